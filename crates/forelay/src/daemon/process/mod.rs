//! The daemon's processes: holder, pinner, worker; takeover of sessions; the table's journal.

pub(in crate::daemon) mod journal;
pub(in crate::daemon) mod sessions;
pub(in crate::daemon) mod worker;
