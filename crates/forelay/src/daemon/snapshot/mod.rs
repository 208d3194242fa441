//! Snapshots of this host: what each is made from, where they are kept, which one a launch
//! resumes from.
//!
//! Refuses to know how a snapshot is made and how a VM resumes: `launch` does both.

pub mod kept;
pub mod of_vm;
pub mod on_disk;
pub mod origin;
#[cfg(test)]
pub mod samples;
pub mod service;
pub mod shelf;
pub mod verified;
