//! Helpers to build and compose small images, and the simplest use of them.

use std::io::Cursor;

use forelay_image::Digest;
use forelay_image::bundle::Bundle;
use forelay_image::erofs::merge::{ComposeOptions, Composed, Layer, MapLayout, compose};
use forelay_image::erofs::read::{Image, ReadAt};
use forelay_image::erofs::write::{Written, write_image};
use forelay_image::tree::{Attributes, FileData, Kind, Node, Tree};

pub struct Built {
    pub bytes: Vec<u8>,
    pub written: Written,
}

pub fn build(tree: &Tree) -> Built {
    let mut out = Cursor::new(Vec::new());
    let written = write_image(tree, &mut out).unwrap();
    let bytes = out.into_inner();
    assert_eq!(bytes.len() as u64, written.image.bytes);
    Built { bytes, written }
}

impl Built {
    pub fn layer(&self) -> Layer<'_> {
        Layer {
            image: self.written.image.digest,
            image_bytes: self.written.image.bytes,
            metadata: &self.bytes[..self.written.image.metadata_bytes as usize],
            chunks: Some(&self.written.chunks),
            bundle: None,
        }
    }
}

pub fn compose_all(layers: &[&Built], per_vm: &Tree, layout: MapLayout) -> Composed {
    let layers: Vec<_> = layers.iter().map(|built| built.layer()).collect();
    compose(&layers, per_vm, ComposeOptions { layout }).unwrap()
}

pub fn file(content: &[u8]) -> Node {
    let mut attributes = Attributes::with_mode(0o644);
    attributes.mtime_s = 1_700_000_000;
    let kind = Kind::File(FileData::Bytes(content.into()));
    Node { attributes, kind }
}

pub fn tree(files: &[(&str, &[u8])]) -> Tree {
    let mut tree = Tree::new();
    for (path, content) in files {
        tree.insert_path(path.as_bytes(), file(content)).unwrap();
    }
    tree
}

fn read(image: &Image<'_>, path: &str) -> Option<Vec<u8>> {
    let inode = image.lookup(path.as_bytes()).unwrap()?;
    Some(image.read_whole(&inode, 1 << 20).unwrap())
}

#[test]
fn later_layers_win_and_own_files_stand_above_all() {
    let base = build(&tree(&[
        ("/etc/a", b"base a"),
        ("/etc/b", b"base b"),
        ("/usr/x", b"x"),
    ]));
    let top = build(&tree(&[("/etc/b", b"top b"), ("/opt/new", b"new")]));
    let own = tree(&[("/etc/hostname", b"vm"), ("/usr/x", b"own x")]);
    let composed = compose_all(&[&base, &top], &own, MapLayout::Devices);
    let components: [(Digest, &dyn ReadAt); 2] = [
        (base.written.image.digest, &base.bytes),
        (top.written.image.digest, &top.bytes),
    ];
    let image = Image::open_multi(&composed.map_image, &components).unwrap();
    assert_eq!(read(&image, "/etc/a").unwrap(), b"base a");
    assert_eq!(read(&image, "/etc/b").unwrap(), b"top b");
    assert_eq!(read(&image, "/opt/new").unwrap(), b"new");
    assert_eq!(read(&image, "/etc/hostname").unwrap(), b"vm");
    assert_eq!(read(&image, "/usr/x").unwrap(), b"own x");
    let conflicts: Vec<_> = composed
        .conflicts
        .iter()
        .map(|c| c.path.as_slice())
        .collect();
    assert_eq!(conflicts, [b"/etc/b"]);
}

#[test]
fn bundled_images_are_read_through_their_one_device() {
    let base = build(&tree(&[("/etc/a", b"base a"), ("/usr/x", b"x")]));
    let (one, two) = (
        build(&tree(&[("/opt/one", b"1")])),
        build(&tree(&[("/opt/two", b"22")])),
    );
    let image = |built: &Built| (built.written.image.digest, built.written.image.bytes);
    let bundle = Bundle::new(&[image(&one), image(&two)]).unwrap();
    let bundled = |built| Layer {
        bundle: Some(&bundle),
        ..Built::layer(built)
    };
    let layers = [bundled(&one), base.layer(), bundled(&two)];
    let composed = compose(&layers, &Tree::new(), ComposeOptions::default()).unwrap();
    assert_eq!(composed.devices.len(), 2);
    assert_eq!(composed.devices[0].image, bundle.tag());
    assert_eq!(composed.devices[0].image_bytes, bundle.bytes());
    let joined = [&one.bytes[..], &two.bytes[..]].concat();
    let devices: [(Digest, &dyn ReadAt); 2] = [
        (bundle.tag(), &joined),
        (base.written.image.digest, &base.bytes),
    ];
    let image = Image::open_multi(&composed.map_image, &devices).unwrap();
    assert_eq!(read(&image, "/opt/one").unwrap(), b"1");
    assert_eq!(read(&image, "/opt/two").unwrap(), b"22");
    assert_eq!(read(&image, "/etc/a").unwrap(), b"base a");
}
