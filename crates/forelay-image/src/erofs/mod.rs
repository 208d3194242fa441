//! EROFS: the on-disk format of component images and map images.
//!
//! Own writer, reader and merger of the uncompressed subset that Forelay needs. The
//! format is that of Linux's `fs/erofs` (kernel documentation "EROFS" and the erofs
//! docs project describe it); the kernel, `fsck.erofs` and `dump.erofs` are the
//! referees in the tests.
//!
//! Owns every byte of an image. Refuses to know about mounts, devices and repositories.
//!
//! ```text
//! component image                        map image
//! +--------------------------+           +--------------------------+
//! | 1 KiB zero, superblock   |           | 1 KiB zero, superblock   |
//! | inodes, directory tails, |           | device table             |
//! | symlink targets, xattrs  |  merge    | inodes, tails, targets   |
//! | directory blocks         | ------->  | directory blocks         |
//! +--------------------------+           +--------------------------+
//! | file data, path order,   |           | data of per-VM files     |
//! | each file block-aligned  |           +--------------------------+
//! +--------------------------+           component k: blocks from its mapped address
//! ```
//!
//! Invariants: blocks are 4 KiB; inodes are extended (64-byte) ones with 32-byte-aligned
//! numbers counted from byte 0; regular files are flat and contiguous, never inline, so
//! that they can be mapped with DAX; same tree, same bytes.
//!
//! A map image addresses component data by *unified block addresses*: device slot k says
//! at which address its blocks start (`mapped_blkaddr`), and inodes stay plain flat ones.
//! Chunk-based inodes with device ids, the other way to do it, cost 32 bytes more an
//! inode and cannot be mounted as one flat disk before Linux 6.4; the reader knows both.

mod alloc;
pub mod directory;
pub mod layout;
pub mod merge;
pub mod read;
pub mod write;
pub mod xattr;
