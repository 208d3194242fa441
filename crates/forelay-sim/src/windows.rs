//! Policies that only look at a profile's own gaps: none, fixed keep-alive, hybrid, clairvoyant.
//!
//! Owns the baselines as `traces/README.md` defines them. After each launch such a policy names a
//! window: load at its start, unload at its end. The hybrid histogram follows Shahrad et al.,
//! "Serverless in the Wild" (USENIX ATC 2020), with that README's constants. Invariant: a window
//! rests on gaps seen before it, except the clairvoyant's, which is the bound.

use crate::tally::{Frame, Tally};
use crate::trace::Trace;

/// Range of the hybrid histogram, in minutes (and bins of one minute).
const RANGE_MIN: usize = 240;

/// A policy of this kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum WindowPolicy {
    /// Unload at once.
    None,
    /// Stay loaded for so many minutes.
    Fixed(f64),
    /// Histogram of gaps, four hours.
    Hybrid,
    /// The same, with the mean gap where the histogram does not reach.
    HybridMean,
    /// Knows the next launch and loads one minute ahead of it.
    Clairvoyant,
}

/// Loaded from `load_min` to `unload_min` after a launch.
#[derive(Debug, Clone, Copy)]
struct Window {
    load_min: f64,
    unload_min: f64,
}

struct GapHistogram {
    bins: [u32; RANGE_MIN],
    within: u32,
    beyond: u32,
    beyond_sum_min: f64,
    sum_of_squares: f64,
}

impl GapHistogram {
    fn new() -> Self {
        Self {
            bins: [0; RANGE_MIN],
            within: 0,
            beyond: 0,
            beyond_sum_min: 0.0,
            sum_of_squares: 0.0,
        }
    }

    fn add(&mut self, gap_min: f64) {
        match self.bins.get_mut(gap_min.floor() as usize) {
            Some(bin) => {
                self.sum_of_squares += f64::from(2 * *bin + 1);
                *bin += 1;
                self.within += 1;
            }
            None => {
                self.beyond += 1;
                self.beyond_sum_min += gap_min;
            }
        }
    }

    /// Population coefficient of variation of the bin counts.
    fn variation(&self) -> f64 {
        let mean = f64::from(self.within) / RANGE_MIN as f64;
        (self.sum_of_squares / RANGE_MIN as f64 - mean * mean)
            .max(0.0)
            .sqrt()
            / mean
    }

    fn percentile(&self, share: f64) -> f64 {
        let need = share * f64::from(self.within);
        let mut sum = 0.0;
        for (minute, &count) in self.bins.iter().enumerate() {
            sum += f64::from(count);
            if sum >= need && sum > 0.0 {
                return minute as f64;
            }
        }
        (RANGE_MIN - 1) as f64
    }

    fn window(&self, with_mean: bool) -> Window {
        let keep = Window {
            load_min: 0.0,
            unload_min: RANGE_MIN as f64,
        };
        if self.within + self.beyond == 0 {
            return keep;
        }
        if self.beyond * 2 > self.within + self.beyond {
            if with_mean {
                let mean = self.beyond_sum_min / f64::from(self.beyond);
                return Window {
                    load_min: 0.85 * mean,
                    unload_min: 1.15 * mean,
                };
            }
            return keep;
        }
        if self.variation() < 2.0 {
            return keep;
        }
        Window {
            load_min: self.percentile(0.05) * 0.9,
            unload_min: (self.percentile(0.99) + 1.0) * 1.1,
        }
    }
}

impl WindowPolicy {
    /// Name as in the README and on the command line.
    pub(crate) fn name(self) -> String {
        match self {
            Self::None => "none".to_owned(),
            Self::Fixed(minutes) => format!("fixed:{minutes}"),
            Self::Hybrid => "hybrid".to_owned(),
            Self::HybridMean => "hybrid+mean".to_owned(),
            Self::Clairvoyant => "clairvoyant".to_owned(),
        }
    }

    fn window(self, histogram: &GapHistogram) -> Window {
        match self {
            // Unloading takes effect before anything of the same moment.
            Self::None => Window {
                load_min: f64::INFINITY,
                unload_min: f64::INFINITY,
            },
            Self::Fixed(minutes) => Window {
                load_min: 0.0,
                unload_min: minutes,
            },
            Self::Hybrid => histogram.window(false),
            Self::HybridMean => histogram.window(true),
            Self::Clairvoyant => Window {
                load_min: 0.0,
                unload_min: f64::INFINITY,
            },
        }
    }

    /// Runs the policy over a trace.
    pub(crate) fn run(self, trace: &Trace, frame: &Frame) -> Tally {
        let mut tally = Tally::new(frame);
        let mut by_profile: Vec<Vec<usize>> = vec![Vec::new(); trace.profiles.len()];
        for (index, launch) in trace.launches.iter().enumerate() {
            if frame.selected[launch.profile as usize] {
                by_profile[launch.profile as usize].push(index);
            }
        }
        for (profile, launches) in by_profile.iter().enumerate() {
            self.run_profile(trace, frame, profile as u32, launches, &mut tally);
        }
        tally
    }

    fn run_profile(
        self,
        trace: &Trace,
        frame: &Frame,
        profile: u32,
        launches: &[usize],
        tally: &mut Tally,
    ) {
        let mut histogram = GapHistogram::new();
        let mut window = Window {
            load_min: 0.0,
            unload_min: 0.0,
        };
        let mut previous = None;
        for &index in launches {
            let launch = trace.launches[index];
            let mut cold = match previous {
                None => 1,
                Some(last) => {
                    let gap = launch.at.seconds_since(last) / 60.0;
                    let warm = gap >= window.load_min && gap <= window.unload_min;
                    let held = self.held(window, gap, true);
                    tally.held(frame, profile, last, held.0, held.1);
                    histogram.add(gap);
                    u32::from(!warm)
                }
            };
            window = self.window(&histogram);
            for _ in 1..launch.count {
                cold += u32::from(window.load_min > 0.0);
                histogram.add(0.0);
                window = self.window(&histogram);
            }
            tally.launched(frame, profile, launch.at, launch.count, cold);
            previous = Some(launch.at);
        }
        if let Some(last) = previous {
            let rest = frame.horizon.seconds_since(last) / 60.0;
            let held = self.held(window, rest, false);
            tally.held(frame, profile, last, held.0, held.1);
        }
    }

    /// The part of a gap over which the profile is loaded.
    fn held(self, window: Window, gap_min: f64, launched: bool) -> (f64, f64) {
        if self == Self::Clairvoyant {
            return if launched {
                ((gap_min - 1.0).max(0.0), gap_min)
            } else {
                (0.0, 0.0)
            };
        }
        (window.load_min, window.unload_min.min(gap_min))
    }
}
