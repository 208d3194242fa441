//! Integration tests of shared memory against the real kernel: `/dev/fuse`, real mounts,
//! real mappings in real processes. Needs root; says so loudly where it has none.

mod charges;
mod confine;
mod content;
#[path = "../../../../xtask/src/frames.rs"]
mod frames;
mod stress;
mod support;
mod takeover;
mod vmm;
