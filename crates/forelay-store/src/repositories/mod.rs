//! The places a repository can be in; one implementation a file.

pub mod address;
pub mod directory;
pub mod limited;
pub mod mirrored;
mod oci;
mod remote;
mod retrying;
mod s3;
pub mod throttle;
