//! Forelay's own policy over a trace, at many prices of memory in one pass.
//!
//! Owns the virtual clock: it feeds launches to the very forecaster the daemon uses and applies its
//! rule at each price. Invariants: every stretch of time is decided on before the launch that ends
//! it is learned; launches of one moment are all judged before any of them is learned; repeats
//! within a minute of which only the minute is known are warm only if the whole minute was held.

use crate::tally::{Frame, Tally};
use crate::trace::{Launch, Trace};
use forelay_predict::arrivals::{
    Config, Forecaster, Observed, OwnerKey, ProfileKey, Regret, Rule, Segment,
};
use forelay_predict::calibration::Reliability;
use forelay_predict::time::{MINUTE_MS, Timestamp};

/// What the pass yields.
pub(crate) struct Sweep {
    pub tallies: Vec<Tally>,
    pub reliability: Reliability,
    pub fallen_back: Vec<usize>,
    pub bytes_per_profile: f64,
}

struct Lane {
    rule: Rule,
    regrets: Vec<Regret>,
    /// Since when each profile is loaded without interruption, minutes after its last launch;
    /// infinite while it is not.
    loaded_from: Vec<f32>,
    tally: Tally,
}

impl Lane {
    /// Unloads a profile, if it is loaded, and charges for the time it was.
    fn release(&mut self, frame: &Frame, profile: u32, origin: Timestamp, at_min: f64) {
        let began = self.loaded_from[profile as usize];
        if began.is_finite() {
            self.tally
                .held(frame, profile, origin, f64::from(began), at_min);
            self.loaded_from[profile as usize] = f32::INFINITY;
        }
    }
}

struct Pass<'a> {
    frame: &'a Frame,
    forecaster: Forecaster,
    keys: Vec<ProfileKey>,
    last: Vec<Option<Timestamp>>,
    lanes: Vec<Lane>,
    load_min: &'a [f64],
    fall_back: bool,
}

/// Runs the sweep. `load_min` gives each profile's load time; a launch is warm only if its load
/// began that long before.
pub(crate) fn run(
    trace: &Trace,
    frame: &Frame,
    config: &Config,
    prices: &[f64],
    load_min: &[f64],
) -> Sweep {
    let mut forecaster = Forecaster::new(config.clone());
    let keys: Vec<ProfileKey> = trace
        .profiles
        .iter()
        .map(|name| forecaster.profile(name))
        .collect();
    let owners: Vec<OwnerKey> = trace
        .owners
        .iter()
        .map(|name| forecaster.owner(name))
        .collect();
    let profiles = trace.profiles.len();
    let lanes = prices
        .iter()
        .map(|&price_per_min| Lane {
            rule: Rule {
                price_per_min,
                keep_alive_min: config.keep_alive_min,
            },
            regrets: vec![Regret::default(); profiles],
            loaded_from: vec![f32::INFINITY; profiles],
            tally: Tally::new(frame),
        })
        .collect();
    let mut pass = Pass {
        frame,
        forecaster,
        keys,
        last: vec![None; profiles],
        lanes,
        load_min,
        fall_back: config.forecasting,
    };
    let mut next_advance = trace.start();
    let mut from = 0;
    while from < trace.launches.len() {
        let at = trace.launches[from].at;
        while next_advance < at {
            pass.advance(next_advance);
            next_advance = next_advance.plus_ms(10 * MINUTE_MS);
        }
        let together = trace.launches[from..]
            .iter()
            .take_while(|launch| launch.at == at)
            .count();
        let batch = &trace.launches[from..from + together];
        for launch in batch {
            pass.judge(launch);
        }
        for launch in batch {
            pass.learn(launch, owners[launch.owner as usize]);
        }
        from += together;
    }
    pass.finish()
}

