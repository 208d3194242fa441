//! Offline bounds: they look into the future and are for comparison only.
//!
//! [`Min`] is Belady's rule (what is needed last leaves first), optimal for unit sizes
//! and costs. [`cold_bound`] bounds the cold time of any policy when sizes and load
//! times differ: it relaxes "fits at every moment" to "fits on average", as PFOO-L
//! (Berger, Beckmann, Harchol-Balter 2018) does.

use std::collections::HashMap;

use forelay_cache::reuse::ranked::Ranked;
use forelay_cache::reuse::{EvictionPolicy, ObjectRequest};

/// Belady's rule.
#[derive(Clone, Debug)]
pub struct Min {
    /// Rank: the complement of the position of the next request.
    objects: Ranked<u64>,
    next: Vec<u64>,
    at: usize,
}

/// For each request the position of the next one for the same object, or `u64::MAX`.
fn next_requests(requests: &[ObjectRequest]) -> Vec<u64> {
    let mut next = vec![u64::MAX; requests.len()];
    let mut seen = HashMap::new();
    for (at, request) in requests.iter().enumerate().rev() {
        if let Some(later) = seen.insert(request.object, at as u64) {
            next[at] = later;
        }
    }
    next
}

impl Min {
    /// An empty memory of `capacity_bytes` that will see exactly `requests`.
    pub fn new(capacity_bytes: u64, requests: &[ObjectRequest]) -> Self {
        Self {
            objects: Ranked::new(capacity_bytes),
            next: next_requests(requests),
            at: 0,
        }
    }
}

impl EvictionPolicy for Min {
    fn request(&mut self, request: &ObjectRequest) -> bool {
        let next = self.next.get(self.at).copied().unwrap_or(u64::MAX);
        self.at += 1;
        let rank = u64::MAX - next;
        if self.objects.contains(request.object) {
            self.objects.set_rank(request.object, rank);
            return true;
        }
        // What is needed later than everything held is not kept at all.
        while !self.objects.fits(request.bytes) {
            match self.objects.lowest() {
                Some((lowest, _)) if lowest < rank => self.objects.pop(),
                _ => return false,
            };
        }
        self.objects.insert(request.object, rank, request.bytes);
        false
    }

    fn contains(&self, object: u32) -> bool {
        self.objects.contains(object)
    }

    fn used_bytes(&self) -> u64 {
        self.objects.used_bytes()
    }

    fn capacity_bytes(&self) -> u64 {
        self.objects.capacity_bytes()
    }
}

/// Least cold time, in seconds, that any policy without prefetch could reach on
/// `requests` with `capacity_bytes`. Time is counted in requests.
pub fn cold_bound(capacity_bytes: u64, requests: &[ObjectRequest]) -> f64 {
    let next = next_requests(requests);
    let mut room = capacity_bytes as f64 * requests.len() as f64;
    let mut cold_s: f64 = requests.iter().map(|request| request.load_s).sum();
    let mut stays: Vec<(f64, f64)> = Vec::new();
    for (at, (request, next)) in requests.iter().zip(&next).enumerate() {
        // A load that costs nothing saves nothing; without it every ratio below is finite.
        if *next == u64::MAX || request.bytes > capacity_bytes || request.load_s <= 0.0 {
            continue;
        }
        let area = request.bytes as f64 * (*next - at as u64) as f64;
        stays.push((area, request.load_s));
    }
    stays.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    for (area, saved_s) in stays {
        let share = if area > 0.0 {
            (room / area).min(1.0)
        } else {
            1.0
        };
        cold_s -= saved_s * share;
        room -= area * share;
        if room <= 0.0 {
            break;
        }
    }
    cold_s
}
