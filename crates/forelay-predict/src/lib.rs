//! Forecasts: when a profile launches next, what it will need, and which parts of it.
//!
//! Owns every statistical decision of Forelay. Refuses to know clocks, files, threads and sockets:
//! each entry point takes the events and the present moment as arguments and returns numbers with
//! reasons, so that the daemon and the simulator run the very same code (DESIGN.md, decision 5).
//!
//! Invariants of the crate:
//! - deterministic: the same events in the same order give the same answer, bit for bit;
//! - causal: a launch is judged on nothing but what was observed before it;
//! - bounded: state per profile has a fixed upper size, whatever the length of the history.
#![forbid(unsafe_code)]

// The data sets' reader is shared with an example, which knows this crate by its name.
#[cfg(test)]
extern crate self as forelay_predict;

pub mod arrivals;
pub mod calibration;
pub mod needs;
pub mod rank;
pub mod resources;
pub mod time;
pub mod working_set;
