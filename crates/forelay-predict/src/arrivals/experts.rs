//! The experts: which past gaps speak about the next one, and how blurred.
//!
//! Owns the competing views of a profile's own history. Each *view* gives candidate gaps with
//! weights that sum to one; each view competes at several blurs, so that an expert is a pair
//! (view, blur). Three more experts need no own history: the pooled histogram, the owner's recent
//! gaps and the calendar's usual periods. Invariant: the number of experts never changes at run
//! time, weights are addressed by [`expert`] and the constants below.

use super::kernel::{exp, ln};
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
pub(crate) const PERIODS: [(f32, f64); 16] = [
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
pub(crate) const fn period_blur(period_min: f32) -> f32 {
    0.15 + 0.004 * period_min
}

/// Blur of an owner's gap.
pub(crate) fn owner_blur(gap_min: f32) -> f32 {
    0.1 + 0.005 * gap_min
}

/// Most candidates of a view that does not weigh remembered gaps: so many moments of a cycle are
/// told apart.
pub(crate) const MOST_CANDIDATES: usize = 8;

/// Gaps that may come next, with their weights within a view; places beyond the last have none.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Candidates {
    pub gaps_min: [f32; MOST_CANDIDATES],
    pub weights: [f32; MOST_CANDIDATES],
    count: usize,
}

impl Candidates {
    fn push(&mut self, gap_min: f64, weight: f64) {
        self.gaps_min[self.count] = gap_min as f32;
        self.weights[self.count] = weight as f32;
        self.count += 1;
    }

    /// Gap and weight of each.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (f32, f32)> + '_ {
        let pairs = self.gaps_min.iter().zip(&self.weights);
        pairs.take(self.count).map(|(&gap, &weight)| (gap, weight))
    }

    /// Whether the view has nothing to say.
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// The remembered gaps by age, zero where there is none, and their weights in each of the gap
/// views; each row sums to one if anything is remembered.
pub(crate) struct GapViews {
    pub gaps_min: [f32; REMEMBERED],
    pub weights: [[f32; REMEMBERED]; GAP_VIEWS],
}

/// Likeness that falls by e with each unit of distance.
#[inline(always)]
fn fading(distance: f32) -> f32 {
    exp(-if distance < 80.0 { distance } else { 80.0 })
}

/// What the gap views say, column by column so that several ages are computed at a time.
pub(crate) fn gap_views(record: &Record, decay: f64) -> GapViews {
    /// Two gaps (or bursts) are alike if their ratio is near one: a tenth is one unit of distance.
    const PER_LIKENESS: f32 = 10.0;
    let count = record.remembered();
    let gaps_min = record.gaps_by_age();
    let bursts = record.bursts_by_age();
    // Beyond the last remembered gap nothing is like the latest ones.
    let mut log = [0.0f32; REMEMBERED + 3];
    for (log, &gap) in log.iter_mut().zip(&gaps_min) {
        *log = ln(gap + 0.5);
    }
    let mut elapsed = 0.0;
    let mut since_midnight = [0.0f32; REMEMBERED];
    for (cell, &gap) in since_midnight.iter_mut().zip(&gaps_min) {
        elapsed += f64::from(gap);
        *cell = cycled(elapsed, 1440.0) as f32;
    }
    let last_burst = ln(f32::from(record.last_burst) + 0.5);
    let mut weights = [[0.0; REMEMBERED]; GAP_VIEWS];
    let unlike =
        |age: usize, depth: usize| PER_LIKENESS * (log[age + 1 + depth] - log[depth]).abs();
    for age in 0..REMEMBERED {
        let day_distance = {
            let d = since_midnight[age];
            if d < 720.0 { d } else { 1440.0 - d }
        };
        let burst = PER_LIKENESS * (ln(bursts[age] + 0.5) - last_burst).abs();
        let previous = unlike(age, 0);
        let near = |distance: f32| if distance < 4.0 { distance } else { 4.0 };
        // What is not remembered counts as somewhat unlike.
        let at_depth = |depth: usize| {
            let known = age + 1 + depth < count;
            if known { near(unlike(age, depth)) } else { 0.7 }
        };
        let series = at_depth(0) + 0.8 * at_depth(1) + 0.64 * at_depth(2);
        let has_previous = age + 1 < count;
        weights[0][age] = 1.0;
        weights[1][age] = if has_previous {
            fading(if previous < 60.0 { previous } else { 60.0 }) + 0.003
        } else {
            0.01
        };
        weights[2][age] = fading(day_distance * (1.0 / 20.0)) + 0.001;
        weights[3][age] = fading(series) + 1.0e-4;
        let after = if has_previous { near(previous) } else { 3.0 };
        weights[4][age] = fading(burst + after) + 1.0e-4;
    }
    let mut base = [0.0f32; REMEMBERED];
    let mut recency = 1.0;
    for cell in &mut base[..count] {
        *cell = recency as f32;
        recency *= decay;
    }
    for row in &mut weights {
        let mut sum = 0.0;
        for (cell, base) in row.iter_mut().zip(&base) {
            *cell *= base;
            sum += *cell;
        }
        let per_sum = if count > 0 { 1.0 / sum } else { 0.0 };
        for cell in row {
            *cell *= per_sum;
        }
    }
    GapViews { gaps_min, weights }
}

/// The remainder, not negative, of a number of cycles that fits 63 bits.
fn cycled(value: f64, cycle: f64) -> f64 {
    let rest = value - (value / cycle) as i64 as f64 * cycle;
    if rest < 0.0 { rest + cycle } else { rest }
}

/// Candidates of the schedule view: one period on, or two if one was skipped.
fn schedule(record: &Record) -> Candidates {
    let mut candidates = Candidates::default();
    if record.remembered() >= 2 {
        let period = record.median_gap_min();
        let next = (f64::from(record.phase_offset_min) + period).max(0.01);
        candidates.push(next, 0.9);
        candidates.push(next + period, 0.1);
    }
    candidates
}

/// Candidates of a phase view: moments of the cycle at which launches recurred, in order of
/// arrival; a moment met in every past cycle takes most of what is left, a rare one little.
fn recurring(record: &Record, cycle_min: f64, tolerance_min: f64) -> Candidates {
    let count = record.remembered();
    if count < 2 {
        return Candidates::default();
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

fn cluster(offsets: &[f64], cycles: f64, tolerance_min: f64) -> Candidates {
    let mut candidates = Candidates::default();
    let mut left = 1.0;
    let mut sum = 0.0;
    let mut start = 0;
    while start < offsets.len() {
        let end = offsets[start..]
            .iter()
            .position(|&offset| offset - offsets[start] > tolerance_min)
            .map_or(offsets.len(), |n| start + n);
        let hits = (end - start) as f64;
        let share = (hits / (cycles + 0.5)).min(0.95);
        let centre = offsets[start..end].iter().sum::<f64>() / hits;
        candidates.push(centre, left * share);
        sum += left * share;
        left *= 1.0 - share;
        start = end;
        if candidates.count == MOST_CANDIDATES || left < 0.02 {
            break;
        }
    }
    if sum < 0.05 {
        return Candidates::default();
    }
    for weight in &mut candidates.weights {
        *weight /= sum as f32;
    }
    candidates
}

/// Candidates of a view that does not weigh remembered gaps.
pub(crate) fn phase_view(record: &Record, view: View) -> Candidates {
    match view {
        View::Schedule => schedule(record),
        View::HourPhase => recurring(record, 60.0, 1.5),
        View::DayPhase => recurring(record, 1440.0, 10.0),
        _ => Candidates::default(),
    }
}
