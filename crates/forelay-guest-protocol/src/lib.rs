//! What host and guest agree on: the messages of the guest channel ([`messages`]) and
//! the frames beside them ([`frames`]), the per-VM configuration file ([`config`]), the account fragments of components and how they
//! merge ([`accounts`]), where an EROFS superblock keeps its UUID and device slots
//! ([`superblock`]), and how a boot is held for a snapshot and resumed ([`snapshot`]).
//!
//! This crate is compiled into the static guest binary, so what it depends on is in every
//! initramfs. It does no I/O and knows neither VMMs nor the store. Everything in it parses bytes that the other
//! side of a trust boundary wrote, so nothing here may panic on input.

#![forbid(unsafe_code)]

pub mod accounts;
pub mod config;
pub mod frames;
pub mod messages;
pub mod snapshot;
pub mod superblock;
