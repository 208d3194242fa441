//! The fit of a mixture: how many trees, how strongly shrunk, judged by rows kept aside.
//!
//! The search climbs from a middling setting to better neighbours on a fixed grid, then averages
//! a few differently seeded fits of the best setting if that makes the kept-aside rows likelier.
//! The daemon and the benchmark on standard data sets call this very function with the same
//! limits. It is deterministic, and bounded by work counted in table cells and items, not by time:
//! a hostile number of names makes the search smaller, never longer.

use std::collections::BTreeMap;

use super::counts::PairCounts;
use super::data::{Rows, Schema};
use super::mixture::{EmSettings, Mixture};

/// Numbers of trees tried.
const TREES: [usize; 6] = [1, 3, 8, 20, 40, 80];
/// Strengths of shrinking tried, in pseudo-rows.
const STRENGTHS: [f64; 6] = [2.0, 8.0, 30.0, 120.0, 500.0, 2000.0];
/// Where the search begins: 8 trees, 30 pseudo-rows.
const START: Setting = (2, 2);
/// Distinct rows that a tree must have at the least: with fewer, trees learn rows by heart.
const ROWS_PER_TREE: usize = 10;
/// The setting for too few rows to keep any aside.
const FEW_ROWS: EmSettings = EmSettings {
    trees: 1,
    strength: 8.0,
    rounds: 1,
    seed: 1,
};

/// Indices into [`TREES`] and [`STRENGTHS`].
type Setting = (usize, usize);

/// Bounds of a fit. The usual ones are some 20 s of one processor for names and launches at the
/// bounds of [`super::NeedsConfig`], and well below one for a host of dozens of components.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FitLimits {
    /// Work of all rounds of all fits, in millions of table cells and items looked at.
    pub million_steps: f64,
    /// Rounds of expectation maximisation while searching.
    pub search_rounds: usize,
    /// Rounds of a fit that is kept.
    pub rounds: usize,
    /// Differently seeded fits that may be averaged.
    pub averaged: usize,
    /// First seed.
    pub seed: u64,
}

impl Default for FitLimits {
    fn default() -> Self {
        Self {
            million_steps: 1_000.0,
            search_rounds: 8,
            rounds: 30,
            averaged: 2,
            seed: 1,
        }
    }
}

/// A mixture and how it was found.
#[derive(Clone, Debug)]
pub struct FittedMixture {
    /// The mixture.
    pub mixture: Mixture,
    /// Trees of one fit.
    pub trees: usize,
    /// Its strength of shrinking.
    pub strength: f64,
    /// Fits averaged.
    pub averaged: usize,
    /// Settings tried.
    pub tried: usize,
    /// Work done, in the unit of [`FitLimits::million_steps`].
    pub million_steps: f64,
}

/// Fits a mixture to `rows`, judged by `valid`; without any to judge by, a single tree.
pub fn fit(rows: &Rows, valid: &Rows, limits: FitLimits) -> FittedMixture {
    let mut search = Search::new(rows, valid, limits);
    if valid.is_empty() {
        let (_, mixture) = search.run(FEW_ROWS, rows);
        return search.finish(vec![mixture], (0, 1));
    }
    let setting = search.climb();
    let parts = search.average(setting);
    search.finish(parts, setting)
}

/// The state of one fit.
struct Search<'a> {
    rows: &'a Rows,
    valid: &'a Rows,
    counts: PairCounts,
    limits: FitLimits,
    /// Work of one round of one tree, in millions.
    million_steps_per_tree: f64,
    million_steps: f64,
    scores: BTreeMap<Setting, f64>,
}

impl<'a> Search<'a> {
    fn new(rows: &'a Rows, valid: &'a Rows, limits: FitLimits) -> Self {
        let items: usize = rows.iter().map(|(row, _)| row.len()).sum();
        let million_steps_per_tree = (cells_of_pairs(&rows.schema) + items as f64) / 1e6;
        Self {
            rows,
            valid,
            counts: PairCounts::of(rows),
            limits,
            million_steps_per_tree,
            million_steps: 0.0,
            scores: BTreeMap::new(),
        }
    }

    /// Whether so many rounds with so many trees are within the limits.
    fn affords(&self, trees: usize, rounds: usize) -> bool {
        let steps = self.million_steps_per_tree * (trees * rounds) as f64;
        self.million_steps + steps <= self.limits.million_steps
    }

