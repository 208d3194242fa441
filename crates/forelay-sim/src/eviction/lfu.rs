//! Least frequently used leaves first; counts start again when an object returns, ties go
//! to the one used longest ago.

use forelay_cache::reuse::ObjectRequest;

use super::ranked::{RankedPolicy, Ranking};

/// The policy of the module's header.
pub type Lfu = RankedPolicy<Frequency>;

/// Ranks by uses, then by the number of the latest request.
#[derive(Clone, Debug, Default)]
pub struct Frequency {
    requests: u64,
}

impl Ranking for Frequency {
    type Rank = (u64, u64);

    fn used(&mut self, _: &ObjectRequest, held: Option<(u64, u64)>) -> (u64, u64) {
        self.requests += 1;
        (held.map_or(0, |(uses, _)| uses) + 1, self.requests)
    }
}
