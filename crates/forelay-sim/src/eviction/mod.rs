//! Eviction policies behind one trait: baselines, bounds, and the two that Forelay has.
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
pub mod gdsf;
pub mod least_used;
pub mod lfu;
pub mod lru;
pub mod min;
pub mod ranked;

use std::fmt;

use forelay_cache::plan::ByWorth;
pub use forelay_cache::reuse::EvictionPolicy;
use forelay_cache::reuse::s3_fifo::S3Fifo;
use forelay_cache::reuse::{ObjectRequest, ReuseMemory, ReuseSettings};

/// The policies by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvictionKind {
    /// [`least_used`]
    LeastUsed,
    /// [`lru`]
    Lru,
    /// [`lfu`]
    Lfu,
    /// [`gdsf`]
    Gdsf,
    /// [`S3Fifo`]
    S3Fifo,
    /// [`ReuseMemory`], without prefetch
    Forecast,
    /// [`ReuseMemory`], with prefetch
    ForecastPrefetch,
    /// [`ByWorth`], the rule by which the planner evicts
    Planner,
    /// [`min`], which knows the future
    Min,
}

impl EvictionKind {
    /// All of them, the bound last.
    pub const ALL: [Self; 9] = [
        Self::LeastUsed,
        Self::Lru,
        Self::Lfu,
        Self::Gdsf,
        Self::S3Fifo,
        Self::Forecast,
        Self::ForecastPrefetch,
        Self::Planner,
        Self::Min,
    ];

    /// The name, as tables and `--policy` show it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LeastUsed => "least-used",
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::Gdsf => "gdsf",
            Self::S3Fifo => "s3-fifo",
            Self::Forecast => "forecast",
            Self::ForecastPrefetch => "forecast+prefetch",
            Self::Planner => "planner",
            Self::Min => "min",
        }
    }

    /// The policy of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// An empty memory of `capacity_bytes` under this policy. `requests` is what it will be
    /// asked for; only the bound looks at them.
    pub fn build(self, capacity_bytes: u64, requests: &[ObjectRequest]) -> Box<dyn EvictionPolicy> {
        let forecast = |prefetch| {
            let config = ReuseSettings {
                prefetch,
                ..Default::default()
            };
            Box::new(ReuseMemory::new(capacity_bytes, config))
        };
        match self {
            Self::LeastUsed => Box::new(least_used::LeastUsed::new(capacity_bytes)),
            Self::Lru => Box::new(lru::Lru::new(capacity_bytes)),
            Self::Lfu => Box::new(lfu::Lfu::new(capacity_bytes)),
            Self::Gdsf => Box::new(gdsf::Gdsf::new(capacity_bytes)),
            Self::S3Fifo => Box::new(S3Fifo::new(capacity_bytes)),
            Self::Forecast => forecast(false),
            Self::ForecastPrefetch => forecast(true),
            Self::Planner => Box::new(ByWorth::new(capacity_bytes)),
            Self::Min => Box::new(min::Min::new(capacity_bytes, requests)),
        }
    }
}

impl fmt::Display for EvictionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
