//! The mixture of all experts over the next gap of one profile, ready to be evaluated at any time.
//!
//! Owns the compact form: the heaviest candidates ([`Atoms`]) and, for everything else, a
//! background over gap bins. Invariant: survival falls from one at elapsed zero and never rises.

use super::atoms::{Atom, Atoms, compact};
use super::bins::{BINS, bin_of, lower_edge, width};
use super::config::Config;
use super::experts::{
    ALL_VIEWS, BLURS, CALENDAR, Candidate, EXPERTS, GAP_VIEWS, HISTOGRAM, OWNER, PERIODS, VIEWS,
    expert, gap_view_weights, owner_blur, period_blur, phase_view,
};
use super::kernel::density;
use super::pool::{OwnerPool, Pool};
use super::record::{REMEMBERED, Record};

/// Share of each candidate view that is left to the background.
const BACKGROUND_SHARE: f64 = 0.1;

/// Predictive distribution of the next gap.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outlook {
    atoms: Option<Box<Atoms>>,
    /// Background mass at or beyond each bin's lower edge.
    background: Vec<f32>,
}

/// Everything the experts say, before weighting.
struct Testimony {
    gap_views: [[f64; REMEMBERED]; GAP_VIEWS],
    phase_views: [Vec<Candidate>; VIEWS - GAP_VIEWS],
}

fn testimony(record: &Record, config: &Config) -> Testimony {
    Testimony {
        gap_views: gap_view_weights(record, config.gap_decay),
        phase_views: std::array::from_fn(|i| phase_view(record, ALL_VIEWS[GAP_VIEWS + i])),
    }
}

/// Density of `gap_min` under each expert, per minute.
pub(crate) fn likelihoods(
    record: &Record,
    owner: &OwnerPool,
    pool: &Pool,
    config: &Config,
    gap_min: f64,
) -> [f64; EXPERTS] {
    let said = testimony(record, config);
    let bin = bin_of(gap_min);
    let background = pool.background(record, owner, config.pool_strength)(bin) / width(bin);
    let mut result = [background; EXPERTS];
    let count = record.remembered();
    for (blur, &scale) in BLURS.iter().enumerate() {
        let kernels: [f64; REMEMBERED] = std::array::from_fn(|age| {
            record
                .gap(age)
                .map_or(0.0, |gap| density(gap, scale, gap_min))
        });
        for (view, weights) in said.gap_views.iter().enumerate() {
            if count > 0 {
                let dense: f64 = weights.iter().zip(&kernels).map(|(w, k)| w * k).sum();
                result[expert(view, blur)] = blend(dense, background, BACKGROUND_SHARE);
            }
        }
        for (i, candidates) in said.phase_views.iter().enumerate() {
            if !candidates.is_empty() {
                let dense: f64 = candidates
                    .iter()
                    .map(|c| c.weight * density(c.gap_min, scale, gap_min))
                    .sum();
                result[expert(GAP_VIEWS + i, blur)] = blend(dense, background, BACKGROUND_SHARE);
            }
        }
    }
    let gaps = owner.gaps();
    if !gaps.is_empty() {
        let sum: f64 = gaps
            .iter()
            .map(|&gap| density(f64::from(gap), owner_blur(f64::from(gap)), gap_min))
            .sum();
        result[OWNER] = blend(sum / gaps.len() as f64, background, 0.3);
    }
    let periods = pool.period_weights();
    let dense: f64 = PERIODS
        .iter()
        .zip(periods)
        .map(|(&(period, _), weight)| weight * density(period, period_blur(period), gap_min))
        .sum();
    result[CALENDAR] = blend(dense, background, 0.2);
    result
}

fn blend(dense: f64, background: f64, background_share: f64) -> f64 {
    (1.0 - background_share) * dense + background_share * background
}

