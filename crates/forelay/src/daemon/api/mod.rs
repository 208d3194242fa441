//! What clients see: the HTTP routes and the views behind them.

pub(super) mod access;
pub(super) mod accounts;
pub(super) mod audit;
pub(super) mod connections;
mod events;
mod exec;
pub(super) mod inspect;
pub(super) mod listeners;
mod metrics;
pub(super) mod pages;
mod problems;
mod server;
mod token;
