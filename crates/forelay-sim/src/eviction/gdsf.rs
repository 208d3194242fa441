//! Greedy-Dual-Size-Frequency (Cherkasova 1998): rank = clock + uses x load time / size;
//! the clock moves up to the rank of what leaves, so that value ages.

use std::collections::HashMap;

use forelay_cache::reuse::ObjectRequest;

use super::ranked::{RankedPolicy, Ranking};

/// The policy of the module's header.
pub type Gdsf = RankedPolicy<Value>;

/// Ranks by ageing value, then by the number of the latest request.
#[derive(Clone, Debug, Default)]
pub struct Value {
    uses: HashMap<u32, u32>,
    clock: f64,
    requests: u64,
}

impl Ranking for Value {
    /// Bits of non-negative floats, which sort like the floats.
    type Rank = (u64, u64);

    fn used(&mut self, request: &ObjectRequest, _: Option<(u64, u64)>) -> (u64, u64) {
        self.requests += 1;
        let uses = self.uses.entry(request.object).or_insert(0);
        *uses += 1;
        let worth = f64::from(*uses) * request.load_s.max(0.0) / request.bytes.max(1) as f64;
        ((self.clock + worth).to_bits(), self.requests)
    }

    fn left(&mut self, object: u32, (rank, _): (u64, u64)) {
        self.clock = f64::from_bits(rank);
        self.uses.remove(&object);
    }
}
