//! The account of one policy at one setting: cold starts and memory.
//!
//! Owns the conventions of `traces/README.md`: a launch takes no time, every profile costs one
//! unit, a profile's first launch is cold and counts, memory is loaded-but-idle profile-minutes cut
//! off at the horizon, quantiles interpolate between profiles. Invariant: only profiles whose
//! number of launches is within the frame's bounds count, in every figure.

use crate::sides::{SharedComponents, Span};
use crate::trace::Trace;
use forelay_predict::time::Timestamp;
use serde::{Deserialize, Serialize};

/// Slices of time for which warm launches are counted apart.
pub(crate) const TIME_SLICES: usize = 48;

/// Which profiles count, and where the halves of the trace meet.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub selected: Vec<bool>,
    pub launches: Vec<u64>,
    pub min_launches: u64,
    pub start: Timestamp,
    pub horizon: Timestamp,
    /// Whether tallies keep every span held (for component sizes).
    pub keep_spans: bool,
}

impl Frame {
    /// Profiles with at least `min_launches` and at most `max_launches` launches count.
    pub(crate) fn new(trace: &Trace, min_launches: u64, max_launches: u64) -> Self {
        let launches = trace.launch_counts();
        Self {
            selected: launches
                .iter()
                .map(|&count| count >= min_launches.max(1) && count <= max_launches)
                .collect(),
            launches,
            min_launches,
            start: trace.start(),
            horizon: trace.horizon,
            keep_spans: false,
        }
    }

    fn slice(&self, at: Timestamp) -> usize {
        let span = self.horizon.ms_since(self.start).max(1) as f64;
        let part = at.ms_since(self.start) as f64 / span;
        ((part * TIME_SLICES as f64).max(0.0) as usize).min(TIME_SLICES - 1)
    }

    /// Beginning of a slice.
    fn slice_start(&self, slice: usize) -> Timestamp {
        let span = self.horizon.ms_since(self.start);
        self.start
            .plus_ms((i128::from(span) * slice as i128 / TIME_SLICES as i128) as i64)
    }
}

/// Counts of one policy.
#[derive(Debug, Clone)]
pub(crate) struct Tally {
    pub cold: Vec<u32>,
    pub memory_min: f64,
    memory_by_slice: Vec<f64>,
    launches_by_slice: Vec<u64>,
    cold_by_slice: Vec<u64>,
    /// Every span held, if asked for.
    pub spans: Option<Vec<Span>>,
}

impl Tally {
    pub(crate) fn new(frame: &Frame) -> Self {
        Self {
            cold: vec![0; frame.selected.len()],
            memory_min: 0.0,
            memory_by_slice: vec![0.0; TIME_SLICES],
            launches_by_slice: vec![0; TIME_SLICES],
            cold_by_slice: vec![0; TIME_SLICES],
            spans: frame.keep_spans.then(Vec::new),
        }
    }

    /// `count` launches at a moment, `cold` of them cold.
    pub(crate) fn launched(
        &mut self,
        frame: &Frame,
        profile: u32,
        at: Timestamp,
        count: u32,
        cold: u32,
    ) {
        if !frame.selected[profile as usize] {
            return;
        }
        let slice = frame.slice(at);
        self.cold[profile as usize] += cold;
        self.launches_by_slice[slice] += u64::from(count);
        self.cold_by_slice[slice] += u64::from(cold);
    }

    /// A profile was loaded and idle over a span, in minutes since `origin`.
    pub(crate) fn held(
        &mut self,
        frame: &Frame,
        profile: u32,
        origin: Timestamp,
        from_min: f64,
        to_min: f64,
    ) {
        if to_min <= from_min || !frame.selected[profile as usize] {
            return;
        }
        self.memory_min += to_min - from_min;
        let from = origin.plus_seconds(from_min * 60.0);
        let to = origin.plus_seconds(to_min * 60.0);
        if let Some(spans) = &mut self.spans {
            spans.push(Span { profile, from, to });
        }
        let first = frame.slice(from);
        let last = frame.slice(to);
        if first == last {
            self.memory_by_slice[first] += to_min - from_min;
            return;
        }
        for slice in first..=last {
            let begin = frame.slice_start(slice).max(from);
            let end = if slice == last {
                to
            } else {
                frame.slice_start(slice + 1).min(to)
            };
            self.memory_by_slice[slice] += (end.seconds_since(begin) / 60.0).max(0.0);
        }
    }

