//! The mixture of all experts over the next gap of one profile, ready to be evaluated at any time.
//!
//! Owns the compact form: the heaviest candidates ([`Atoms`]) and, for everything else, a
//! background over gap bins. Invariant: survival falls from one at elapsed zero and never rises.

use super::atoms::{Atom, Atoms, compact};
use super::bins::{BINS, bin_of, share_below, width};
use super::config::ArrivalsConfig;
use super::experts::{
    ALL_VIEWS, BLURS, CALENDAR, Candidates, EXPERTS, GAP_VIEWS, GapViews, HISTOGRAM, OWNER,
    PERIODS, VIEWS, expert, gap_views, owner_blur, period_blur, phase_view,
};
use super::kernel::densities;
use super::pool::{OwnerPool, Pool};
use super::record::{REMEMBERED, Record};

/// Share of each candidate view that is left to the background.
const BACKGROUND_SHARE: f64 = 0.1;

/// Predictive distribution of the next gap.
#[derive(Debug, Clone)]
pub(crate) struct Outlook {
    atoms: Atoms,
    /// Background mass at or beyond each bin's lower edge; all of it beyond the first, or none if
    /// there is no forecast yet.
    background: [f32; BINS + 1],
    made: bool,
}

impl Default for Outlook {
    fn default() -> Self {
        Self {
            atoms: Atoms::default(),
            background: [0.0; BINS + 1],
            made: false,
        }
    }
}

/// Everything the experts say, before weighting.
struct ExpertOutput {
    gap_views: GapViews,
    phase_views: [Candidates; VIEWS - GAP_VIEWS],
}

fn expert_output(record: &Record, config: &ArrivalsConfig) -> ExpertOutput {
    ExpertOutput {
        gap_views: gap_views(record, config.gap_decay),
        phase_views: std::array::from_fn(|i| phase_view(record, ALL_VIEWS[GAP_VIEWS + i])),
    }
}

/// Density of `gap_min` under each expert, per minute.
pub(crate) fn likelihoods(
    record: &Record,
    owner: &OwnerPool,
    pool: &Pool,
    config: &ArrivalsConfig,
    gap_min: f64,
) -> [f64; EXPERTS] {
    let said = expert_output(record, config);
    let bin = bin_of(gap_min);
    let background = pool.background(record, owner, config.pool_strength)(bin) / width(bin);
    let mut result = [background; EXPERTS];
    if record.remembered() > 0 {
        for (blur, &scale) in BLURS.iter().enumerate() {
            let sharpness = 1.0 / scale as f32;
            let kernels = densities(&said.gap_views.gaps_min, &[sharpness; REMEMBERED], gap_min);
            for (view, weights) in said.gap_views.weights.iter().enumerate() {
                let dense = mean(weights, &kernels);
                result[expert(view, blur)] = blend(dense, background, BACKGROUND_SHARE);
            }
            for (i, candidates) in said.phase_views.iter().enumerate() {
                if !candidates.is_empty() {
                    let kernels = densities(&candidates.gaps_min, &[sharpness; _], gap_min);
                    let dense = mean(&candidates.weights, &kernels);
                    result[expert(GAP_VIEWS + i, blur)] =
                        blend(dense, background, BACKGROUND_SHARE);
                }
            }
        }
    }
    if let Some(dense) = owner.density(gap_min) {
        result[OWNER] = blend(dense, background, 0.3);
    }
    result[CALENDAR] = blend(pool.calendar_density(gap_min), background, 0.2);
    result
}

/// Sum of products of two short columns.
fn mean<const N: usize>(weights: &[f32; N], values: &[f32; N]) -> f64 {
    let mut sums = [0.0f32; 4];
    for first in (0..N).step_by(sums.len()) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += weights[first + lane] * values[first + lane];
        }
    }
    f64::from((sums[0] + sums[1]) + (sums[2] + sums[3]))
}

fn blend(dense: f64, background: f64, background_share: f64) -> f64 {
    (1.0 - background_share) * dense + background_share * background
}

/// The mixture while it is put together.
struct Mixture {
    atoms: Vec<Atom>,
    /// Mass that no atom carries: the background's.
    rest: f64,
}

impl Mixture {
    fn add(&mut self, centre_min: f32, blur_min: f32, mass: f64) {
        if mass > 5.0e-4 {
            self.atoms.push(Atom {
                centre_min,
                blur_min,
                weight: mass as f32,
            });
        } else {
            self.rest += mass;
        }
    }

