//! Snapshots of this host: what each is made from, where they are kept, which one a launch
//! resumes from.
//!
//! Refuses to know how a snapshot is made and how a VM resumes: `launch` does both.

pub mod of_vm;
pub mod origin;
pub mod service;
pub mod shelf;
