//! Least recently used leaves first.

use forelay_cache::reuse::ObjectRequest;

use super::ranked::{RankedPolicy, Ranking};

/// The policy of the module's header.
pub type Lru = RankedPolicy<Recency>;

/// Ranks by the number of the latest request.
#[derive(Clone, Debug, Default)]
pub struct Recency {
    requests: u64,
}

impl Ranking for Recency {
    type Rank = u64;

    fn used(&mut self, _: &ObjectRequest, _: Option<u64>) -> u64 {
        self.requests += 1;
        self.requests
    }
}
