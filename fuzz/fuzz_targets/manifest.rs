//! `bodies/manifest.rs` as a fuzz target.
#![no_main]

#[path = "../bodies/manifest.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|text: &str| body::run(text));
