//! Objects held in the order of a rank; the lowest rank leaves first. What LRU, LFU,
//! GDSF and the offline bound have in common.
//!
//! Invariant: `order` and `held` hold the same objects; `used_bytes` is their sum and at
//! most `capacity_bytes`.

use std::collections::{BTreeSet, HashMap};

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

    /// Gives up the object of lowest rank; returns its rank and itself.
    pub(super) fn pop(&mut self) -> Option<(R, u32)> {
        let (rank, object) = self.order.pop_first()?;
        if let Some((_, bytes)) = self.held.remove(&object) {
            self.used_bytes -= bytes;
        }
        Some((rank, object))
    }
}
