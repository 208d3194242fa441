//! Integration tests of the store, in real directories.

mod cold;
mod conformance;
mod decoders;
mod faults;
mod fuzzed;
mod garbage;
mod life;
mod privileged;
mod proxy;
mod remote;
mod servers;
mod support;
