//! The Forelay host daemon and the `forelay` command.
//!
//! Owns orchestration: it ties the store, shared memory, forecasts, the planner and the
//! VMM together. Each of these knows nothing of the others; only this crate knows all.
#![forbid(unsafe_code)]

mod aggregates;
pub mod api;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod exec_frames;
pub mod history;
pub mod host_stats;
pub mod recipe;
mod stacked;
mod units;
