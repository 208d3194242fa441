//! placeholder header: to be replaced.
fn main() {}
