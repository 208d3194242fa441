//! What other machines serve over HTTP: requests that are bounded in time and size, and
//! container registries.
//!
//! Refuses to know components and repositories. Invariant: nothing that a server says makes
//! memory grow beyond a bound that the caller gave, and nothing that it sends panics.
#![forbid(unsafe_code)]

mod credentials;
mod error;
mod patience;
pub mod registry;
pub mod wire;

pub use error::RemoteError;
pub use patience::Patience;
