//! Eviction policies, one a file.

pub mod least_used;
