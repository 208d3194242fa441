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
pub mod ranked;
pub mod s3_fifo;
pub mod trees;

use std::fmt;

/// The policies by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`least_used`]
    LeastUsed,
    /// [`lru`]
    Lru,
    /// [`lfu`]
    Lfu,
    /// [`gdsf`]
    Gdsf,
    /// [`s3_fifo`]
    S3Fifo,
    /// [`forecast`], without prefetch
    Forecast,
    /// [`forecast`], with prefetch
    ForecastPrefetch,
    /// [`crate::plan::ByWorth`], the rule by which the planner evicts
    Planner,
    /// [`min`], which knows the future
    Min,
}

impl Kind {
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
    pub fn build(self, capacity_bytes: u64, requests: &[Request]) -> Box<dyn Policy> {
        let forecast = |prefetch| {
            let config = forecast::ForecastConfig {
                prefetch,
                ..Default::default()
            };
            Box::new(forecast::Forecast::new(capacity_bytes, config))
        };
        match self {
            Self::LeastUsed => Box::new(least_used::LeastUsed::new(capacity_bytes)),
            Self::Lru => Box::new(lru::Lru::new(capacity_bytes)),
            Self::Lfu => Box::new(lfu::Lfu::new(capacity_bytes)),
            Self::Gdsf => Box::new(gdsf::Gdsf::new(capacity_bytes)),
            Self::S3Fifo => Box::new(s3_fifo::S3Fifo::new(capacity_bytes)),
            Self::Forecast => forecast(false),
            Self::ForecastPrefetch => forecast(true),
            Self::Planner => Box::new(crate::plan::ByWorth::new(capacity_bytes)),
            Self::Min => Box::new(min::Min::new(capacity_bytes, requests)),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

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
    /// Bytes brought in before they were requested; most policies never do that.
    fn prefetched_bytes(&self) -> u64 {
        0
    }
}