    /// Whether a setting may be tried: there must be work left to fit it in full afterwards.
    fn is_open(&self, setting: Setting) -> bool {
        let trees = TREES[setting.0];
        let rounds = self.limits.search_rounds + self.limits.rounds;
        let enough = trees * ROWS_PER_TREE <= self.rows.len();
        trees == 1 || enough && self.affords(trees, rounds)
    }

    fn run(&mut self, settings: EmSettings, valid: &Rows) -> (f64, Mixture) {
        let fitted = Mixture::fit(self.rows, valid, &self.counts, settings);
        self.million_steps += self.million_steps_per_tree * (settings.trees * fitted.rounds) as f64;
        (fitted.valid_log_likelihood, fitted.mixture)
    }

    fn settings(&self, setting: Setting, rounds: usize, extra_seed: u64) -> EmSettings {
        EmSettings {
            trees: TREES[setting.0],
            strength: STRENGTHS[setting.1],
            rounds,
            seed: self.limits.seed.wrapping_add(extra_seed),
        }
    }

    /// How likely a setting makes the rows kept aside.
    fn score(&mut self, setting: Setting) -> f64 {
        if let Some(score) = self.scores.get(&setting) {
            return *score;
        }
        let settings = self.settings(setting, self.limits.search_rounds, 0);
        let (score, _) = self.run(settings, self.valid);
        self.scores.insert(setting, score);
        score
    }

    /// The best setting that is reached from [`START`] by better neighbours.
    fn climb(&mut self) -> Setting {
        let mut at = START;
        while at.0 > 0 && !self.is_open(at) {
            at.0 -= 1;
        }
        // More trees first, since they gain most; then more or less shrinking.
        let directions = [(1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 0)];
        let mut here = self.score(at);
        // The first better neighbour will do: most steps only go on in one direction.
        'climb: loop {
            for (trees, strength) in directions {
                let (Some(trees), Some(strength)) = (
                    at.0.checked_add_signed(trees).filter(|i| *i < TREES.len()),
                    at.1.checked_add_signed(strength)
                        .filter(|i| *i < STRENGTHS.len()),
                ) else {
                    continue;
                };
                let next = (trees, strength);
                if !self.scores.contains_key(&next) && !self.is_open(next) {
                    continue;
                }
                let score = self.score(next);
                if score > here {
                    (at, here) = (next, score);
                    continue 'climb;
                }
            }
            return at;
        }
    }

    /// Fits of a setting from several seeds, as many as make the rows kept aside likelier.
    fn average(&mut self, setting: Setting) -> Vec<Mixture> {
        let mut parts: Vec<Mixture> = Vec::new();
        let mut best = f64::NEG_INFINITY;
        let seeds = if TREES[setting.0] == 1 {
            1
        } else {
            self.limits.averaged.max(1)
        };
        for extra in 0..seeds as u64 {
            let settings = self.settings(setting, self.limits.rounds, extra);
            if extra > 0 && !self.affords(settings.trees, settings.rounds) {
                break;
            }
            let (alone, mixture) = self.run(settings, self.valid);
            parts.push(mixture);
            let joint = match parts.as_slice() {
                [_] => alone,
                _ => Mixture::average(parts.clone())
                    .map_or(alone, |m| m.mean_log_likelihood(self.valid)),
            };
            if joint <= best {
                parts.pop();
            } else {
                best = joint;
            }
        }
        parts
    }

    fn finish(self, parts: Vec<Mixture>, (trees, strength): Setting) -> FittedMixture {
        FittedMixture {
            averaged: parts.len(),
            mixture: Mixture::average(parts).unwrap_or_else(|| Mixture::chow_liu(self.rows, 1.0)),
            trees: TREES[trees],
            strength: STRENGTHS[strength],
            tried: self.scores.len(),
            million_steps: self.million_steps,
        }
    }
}

/// Cells of the joint tables of all pairs of variables.
fn cells_of_pairs(schema: &Schema) -> f64 {
    let cards = (0..schema.variables()).map(|v| schema.card(v) as f64);
    let (sum, squares) = cards.fold((0.0, 0.0), |(sum, squares), card| {
        (sum + card, squares + card * card)
    });
    (sum * sum - squares) / 2.0
}
