//! Choosing a mixture: how many trees, how strongly shrunk, judged by rows kept aside.
//!
//! The search climbs from a middling setting to better neighbours on a fixed grid, then averages
//! a few differently seeded fits of the best setting if that makes the kept-aside rows likelier.
//! It is the same for every data set, deterministic, and bounded by work counted in table
//! evaluations, not by time.

use std::collections::BTreeMap;

use super::counts::PairCounts;
use super::data::Rows;
use super::mixture::{Fit, Mixture};

/// Numbers of trees tried.
const COMPONENTS: [usize; 6] = [1, 3, 8, 20, 40, 80];
/// Strengths of shrinking tried, in pseudo-rows.
const STRENGTHS: [f64; 6] = [2.0, 8.0, 30.0, 120.0, 500.0, 2000.0];

/// Bounds of the search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Search {
    /// Table evaluations that one round of one fit may take, in millions; settings beyond are not
    /// tried.
    pub max_million_steps: f64,
    /// Rounds of expectation maximisation of a fit while searching.
    pub search_rounds: usize,
    /// Rounds of a fit that is kept.
    pub rounds: usize,
    /// Differently seeded fits that may be averaged.
    pub averaged: usize,
    /// First seed.
    pub seed: u64,
}

impl Default for Search {
    fn default() -> Self {
        Self {
            max_million_steps: 12.0,
            search_rounds: 8,
            rounds: 30,
            averaged: 2,
            seed: 1,
        }
    }
}

/// What the search chose.
#[derive(Clone, Debug)]
pub struct Learned {
    /// The model.
    pub mixture: Mixture,
    /// Mean log-likelihood of the rows kept aside.
    pub valid_log_likelihood: f64,
    /// Trees of one fit.
    pub components: usize,
    /// Its strength of shrinking.
    pub strength: f64,
    /// Fits averaged.
    pub averaged: usize,
    /// Settings tried.
    pub tried: usize,
}

/// Learns a mixture from `rows`, judged by `valid`.
pub fn learn(rows: &Rows, valid: &Rows, search: Search) -> Learned {
    let counts = PairCounts::of(rows);
    let variables = rows.schema.variables() as f64;
    let items: usize = rows.iter().map(|(row, _)| row.len()).sum();
    // A round looks at each pair of variables and at each item of each row, once per tree; a pair
    // takes about four times as long as an item.
    let steps = |k: usize| k as f64 * (variables * variables / 2.0 + items as f64 / 4.0) / 1e6;
    let affordable = |k: usize| k == 1 || steps(k) <= search.max_million_steps;
    let mut tried: BTreeMap<(usize, usize), (f64, Mixture)> = BTreeMap::new();
    let fit = |at: (usize, usize), rounds: usize, seed: u64| {
        let how = Fit {
            components: COMPONENTS[at.0],
            strength: STRENGTHS[at.1],
            rounds,
            seed,
        };
        let mixture = Mixture::fit(rows, valid, &counts, how);
        (mixture.mean_log_likelihood(valid), mixture)
    };
    let mut at = (2, 2);
    while at.0 > 0 && !affordable(COMPONENTS[at.0]) {
        at.0 -= 1;
    }
    tried.insert(at, fit(at, search.search_rounds, search.seed));
    loop {
        let here = tried[&at].0;
        let (k, s) = (at.0 as isize, at.1 as isize);
        // More trees first, since they gain most; then more or less shrinking.
        let steps = [(1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 0)];
        let neighbours = steps.into_iter().filter_map(|(dk, ds)| {
            let next = (usize::try_from(k + dk).ok()?, usize::try_from(s + ds).ok()?);
            let components = *COMPONENTS.get(next.0)?;
            let known = STRENGTHS.get(next.1).is_some();
            (known && affordable(components)).then_some(next)
        });
        // The first better neighbour will do: most steps only go on in one direction.
        let better = neighbours.into_iter().find(|next| {
            let score = tried
                .entry(*next)
                .or_insert_with(|| fit(*next, search.search_rounds, search.seed))
                .0;
            score > here
        });
        match better {
            Some(next) => at = next,
            None => break,
        }
    }
    let tried_settings = tried.len();
    let mut parts: Vec<Mixture> = Vec::new();
    let mut score = f64::NEG_INFINITY;
    for extra in 0..search.averaged.max(1) as u64 {
        let (alone, mixture) = fit(at, search.rounds, search.seed.wrapping_add(extra));
        parts.push(mixture);
        let joint = match parts.as_slice() {
            [_] => alone,
            _ => Mixture::average(parts.clone()).map_or(alone, |m| m.mean_log_likelihood(valid)),
        };
        if joint <= score {
            parts.pop();
        } else {
            score = joint;
        }
        if COMPONENTS[at.0] == 1 {
            break;
        }
    }
    let averaged = parts.len();
    let mixture = Mixture::average(parts).unwrap_or_else(|| Mixture::chow_liu(rows, 1.0));
    Learned {
        mixture,
        valid_log_likelihood: score,
        components: COMPONENTS[at.0],
        strength: STRENGTHS[at.1],
        averaged,
        tried: tried_settings,
    }
}