    /// What the profile's own launches say, at one blur; `weight` is an expert's.
    fn add_own(
        &mut self,
        (blur, scale): (usize, f32),
        record: &Record,
        said: &ExpertOutput,
        weight: &impl Fn(usize) -> f64,
    ) {
        let mut by_age = [0.0f32; REMEMBERED];
        for (view, weights) in said.gap_views.weights.iter().enumerate() {
            let mass = weight(expert(view, blur));
            if record.remembered() == 0 {
                self.rest += mass;
                continue;
            }
            self.rest += BACKGROUND_SHARE * mass;
            let mass = ((1.0 - BACKGROUND_SHARE) * mass) as f32;
            for (cell, w) in by_age.iter_mut().zip(weights) {
                *cell += mass * w;
            }
        }
        let gaps = said.gap_views.gaps_min.iter().zip(by_age);
        for (&gap, mass) in gaps.take(record.remembered()) {
            self.add(gap, scale, f64::from(mass));
        }
        for (i, candidates) in said.phase_views.iter().enumerate() {
            let mass = weight(expert(GAP_VIEWS + i, blur));
            self.rest += if candidates.is_empty() {
                mass
            } else {
                BACKGROUND_SHARE * mass
            };
            for (gap, share) in candidates.iter() {
                let mass = (1.0 - BACKGROUND_SHARE) * mass * f64::from(share);
                self.add(gap, scale, mass);
            }
        }
    }
}

impl Outlook {
    /// The mixture as of the record's latest launch.
    pub(crate) fn new(
        record: &Record,
        owner: &OwnerPool,
        pool: &Pool,
        config: &ArrivalsConfig,
    ) -> Self {
        let said = expert_output(record, config);
        let pooled = pool.weights(record.gap_count);
        let weight = |e: usize| {
            (1.0 - config.share) * f64::from(record.weights[e]) + config.share * pooled[e]
        };
        let mut mixture = Mixture {
            atoms: Vec::with_capacity(192),
            rest: weight(HISTOGRAM),
        };
        for (blur, &scale) in BLURS.iter().enumerate() {
            mixture.add_own((blur, scale as f32), record, &said, &weight);
        }
        let gaps = owner.gaps();
        let mass = weight(OWNER);
        mixture.rest += if gaps.is_empty() { mass } else { 0.3 * mass };
        for &gap in gaps {
            mixture.add(gap, owner_blur(gap), 0.7 * mass / gaps.len() as f64);
        }
        let mass = weight(CALENDAR);
        mixture.rest += 0.2 * mass;
        for (&(period, _), w) in PERIODS.iter().zip(pool.period_weights()) {
            mixture.add(period, period_blur(period), 0.8 * mass * w);
        }
        let (atoms, dropped) = compact(mixture.atoms);
        let rest = mixture.rest + dropped;
        let background = pool.background(record, owner, config.pool_strength);
        let mut beyond = [0.0f32; BINS + 1];
        let mut sum = 0.0;
        for bin in (0..BINS).rev() {
            sum += background(bin) * rest;
            beyond[bin] = sum as f32;
        }
        Self {
            atoms,
            background: beyond,
            made: true,
        }
    }

    /// Probability that the next launch is later than `elapsed_min` after the latest.
    pub(crate) fn survival(&self, elapsed_min: f64) -> f64 {
        if !self.made {
            return 1.0;
        }
        let bin = bin_of(elapsed_min);
        let within = share_below(bin, elapsed_min);
        let (here, next) = (self.background[bin], self.background[bin + 1]);
        let background = f64::from(here) + f64::from(next - here) * within;
        (background + self.atoms.beyond(elapsed_min)).max(1.0e-12)
    }

    /// How long a stretch of time may be treated as one, at `elapsed_min` with `survival` left.
    pub(crate) fn stretch_min(
        &self,
        elapsed_min: f64,
        survival: f64,
        config: &ArrivalsConfig,
    ) -> f64 {
        let longest = (config.tick_growth * elapsed_min).max(config.tick_min);
        if longest <= config.tick_min {
            return longest;
        }
        // Fine where the hazard changes quickly: near a candidate, as far as its blur demands.
        let fine = self.atoms.finest(elapsed_min, survival);
        fine.clamp(config.tick_min, longest)
    }

    /// True until the first launch has been seen.
    pub(crate) fn is_empty(&self) -> bool {
        !self.made
    }

    /// Reads a word of every part (see [`Record::touch`]).
    pub(crate) fn touch(&self) -> f32 {
        let background = self.background.iter().step_by(16);
        background.sum::<f32>() + self.atoms.touch()
    }
}