impl Pass<'_> {
    fn advance(&mut self, now: Timestamp) {
        let Self {
            forecaster,
            lanes,
            frame,
            last,
            ..
        } = self;
        forecaster.advance(now, |key, segment| {
            if let Some(origin) = last[key.0 as usize] {
                account(lanes, frame, key.0, origin, segment);
            }
        });
    }

    /// The launch meets the decisions made before it.
    fn judge(&mut self, launch: &Launch) {
        let index = launch.profile as usize;
        let selected = self.frame.selected[index];
        let Some(origin) = self.last[index] else {
            for lane in &mut self.lanes {
                lane.tally
                    .launched(self.frame, launch.profile, launch.at, 1, 1);
            }
            return;
        };
        if origin == launch.at {
            // A second row of the same moment: as a repeat, judged when it is learned.
            return;
        }
        let Self {
            forecaster,
            lanes,
            frame,
            ..
        } = self;
        forecaster.settle(self.keys[index], launch.at, true, |segment| {
            account(lanes, frame, launch.profile, origin, segment);
        });
        if selected {
            let gap = launch.at.seconds_since(origin) / 60.0;
            for lane in lanes {
                let began = f64::from(lane.loaded_from[index]);
                let warm = began <= 0.0 || gap - began >= self.load_min[index] - 1.0e-4;
                let cold = u32::from(!warm || began.is_infinite());
                lane.release(frame, launch.profile, origin, gap);
                lane.tally
                    .launched(frame, launch.profile, launch.at, 1, cold);
            }
        }
    }

    fn learn(&mut self, launch: &Launch, owner: OwnerKey) {
        let index = launch.profile as usize;
        let key = self.keys[index];
        let repeats = launch.count - 1;
        let outcome = self.forecaster.learn_launch(key, owner, launch.at, repeats);
        let further = match outcome {
            Observed::Repeated => launch.count,
            _ => repeats,
        };
        self.last[index] = Some(launch.at);
        let worth = if further > 0 {
            self.forecaster.worth_of_first_minute(key)
        } else {
            0.0
        };
        for lane in &mut self.lanes {
            // A launch loads the profile; whether it stays is the first stretch's decision.
            lane.loaded_from[index] = 0.0;
            if further > 0 {
                let held = worth > lane.rule.price_per_min
                    || (self.fall_back && lane.regrets[index].harmful());
                let cold = if held { 0 } else { further };
                lane.tally
                    .launched(self.frame, launch.profile, launch.at, further, cold);
            }
        }
    }

    fn finish(mut self) -> Sweep {
        let horizon = self.frame.horizon;
        for index in 0..self.keys.len() {
            let Some(origin) = self.last[index] else {
                continue;
            };
            let Self {
                forecaster,
                lanes,
                frame,
                keys,
                ..
            } = &mut self;
            forecaster.settle(keys[index], horizon, false, |segment| {
                account(lanes, frame, index as u32, origin, segment);
            });
            let end_min = horizon.seconds_since(origin) / 60.0;
            for lane in lanes {
                lane.release(frame, index as u32, origin, end_min);
            }
        }
        let fallen_back = self
            .lanes
            .iter()
            .map(|lane| {
                lane.regrets
                    .iter()
                    .filter(|regret| regret.harmful())
                    .count()
            })
            .collect();
        Sweep {
            fallen_back,
            tallies: self.lanes.into_iter().map(|lane| lane.tally).collect(),
            reliability: self.forecaster.reliability().clone(),
            bytes_per_profile: self.forecaster.bytes_per_profile(),
        }
    }
}

/// Applies every lane's rule to a stretch.
fn account(lanes: &mut [Lane], frame: &Frame, profile: u32, origin: Timestamp, segment: &Segment) {
    let index = profile as usize;
    if !frame.selected[index] {
        return;
    }
    for lane in lanes {
        let regret = &mut lane.regrets[index];
        let held = lane.rule.holds(segment, regret);
        regret.note(segment, &lane.rule);
        if held {
            if lane.loaded_from[index].is_infinite() {
                lane.loaded_from[index] = segment.start_min as f32;
            }
        } else {
            lane.release(frame, profile, origin, segment.start_min);
        }
    }
}
