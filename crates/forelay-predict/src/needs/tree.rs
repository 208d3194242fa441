//! A Bayesian network in the shape of a tree: learned by Chow and Liu's method (1968), evaluated
//! sparsely, and queried exactly by belief propagation.
//!
//! Invariant: `order` lists parents before children; each table row is a distribution with no
//! zero, so that no observation is impossible.

use super::counts::{PairCounts, Prior};
use super::data::Schema;

/// No parent.
const ROOT: u32 = u32::MAX;

/// Evidence about one variable.
pub const UNKNOWN: u32 = u32::MAX;

/// A tree-shaped (or forest-shaped) Bayesian network.
#[derive(Clone, Debug)]
pub struct Tree {
    parent: Vec<u32>,
    order: Vec<u32>,
    /// Where each variable's table starts: `ln P(value | parent's value)`, parent-major.
    start: Vec<u32>,
    tables: Vec<f32>,
    cards: Vec<u32>,
    /// `ln P` of the row of all zeros.
    zeros: f64,
    /// Per table row of value `a` of variable `i`: what the children's zeros gain or lose when `i`
    /// is `a` instead of 0. Indexed as `pull_start[i] + a`.
    pull: Vec<f32>,
    pull_start: Vec<u32>,
}

impl Tree {
    /// The tree of largest mutual information. Edges with less than `min_information` nats are
    /// left out, which makes a forest.
    ///
    /// The structure is learned under `structure`, the tables are filled under `prior`.
    pub fn learn(
        counts: &PairCounts,
        schema: &Schema,
        structure: Prior<'_>,
        prior: Prior<'_>,
        min_information: f64,
    ) -> Self {
        let n = schema.variables();
        let mut margin = Vec::new();
        let mut entropies = Vec::with_capacity(n);
        for v in 0..n {
            structure.marginal(counts, schema, v, &mut margin);
            entropies.push(plogp(&margin));
        }
        let (mut joint, mut scratch) = (Vec::new(), Vec::new());
        let mut parent = vec![ROOT; n];
        let mut order = Vec::with_capacity(n);
        let mut best = vec![(f64::NEG_INFINITY, ROOT); n];
        let mut outside: Vec<u32> = (0..n as u32).collect();
        // Prim's method: the tree grows by the edge of most information.
        while !outside.is_empty() {
            let at = (1..outside.len()).fold(0, |at, i| {
                let better = best[outside[i] as usize].0 > best[outside[at] as usize].0;
                if better { i } else { at }
            });
            let next = outside.remove(at) as usize;
            let (information, from) = best[next];
            if from != ROOT && information >= min_information {
                parent[next] = from;
            }
            order.push(next as u32);
            for other in &outside {
                let other = *other as usize;
                structure.joint(counts, schema, (next, other), &mut joint, &mut scratch);
                // I(X;Y) = H(X) + H(Y) - H(X,Y); plogp is negative entropy.
                let information = plogp(&joint) - entropies[next] - entropies[other];
                if information > best[other].0 {
                    best[other] = (information, next as u32);
                }
            }
        }
        Self::with_structure(parent, order, counts, schema, prior)
    }

    /// A network of unconnected variables.
    pub fn independent(counts: &PairCounts, schema: &Schema, prior: Prior<'_>) -> Self {
        let n = schema.variables();
        let order = (0..n as u32).collect();
        Self::with_structure(vec![ROOT; n], order, counts, schema, prior)
    }

    fn with_structure(
        parent: Vec<u32>,
        order: Vec<u32>,
        counts: &PairCounts,
        schema: &Schema,
        prior: Prior<'_>,
    ) -> Self {
        let n = parent.len();
        let mut start = vec![0; n];
        let mut tables = Vec::new();
        let (mut joint, mut scratch) = (Vec::new(), Vec::new());
        for v in 0..n {
            start[v] = tables.len() as u32;
            if parent[v] == ROOT {
                prior.marginal(counts, schema, v, &mut joint);
                tables.extend(joint.iter().map(|p| ln(*p)));
                continue;
            }
            let edge = (parent[v] as usize, v);
            prior.joint(counts, schema, edge, &mut joint, &mut scratch);
            for row in joint.chunks(schema.card(v)) {
                let sum: f64 = row.iter().sum();
                tables.extend(row.iter().map(|p| ln(p / sum)));
            }
        }
        let cards = (0..n).map(|v| schema.card(v) as u32).collect();
        let mut tree = Self {
            parent,
            order,
            start,
            tables,
            cards,
            zeros: 0.0,
            pull: Vec::new(),
            pull_start: Vec::new(),
        };
        tree.prepare();
        tree
    }

    /// Sums that make sparse evaluation possible.
    fn prepare(&mut self) {
        let n = self.parent.len();
        self.pull_start = Vec::with_capacity(n);
        let mut size = 0;
        for card in &self.cards {
            self.pull_start.push(size);
            size += card;
        }
        self.pull = vec![0.0; size as usize];
        self.zeros = 0.0;
        for v in 0..n {
            self.zeros += f64::from(self.log_p(v, 0, 0));
            let parent = self.parent[v];
            if parent == ROOT {
                continue;
            }
            let base = self.log_p(v, 0, 0);
            for a in 1..self.cards[parent as usize] {
                let gain = self.log_p(v, 0, a as usize) - base;
                self.pull[(self.pull_start[parent as usize] + a) as usize] += gain;
            }
        }
    }

