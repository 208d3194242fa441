//! What all profiles, and the profiles of one owner, have in common.
//!
//! Owns the pooled histograms, the pooled weights of the experts (by how many launches a profile
//! has), the weights of calendar periods, and each owner's recent gaps and launches. A sparse
//! profile is judged by these until it has a history of its own. Invariants: bounded in size
//! (an owner costs at most 2 KiB, and only an owner of several profiles costs that).

use super::bins::{BINS, bin_of};
use super::experts::{
    BLURS, CALENDAR, EXPERTS, HISTOGRAM, OWNER, PERIODS, expert, owner_blur, period_blur,
};
use super::kernel::densities;
use super::record::Record;
use crate::time::Timestamp;

/// Stages of experience: 0, 1, 2, 3, 4-7, 8-15, 16 and more gaps.
pub(crate) const STAGES: usize = 7;
const OWNER_GAPS: usize = 32;
const OWNER_LAUNCHES: usize = 48;

/// Stage of a profile with that many gaps.
pub(crate) fn stage(gap_count: u32) -> usize {
    match gap_count {
        0..=3 => gap_count as usize,
        4..=7 => 4,
        8..=15 => 5,
        _ => 6,
    }
}

/// Knowledge shared by all profiles.
#[derive(Debug, Clone)]
pub(crate) struct Pool {
    histograms: Vec<Vec<f64>>,
    weights: Vec<Vec<f64>>,
    seen: Vec<f64>,
    periods: Vec<f64>,
    /// Repeats at the first moments of profiles, and how many profiles that were.
    first_repeats: (f32, f32),
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            histograms: vec![vec![0.2; BINS]; STAGES],
            weights: (0..STAGES).map(initial_weights).collect(),
            seen: vec![0.0; STAGES],
            periods: PERIODS.iter().map(|&(_, weight)| weight).collect(),
            first_repeats: (0.0, 1.0),
        }
    }
}

/// Before anything is known: a newcomer follows the calendar or its owner, everyone else mostly
/// repeats itself exactly.
fn initial_weights(stage: usize) -> Vec<f64> {
    let mut weights = vec![0.3 / EXPERTS as f64; EXPERTS];
    if stage == 0 {
        weights[CALENDAR] += 0.8;
        weights[OWNER] += 0.1;
        weights[HISTOGRAM] += 0.2;
    } else {
        weights[CALENDAR] += 0.05;
        weights[OWNER] += 0.05;
        weights[HISTOGRAM] += 0.1;
        for view in 0..super::experts::GAP_VIEWS {
            weights[expert(view, 0)] += 0.08;
            weights[expert(view, 1)] += 0.04;
            weights[expert(view, 2)] += 0.04;
        }
        weights[expert(super::experts::GAP_VIEWS, 0)] += 0.02;
    }
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

impl Pool {
    /// Repeats to expect at the first moment of a profile.
    pub(crate) fn expected_first_repeats(&self) -> f32 {
        self.first_repeats.0 / self.first_repeats.1
    }

    /// A profile launches for the first time.
    pub(crate) fn enrol(&mut self) {
        self.first_repeats.1 += 1.0;
    }

    /// That launch is repeated.
    pub(crate) fn learn_first_repeats(&mut self, repeats: f32) {
        self.first_repeats.0 += repeats;
    }

    /// Pooled weights of the experts for a profile with that many gaps.
    pub(crate) fn weights(&self, gap_count: u32) -> &[f64] {
        &self.weights[stage(gap_count)]
    }

    /// Learns one gap of a profile that had `gap_count` gaps before; `likelihoods` are the
    /// experts' densities of it, `posterior` the profile's own new weights.
    pub(crate) fn learn(
        &mut self,
        gap_count: u32,
        gap_min: f64,
        likelihoods: &[f64; EXPERTS],
        posterior: &[f32],
    ) {
        let stage = stage(gap_count);
        self.seen[stage] += 1.0;
        let rate = (1.0 / (self.seen[stage] + 30.0)).max(0.002);
        let weights = &mut self.weights[stage];
        let sum: f64 = weights
            .iter()
            .zip(likelihoods)
            .map(|(w, f)| w * (f + 1.0e-12))
            .sum();
        let per_sum = 1.0 / sum;
        for (expert, weight) in weights.iter_mut().enumerate() {
            let pooled = *weight * (likelihoods[expert] + 1.0e-12) * per_sum;
            let own = f64::from(posterior[expert]);
            *weight = *weight * (1.0 - rate) + rate * 0.5 * (pooled + own);
        }
        for cell in &mut self.histograms[stage] {
            *cell *= 0.9995;
        }
        self.histograms[stage][bin_of(gap_min)] += 1.0;
        self.learn_period(gap_min);
    }

    fn learn_period(&mut self, gap_min: f64) {
        let nearest = period_densities(gap_min)
            .into_iter()
            .enumerate()
            .max_by(|a, b| a.1.total_cmp(&b.1));
        if let Some((index, likelihood)) = nearest
            && likelihood > 0.1
        {
            self.periods[index] += 1.0;
            if self.periods[index] > 400.0 {
                for weight in &mut self.periods {
                    *weight *= 0.5;
                }
            }
        }
    }

    /// Weight of each calendar period; sums to one.
    pub(crate) fn period_weights(&self) -> [f64; PERIODS.len()] {
        let sum: f64 = self.periods.iter().sum();
        let per_sum = 1.0 / sum;
        std::array::from_fn(|i| self.periods[i] * per_sum)
    }

    /// Density of a gap by the calendar's periods, per minute.
    pub(crate) fn calendar_density(&self, gap_min: f64) -> f64 {
        let weights = self.period_weights().into_iter();
        let dense = weights.zip(period_densities(gap_min));
        dense
            .map(|(weight, density)| weight * f64::from(density))
            .sum()
    }

    /// Probability of gap bins for a profile: own histogram over owner's over everyone's.
    pub(crate) fn background<'a>(
        &'a self,
        record: &'a Record,
        owner: &'a OwnerPool,
        pool_strength: f64,
    ) -> impl Fn(usize) -> f64 + 'a {
        let everyone = &self.histograms[stage(record.gap_count)];
        // One over each sum: bins are many, divisions slow.
        let per_everyone = 5.0 / total(everyone);
        let per_owner = pool_strength / (total(&owner.histogram) + 5.0);
        let per_own = 1.0 / (total(&record.histogram) + pool_strength);
        move |bin| {
            let general = everyone[bin] * per_everyone;
            let counted = owner.histogram.get(bin).map_or(0.0, |&x| f64::from(x));
            let pooled = (counted + general) * per_owner;
            let own = f64::from(record.histogram[bin]);
            (own + pooled) * per_own
        }
    }
}

