//! Integration tests of the store, in real directories.

mod cold;
mod decoders;
mod faults;
mod fuzzed;
mod garbage;
mod life;
mod privileged;
mod support;
