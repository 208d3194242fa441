//! `bodies/compose.rs` as a fuzz target.
#![no_main]

#[path = "../bodies/compose.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
