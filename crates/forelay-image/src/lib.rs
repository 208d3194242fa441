//! Pure formats of Forelay: digests, file trees, EROFS component and map images,
//! chunk indexes, component metadata, manifests and locks.
//!
//! Owns every byte layout that leaves a process. Refuses to know where bytes come
//! from or go to: no network, no clock, no threads, no mounts.
#![forbid(unsafe_code)]

pub mod aggregate;
pub mod bundle;
pub mod chunk;
pub mod component;
pub mod control;
pub mod digest;
pub mod erofs;
pub mod extent;
pub mod lock;
pub mod manifest;
pub mod name;
pub mod numbers;
pub mod package_status;
pub mod pages;
pub mod snapshot;
pub mod solve;
pub mod touch;
pub mod tree;
pub mod version;
pub mod watched;

pub use chunk::{Chunk, ChunkIndex};
pub use component::{Component, ComponentId};
pub use digest::{Digest, ImageUuid};
pub use extent::{Extent, PAGE_BYTES};
pub use name::{NameError, NameOf, printable};
pub use touch::{PlannedExtent, Touch};
