//! Repositories, packs, the disk cache and the fetch scheduler.
//!
//! ```text
//! image -> publish -> repository (packs, indexes, components)
//!                          |
//!            Scheduler: demand before prefetch, single flight, verified
//!                          |
//!                      disk cache -> bytes for shared memory
//! ```
//! Refuses to know shared memory, VMs and what will be needed next. Nothing leaves this
//! crate unverified.
#![forbid(unsafe_code)]

mod copy;
pub mod disk_cache;
pub mod error;
pub mod fetch;
pub mod gc;
pub mod images;
pub mod layout;
mod listing;
pub mod pack;
pub mod publish;
pub mod repositories;
pub mod repository;
pub mod sealed;
pub mod store;
pub mod verify;

pub use error::StoreError;
pub use fetch::{
    FetchConfig, FetchError, ImagePart, Limits, Prefetch, PrefetchCanceller, PrefetchItem,
    Priority, Scheduler,
};
pub use images::{ImageHold, ImageMap};
pub use repositories::address::RepositoryUrl;
pub use repositories::directory::DirectoryRepository;
pub use repositories::limited::Limited;
pub use repositories::mirrored::Mirrored;
pub use repositories::throttle::Throttled;
pub use repository::{Repository, RepositoryError, SetAside};
pub use store::{ImageReader, Store, StoreConfig};
