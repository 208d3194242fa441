//! What every crate that runs on the host does in the same way: files that appear whole
//! ([`atomic_write`]) and errors in one line ([`error_chain`]).
//!
//! Refuses to know Forelay: no type of another crate stands here, and no dependency beyond
//! the standard library.
#![forbid(unsafe_code)]

mod atomic_write;
mod error_chain;

pub use atomic_write::atomic_write;
pub use error_chain::error_chain;
