//! The simulator from outside: causality, determinism, recovery of known truth, and, where the
//! traces are at hand, the README's reference table.

mod causality;
mod guard;
mod recovery;
mod reference;
