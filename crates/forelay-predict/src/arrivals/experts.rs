//! The experts: which past gaps speak about the next one, and how blurred.
//!
//! Owns the competing views of a profile's own history. Each *view* gives candidate gaps with
//! weights that sum to one; each view competes at several blurs, so that an expert is a pair
//! (view, blur). Three more experts need no own history: the pooled histogram, the owner's recent
//! gaps and the calendar's usual periods. Invariant: the number of experts never changes at run
//! time, weights are addressed by [`expert`] and the constants below.

use super::kernel::exp;
use super::record::{REMEMBERED, Record};

/// Blurs in minutes: scale of the logistic kernel.
pub(crate) const BLURS: [f64; 6] = [0.1, 0.4, 1.5, 6.0, 25.0, 100.0];
/// Views that weigh the remembered gaps.
pub(crate) const GAP_VIEWS: usize = 5;
/// All views.
pub(crate) const VIEWS: usize = 8;
/// The pooled histogram as an expert.
pub(crate) const HISTOGRAM: usize = VIEWS * BLURS.len();
/// The owner's recent gaps as an expert.
pub(crate) const OWNER: usize = HISTOGRAM + 1;
/// The calendar's periods as an expert.
pub(crate) const CALENDAR: usize = HISTOGRAM + 2;
/// How many experts compete.
pub(crate) const EXPERTS: usize = HISTOGRAM + 3;

/// Periods by which people schedule things, in minutes, with a prior weight each.
pub(crate) const PERIODS: [(f64, f64); 16] = [
    (1.0, 3.0),
    (2.0, 1.0),
    (3.0, 1.0),
    (5.0, 4.0),
    (10.0, 2.0),
    (15.0, 2.0),
    (20.0, 1.0),
    (30.0, 2.0),
    (60.0, 3.0),
    (120.0, 1.0),
    (180.0, 0.5),
    (240.0, 0.5),
    (360.0, 0.5),
    (720.0, 0.5),
    (1440.0, 3.0),
    (10_080.0, 0.5),
];

/// Views of the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    /// Recent gaps, newest first.
    Recent,
    /// Gaps that followed a gap like the latest.
    PreviousGap,
    /// Gaps that began at this time of day.
    TimeOfDay,
    /// Gaps that followed a series like the latest three.
    Series,
    /// Gaps that followed a like gap and a like burst.
    Burst,
    /// One period after where the schedule expected the latest launch.
    Schedule,
    /// Minutes past the hour at which launches recur.
    HourPhase,
    /// Times of day at which launches recur.
    DayPhase,
}

/// Every view, in the order of expert indices; gap views first.
pub(crate) const ALL_VIEWS: [View; VIEWS] = [
    View::Recent,
    View::PreviousGap,
    View::TimeOfDay,
    View::Series,
    View::Burst,
    View::Schedule,
    View::HourPhase,
    View::DayPhase,
];

/// Index of the expert (view, blur).
pub(crate) fn expert(view: usize, blur: usize) -> usize {
    view * BLURS.len() + blur
}

/// Blur of a calendar period.
pub(crate) fn period_blur(period_min: f64) -> f64 {
    0.15 + 0.004 * period_min
}

/// Blur of an owner's gap.
pub(crate) fn owner_blur(gap_min: f64) -> f64 {
    0.1 + 0.005 * gap_min
}

/// A gap that may come next, with its weight within a view.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub gap_min: f64,
    pub weight: f64,
}

/// Weights of the remembered gaps (by age) in each of the gap views; each row sums to one.
pub(crate) fn gap_view_weights(record: &Record, decay: f64) -> [[f64; REMEMBERED]; GAP_VIEWS] {
    let mut weights = [[0.0; REMEMBERED]; GAP_VIEWS];
    let count = record.remembered();
    if count == 0 {
        return weights;
    }
    let log: [f64; REMEMBERED] =
        std::array::from_fn(|age| record.gap(age).map_or(0.0, |gap| (gap + 0.5).ln()));
    let now_tod = time_of_day(record, 0.0);
    let last_burst = (f64::from(record.last_burst) + 0.5).ln();
    let fading = |distance: f64| f64::from(exp(-distance.min(80.0) as f32));
    let mut elapsed = 0.0;
    let mut base = 1.0;
    for age in 0..count {
        elapsed += record.gap(age).unwrap_or(0.0);
        let previous = (age + 1 < count).then(|| ((log[age + 1] - log[0]).abs() / 0.1).min(60.0));
        let day_distance = {
            let d = (time_of_day(record, -elapsed) - now_tod).abs();
            d.min(1440.0 - d)
        };
        let burst = ((record.burst(age) + 0.5).ln() - last_burst).abs() / 0.1;
        weights[0][age] = base;
        weights[1][age] = base * previous.map_or(0.01, |d| fading(d) + 0.003);
        weights[2][age] = base * (fading(day_distance / 20.0) + 0.001);
        weights[3][age] = base * (fading(series_distance(&log, age, count)) + 1.0e-4);
        let after = previous.map_or(3.0, |d| d.min(4.0));
        weights[4][age] = base * (fading(burst + after) + 1.0e-4);
        base *= decay;
    }
    for row in &mut weights {
        let sum: f64 = row.iter().sum();
        for cell in row.iter_mut() {
            *cell /= sum;
        }
    }
    weights
}

