//! Eviction policies, one a file, behind one trait, for the simulator and comparisons.
//!
//! A policy sees requests for objects (components, or whole profiles in unit slots) in
//! order and decides what stays. It refuses to know the future ([`min`] excepted, which
//! is a bound and says so), the clock, and what an object is.
//!
//! Contract (one suite for all, `contract_test`): the bytes held never exceed the
//! capacity; an object is held after a request for it unless it is larger than the
//! capacity or the policy declines it; a request is a hit exactly if the object was held
//! before; equal inputs give equal decisions.

#[cfg(test)]
mod contract_test;
pub mod forecast;
pub mod gdsf;
pub mod history;
pub mod least_used;
pub mod lfu;
pub mod lru;
pub mod min;
mod ranked;
pub mod s3_fifo;
pub mod trees;

/// One request for an object.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// The object, as a small dense number.
    pub object: u32,
    /// Who asks, as a small dense number.
    pub owner: u32,
    /// Size of the object in bytes; 1 for unit slots.
    pub bytes: u64,
    /// What a miss costs, in seconds; 1 for unit slots.
    pub load_s: f64,
    /// When, in milliseconds since the epoch.
    pub now_ms: i64,
}

/// Decides which objects stay in a bounded memory. See the module's header.
pub trait Policy {
    /// The policy's name, as tables and `--policy` show it.
    fn name(&self) -> &'static str;
    /// Serves a request; true if the object was held already.
    fn request(&mut self, request: &Request) -> bool;
    /// Whether an object is held.
    fn contains(&self, object: u32) -> bool;
    /// Bytes held.
    fn used_bytes(&self) -> u64;
    /// Most bytes that may be held.
    fn capacity_bytes(&self) -> u64;
}
