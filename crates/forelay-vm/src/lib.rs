//! placeholder header: to be replaced by the crate's owner.
