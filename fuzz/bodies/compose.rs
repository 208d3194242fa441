//! Any bytes as a layer's metadata: composing gives an image that reads, or an error.

use forelay_image::Digest;
use forelay_image::erofs::merge::{ComposeOptions, Layer, compose};
use forelay_image::erofs::read::Image;
use forelay_image::tree::Tree;

/// Takes one input.
pub fn run(bytes: &[u8]) {
    // The identity must match the UUID, or nothing behind that check is reached.
    let mut digest = [0; 32];
    if let Some(uuid) = bytes.get(1024 + 48..1024 + 64) {
        digest[..16].copy_from_slice(uuid);
    }
    let blocks = bytes.get(1024 + 36..1024 + 40);
    let blocks = blocks.map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let layer = Layer {
        image: Digest::from_bytes(digest),
        image_bytes: u64::from(blocks) * 4096,
        metadata: bytes,
        chunks: None,
        bundle: None,
    };
    let layers = [layer, layer];
    if let Ok(composed) = compose(&layers, &Tree::new(), ComposeOptions::default()) {
        let image = Image::open(&composed.map_image).expect("a composed image opens");
        image.file_extents().expect("a composed image reads");
    }
}
