//! `bodies/erofs_read.rs` as a fuzz target.
#![no_main]

#[path = "../bodies/erofs_read.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
