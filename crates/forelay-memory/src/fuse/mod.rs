//! The read-only FUSE layer: wire format, the `/dev/fuse` descriptor, the mount.
//!
//! Own code instead of a crate because of takeover: no kept crate can resume a live
//! session, send `RESEND` *and* push pages with `STORE`, and a flat read-only
//! directory needs only some fifteen opcodes. Nothing in here knows files, faults or
//! who answers them; that is [`crate::shared`]'s part.

pub mod abi;
pub mod connection;
pub mod mount;
