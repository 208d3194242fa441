//! Makes a component image of each directory and one map image of them all.
//!
//! ```text
//! cargo run --example compose_dirs -- OUT_DIR DIR...
//! mount -t erofs -o ro,device=/dev/loop1,... /dev/loop0 /mnt
//! ```
//! Writes `OUT_DIR/map`, `OUT_DIR/component-N` and, as one disk, `OUT_DIR/flat`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use forelay_image::erofs::layout::BLOCK_BYTES;
use forelay_image::erofs::merge::{ComposeOptions, Layer, MapLayout, compose};
use forelay_image::erofs::write::write_image;
use forelay_image::tree::Tree;

#[allow(dead_code)]
#[path = "../tests/it/host_tree.rs"]
mod host_tree;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [out, directories @ ..] = arguments.as_slice() else {
        eprintln!("usage: compose_dirs OUT_DIR DIR...");
        std::process::exit(2);
    };
    let out = Path::new(out);
    fs::create_dir_all(out).unwrap();
    let mut built = Vec::new();
    for (index, directory) in directories.iter().enumerate() {
        let tree = host_tree::read_host_tree(Path::new(directory));
        let path = out.join(format!("component-{index}"));
        let mut file = File::create(&path).unwrap();
        let written = write_image(&tree, &mut file).unwrap();
        println!(
            "{directory}: {:?}, {} chunks",
            written.image,
            written.chunks.chunks.len()
        );
        let bytes = fs::read(&path).unwrap();
        built.push((bytes, written));
    }
    let layers: Vec<Layer<'_>> = built
        .iter()
        .map(|(bytes, written)| Layer {
            image: written.image.digest,
            image_bytes: written.image.bytes,
            metadata: &bytes[..written.image.metadata_bytes as usize],
            chunks: Some(&written.chunks),
            bundle: None,
        })
        .collect();
    let mut own = Tree::new();
    let hostname = host_tree::attributes(out, &fs::metadata(out).unwrap());
    let kind = forelay_image::tree::Kind::File(forelay_image::tree::FileData::Bytes(
        b"composed\n".as_slice().into(),
    ));
    let attributes = forelay_image::tree::Attributes {
        mode: 0o644,
        ..hostname
    };
    own.insert_path(
        b"/etc/hostname",
        forelay_image::tree::Node { attributes, kind },
    )
    .unwrap();
    for layout in [MapLayout::Devices, MapLayout::Flat] {
        let composed = compose(&layers, &own, ComposeOptions { layout }).unwrap();
        let name = match layout {
            MapLayout::Devices => "map",
            MapLayout::Flat => "flat",
        };
        println!(
            "{name}: {} bytes, {} inodes",
            composed.map_image.len(),
            composed.inodes
        );
        for conflict in composed.conflicts.iter().take(10) {
            println!("conflict: {}", String::from_utf8_lossy(&conflict.path));
        }
        fs::write(out.join(name), &composed.map_image).unwrap();
        if layout == MapLayout::Flat {
            let flat = File::options().write(true).open(out.join(name)).unwrap();
            for (device, (bytes, _)) in composed.devices.iter().zip(&built) {
                let at = u64::from(device.mapped_block) * BLOCK_BYTES;
                flat.write_all_at(bytes, at).unwrap();
            }
        }
    }
}