/// How unlike the three gaps before the gap of that age are to the latest three.
fn series_distance(log: &[f64; REMEMBERED], age: usize, count: usize) -> f64 {
    let mut distance = 0.0;
    let mut importance = 1.0;
    for depth in 0..3 {
        distance += importance
            * if age + 1 + depth >= count || depth >= count {
                0.7
            } else {
                ((log[age + 1 + depth] - log[depth]).abs() / 0.1).min(4.0)
            };
        importance *= 0.8;
    }
    distance
}

/// The remainder, not negative, of a number of cycles that fits 63 bits.
fn cycled(value: f64, cycle: f64) -> f64 {
    let rest = value - (value / cycle) as i64 as f64 * cycle;
    if rest < 0.0 { rest + cycle } else { rest }
}

fn time_of_day(record: &Record, offset_min: f64) -> f64 {
    cycled(record.last.minutes() + offset_min, 1440.0)
}

/// Candidates of the schedule view: one period on, or two if one was skipped.
pub(crate) fn schedule(record: &Record) -> Vec<Candidate> {
    if record.remembered() < 2 {
        return Vec::new();
    }
    let period = record.median_gap_min();
    let next = (f64::from(record.phase_offset_min) + period).max(0.01);
    vec![
        Candidate {
            gap_min: next,
            weight: 0.9,
        },
        Candidate {
            gap_min: next + period,
            weight: 0.1,
        },
    ]
}

/// Candidates of a phase view: moments of the cycle at which launches recurred, in order of
/// arrival; a moment met in every past cycle takes most of what is left, a rare one little.
pub(crate) fn recurring(record: &Record, cycle_min: f64, tolerance_min: f64) -> Vec<Candidate> {
    let count = record.remembered();
    if count < 2 {
        return Vec::new();
    }
    let mut offsets = [0.0; REMEMBERED + 1];
    let mut used = 0;
    let mut oldest = 0.0;
    let mut back = 0.0;
    for age in 0..count {
        back += record.gap(age).unwrap_or(0.0);
        if back > cycle_min * 16.0 {
            break;
        }
        oldest = back;
        let mut offset = cycled(-back, cycle_min);
        if offset < tolerance_min {
            offset += cycle_min;
        }
        offsets[used] = offset;
        used += 1;
    }
    offsets[used] = cycle_min;
    used += 1;
    let offsets = &mut offsets[..used];
    offsets.sort_unstable_by(f64::total_cmp);
    cluster(offsets, oldest / cycle_min + 1.0, tolerance_min)
}

/// Most moments of a cycle that are told apart.
const MOST_MOMENTS: usize = 8;

fn cluster(offsets: &[f64], cycles: f64, tolerance_min: f64) -> Vec<Candidate> {
    let mut candidates = Vec::with_capacity(8);
    let mut left = 1.0;
    let mut start = 0;
    while start < offsets.len() {
        let end = offsets[start..]
            .iter()
            .position(|&offset| offset - offsets[start] > tolerance_min)
            .map_or(offsets.len(), |n| start + n);
        let hits = (end - start) as f64;
        let share = (hits / (cycles + 0.5)).min(0.95);
        let centre = offsets[start..end].iter().sum::<f64>() / hits;
        candidates.push(Candidate {
            gap_min: centre,
            weight: left * share,
        });
        left *= 1.0 - share;
        start = end;
        if candidates.len() == MOST_MOMENTS || left < 0.02 {
            break;
        }
    }
    let sum: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    if sum < 0.05 {
        return Vec::new();
    }
    for candidate in &mut candidates {
        candidate.weight /= sum;
    }
    candidates
}

/// Candidates of a view that does not weigh remembered gaps.
pub(crate) fn phase_view(record: &Record, view: View) -> Vec<Candidate> {
    match view {
        View::Schedule => schedule(record),
        View::HourPhase => recurring(record, 60.0, 1.5),
        View::DayPhase => recurring(record, 1440.0, 10.0),
        _ => Vec::new(),
    }
}
