//! What is remembered about one profile's launches.
//!
//! Owns the fixed-size memory: a ring of the last gaps with the size of the burst that preceded
//! each, a decayed histogram of gap lengths, the weight of each expert, the phase of its schedule.
//! Invariants: `gaps` newest is at `cursor - 1`; weights sum to one; no field grows with history.

use super::bins::{BINS, bin_of};
use super::config::ArrivalsConfig;
use super::experts::EXPERTS;
use super::outlook::Outlook;
use super::triggers::Slot;
use crate::time::Timestamp;

/// How many gaps are remembered one by one.
pub(crate) const REMEMBERED: usize = 20;
/// Repeats of one moment that are counted.
const MOST_REPEATS: u32 = 5;

/// State of one profile.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    /// Owner at the latest launch.
    pub owner: u32,
    /// Latest launch; meaningless while `launches` is zero.
    pub last: Timestamp,
    /// Launch moments learned (repeats at one moment count once).
    pub launches: u32,
    /// Gaps learned, saturating.
    pub gap_count: u32,
    gaps: [f32; REMEMBERED],
    bursts: [u16; REMEMBERED],
    cursor: u8,
    /// Launches at the latest moment.
    pub last_burst: u16,
    /// Expected further launches within the minute after a launch.
    pub repeats: f32,
    /// Where the schedule expects the latest launch to have been, relative to it, in minutes.
    pub phase_offset_min: f32,
    pub histogram: [f32; BINS],
    pub weights: [f32; EXPERTS],
    /// How far (minutes since `last`) hazards have been settled.
    pub settled_min: f64,
    /// Launches that may announce this profile's next one.
    pub slots: Vec<Slot>,
    /// Profiles whose launch this one may announce.
    pub successors: Vec<u32>,
    /// Share of launches that a trigger announced, and how many launches that rests on.
    pub announced: f32,
    pub announced_count: u16,
    /// Forecast awaiting its outcome, negative if none.
    pub pending: f32,
    /// Balance of forecasting against the simple rule.
    pub regret: super::rule::Regret,
    /// How well "launch within ten minutes" was told of this profile.
    pub judged: crate::calibration::Judged,
    pub outlook: Outlook,
}

impl Record {
    pub(crate) fn new(owner: u32) -> Self {
        Self {
            owner,
            last: Timestamp(0),
            launches: 0,
            gap_count: 0,
            gaps: [0.0; REMEMBERED],
            bursts: [0; REMEMBERED],
            cursor: 0,
            last_burst: 1,
            repeats: 0.0,
            phase_offset_min: 0.0,
            histogram: [0.0; BINS],
            weights: [1.0 / EXPERTS as f32; EXPERTS],
            settled_min: 0.0,
            slots: Vec::new(),
            successors: Vec::new(),
            announced: 0.0,
            announced_count: 0,
            pending: -1.0,
            regret: super::rule::Regret::default(),
            judged: crate::calibration::Judged::default(),
            outlook: Outlook::default(),
        }
    }

    /// How many gaps the ring holds.
    pub(crate) fn remembered(&self) -> usize {
        (self.gap_count as usize).min(REMEMBERED)
    }

    /// Gap by age, zero is the latest; `None` beyond what is remembered.
    pub(crate) fn gap(&self, age: usize) -> Option<f64> {
        (age < self.remembered()).then(|| f64::from(self.gaps[self.slot(age)]))
    }

    /// All gaps, the latest first; zero beyond what is remembered.
    pub(crate) fn gaps_by_age(&self) -> [f32; REMEMBERED] {
        // The ring is zero where nothing was put.
        std::array::from_fn(|age| self.gaps[self.slot(age)])
    }

    /// Sizes of the bursts before those gaps.
    pub(crate) fn bursts_by_age(&self) -> [f32; REMEMBERED] {
        std::array::from_fn(|age| f32::from(self.bursts[self.slot(age)]))
    }

    /// Reads a word of every part, so that the processor waits for all of them at once and not for
    /// one after the other. Most profiles are not in its caches when they launch.
    pub(crate) fn touch(&self) {
        let every_line = |column: &[f32]| column.iter().step_by(16).sum::<f32>();
        let mut sum = every_line(&self.gaps) + every_line(&self.histogram);
        sum += every_line(&self.weights) + self.outlook.touch();
        sum += self.slots.first().map_or(0.0, |slot| slot.trials() as f32);
        std::hint::black_box(sum);
    }

    fn slot(&self, age: usize) -> usize {
        (self.cursor as usize + REMEMBERED - 1 - age % REMEMBERED) % REMEMBERED
    }

    /// Median of the remembered gaps, zero if there are none.
    pub(crate) fn median_gap_min(&self) -> f64 {
        let count = self.remembered();
        if count == 0 {
            return 0.0;
        }
        let mut sorted = [0.0f32; REMEMBERED];
        for (age, cell) in sorted.iter_mut().enumerate().take(count) {
            *cell = self.gaps[self.slot(age)];
        }
        let sorted = &mut sorted[..count];
        sorted.sort_unstable_by(f32::total_cmp);
        f64::from(sorted[count / 2] + sorted[(count - 1) / 2]) / 2.0
    }

    /// Appends a gap to ring, histogram and phase.
    pub(crate) fn push_gap(&mut self, gap_min: f64, config: &ArrivalsConfig) {
        for cell in &mut self.histogram {
            *cell *= config.histogram_decay as f32;
        }
        self.histogram[bin_of(gap_min)] += 1.0;
        let at = self.cursor as usize % REMEMBERED;
        self.gaps[at] = gap_min as f32;
        self.bursts[at] = self.last_burst;
        self.cursor = ((at + 1) % REMEMBERED) as u8;
        self.gap_count = self.gap_count.saturating_add(1);
        self.follow_phase(gap_min, config);
    }

    fn follow_phase(&mut self, gap_min: f64, config: &ArrivalsConfig) {
        let period = self.median_gap_min();
        // The schedule expected this launch at `phase_offset + period` after the previous one.
        let error = gap_min - (f64::from(self.phase_offset_min) + period);
        self.phase_offset_min = if error.abs() < 0.25 * period {
            (-error * (1.0 - config.phase_gain)) as f32
        } else {
            0.0
        };
    }

    /// Notes the size of the burst at the latest launch moment. Launches of that moment which
    /// are told one by one (`again`) come to the same as if they were told at once.
    pub(crate) fn note_repeats(&mut self, repeats: u32, again: bool) {
        let share = if self.gap_count == 0 { 0.5 } else { 0.02 };
        let counted = repeats.min(MOST_REPEATS) as f32;
        self.repeats += share
            * match again {
                true => counted - self.counted_repeats(),
                false => counted - self.repeats,
            };
        self.last_burst = repeats.saturating_add(1).min(u32::from(u16::MAX)) as u16;
    }

    /// Repeats at the latest launch moment, as far as they are counted.
    pub(crate) fn counted_repeats(&self) -> f32 {
        let repeats = u32::from(self.last_burst).saturating_sub(1);
        repeats.min(MOST_REPEATS) as f32
    }

    /// Bytes held by this profile, heap included.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.slots.capacity() * size_of::<Slot>()
            + self.successors.capacity() * size_of::<u32>()
    }
}
