//! Building components from what already exists: Debian packages, a Debian base, the
//! Debian cloud kernel, tar archives, host directories and container images.
//!
//! Each importer turns its source into a [`forelay_image::tree::Tree`] whose content
//! stays in spool files. Importers know no repository: they hand over an image.
//!
//! Invariants: the same source gives the same image digest, on any host and at any time;
//! nothing is left behind on failure (mounts live in a namespace of their own that ends
//! with the build, files in temporary directories).
#![forbid(unsafe_code)]

pub mod apt;
pub mod base;
mod build;
pub mod clean;
pub mod deb;
mod describe;
mod difference;
pub mod dir;
mod draft;
pub mod entrypoint;
mod error;
pub mod initramfs;
pub mod kernel;
mod kmod_index;
pub mod modules;
mod oci;
pub mod packages;
mod progress;
mod rootfs;
pub mod roots;
pub mod sandbox;
mod split;
pub mod spool;
pub mod stable_ids;
pub mod tar;
mod tool;
pub mod unpack;
pub mod users;
mod within;

pub use build::{BuildRequest, BuildSource, Builder, BuiltComponent, BuiltComponents};
pub use draft::{Draft, Files, Imported, Part, host_architecture};
pub use error::ImportError;
pub use oci::{ImageOptions, ImageSource, KnownLayers};
pub use packages::NEEDS_LDCONFIG;
pub use progress::{BuildPhase, Progress, Reporter};
pub use sandbox::limits::BuildLimits;

#[cfg(test)]
#[path = "debian_tests.rs"]
mod tests;

#[cfg(test)]
mod laid_tests;
