//! Learning of structure and tables, apart from the model that it is for.
//!
//! Owns the choice of how many trees. Refuses to know names: a lesson holds numbers, and which of
//! them must keep their meaning until what was learned is adopted. Takes milliseconds to tens of
//! them, needs nothing but itself and may run on any thread.

use std::collections::BTreeSet;

use super::counts::PairCounts;
use super::data::{Rows, Schema};
use super::mixture::{Fit, Mixture};

/// Numbers of names in use.
#[derive(Clone, Debug, Default)]
pub(super) struct Used {
    pub components: BTreeSet<u16>,
    pub profiles: BTreeSet<u16>,
    pub owners: BTreeSet<u16>,
}

impl Used {
    pub fn has_component(&self, id: u16) -> bool {
        self.components.contains(&id)
    }
}

/// Launches to learn from, as [`super::Model::lesson`] gives them.
#[derive(Clone, Debug)]
pub struct Lesson {
    /// Launches observed when it was taken: which lesson it is.
    pub(super) taken_at: u64,
    pub(super) schema: Schema,
    /// Indicators and weight of each launch.
    pub(super) rows: Vec<(Vec<u32>, f32)>,
    pub(super) components: Vec<u16>,
    pub(super) used: Used,
}

/// What a lesson taught.
#[derive(Clone, Debug)]
pub struct Learned {
    pub(super) taken_at: u64,
    pub(super) mixture: Mixture,
    /// Components the mixture knows, in the order of its variables after the context.
    pub(super) components: Vec<u16>,
    pub(super) used: Used,
}

impl Lesson {
    /// Learns structure and tables.
    pub fn study(self) -> Learned {
        let part = |keep: &dyn Fn(usize) -> bool| {
            let rows = self.rows.iter().enumerate();
            let kept = rows.filter(|(i, _)| keep(*i)).map(|(_, row)| row.clone());
            Rows::new(self.schema.clone(), kept)
        };
        let all = part(&|_| true);
        let counts = PairCounts::of(&all);
        let how = |components| Fit {
            components,
            strength: 8.0,
            rounds: 12,
            seed: 1,
        };
        // Three trees are used if they forecast a fifth of the rows, kept aside, better than one.
        let (train, aside) = (part(&|i| i % 5 != 4), part(&|i| i % 5 == 4));
        let train_counts = PairCounts::of(&train);
        let score = |components| {
            let mixture = Mixture::fit(&train, &aside, &train_counts, how(components));
            mixture.mean_log_likelihood(&aside)
        };
        let trees = if self.rows.len() >= 100 && score(3) > score(1) {
            3
        } else {
            1
        };
        Learned {
            taken_at: self.taken_at,
            mixture: Mixture::fit(&all, &all, &counts, how(trees)),
            components: self.components,
            used: self.used,
        }
    }
}