    /// The figures of the tally.
    pub(crate) fn row(&self, frame: &Frame, policy: &str, knob: Option<f64>) -> Row {
        let mut rates: Vec<f64> = self
            .cold
            .iter()
            .zip(&frame.launches)
            .zip(&frame.selected)
            .filter(|&(_, &selected)| selected)
            .map(|((&cold, &launches), _)| 100.0 * f64::from(cold) / launches as f64)
            .collect();
        rates.sort_unstable_by(f64::total_cmp);
        let half = TIME_SLICES / 2;
        Row {
            policy: policy.to_owned(),
            knob,
            min_launches: frame.min_launches,
            profiles: rates.len(),
            cold_p25: quantile(&rates, 0.25),
            cold_p50: quantile(&rates, 0.5),
            cold_p75: quantile(&rates, 0.75),
            cold_total_pct: self.cold_pct(0..TIME_SLICES),
            memory_pct_of_fixed10: 0.0,
            memory_profile_minutes: self.memory_min,
            shared: None,
            halves: [self.half(0..half), self.half(half..TIME_SLICES)],
            hit_ratio_over_time: (0..TIME_SLICES)
                .map(|slice| 1.0 - self.cold_pct(slice..slice + 1) / 100.0)
                .collect(),
        }
    }

    fn cold_pct(&self, slices: std::ops::Range<usize>) -> f64 {
        let cold: u64 = self.cold_by_slice[slices.clone()].iter().sum();
        let launches: u64 = self.launches_by_slice[slices].iter().sum();
        100.0 * cold as f64 / launches.max(1) as f64
    }

    fn half(&self, slices: std::ops::Range<usize>) -> Half {
        Half {
            cold_total_pct: self.cold_pct(slices.clone()),
            memory_pct_of_fixed10: 0.0,
            memory_profile_minutes: self.memory_by_slice[slices].iter().sum(),
        }
    }
}

/// Figures of one half of the trace's time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Half {
    /// Cold launches, in percent of that half's.
    pub cold_total_pct: f64,
    /// Memory relative to the fixed 10-minute keep-alive in the same half.
    pub memory_pct_of_fixed10: f64,
    /// Loaded-but-idle profile-minutes.
    pub memory_profile_minutes: f64,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name of the policy.
    pub policy: String,
    /// Its setting, where it has one.
    pub knob: Option<f64>,
    /// Profiles with fewer launches are left out.
    pub min_launches: u64,
    /// Profiles that count.
    pub profiles: usize,
    /// Cold launches per profile, in percent, first quartile.
    pub cold_p25: f64,
    /// Median.
    pub cold_p50: f64,
    /// Third quartile.
    pub cold_p75: f64,
    /// Cold launches of all.
    pub cold_total_pct: f64,
    /// Memory relative to the fixed 10-minute keep-alive.
    pub memory_pct_of_fixed10: f64,
    /// Loaded-but-idle profile-minutes.
    pub memory_profile_minutes: f64,
    /// Earlier and later half of the trace's time.
    pub halves: [Half; 2],
    /// Figures over components, if their sizes were given.
    pub shared: Option<SharedComponents>,
    /// Share of warm launches in each of 48 equal slices of time.
    pub hit_ratio_over_time: Vec<f64>,
}

impl Row {
    /// Fills in the relative figures, given the fixed 10-minute keep-alive's.
    pub(crate) fn relate_to(&mut self, fixed10: &Row) {
        let relative = |own: f64, base: f64| 100.0 * own / base.max(1.0e-9);
        self.memory_pct_of_fixed10 =
            relative(self.memory_profile_minutes, fixed10.memory_profile_minutes);
        for (own, base) in self.halves.iter_mut().zip(&fixed10.halves) {
            own.memory_pct_of_fixed10 =
                relative(own.memory_profile_minutes, base.memory_profile_minutes);
        }
    }
}

/// Quantile with linear interpolation, zero of nothing.
pub(crate) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let at = share * last as f64;
    let low = at.floor() as usize;
    let high = at.ceil() as usize;
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&[], 0.5), 0.0);
        assert_eq!(quantile(&[1.0, 2.0], 0.5), 1.5);
        assert_eq!(quantile(&[0.0, 10.0, 20.0, 30.0], 0.25), 7.5);
    }
}
