//! The literal baseline rule: evict the least-used unpinned component until the new one
//! fits, looping until it does; never for a component larger than the budget.
//!
//! Invariant: what is chosen covers the need, or nothing is chosen.

/// A component that may be evicted.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<K> {
    /// Which one.
    pub key: K,
    /// What evicting it frees, in bytes.
    pub bytes: u64,
    /// How often it was used.
    pub uses: u64,
    /// When it was used last, in milliseconds; breaks ties, the older one leaves first.
    pub last_use_ms: i64,
}

/// The components to evict, in order, so that at least `needed_bytes` become free. Empty
/// when all of them together would not suffice.
pub fn choose<K: Ord + Copy>(mut candidates: Vec<Candidate<K>>, needed_bytes: u64) -> Vec<K> {
    candidates.retain(|candidate| candidate.bytes > 0);
    let all: u64 = candidates.iter().map(|candidate| candidate.bytes).sum();
    if all < needed_bytes {
        return Vec::new();
    }
    candidates.sort_by_key(|candidate| (candidate.uses, candidate.last_use_ms, candidate.key));
    let mut freed = 0;
    let enough = |candidate: &Candidate<K>| {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(key: u32, bytes: u64, uses: u64, last_use_ms: i64) -> Candidate<u32> {
        Candidate {
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
