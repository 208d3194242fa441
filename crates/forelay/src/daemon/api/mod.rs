//! What clients see: the HTTP routes and the views behind them.

pub(super) mod accounts;
pub(super) mod connections;
mod exec;
pub(super) mod inspect;
pub(super) mod server;
