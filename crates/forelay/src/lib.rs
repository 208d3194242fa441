//! The parts of the `forelay` host daemon that tests and benches reach without the command.
//!
//! Owns nothing itself; see the modules.
#![forbid(unsafe_code)]

pub mod history;
