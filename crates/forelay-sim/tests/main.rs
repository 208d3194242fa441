//! The simulator from outside: causality, determinism, recovery of known truth,
//! what any price must lead to, and, where the
//! traces are at hand, the README's reference table.

mod causality;
mod guard;
mod needs;
mod prices;
mod recovery;
mod reference;
mod synthetic;
