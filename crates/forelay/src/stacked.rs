//! Component images that are one tree of a VM's: a component's alone, or all layers of a
//! container image.
//!
//! Owns lookups in layers over each other: their deletions hold, and so do opaque directories.
//! No symbolic link is followed. An error names the component that it is in by its place among
//! all of the VM.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use forelay_image::erofs::layout::FileType;
use forelay_image::erofs::read::{Image, Inode, ReadAt, ReadError};
use forelay_image::erofs::xattr::OPAQUE;
use forelay_image::tree::split_path;
use forelay_image::{ChunkIndex, Digest};

/// One component's image: metadata at hand, content where it is.
pub struct Layer<'a> {
    /// Its place among the components of the VM.
    pub number: usize,
    pub metadata: &'a [u8],
    pub chunks: &'a ChunkIndex,
    pub reader: &'a dyn ReadAt,
}

impl ReadAt for Layer<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        match offset < self.metadata.len() as u64 {
            true => self.metadata.read_at(buffer, offset),
            false => self.reader.read_at(buffer, offset),
        }
    }

    fn size(&self) -> std::io::Result<u64> {
        self.reader.size()
    }
}

/// What was read of components; an error names its component.
pub type InLayer<T> = Result<T, (usize, ReadError)>;

/// A node of a stack: its image's place in that, highest first, and its inode number.
pub type FilePlace = (usize, u64);

/// Images over each other.
pub struct Stacked<'a> {
    /// The highest first.
    images: Vec<(usize, Image<'a>, &'a ChunkIndex)>,
}

/// A file, or the like, of a stack.
pub struct FoundFile {
    /// Its image.
    image: usize,
    pub inode: Inode,
}

/// How far a path leads in one of the images.
enum LayerWay {
    /// To this; the flag says that nothing of it is merged with what lies below.
    Here(Inode, bool),
    /// Nowhere, and on in the images below.
    On,
    /// Nowhere, and what lies below is hidden.
    Hidden,
}

