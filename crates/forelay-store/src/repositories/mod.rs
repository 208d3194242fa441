//! The places a repository can be in; one implementation a file.

pub mod directory;
pub mod limited;
pub mod throttle;
