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
    /// The same without the logarithm.
    probabilities: Vec<f32>,
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
            probabilities: tables.iter().map(|ln| ln.exp()).collect(),
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

    /// Probability of the evidence (`evidence[v]` is a value or [`UNKNOWN`]), as its logarithm,
    /// and every variable's distribution given it, exactly, by two passes over the tree.
    pub fn posterior(&self, evidence: &[u32]) -> (f64, Vec<f64>) {
        let mut messages = Messages::new(self, evidence);
        messages.collect();
        messages.distribute()
    }

    /// `P(variable | parent = of_parent)`, all values.
    fn row(&self, variable: usize, of_parent: usize) -> &[f32] {
        let card = self.cards[variable] as usize;
        let row = if self.parent[variable] == ROOT {
            0
        } else {
            of_parent
        };
        let start = self.start[variable] as usize + row * card;
        &self.probabilities[start..start + card]
    }

    /// Where a variable's values are in what has a place for each value of each variable.
    fn slots(&self, variable: usize) -> std::ops::Range<usize> {
        let from = self.pull_start[variable] as usize;
        from..from + self.cards[variable] as usize
    }

    /// Where a variable's distribution starts in what [`Tree::posterior`] returns.
    pub fn slot(&self, variable: usize) -> usize {
        self.pull_start[variable] as usize
    }
}

/// Belief propagation in one tree.
struct Messages<'a> {
    tree: &'a Tree,
    /// How well each value of each variable explains the evidence below it; zero where the
    /// evidence about the variable itself excludes the value.
    up: Vec<f64>,
    /// What each variable tells its parent, per value of the parent, scaled.
    to_parent: Vec<f64>,
    message_start: Vec<usize>,
    log_scale: f64,
}

impl<'a> Messages<'a> {
    fn new(tree: &'a Tree, evidence: &[u32]) -> Self {
        let mut up = vec![1.0; tree.pull.len()];
        for (v, known) in evidence.iter().enumerate().take(tree.parent.len()) {
            if *known != UNKNOWN {
                let values = up[tree.slots(v)].iter_mut().enumerate();
                values
                    .filter(|(value, _)| *value as u32 != *known)
                    .for_each(|(_, up)| *up = 0.0);
            }
        }
        Self {
            tree,
            up,
            to_parent: Vec::new(),
            message_start: vec![0; tree.parent.len()],
            log_scale: 0.0,
        }
    }

    /// From the leaves to the roots.
    fn collect(&mut self) {
        let tree = self.tree;
        for v in tree.order.iter().rev().map(|v| *v as usize) {
            let Some(parent) = tree.parent(v) else {
                continue;
            };
            let start = self.to_parent.len();
            self.message_start[v] = start;
            for (a, slot) in tree.slots(parent).enumerate() {
                // What the evidence excludes needs no sum: profiles have hundreds of values.
                let sum = if self.up[slot] > 0.0 {
                    let up = &self.up[tree.slots(v)];
                    let row = tree.row(v, a).iter().zip(up);
                    row.map(|(p, up)| f64::from(*p) * up).sum()
                } else {
                    0.0
                };
                self.to_parent.push(sum);
            }
            let message = &mut self.to_parent[start..];
            // Evidence always has some probability (no table has a zero), so this is above zero.
            let largest = message.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
            self.log_scale += largest.ln();
            for (slot, sum) in tree.slots(parent).zip(message) {
                *sum /= largest;
                self.up[slot] *= *sum;
            }
        }
    }

    /// From the roots to the leaves: `ln P(evidence)` and all distributions.
    fn distribute(mut self) -> (f64, Vec<f64>) {
        let tree = self.tree;
        let mut belief = vec![0.0; self.up.len()];
        for v in tree.order.iter().map(|v| *v as usize) {
            let slots = tree.slots(v);
            match tree.parent(v) {
                None => {
                    for (slot, p) in slots.clone().zip(tree.row(v, 0)) {
                        belief[slot] = f64::from(*p) * self.up[slot];
                    }
                    let sum: f64 = belief[slots.clone()].iter().sum();
                    self.log_scale += sum.max(f64::MIN_POSITIVE).ln();
                }
                Some(parent) => {
                    for (a, of_parent) in tree.slots(parent).enumerate() {
                        let message = self.to_parent[self.message_start[v] + a];
                        if message <= 0.0 || belief[of_parent] <= 0.0 {
                            continue;
                        }
                        let without = belief[of_parent] / message;
                        for (slot, p) in slots.clone().zip(tree.row(v, a)) {
                            belief[slot] += without * f64::from(*p) * self.up[slot];
                        }
                    }
                }
            }
            let sum: f64 = belief[slots.clone()].iter().sum();
            if sum > 0.0 {
                belief[slots].iter_mut().for_each(|b| *b /= sum);
            }
        }
        (self.log_scale, belief)
    }
}

fn ln(p: f64) -> f32 {
    p.max(1e-12).ln() as f32
}

/// Sum of `p ln p`: the negative entropy.
fn plogp(p: &[f64]) -> f64 {
    p.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum()
}
