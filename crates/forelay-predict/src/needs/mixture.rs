//! A mixture of Chow-Liu trees, fitted by expectation maximisation (Meila and Jordan 2000).
//!
//! Each component's tables are shrunk towards the distribution of all rows, so that a component
//! with few rows differs from the whole only where its rows insist; that, stopping when rows kept
//! aside get no likelier, and choosing the number of components by them is what keeps the mixture
//! from overfitting.
//!
//! Invariant: weights are positive and sum to one.

use super::counts::{PairCounts, Prior};
use super::data::{Rows, Schema};
use super::tree::Tree;

/// Shares of a row below this are not worth counting.
const LEAST_SHARE: f32 = 1e-3;
/// Pseudo-rows in every cell of the distribution of all rows.
const CELLS: f64 = 0.1;

/// How expectation maximisation runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EmSettings {
    /// Trees.
    pub trees: usize,
    /// Pseudo-rows of the distribution of all rows in each tree.
    pub strength: f64,
    /// Rounds of expectation maximisation, at most.
    pub rounds: usize,
    /// Seed of the initial shares.
    pub seed: u64,
}

/// What expectation maximisation found.
#[derive(Clone, Debug)]
pub struct EmFit {
    /// The mixture that made the rows kept aside likeliest.
    pub mixture: Mixture,
    /// Their mean log-likelihood.
    pub valid_log_likelihood: f64,
    /// Rounds that it took.
    pub rounds: usize,
}

/// A mixture of trees.
#[derive(Clone, Debug)]
pub struct Mixture {
    schema: Schema,
    log_weights: Vec<f64>,
    trees: Vec<Tree>,
}

/// Scratch space of [`Mixture::log_likelihood`].
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    values: Vec<u8>,
    logs: Vec<f64>,
}

impl Mixture {
    /// One Chow-Liu tree with `alpha` pseudo-rows in every cell.
    pub fn chow_liu(rows: &Rows, alpha: f64) -> Self {
        let counts = PairCounts::of(rows);
        let prior = Prior::Cells(alpha);
        Self {
            schema: rows.schema.clone(),
            log_weights: vec![0.0],
            trees: vec![Tree::learn(&counts, &rows.schema, prior, prior, 0.0)],
        }
    }

    /// The variables.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// `ln P(row)`.
    pub fn log_likelihood(&self, row: &[u32], scratch: &mut Scratch) -> f64 {
        self.component_logs(row, scratch);
        log_sum_exp(&scratch.logs)
    }

    /// Mean of `ln P` over weighted rows.
    pub fn mean_log_likelihood(&self, rows: &Rows) -> f64 {
        let mut scratch = Scratch::default();
        let sum: f64 = rows
            .iter()
            .map(|(row, weight)| f64::from(weight) * self.log_likelihood(row, &mut scratch))
            .sum();
        sum / rows.total().max(f64::MIN_POSITIVE)
    }

    /// Fills `scratch.logs` with `ln (weight x P)` per component.
    fn component_logs(&self, row: &[u32], scratch: &mut Scratch) {
        scratch.values.resize(self.schema.variables(), 0);
        for indicator in row {
            let (v, value) = self.schema.value(*indicator);
            scratch.values[v] = value as u8;
        }
        scratch.logs.clear();
        for (tree, weight) in self.trees.iter().zip(&self.log_weights) {
            let log = tree.log_likelihood(&self.schema, row, &scratch.values);
            scratch.logs.push(weight + log);
        }
        for indicator in row {
            scratch.values[self.schema.value(*indicator).0] = 0;
        }
    }

    /// The distribution of every variable given evidence (a value or
    /// [`super::tree::UNKNOWN`] each), exactly: the trees' posteriors weighted by how well each
    /// explains the evidence. See [`Mixture::slot`].
    pub fn posterior(&self, evidence: &[u32]) -> Vec<f64> {
        let parts: Vec<(f64, Vec<f64>)> =
            self.trees.iter().map(|t| t.posterior(evidence)).collect();
        let logs: Vec<f64> = parts
            .iter()
            .zip(&self.log_weights)
            .map(|((log, _), weight)| log + weight)
            .collect();
        let total = log_sum_exp(&logs);
        let mut out = vec![0.0; parts.first().map_or(0, |(_, p)| p.len())];
        for ((_, part), log) in parts.iter().zip(&logs) {
            let share = (log - total).exp();
            for (sum, p) in out.iter_mut().zip(part) {
                *sum += share * p;
            }
        }
        out
    }

    /// Where a variable's distribution starts in a posterior.
    pub fn slot(&self, variable: usize) -> usize {
        self.trees.first().map_or(0, |tree| tree.slot(variable))
    }

    /// Fits a mixture, stopping when `valid` gets no likelier.
    pub fn fit(rows: &Rows, valid: &Rows, counts: &PairCounts, how: EmSettings) -> EmFit {
        let k = how.trees.max(1);
        let mut shares = initial_shares(rows, counts, k, how.seed);
        let (mut best, mut worse, mut rounds) = (None::<(f64, Self)>, 0, 0);
        while rounds < how.rounds.max(1) {
            rounds += 1;
            let mixture = Self::maximise(rows, counts, &shares, k, how.strength);
            let score = mixture.mean_log_likelihood(valid);
            let improved = best
                .as_ref()
                .is_none_or(|(b, _)| score > b + 2e-4 * b.abs());
            worse = if improved { 0 } else { worse + 1 };
            let last = worse >= 2 || k == 1;
            if !last {
                mixture.expect(rows, &mut shares);
            }
            if best.as_ref().is_none_or(|(b, _)| score > *b) {
                best = Some((score, mixture));
            }
            if last {
                break;
            }
        }
        let (valid_log_likelihood, mixture) =
            best.unwrap_or_else(|| (f64::NEG_INFINITY, Self::chow_liu(rows, 1.0)));
        EmFit {
            mixture,
            valid_log_likelihood,
            rounds,
        }
    }

