//! What running VMs use right now, as far as can be seen from outside.
//!
//! A page that a VM has faulted in, or was seen to touch for the first time, is guarded
//! for a while: evicting it under pressure would only bring it back at once. A guarded
//! page that is evicted all the same (the pool's own cap) is guarded again when it returns.
//!
//! The planner keeps a second one of these for what launches asked for lately are about to
//! touch.
//!
//! Refuses to know why something is evicted. Invariant: a use guards its pages for at
//! least the hold time and at most twice that.

use std::collections::BTreeMap;

use forelay_image::pages::{PageRun, PageSet};

use crate::names::SharedImage;

/// Pages used lately, in two generations.
#[derive(Clone, Debug, Default)]
pub(super) struct RecentUse {
    young: BTreeMap<SharedImage, PageSet>,
    old: BTreeMap<SharedImage, PageSet>,
    turned_ms: i64,
}

impl RecentUse {
    /// Notes a use.
    pub(super) fn used(&mut self, image: &SharedImage, run: PageRun) {
        if !run.is_empty() {
            self.young.entry(image.clone()).or_default().insert(run);
        }
    }

    /// Lets go of what was not used for `hold_ms`.
    pub(super) fn turn(&mut self, hold_ms: i64, now_ms: i64) {
        if now_ms.saturating_sub(self.turned_ms) >= hold_ms {
            self.old = std::mem::take(&mut self.young);
            self.turned_ms = now_ms;
        }
    }

    /// The parts of `runs` that were not used lately.
    pub(super) fn without(&self, image: &SharedImage, runs: Vec<PageRun>) -> Vec<PageRun> {
        let subtract = |runs: Vec<PageRun>, used: Option<&PageSet>| match used {
            None => runs,
            Some(used) => runs
                .into_iter()
                .flat_map(|run| used.gaps_within(run))
                .collect(),
        };
        let runs = subtract(runs, self.young.get(image));
        subtract(runs, self.old.get(image))
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::Digest;

    use super::*;
    use crate::names::Domain;

    #[test]
    fn a_use_is_held_for_one_hold_time_and_gone_after_two() {
        let image = SharedImage::new(Domain::from("d"), Digest::of(b"image"));
        let mut recently_used = RecentUse::default();
        recently_used.turn(1000, 10_000);
        recently_used.used(&image, PageRun::from(2..4));
        let all = || vec![PageRun::from(0..8)];
        let parts = vec![PageRun::from(0..2), PageRun::from(4..8)];
        assert_eq!(recently_used.without(&image, all()), parts);
        recently_used.turn(1000, 10_500);
        recently_used.turn(1000, 11_000);
        assert_eq!(
            recently_used.without(&image, all()),
            parts,
            "held in the old half"
        );
        recently_used.used(&image, PageRun::from(0..1));
        recently_used.turn(1000, 12_000);
        assert_eq!(recently_used.without(&image, all()), [PageRun::from(1..8)]);
        recently_used.turn(1000, 13_000);
        assert_eq!(recently_used.without(&image, all()), all());
    }
}