    /// `ln P(variable = value | parent = of_parent)`.
    fn log_p(&self, variable: usize, value: usize, of_parent: usize) -> f32 {
        let row = if self.parent[variable] == ROOT {
            0
        } else {
            of_parent
        };
        self.tables[self.start[variable] as usize + row * self.cards[variable] as usize + value]
    }

    /// The parent of a variable.
    pub fn parent(&self, variable: usize) -> Option<usize> {
        (self.parent[variable] != ROOT).then(|| self.parent[variable] as usize)
    }

    /// `ln P(row)`. `values` is the row in dense form, zeros included.
    pub fn log_likelihood(&self, schema: &Schema, row: &[u32], values: &[u8]) -> f64 {
        let mut sum = self.zeros;
        for indicator in row {
            let (v, value) = schema.value(*indicator);
            let parent = self.parent[v];
            let of_parent = if parent == ROOT {
                0
            } else {
                usize::from(values[parent as usize])
            };
            let own = self.log_p(v, value, of_parent) - self.log_p(v, 0, of_parent);
            sum += f64::from(own + self.pull[self.pull_start[v] as usize + value]);
        }
        sum
    }

    /// By how much `ln P` of a complete row changes if a variable of two values takes the other
    /// value, for every variable.
    pub fn flips(&self, values: &[u8], out: &mut Vec<f32>) {
        out.clear();
        out.resize(values.len(), 0.0);
        for v in 0..values.len() {
            let value = usize::from(values[v]);
            let other = 1 - value.min(1);
            let parent = self.parent[v];
            let of_parent = match parent {
                ROOT => 0,
                p => usize::from(values[p as usize]),
            };
            out[v] += self.log_p(v, other, of_parent) - self.log_p(v, value, of_parent);
            if parent != ROOT {
                let p = parent as usize;
                let turned = 1 - usize::from(values[p]).min(1);
                out[p] += self.log_p(v, value, turned) - self.log_p(v, value, of_parent);
            }
        }
    }

    /// Probability of the evidence (`evidence[v]` is a value or [`UNKNOWN`]), as its logarithm,
    /// and every variable's distribution given it, exactly, by two passes over the tree.
    pub fn posterior(&self, evidence: &[u32]) -> (f64, Vec<f64>) {
        let size = self.pull.len();
        let n = self.parent.len();
        let mut up = vec![1.0_f64; size];
        let mut to_parent: Vec<f64> = Vec::new();
        let mut message_start = vec![0_usize; n];
        let mut log_scale = 0.0;
        let slot = |v: usize| self.pull_start[v] as usize;
        let card = |v: usize| self.cards[v] as usize;
        for v in 0..n {
            if let Some(known) = evidence.get(v).filter(|e| **e != UNKNOWN) {
                for value in 0..card(v) {
                    if value as u32 != *known {
                        up[slot(v) + value] = 0.0;
                    }
                }
            }
        }
        for v in self.order.iter().rev().map(|v| *v as usize) {
            let Some(parent) = self.parent(v) else {
                continue;
            };
            message_start[v] = to_parent.len();
            let mut largest: f64 = 0.0;
            for a in 0..card(parent) {
                let sum = self.expect(v, a, &up[slot(v)..slot(v) + card(v)]);
                largest = largest.max(sum);
                to_parent.push(sum);
            }
            // Evidence always has some probability (no table has a zero), so this is above zero.
            let largest = largest.max(f64::MIN_POSITIVE);
            log_scale += largest.ln();
            for a in 0..card(parent) {
                let message = &mut to_parent[message_start[v] + a];
                *message /= largest;
                up[slot(parent) + a] *= *message;
            }
        }
        let mut belief = vec![0.0; size];
        for v in self.order.iter().map(|v| *v as usize) {
            let (from, to) = (slot(v), slot(v) + card(v));
            match self.parent(v) {
                None => {
                    for value in 0..card(v) {
                        belief[from + value] =
                            f64::from(self.log_p(v, value, 0)).exp() * up[from + value];
                    }
                    let sum: f64 = belief[from..to].iter().sum();
                    log_scale += sum.max(f64::MIN_POSITIVE).ln();
                }
                Some(parent) => {
                    for a in 0..card(parent) {
                        let message = to_parent[message_start[v] + a];
                        if message <= 0.0 {
                            continue;
                        }
                        let without = belief[slot(parent) + a] / message;
                        for value in 0..card(v) {
                            belief[from + value] += without
                                * f64::from(self.log_p(v, value, a)).exp()
                                * up[from + value];
                        }
                    }
                }
            }
            let sum: f64 = belief[from..to].iter().sum();
            if sum > 0.0 {
                belief[from..to].iter_mut().for_each(|b| *b /= sum);
            }
        }
        (log_scale, belief)
    }

    fn expect(&self, v: usize, of_parent: usize, up: &[f64]) -> f64 {
        up.iter()
            .enumerate()
            .filter(|(_, u)| **u > 0.0)
            .map(|(value, u)| f64::from(self.log_p(v, value, of_parent)).exp() * u)
            .sum()
    }

    /// Where a variable's distribution starts in what [`Tree::posterior`] returns.
    pub fn slot(&self, variable: usize) -> usize {
        self.pull_start[variable] as usize
    }
}

fn ln(p: f64) -> f32 {
    p.max(1e-12).ln() as f32
}

/// Sum of `p ln p`: the negative entropy.
fn plogp(p: &[f64]) -> f64 {
    p.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum()
}