impl Outlook {
    /// The mixture as of the record's latest launch.
    pub(crate) fn new(record: &Record, owner: &OwnerPool, pool: &Pool, config: &Config) -> Self {
        let said = testimony(record, config);
        let pooled = pool.weights(record.gap_count);
        let weight = |e: usize| {
            (1.0 - config.share) * f64::from(record.weights[e]) + config.share * pooled[e]
        };
        let mut rest = weight(HISTOGRAM);
        let mut atoms: Vec<Atom> = Vec::with_capacity(192);
        let mut add = |centre: f64, blur: f64, mass: f64, rest: &mut f64| {
            if mass > 5.0e-4 {
                atoms.push(Atom {
                    centre_min: centre as f32,
                    blur_min: blur as f32,
                    weight: mass as f32,
                });
            } else {
                *rest += mass;
            }
        };
        for (blur, &scale) in BLURS.iter().enumerate() {
            let mut by_age = [0.0; REMEMBERED];
            for (view, weights) in said.gap_views.iter().enumerate() {
                let mass = weight(expert(view, blur));
                if record.remembered() == 0 {
                    rest += mass;
                    continue;
                }
                rest += BACKGROUND_SHARE * mass;
                for (cell, w) in by_age.iter_mut().zip(weights) {
                    *cell += (1.0 - BACKGROUND_SHARE) * mass * w;
                }
            }
            for (age, mass) in by_age.into_iter().enumerate() {
                if let Some(gap) = record.gap(age) {
                    add(gap, scale, mass, &mut rest);
                }
            }
            for (i, candidates) in said.phase_views.iter().enumerate() {
                let mass = weight(expert(GAP_VIEWS + i, blur));
                rest += if candidates.is_empty() {
                    mass
                } else {
                    BACKGROUND_SHARE * mass
                };
                for c in candidates {
                    add(
                        c.gap_min,
                        scale,
                        (1.0 - BACKGROUND_SHARE) * mass * c.weight,
                        &mut rest,
                    );
                }
            }
        }
        let gaps = owner.gaps();
        let mass = weight(OWNER);
        rest += if gaps.is_empty() { mass } else { 0.3 * mass };
        for &gap in gaps {
            let gap = f64::from(gap);
            add(
                gap,
                owner_blur(gap),
                0.7 * mass / gaps.len() as f64,
                &mut rest,
            );
        }
        let mass = weight(CALENDAR);
        rest += 0.2 * mass;
        for (&(period, _), w) in PERIODS.iter().zip(pool.period_weights()) {
            add(period, period_blur(period), 0.8 * mass * w, &mut rest);
        }
        let (atoms, dropped) = compact(atoms);
        rest += dropped;
        let background = pool.background(record, owner, config.pool_strength);
        let mut beyond = vec![0.0f32; BINS + 1];
        let mut sum = 0.0;
        for bin in (0..BINS).rev() {
            sum += background(bin) * rest;
            beyond[bin] = sum as f32;
        }
        Self {
            atoms: Some(Box::new(atoms)),
            background: beyond,
        }
    }

    /// Probability that the next launch is later than `elapsed_min` after the latest.
    pub(crate) fn survival(&self, elapsed_min: f64) -> f64 {
        let bin = bin_of(elapsed_min);
        let within = ((elapsed_min - lower_edge(bin)) / width(bin)).clamp(0.0, 1.0);
        let (Some(&here), Some(&next)) = (self.background.get(bin), self.background.get(bin + 1))
        else {
            return 1.0;
        };
        let background = f64::from(here) + f64::from(next - here) * within;
        let candidates = self.atoms.as_ref().map_or(0.0, |a| a.beyond(elapsed_min));
        (background + candidates).max(1.0e-12)
    }

    /// How long a stretch of time may be treated as one, at `elapsed_min` with `survival` left.
    pub(crate) fn stretch_min(&self, elapsed_min: f64, survival: f64, config: &Config) -> f64 {
        let longest = (config.tick_growth * elapsed_min).max(config.tick_min);
        // Fine where the hazard changes quickly: near a candidate, as far as its blur demands.
        let finest = |atoms: &Atoms| atoms.finest(elapsed_min, survival);
        let fine = self.atoms.as_deref().map_or(longest, finest);
        fine.clamp(config.tick_min, longest)
    }

    /// True until the first launch has been seen.
    pub(crate) fn is_empty(&self) -> bool {
        self.background.is_empty()
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.atoms.as_ref().map_or(0, |_| size_of::<Atoms>())
            + self.background.capacity() * size_of::<f32>()
    }
}