/// The sum, in parts that do not wait for each other.
fn total<T: Copy + Into<f64>>(histogram: &[T]) -> f64 {
    let mut sums = [0.0; 4];
    for four in histogram.chunks_exact(4) {
        for (sum, &x) in sums.iter_mut().zip(four) {
            *sum += x.into();
        }
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// Density of a gap around each of [`PERIODS`], per minute.
fn period_densities(gap_min: f64) -> [f32; PERIODS.len()] {
    let periods = PERIODS.map(|(period, _)| period);
    let sharpness = PERIODS.map(|(period, _)| 1.0 / period_blur(period));
    densities(&periods, &sharpness, gap_min)
}

/// Knowledge shared by the profiles of one owner.
#[derive(Debug, Clone, Default)]
pub(crate) struct OwnerPool {
    profiles: u32,
    last_newcomer: Option<u32>,
    histogram: Vec<f32>,
    gaps: Vec<f32>,
    cursor: u32,
    launches: Vec<(u32, Timestamp)>,
    launches_cursor: u32,
}

impl OwnerPool {
    /// Notes that a profile was first launched under this owner.
    pub(crate) fn enrol(&mut self, profile: u32) {
        if self.last_newcomer != Some(profile) {
            self.profiles = self.profiles.saturating_add(1);
            self.last_newcomer = Some(profile);
        }
    }

    /// Learns a gap of one of the owner's profiles.
    pub(crate) fn learn_gap(&mut self, gap_min: f64) {
        if self.histogram.is_empty() {
            self.histogram = vec![0.0; BINS];
        }
        for cell in &mut self.histogram {
            *cell *= 0.99;
        }
        self.histogram[bin_of(gap_min)] += 1.0;
        if self.gaps.len() < OWNER_GAPS {
            self.gaps.push(gap_min as f32);
        } else {
            self.gaps[self.cursor as usize % OWNER_GAPS] = gap_min as f32;
            self.cursor = (self.cursor + 1) % OWNER_GAPS as u32;
        }
    }

    /// Recent gaps of the owner's profiles, in no order.
    pub(crate) fn gaps(&self) -> &[f32] {
        &self.gaps
    }

    /// Density of a gap after the owner's recent ones, per minute, if there are any.
    pub(crate) fn density(&self, gap_min: f64) -> Option<f64> {
        const LANES: usize = 8;
        let mut sum = 0.0;
        for gaps in self.gaps.chunks(LANES) {
            // Places without a gap are far from any.
            let centres = std::array::from_fn(|i| gaps.get(i).copied().unwrap_or(f32::MAX));
            let sharpness = centres.map(|gap: f32| 1.0 / owner_blur(gap));
            sum += densities::<LANES>(&centres, &sharpness, gap_min)
                .iter()
                .sum::<f32>();
        }
        (!self.gaps.is_empty()).then(|| f64::from(sum) / self.gaps.len() as f64)
    }

    /// Notes a launch, for the search of what announces what.
    pub(crate) fn note_launch(&mut self, profile: u32, at: Timestamp) {
        if self.profiles < 2 {
            return;
        }
        if self.launches.len() < OWNER_LAUNCHES {
            self.launches.push((profile, at));
        } else {
            self.launches[self.launches_cursor as usize % OWNER_LAUNCHES] = (profile, at);
            self.launches_cursor = (self.launches_cursor + 1) % OWNER_LAUNCHES as u32;
        }
    }

    /// Recent launches, newest first.
    pub(crate) fn recent_launches(&self) -> impl Iterator<Item = (u32, Timestamp)> + '_ {
        let count = self.launches.len();
        let newest = if count < OWNER_LAUNCHES {
            count
        } else {
            self.launches_cursor as usize
        };
        (1..=count).map(move |back| self.launches[(newest + count - back) % count])
    }

    /// Bytes held by this owner, heap included.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>()
            + (self.histogram.capacity() + self.gaps.capacity()) * size_of::<f32>()
            + self.launches.capacity() * size_of::<(u32, Timestamp)>()
    }
}

const _: () = assert!(BLURS.len() == 6 && BINS.is_multiple_of(4));
