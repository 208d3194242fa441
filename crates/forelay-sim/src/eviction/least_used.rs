//! The literal baseline rule over whole components: the least-used one leaves until the new one
//! fits, never for a component larger than the memory.

use std::collections::{BTreeMap, HashMap};

use forelay_cache::reuse::{EvictionPolicy, ObjectRequest};

/// A component that may be evicted.
#[derive(Clone, Copy, Debug)]
struct Evictable<K> {
    /// Which one.
    key: K,
    /// What evicting it frees, in bytes.
    bytes: u64,
    /// How often it was used.
    uses: u64,
    /// When it was used last, in milliseconds; breaks ties, the older one leaves first.
    last_use_ms: i64,
}

/// The components to evict, in order, so that at least `needed_bytes` become free. Empty
/// when all of them together would not suffice.
fn choose<K: Ord + Copy>(mut candidates: Vec<Evictable<K>>, needed_bytes: u64) -> Vec<K> {
    candidates.retain(|candidate| candidate.bytes > 0);
    let all: u64 = candidates.iter().map(|candidate| candidate.bytes).sum();
    if all < needed_bytes {
        return Vec::new();
    }
    candidates.sort_by_key(|candidate| (candidate.uses, candidate.last_use_ms, candidate.key));
    let mut freed = 0;
    let enough = |candidate: &Evictable<K>| {
        let wanted = freed < needed_bytes;
        freed += candidate.bytes;
        wanted
    };
    candidates
        .into_iter()
        .take_while(enough)
        .map(|candidate| candidate.key)
        .collect()
}

/// The rule as a policy over whole components.
#[derive(Clone, Debug)]
pub struct LeastUsed {
    capacity_bytes: u64,
    used_bytes: u64,
    held: BTreeMap<u32, Evictable<u32>>,
    /// Uses of every component ever seen: they survive its eviction.
    uses: HashMap<u32, u64>,
}

impl LeastUsed {
    /// An empty memory of `capacity_bytes`.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            used_bytes: 0,
            held: BTreeMap::new(),
            uses: HashMap::new(),
        }
    }
}

impl EvictionPolicy for LeastUsed {
    fn request(&mut self, request: &ObjectRequest) -> bool {
        let uses = self.uses.entry(request.object).or_insert(0);
        *uses += 1;
        let candidate = Evictable {
            key: request.object,
            bytes: request.bytes,
            uses: *uses,
            last_use_ms: request.now_ms,
        };
        if let Some(held) = self.held.get_mut(&request.object) {
            (held.uses, held.last_use_ms) = (candidate.uses, candidate.last_use_ms);
            return true;
        }
        if request.bytes > self.capacity_bytes {
            return false;
        }
        let lacking = (self.used_bytes + request.bytes).saturating_sub(self.capacity_bytes);
        if lacking > 0 {
            for key in choose(self.held.values().copied().collect(), lacking) {
                if let Some(gone) = self.held.remove(&key) {
                    self.used_bytes -= gone.bytes;
                }
            }
        }
        self.used_bytes += request.bytes;
        self.held.insert(request.object, candidate);
        false
    }

    fn contains(&self, object: u32) -> bool {
        self.held.contains_key(&object)
    }

    fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(key: u32, bytes: u64, uses: u64, last_use_ms: i64) -> Evictable<u32> {
        Evictable {
            key,
            bytes,
            uses,
            last_use_ms,
        }
    }

    #[test]
    fn loops_until_it_fits_and_never_evicts_in_vain() {
        let all = vec![
            candidate(1, 10, 5, 0),
            candidate(2, 10, 1, 9),
            candidate(3, 10, 1, 3),
            candidate(4, 0, 0, 0),
        ];
        assert_eq!(choose(all.clone(), 1), [3]);
        assert_eq!(choose(all.clone(), 11), [3, 2]);
        assert_eq!(choose(all.clone(), 30), [3, 2, 1]);
        assert_eq!(choose(all.clone(), 31), [0u32; 0]);
        assert_eq!(choose(all, 0), [0u32; 0]);
    }
}
