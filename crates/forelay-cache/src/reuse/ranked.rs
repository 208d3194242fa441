//! Objects held in the order of a rank; the lowest rank leaves first.
//!
//! Invariant: `order` and `held` hold the same objects; `used_bytes` is their sum and at
//! most `capacity_bytes`.

use std::collections::{BTreeSet, HashMap};

/// Objects in the order of a rank.
#[derive(Clone, Debug)]
pub struct Ranked<R> {
    capacity_bytes: u64,
    used_bytes: u64,
    held: HashMap<u32, (R, u64)>,
    order: BTreeSet<(R, u32)>,
}

impl<R: Ord + Copy> Ranked<R> {
    /// An empty memory.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            used_bytes: 0,
            held: HashMap::new(),
            order: BTreeSet::new(),
        }
    }

    /// Most bytes that may be held.
    pub const fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Bytes held.
    pub const fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    /// Whether an object is held.
    pub fn contains(&self, object: u32) -> bool {
        self.held.contains_key(&object)
    }

    /// The rank of a held object.
    pub fn rank(&self, object: u32) -> Option<R> {
        self.held.get(&object).map(|held| held.0)
    }

    /// Ranks a held object again.
    pub fn set_rank(&mut self, object: u32, rank: R) {
        if let Some(held) = self.held.get_mut(&object) {
            self.order.remove(&(held.0, object));
            held.0 = rank;
            self.order.insert((rank, object));
        }
    }

    /// Holds a new object; the caller has made room.
    pub fn insert(&mut self, object: u32, rank: R, bytes: u64) {
        debug_assert!(self.fits(bytes) && !self.contains(object));
        self.held.insert(object, (rank, bytes));
        self.order.insert((rank, object));
        self.used_bytes += bytes;
    }

    /// Whether so many bytes more may be held.
    pub const fn fits(&self, bytes: u64) -> bool {
        self.used_bytes.saturating_add(bytes) <= self.capacity_bytes
    }

    /// Ranks and sizes, lowest rank first.
    pub fn ascending(&self) -> impl Iterator<Item = (R, u64)> + '_ {
        self.order
            .iter()
            .map(|(rank, object)| (*rank, self.held[object].1))
    }

    /// The object of lowest rank.
    pub fn lowest(&self) -> Option<(R, u32)> {
        self.order.first().copied()
    }

    /// The objects, lowest rank first.
    pub fn objects(&self) -> impl Iterator<Item = u32> + '_ {
        self.order.iter().map(|(_, object)| *object)
    }

    /// Gives up an object.
    pub fn remove(&mut self, object: u32) {
        if let Some((rank, bytes)) = self.held.remove(&object) {
            self.order.remove(&(rank, object));
            self.used_bytes -= bytes;
        }
    }

    /// Gives up the object of lowest rank; returns its rank and itself.
    pub fn pop(&mut self) -> Option<(R, u32)> {
        let (rank, object) = self.lowest()?;
        self.remove(object);
        Some((rank, object))
    }
}
