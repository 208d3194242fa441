//! Integration tests of component images and map images, with the kernel, `fsck.erofs`
//! and `dump.erofs` as referees.

mod compose;
mod host_tree;
mod hostile;
mod images;
mod kernel;
mod layers;
mod model;
mod referee;
