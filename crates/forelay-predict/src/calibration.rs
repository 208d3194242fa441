//! Do the probabilities mean what they say? Reliability bins, Brier score, online recalibration.
//!
//! Owns two accumulators over (forecast, outcome) pairs. Refuses to know what was forecast.
//! Invariants: a pair is judged with what was known before it; memory is constant.

use serde::{Deserialize, Serialize};

/// Bins of equal width over [0, 1].
const BINS: usize = 20;
/// Bins over the log-odds for recalibration.
const LEVELS: usize = 40;
const PRIOR: f64 = 4.0;
const CAPACITY: f64 = 300.0;

/// One row of a reliability diagram.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ReliabilityBin {
    /// Forecasts in this bin.
    pub forecasts: u64,
    /// Their mean probability.
    pub mean_forecast: f64,
    /// The share that came true.
    pub observed: f64,
}

/// Running reliability of probability forecasts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reliability {
    forecasts: Vec<u64>,
    probability_sum: Vec<f64>,
    outcome_sum: Vec<u64>,
    squared_error_sum: f64,
}

impl Default for Reliability {
    fn default() -> Self {
        Self {
            forecasts: vec![0; BINS],
            probability_sum: vec![0.0; BINS],
            outcome_sum: vec![0; BINS],
            squared_error_sum: 0.0,
        }
    }
}

impl Reliability {
    /// Adds a forecast and what happened.
    pub fn note(&mut self, probability: f64, happened: bool) {
        let probability = if probability.is_finite() {
            probability.clamp(0.0, 1.0)
        } else {
            0.0
        };
        let bin = ((probability * BINS as f64) as usize).min(BINS - 1);
        let outcome = f64::from(u8::from(happened));
        self.forecasts[bin] += 1;
        self.probability_sum[bin] += probability;
        self.outcome_sum[bin] += u64::from(happened);
        self.squared_error_sum += (probability - outcome).powi(2);
    }

    /// Forecasts judged.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.forecasts.iter().sum()
    }

    /// Mean squared error, zero if nothing was judged.
    #[must_use]
    pub fn brier_score(&self) -> f64 {
        self.squared_error_sum / self.count().max(1) as f64
    }

    /// Expected calibration error: mean distance of told from observed, by forecasts.
    #[must_use]
    pub fn expected_calibration_error(&self) -> f64 {
        self.calibration_error_from(0.0)
    }

    /// The same over forecasts in bins that begin at `least` or above: what remains when the many
    /// near-certain "no" are left out.
    #[must_use]
    pub fn calibration_error_from(&self, least: f64) -> f64 {
        let first = (least * BINS as f64).round() as usize;
        let mut total = 0;
        let mut error = 0.0;
        for bin in first.min(BINS)..BINS {
            total += self.forecasts[bin];
            error += (self.probability_sum[bin] - self.outcome_sum[bin] as f64).abs();
        }
        error / total.max(1) as f64
    }

    /// The diagram, one row per bin of width 0.05; empty bins are left out.
    #[must_use]
    pub fn bins(&self) -> Vec<ReliabilityBin> {
        (0..BINS)
            .filter(|&bin| self.forecasts[bin] > 0)
            .map(|bin| ReliabilityBin {
                forecasts: self.forecasts[bin],
                mean_forecast: self.probability_sum[bin] / self.forecasts[bin] as f64,
                observed: self.outcome_sum[bin] as f64 / self.forecasts[bin] as f64,
            })
            .collect()
    }
}

/// Bins of a [`Judged`].
const COARSE_BINS: usize = 5;

/// The reliability of one profile's forecasts, in little memory: older ones fade once there are
/// many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    squared_error_sum: f32,
    forecasts: [u16; COARSE_BINS],
    happened: [u16; COARSE_BINS],
    told: [f32; COARSE_BINS],
}

impl Judged {
    /// Adds a forecast and what happened.
    pub fn note(&mut self, probability: f64, happened: bool) {
        let probability = if probability.is_finite() {
            probability.clamp(0.0, 1.0)
        } else {
            0.0
        };
        let bin = ((probability * COARSE_BINS as f64) as usize).min(COARSE_BINS - 1);
        if self.forecasts[bin] == u16::MAX {
            self.fade();
        }
        self.forecasts[bin] += 1;
        self.happened[bin] += u16::from(happened);
        self.told[bin] += probability as f32;
        let outcome = f64::from(u8::from(happened));
        self.squared_error_sum += (probability - outcome).powi(2) as f32;
    }

    fn fade(&mut self) {
        self.squared_error_sum /= 2.0;
        for bin in 0..COARSE_BINS {
            self.forecasts[bin] /= 2;
            self.happened[bin] /= 2;
            self.told[bin] /= 2.0;
        }
    }

