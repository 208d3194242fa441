//! Objects held in the order of a rank; the lowest rank leaves first. What LRU, LFU,
//! GDSF and the offline bound have in common; the first three differ in the rank alone.
//!
//! Invariant: `order` and `held` hold the same objects; `used_bytes` is their sum and at
//! most `capacity_bytes`.

use std::collections::{BTreeSet, HashMap};

use super::{Policy, Request};

/// What a policy that goes by rank ranks by.
pub trait Ranking: Default {
    /// A rank; the lowest leaves first.
    type Rank: Ord + Copy;

    /// The policy's name.
    const NAME: &'static str;

    /// The rank of an object that is requested; `held` is its rank until now.
    fn used(&mut self, request: &Request, held: Option<Self::Rank>) -> Self::Rank;

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

impl<R: Ranking> Policy for RankedPolicy<R> {
    fn name(&self) -> &'static str {
        R::NAME
    }

    fn request(&mut self, request: &Request) -> bool {
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

/// Objects in the order of a rank.
#[derive(Clone, Debug)]
pub(super) struct Ranked<R> {
    capacity_bytes: u64,
    used_bytes: u64,
    held: HashMap<u32, (R, u64)>,
    order: BTreeSet<(R, u32)>,
}

impl<R: Ord + Copy> Ranked<R> {
    pub(super) fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            used_bytes: 0,
            held: HashMap::new(),
            order: BTreeSet::new(),
        }
    }

    pub(super) const fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    pub(super) const fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    pub(super) fn contains(&self, object: u32) -> bool {
        self.held.contains_key(&object)
    }

    pub(super) fn rank(&self, object: u32) -> Option<R> {
        self.held.get(&object).map(|held| held.0)
    }

    /// Ranks a held object anew.
    pub(super) fn set_rank(&mut self, object: u32, rank: R) {
        if let Some(held) = self.held.get_mut(&object) {
            self.order.remove(&(held.0, object));
            held.0 = rank;
            self.order.insert((rank, object));
        }
    }

    /// Holds a new object; the caller has made room.
    pub(super) fn insert(&mut self, object: u32, rank: R, bytes: u64) {
        debug_assert!(self.fits(bytes) && !self.contains(object));
        self.held.insert(object, (rank, bytes));
        self.order.insert((rank, object));
        self.used_bytes += bytes;
    }

    pub(super) const fn fits(&self, bytes: u64) -> bool {
        self.used_bytes.saturating_add(bytes) <= self.capacity_bytes
    }

    /// Ranks and sizes, lowest rank first.
    pub(super) fn ascending(&self) -> impl Iterator<Item = (R, u64)> + '_ {
        self.order
            .iter()
            .map(|(rank, object)| (*rank, self.held[object].1))
    }

    /// The object of lowest rank.
    pub(super) fn lowest(&self) -> Option<(R, u32)> {
        self.order.first().copied()
    }

    /// The objects, lowest rank first.
    pub(super) fn objects(&self) -> impl Iterator<Item = u32> + '_ {
        self.order.iter().map(|(_, object)| *object)
    }

    /// Gives up an object.
    pub(super) fn remove(&mut self, object: u32) {
        if let Some((rank, bytes)) = self.held.remove(&object) {
            self.order.remove(&(rank, object));
            self.used_bytes -= bytes;
        }
    }

    /// Gives up the object of lowest rank; returns its rank and itself.
    pub(super) fn pop(&mut self) -> Option<(R, u32)> {
        let (rank, object) = self.lowest()?;
        self.remove(object);
        Some((rank, object))
    }
}