impl<'a> Stacked<'a> {
    /// Opens the images of layers, the lowest first.
    pub fn open(layers: &'a [Layer<'a>]) -> InLayer<Self> {
        let open = layers.iter().rev().map(|layer| {
            let image = Image::open(layer).map_err(|error| (layer.number, error));
            image.map(|image| (layer.number, image, layer.chunks))
        });
        let images: InLayer<Vec<_>> = open.collect();
        images.map(|images| Self { images })
    }

    /// What is at a path, if anything is.
    pub fn find(&self, path: &str) -> InLayer<Option<FoundFile>> {
        for image in 0..self.images.len() {
            match self.way(image, path)? {
                LayerWay::Here(inode, _) if inode.record.is_whiteout() => return Ok(None),
                LayerWay::Here(inode, _) => return Ok(Some(FoundFile { image, inode })),
                LayerWay::On => {}
                LayerWay::Hidden => return Ok(None),
            }
        }
        Ok(None)
    }

    /// What the directory at a path has, if there is one.
    pub fn folder(&self, path: &str) -> InLayer<HashMap<Vec<u8>, FilePlace>> {
        let mut names: HashMap<Vec<u8>, Option<FilePlace>> = HashMap::new();
        for image in 0..self.images.len() {
            let (inode, is_opaque) = match self.way(image, path)? {
                LayerWay::Here(inode, is_opaque) => (inode, is_opaque),
                LayerWay::On => continue,
                LayerWay::Hidden => break,
            };
            if inode.record.file_type != FileType::Directory {
                break;
            }
            let entries = self.images[image].1.read_dir(&inode);
            for entry in entries.map_err(self.failed(image))? {
                if let Entry::Vacant(free) = names.entry(entry.name) {
                    let place = (image, entry.nid);
                    let deleted =
                        self.images.len() > 1 && self.at(place)?.inode.record.is_whiteout();
                    free.insert((!deleted).then_some(place));
                }
            }
            if is_opaque {
                break;
            }
        }
        let there = names.into_iter();
        Ok(there
            .filter_map(|(name, place)| Some((name, place?)))
            .collect())
    }

    /// The node at a place.
    pub fn at(&self, (image, nid): FilePlace) -> InLayer<FoundFile> {
        let inode = self.images[image].1.inode(nid);
        let inode = inode.map_err(self.failed(image))?;
        Ok(FoundFile { image, inode })
    }

    /// The chunks that a file is in: those of equal files are equal.
    pub fn chunks(&self, found: &FoundFile) -> InLayer<Vec<Digest>> {
        let (_, image, chunks) = &self.images[found.image];
        let extents = image.extents_of(&found.inode);
        let extents = extents.map_err(self.failed(found.image))?;
        let of_file = extents
            .iter()
            .flat_map(|one| chunks.overlapping(one.extent));
        Ok(of_file.map(|chunk| chunk.digest).collect())
    }

    /// A whole file of at most so many bytes.
    pub fn read(&self, found: &FoundFile, limit_bytes: u64) -> InLayer<Vec<u8>> {
        let read = self.images[found.image]
            .1
            .read_whole(&found.inode, limit_bytes);
        read.map_err(self.failed(found.image))
    }

    /// Where a symbolic link leads; `None` for anything else.
    pub fn link(&self, found: &FoundFile) -> Option<Vec<u8>> {
        self.images[found.image].1.read_link(&found.inode).ok()
    }

    fn failed(&self, image: usize) -> impl Fn(ReadError) -> (usize, ReadError) + use<> {
        let number = self.images[image].0;
        move |error| (number, error)
    }

    fn way(&self, image: usize, path: &str) -> InLayer<LayerWay> {
        let parts: Vec<&[u8]> = split_path(path.as_bytes()).collect();
        let mut is_opaque = false;
        for end in 1..=parts.len() {
            let read = &self.images[image].1;
            let inode = read.lookup(&parts[..end].join(&b'/'));
            let Some(inode) = inode.map_err(self.failed(image))? else {
                return Ok(if is_opaque {
                    LayerWay::Hidden
                } else {
                    LayerWay::On
                });
            };
            let is_directory = inode.record.file_type == FileType::Directory;
            if is_directory && self.images.len() > 1 {
                let xattrs = read.xattrs(&inode).map_err(self.failed(image))?;
                is_opaque |= xattrs.contains_key(OPAQUE);
            }
            if end == parts.len() {
                return Ok(LayerWay::Here(inode, is_opaque));
            }
            if !is_directory {
                return Ok(LayerWay::Hidden);
            }
        }
        Ok(LayerWay::On)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use forelay_image::erofs::write::write_image;
    use forelay_image::tree::{Attributes, Kind, Node, Tree};

    use super::*;

    fn put(tree: &mut Tree, path: &str, text: &str) {
        let attributes = Attributes::with_mode(0o644);
        tree.put_file(path, text.as_bytes(), attributes).unwrap();
    }

    fn delete(tree: &mut Tree, path: &str) {
        let attributes = Attributes::with_mode(0);
        let kind = Kind::CharDevice { major: 0, minor: 0 };
        let node = Node { attributes, kind };
        tree.insert_path(path.as_bytes(), node).unwrap();
    }

    #[test]
    fn the_highest_counts_and_what_is_deleted_or_hidden_does_not() {
        let mut trees = [Tree::new(), Tree::new(), Tree::new()];
        for path in ["etc/a", "etc/b", "etc/c", "var/d", "opt/e"] {
            put(&mut trees[0], path, "low");
        }
        put(&mut trees[1], "etc/b", "middle");
        put(&mut trees[1], "etc/x", "middle");
        delete(&mut trees[1], "var");
        put(&mut trees[2], "etc/b", "high");
        delete(&mut trees[2], "etc/c");
        put(&mut trees[2], "opt/f", "high");
        let opt = trees[2].lookup(b"opt").unwrap();
        let xattrs = &mut trees[2].node_mut(opt).attributes.xattrs;
        xattrs.insert(OPAQUE.to_vec(), b"y".to_vec());
        let built: Vec<_> = trees
            .iter()
            .map(|tree| {
                let mut bytes = Cursor::new(Vec::new());
                let written = write_image(tree, &mut bytes).unwrap();
                (bytes.into_inner(), written)
            })
            .collect();
        let layers = (0..).zip(&built).map(|(number, (bytes, written))| Layer {
            number,
            metadata: &bytes[..written.image.metadata_bytes as usize],
            chunks: &written.chunks,
            reader: bytes,
        });
        let layers: Vec<_> = layers.collect();
        let stack = Stacked::open(&layers).unwrap();
        let text = |path: &str| {
            let found = stack.find(path).unwrap()?;
            Some(String::from_utf8(stack.read(&found, 100).unwrap()).unwrap())
        };
        let expected = [
            ("etc/a", Some("low")),
            ("etc/b", Some("high")),
            ("etc/c", None),
            ("etc/x", Some("middle")),
            ("var/d", None),
            ("opt/e", None),
            ("opt/f", Some("high")),
            ("etc/a/b", None),
        ];
        for (path, expected) in expected {
            assert_eq!(text(path).as_deref(), expected, "{path}");
        }
        let names = |path: &str| {
            let folder = stack.folder(path).unwrap();
            let mut names: Vec<_> = folder.into_keys().collect();
            names.sort();
            names
        };
        assert_eq!(names("etc"), [b"a", b"b", b"x"]);
        assert_eq!(names("opt"), [b"f"]);
        assert!(names("var").is_empty() && names("etc/a").is_empty());
    }
}
