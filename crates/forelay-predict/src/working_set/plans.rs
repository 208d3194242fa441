//! Plans that were made, kept for as long as what they rest on stays as it is.
//!
//! Invariant: a kept plan is the one that would be made now.

use std::collections::BTreeMap;
use std::sync::Arc;

use forelay_image::Digest;

use super::{Expectation, WorkingSets};

/// Plans by profile and images.
#[derive(Clone, Debug, Default)]
pub struct Plans {
    /// Of which revision of the working sets.
    revision: u64,
    kept: BTreeMap<(String, Vec<Digest>), Arc<[Expectation]>>,
}

impl Plans {
    /// What [`WorkingSets::plan`] says.
    pub fn plan(
        &mut self,
        sets: &WorkingSets,
        profile: &str,
        images: &[Digest],
    ) -> Arc<[Expectation]> {
        if self.revision != sets.revision() {
            self.revision = sets.revision();
            self.kept.clear();
        }
        let kept = self.kept.entry((profile.to_owned(), images.to_vec()));
        let plan = kept.or_insert_with(|| sets.plan(profile, images).into());
        Arc::clone(plan)
    }
}
