//! Shared memory on Linux: one copy of each component image in the host's page cache,
//! mapped read-only into every VM that uses it.
//!
//! Owns the FUSE mount, its session across daemons (holder), pins (pinner), push and
//! eviction, observation of touched pages, memory pressure, and the hints and confinement
//! with which VMMs are started. Refuses to know the store, the cache policy and VMs: it is told
//! which bytes go where and asks a [`FaultHandler`] for those that are missing. Threads
//! only, no async runtime. The one crate with unsafe code besides the guest.

pub mod command_hints;
pub mod confine;
pub mod connect_filter;
pub mod counters;
pub mod files;
pub mod fuse;
pub mod holder;
pub mod mapping;
pub mod observe;
mod packet;
pub mod pinner;
pub mod pressure;
pub mod private_pages;
mod session;
mod shared;

pub use counters::Counters;
pub use files::{AddFileError, FileKey, FileSpec};
pub use fuse::mount::MountError;
pub use session::{AnswerFailure, Fault, FaultHandler, Reply, ReplyError, WaitingRead};
pub use shared::{Config, MemoryError, Session, SharedMemory, StartError};