    /// Every row's share in each component.
    fn expect(&self, rows: &Rows, shares: &mut [f32]) {
        let k = self.trees.len();
        let mut scratch = Scratch::default();
        for (i, share) in shares.chunks_mut(k).enumerate() {
            self.component_logs(rows.row(i), &mut scratch);
            let total = log_sum_exp(&scratch.logs);
            for (s, log) in share.iter_mut().zip(&scratch.logs) {
                *s = (log - total).exp() as f32;
            }
        }
    }

    /// The likeliest components under the shares.
    fn maximise(rows: &Rows, all: &PairCounts, shares: &[f32], k: usize, strength: f64) -> Self {
        let prior = Prior::Shrink {
            of: all,
            strength,
            cells: CELLS,
        };
        let mut counts = PairCounts::new(&rows.schema);
        let mut trees = Vec::with_capacity(k);
        let mut weights = Vec::with_capacity(k);
        for component in 0..k {
            counts.clear();
            for (i, (row, weight)) in rows.iter().enumerate() {
                let share = shares[i * k + component];
                if share > LEAST_SHARE {
                    counts.add(row, weight * share);
                }
            }
            weights.push(counts.total + 1.0);
            trees.push(Tree::learn(&counts, &rows.schema, prior, prior, 0.0));
        }
        let total: f64 = weights.iter().sum();
        Self {
            schema: rows.schema.clone(),
            log_weights: weights.iter().map(|w| (w / total).ln()).collect(),
            trees,
        }
    }

    /// Several mixtures as one, equally weighted. They must share a schema.
    pub fn average(mixtures: Vec<Self>) -> Option<Self> {
        let share = (mixtures.len() as f64).ln();
        let mut all = mixtures.into_iter();
        let mut out = all.next()?;
        for mixture in all {
            out.log_weights.extend(mixture.log_weights);
            out.trees.extend(mixture.trees);
        }
        out.log_weights.iter_mut().for_each(|w| *w -= share);
        Some(out)
    }
}

/// Initial shares: a few rounds of a mixture of independent variables from random rows, which is
/// quick and parts the rows far better than chance.
fn initial_shares(rows: &Rows, all: &PairCounts, k: usize, seed: u64) -> Vec<f32> {
    let n = rows.schema.indicators();
    let mut shares = vec![1.0_f32; rows.len() * k];
    if k == 1 {
        return shares;
    }
    let mut random = Random(seed);
    let base: Vec<f64> = (0..n)
        .map(|i| (f64::from(all.single(i)) + 0.5) / (all.total + 1.0))
        .collect();
    let mut means: Vec<Vec<f64>> = (0..k)
        .map(|_| {
            let mut mean: Vec<f64> = base.clone();
            let mut seen = vec![false; n];
            // Three random rows are a less erratic centre than one.
            for _ in 0..3 {
                for i in rows.row(random.below(rows.len().max(1))) {
                    seen[*i as usize] = true;
                }
            }
            for (p, seen) in mean.iter_mut().zip(&seen) {
                *p = 0.7 * *p + if *seen { 0.25 } else { 0.0 };
            }
            mean
        })
        .collect();
    let mut weights = vec![1.0 / k as f64; k];
    for _ in 0..6 {
        let logits: Vec<(f64, Vec<f64>)> = means
            .iter()
            .zip(&weights)
            .map(|(mean, weight)| {
                let zeros: f64 = mean.iter().map(|p| (1.0 - p).max(1e-9).ln()).sum();
                let ones = mean
                    .iter()
                    .map(|p| p.max(1e-9).ln() - (1.0 - p).max(1e-9).ln());
                (zeros + weight.ln(), ones.collect())
            })
            .collect();
        let mut sums = vec![vec![0.0_f64; n]; k];
        let mut totals = vec![0.0_f64; k];
        let mut logs = vec![0.0; k];
        for (i, (row, weight)) in rows.iter().enumerate() {
            for (log, (zeros, ones)) in logs.iter_mut().zip(&logits) {
                *log = zeros + row.iter().map(|i| ones[*i as usize]).sum::<f64>();
            }
            let total = log_sum_exp(&logs);
            for c in 0..k {
                let share = (logs[c] - total).exp();
                shares[i * k + c] = share as f32;
                if share > f64::from(LEAST_SHARE) {
                    let share = share * f64::from(weight);
                    totals[c] += share;
                    row.iter().for_each(|i| sums[c][*i as usize] += share);
                }
            }
        }
        let everything: f64 = totals.iter().sum();
        for c in 0..k {
            weights[c] = (totals[c] + 1.0) / (everything + k as f64);
            for (mean, (sum, base)) in means[c].iter_mut().zip(sums[c].iter().zip(&base)) {
                *mean = (sum + 4.0 * base) / (totals[c] + 4.0);
            }
        }
    }
    shares
}

/// `ln` of the sum of exponentials.
pub(super) fn log_sum_exp(logs: &[f64]) -> f64 {
    let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + logs.iter().map(|l| (l - largest).exp()).sum::<f64>().ln()
}

/// SplitMix64 (Steele, Lea and Flood 2014): small, seeded, the same everywhere.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}
