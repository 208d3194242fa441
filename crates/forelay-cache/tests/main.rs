//! Integration tests of forelay-cache: what only shows from outside.

mod allocation;
