//! What host and guest agree on: the messages of the guest channel ([`protocol`]), the
//! per-VM configuration file ([`config`]) and where an EROFS superblock keeps its UUID and
//! device slots ([`superblock`]).
//!
//! This library is compiled into the static guest binary and into `forelay-vm`. It does no
//! I/O and knows neither VMMs nor the store. Everything in it parses bytes that the other
//! side of a trust boundary wrote, so nothing here may panic on input.

#![forbid(unsafe_code)]

pub mod config;
pub mod payload;
pub mod protocol;
pub mod superblock;
