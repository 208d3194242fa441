//! Memory decisions of Forelay: the mapping table, the plan (admission, prefetch,
//! eviction), expected reuse, accounting and the adaptive budget.
//!
//! Owns what shall be in shared memory and what is. Refuses to know the clock, files,
//! sockets and threads: events and times come in, actions go out, so the daemon and
//! the simulator run the same code.
#![forbid(unsafe_code)]

pub mod accounting;
pub mod budget;
pub mod mapping_table;
pub mod names;
pub mod plan;
pub mod reuse;

pub use mapping_table::MappingTable;
pub use names::{DeviceImage, Domain, ProfileName, SharedImage, VmName};
pub use plan::{Planner, PlannerEvent};
