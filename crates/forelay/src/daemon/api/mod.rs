//! What clients see: the HTTP routes and the views behind them.

pub(in crate::daemon) mod accounts;
pub(in crate::daemon) mod connections;
pub(in crate::daemon) mod inspect;
pub(in crate::daemon) mod server;
