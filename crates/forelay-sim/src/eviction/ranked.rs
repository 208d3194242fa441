//! What LRU, LFU and GDSF have in common: the lowest rank leaves first. They differ in the rank
//! alone.

use forelay_cache::reuse::ranked::Ranked;
use forelay_cache::reuse::{EvictionPolicy, ObjectRequest};

/// What a policy that goes by rank ranks by.
pub trait Ranking: Default {
    /// A rank; the lowest leaves first.
    type Rank: Ord + Copy;

    /// The rank of an object that is requested; `held` is its rank until now.
    fn used(&mut self, request: &ObjectRequest, held: Option<Self::Rank>) -> Self::Rank;

    /// An object of that rank has made room.
    fn left(&mut self, _object: u32, _rank: Self::Rank) {}
}

/// A policy that goes by rank and keeps everything that fits.
#[derive(Clone, Debug)]
pub struct RankedPolicy<R: Ranking> {
    objects: Ranked<R::Rank>,
    ranking: R,
}

impl<R: Ranking> RankedPolicy<R> {
    /// An empty memory of `capacity_bytes`.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            objects: Ranked::new(capacity_bytes),
            ranking: R::default(),
        }
    }
}

impl<R: Ranking> EvictionPolicy for RankedPolicy<R> {
    fn request(&mut self, request: &ObjectRequest) -> bool {
        if let Some(held) = self.objects.rank(request.object) {
            let rank = self.ranking.used(request, Some(held));
            self.objects.set_rank(request.object, rank);
            return true;
        }
        if request.bytes <= self.objects.capacity_bytes() {
            while !self.objects.fits(request.bytes) {
                let Some((rank, object)) = self.objects.pop() else {
                    break;
                };
                self.ranking.left(object, rank);
            }
            let rank = self.ranking.used(request, None);
            self.objects.insert(request.object, rank, request.bytes);
        }
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
