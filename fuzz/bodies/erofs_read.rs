//! Any bytes as an image: everything that the reader offers either works or says why not.

use forelay_image::erofs::read::{Image, ReadError};

/// Takes one input.
pub fn run(bytes: &[u8]) {
    let Ok(image) = Image::open(&bytes) else {
        return;
    };
    let _ = image.file_extents();
    let _ = image.lookup(b"usr/bin/x");
    let _ = image.to_tree(1 << 20);
    let _ = image.walk(|_, inode| {
        let _ = image.xattrs(inode);
        let _ = image.read_link(inode);
        Ok::<(), ReadError>(())
    });
}