    /// Forecasts judged.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.forecasts.iter().map(|&count| u64::from(count)).sum()
    }

    /// Mean squared error, zero if nothing was judged.
    #[must_use]
    pub fn brier_score(&self) -> f64 {
        f64::from(self.squared_error_sum) / self.count().max(1) as f64
    }

    /// The diagram, one row per bin of width 0.2; empty bins are left out.
    #[must_use]
    pub fn bins(&self) -> Vec<ReliabilityBin> {
        (0..COARSE_BINS)
            .filter(|&bin| self.forecasts[bin] > 0)
            .map(|bin| {
                let forecasts = f64::from(self.forecasts[bin]);
                ReliabilityBin {
                    forecasts: u64::from(self.forecasts[bin]),
                    mean_forecast: f64::from(self.told[bin]) / forecasts,
                    observed: f64::from(self.happened[bin]) / forecasts,
                }
            })
            .collect()
    }
}

/// Maps told probabilities to what they turned out to mean.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recalibration {
    told: Vec<f64>,
    happened: Vec<f64>,
    count: Vec<f64>,
}

impl Default for Recalibration {
    fn default() -> Self {
        Self {
            told: vec![0.0; LEVELS],
            happened: vec![0.0; LEVELS],
            count: vec![0.0; LEVELS],
        }
    }
}

impl Recalibration {
    fn place(probability: f64) -> (usize, f64) {
        let p = probability.clamp(1.0e-6, 1.0 - 1.0e-6);
        let level = ((p / (1.0 - p)).ln() + 14.0) / 28.0 * (LEVELS - 1) as f64;
        let level = level.clamp(0.0, (LEVELS - 2) as f64 + 0.999);
        (level as usize, level.fract())
    }

    /// The probability to tell instead.
    #[must_use]
    pub fn apply(&self, probability: f64) -> f64 {
        let (low, share) = Self::place(probability);
        let corrected = |level: usize| {
            let count = self.count[level];
            // The shift of this level in probability, shrunk towards none.
            (self.happened[level] - self.told[level]) / (count + PRIOR)
        };
        let shift = corrected(low) * (1.0 - share) + corrected(low + 1) * share;
        (probability + shift).clamp(0.0, 1.0)
    }

    /// Learns from a forecast as it was before recalibration.
    pub fn learn(&mut self, probability: f64, happened: bool) {
        let (low, share) = Self::place(probability);
        for (level, weight) in [(low, 1.0 - share), (low + 1, share)] {
            self.told[level] += probability * weight;
            self.count[level] += weight;
            if happened {
                self.happened[level] += weight;
            }
            if self.count[level] > CAPACITY {
                self.told[level] *= 0.5;
                self.happened[level] *= 0.5;
                self.count[level] *= 0.5;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small deterministic generator, enough to draw outcomes.
    struct Draw(u64);
    impl Draw {
        fn next(&mut self) -> f64 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (self.0 >> 33) as f64 / (1u64 << 31) as f64
        }
    }

    #[test]
    fn honest_forecasts_have_a_small_error_and_overconfident_ones_a_large_one() {
        let mut draw = Draw(7);
        let (mut honest, mut bold) = (Reliability::default(), Reliability::default());
        for _ in 0..20_000 {
            let p = draw.next();
            let happened = draw.next() < p;
            honest.note(p, happened);
            bold.note(if p > 0.5 { 0.99 } else { 0.01 }, happened);
        }
        assert!(honest.expected_calibration_error() < 0.02);
        assert!(bold.expected_calibration_error() > 0.2);
        assert!(honest.brier_score() < bold.brier_score());
    }

    #[test]
    fn recalibration_learns_a_bias() {
        let mut draw = Draw(11);
        let mut map = Recalibration::default();
        let mut after = Reliability::default();
        for i in 0..20_000 {
            let p = draw.next();
            let happened = draw.next() < p * p;
            if i > 5_000 {
                after.note(map.apply(p), happened);
            }
            map.learn(p, happened);
        }
        let error = after.expected_calibration_error();
        assert!(error < 0.02, "{error}");
    }

    #[test]
    fn a_profiles_own_account_agrees_with_the_large_one_and_never_overflows() {
        let mut draw = Draw(5);
        let (mut large, mut own) = (Reliability::default(), Judged::default());
        for _ in 0..5_000 {
            let p = draw.next();
            let happened = draw.next() < p;
            large.note(p, happened);
            own.note(p, happened);
        }
        assert_eq!(own.count(), 5_000);
        assert!((own.brier_score() - large.brier_score()).abs() < 1e-4);
        let bins = own.bins();
        assert_eq!(bins.len(), COARSE_BINS);
        assert!(
            bins.iter()
                .all(|b| (b.mean_forecast - b.observed).abs() < 0.06)
        );
        for _ in 0..200_000 {
            own.note(0.0, false);
        }
        assert!(own.count() <= u64::from(u16::MAX) * 2 && own.brier_score() < 0.01);
        own.note(f64::NAN, true);
    }

    #[test]
    fn absurd_forecasts_do_no_harm() {
        let mut reliability = Reliability::default();
        reliability.note(f64::NAN, true);
        reliability.note(7.0, true);
        assert_eq!(reliability.count(), 2);
        assert!(Recalibration::default().apply(2.0) <= 1.0);
    }
}
