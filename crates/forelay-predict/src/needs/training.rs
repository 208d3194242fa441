//! The training set of the online model and what a fit makes of it, apart from the model that
//! they are for.
//!
//! Owns the split into rows to fit and rows to judge by. Refuses to know names: it holds numbers,
//! and which of them must keep their meaning until the fitted model is installed. Needs nothing
//! but itself and may run on any thread.

use std::collections::BTreeSet;

use super::data::{Rows, Schema};
use super::fit::{self, FitLimits};
use super::mixture::Mixture;

/// Launches below which none is kept aside.
const LEAST_SPLIT: usize = 100;
/// One launch in so many is kept aside to judge by.
const ASIDE: usize = 5;

/// Numbers of names in use.
#[derive(Clone, Debug, Default)]
pub(super) struct NamesInUse {
    pub components: BTreeSet<u16>,
    pub profiles: BTreeSet<u16>,
    pub owners: BTreeSet<u16>,
}

impl NamesInUse {
    pub fn has_component(&self, id: u16) -> bool {
        self.components.contains(&id)
    }
}

/// Remembered launches to fit a model to, as [`super::Model::training_set`] gives them.
#[derive(Clone, Debug)]
pub struct NeedsTraining {
    /// Launches observed when it was taken: which training set it is.
    pub(super) taken_at: u64,
    pub(super) schema: Schema,
    /// Indicators and weight of each launch, the oldest first.
    pub(super) rows: Vec<(Vec<u32>, f32)>,
    pub(super) components: Vec<u16>,
    pub(super) used: NamesInUse,
}

/// A fitted model of a training set.
#[derive(Clone, Debug)]
pub struct FittedNeeds {
    pub(super) taken_at: u64,
    pub(super) mixture: Mixture,
    /// Components the mixture knows, in the order of its variables after the context.
    pub(super) components: Vec<u16>,
    pub(super) used: NamesInUse,
}

impl NeedsTraining {
    /// Fits structure and tables: milliseconds for a host of dozens of components, a few seconds
    /// of one processor at the most ([`FitLimits`]).
    pub fn fit(self) -> FittedNeeds {
        let (train, valid) = self.split();
        FittedNeeds {
            taken_at: self.taken_at,
            mixture: fit::fit(&train, &valid, FitLimits::default()).mixture,
            components: self.components,
            used: self.used,
        }
    }

    /// The rows to fit to and those to judge by; none of the latter if there are few.
    pub(super) fn split(&self) -> (Rows, Rows) {
        let split = self.rows.len() >= LEAST_SPLIT;
        let part = |aside: bool| {
            let rows = self.rows.iter().enumerate();
            let kept = rows.filter(|(i, _)| (split && i % ASIDE == ASIDE - 1) == aside);
            Rows::new(self.schema.clone(), kept.map(|(_, row)| row.clone()))
        };
        (part(false), part(true))
    }
}
