//! Files of a VM that several of its components have made entries in, found in the
//! components' images and made one. What becomes of the entries is
//! [`forelay_image::aggregate`]'s; which files are compared at all is told by their chunks,
//! so that equal ones are not read.
//!
//! What cannot be made one (settled by hand, no text) is laid as other files are, and told.

use std::collections::BTreeSet;

use forelay_guest_protocol::accounts::MergedFile;
use forelay_image::aggregate::{
    ALTERNATIVE_LINKS, ALTERNATIVES, Alternative, aggregate_paths, merged_entries,
};
use forelay_image::erofs::layout::FileType;
use forelay_image::erofs::read::{Image, Inode, ReadAt, ReadError};
use forelay_image::{ChunkIndex, Digest};

use crate::recipe::Reader;

/// Largest file that is made one with others.
const LIMIT_BYTES: u64 = 4 << 20;

/// One component's image: metadata at hand, content where it is.
pub struct Layer<'a> {
    pub metadata: &'a [u8],
    pub chunks: &'a ChunkIndex,
    pub reader: &'a Reader,
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

/// What a VM has of its own because its components have it differently.
#[derive(Debug, Default)]
pub struct Aggregates {
    pub files: Vec<MergedFile>,
    /// Paths and targets of symbolic links.
    pub links: Vec<(String, Vec<u8>)>,
}

/// Makes one of what the layers have, the base first. An error names its layer.
pub fn merge(layers: &[Layer<'_>]) -> Result<Aggregates, (usize, ReadError)> {
    let open = layers.iter().enumerate().map(|(number, layer)| {
        let image = Image::open(layer).map_err(|error| (number, error))?;
        Ok((image, layer.chunks))
    });
    let images = Images(open.collect::<Result<_, _>>()?);
    let mut merged = Aggregates::default();
    for path in aggregate_paths() {
        let versions = images.versions(path)?;
        if let Some((texts, last)) = images.texts(&versions)? {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            let on_base = versions[0].0 == 0;
            let text = merged_entries(path, &texts, on_base);
            merged.files.push(own_file(path, text, &last));
        }
    }
    for name in images.alternatives()? {
        images.settle(&name, &mut merged)?;
    }
    Ok(merged)
}

fn own_file(path: &str, text: String, like: &Inode) -> MergedFile {
    MergedFile {
        path: path.to_owned(),
        bytes: text.into_bytes(),
        mode: like.record.mode,
        uid: like.record.uid,
        gid: like.record.gid,
    }
}

/// The layers' open images with their chunks.
struct Images<'a>(Vec<(Image<'a>, &'a ChunkIndex)>);

/// What was read of the layers; an error names its layer.
type InLayer<T> = Result<T, (usize, ReadError)>;

impl Images<'_> {
    /// The layers' inodes at a path, without those that differ from none before.
    fn versions(&self, path: &str) -> InLayer<Vec<(usize, Inode)>> {
        let mut seen: BTreeSet<Vec<Digest>> = BTreeSet::new();
        let mut versions = Vec::new();
        for (number, (image, chunks)) in self.0.iter().enumerate() {
            let fail = |error| (number, error);
            let Some(inode) = image.lookup(path.as_bytes()).map_err(fail)? else {
                continue;
            };
            // A link, a directory, or no list that a package made: laid as such.
            if inode.record.file_type != FileType::File || inode.record.size > LIMIT_BYTES {
                return Ok(Vec::new());
            }
            let extents = image.extents_of(&inode).map_err(fail)?;
            let of_file = extents
                .iter()
                .flat_map(|one| chunks.overlapping(one.extent));
            if seen.insert(of_file.map(|chunk| chunk.digest).collect()) {
                versions.push((number, inode));
            }
        }
        Ok(versions)
    }

    /// What several versions say, and the last of them; `None` where there is nothing to be
    /// made one, or something that is no text.
    fn texts(&self, versions: &[(usize, Inode)]) -> InLayer<Option<(Vec<String>, Inode)>> {
        let [_, .., (_, last)] = versions else {
            return Ok(None);
        };
        let mut texts = Vec::new();
        for &(number, ref inode) in versions {
            let read = self.0[number].0.read_whole(inode, LIMIT_BYTES);
            match String::from_utf8(read.map_err(|error| (number, error))?) {
                Ok(text) => texts.push(text),
                Err(_) => return Ok(None),
            }
        }
        Ok(Some((texts, *last)))
    }

    /// Names of all alternatives.
    fn alternatives(&self) -> InLayer<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for (number, (image, _)) in self.0.iter().enumerate() {
            let fail = |error| (number, error);
            let directory = image.lookup(ALTERNATIVES.as_bytes()).map_err(fail)?;
            let entries = directory.map(|directory| image.read_dir(&directory));
            // Something else is laid as such.
            let entries = entries.and_then(Result::ok).into_iter().flatten();
            names.extend(entries.filter_map(|entry| String::from_utf8(entry.name).ok()));
        }
        Ok(names)
    }

    /// Unites the choices of one alternative, with the links of the component that has the
    /// best of them.
    fn settle(&self, name: &str, merged: &mut Aggregates) -> InLayer<()> {
        let path = format!("{ALTERNATIVES}/{name}");
        let Some((texts, last)) = self.texts(&self.versions(&path)?)? else {
            return Ok(());
        };
        let parsed = texts.iter().map(|text| Alternative::parse(text));
        let Some(mut parsed) = parsed.collect::<Option<Vec<_>>>().map(Vec::into_iter) else {
            return Ok(());
        };
        let Some(mut alternative) = parsed.next() else {
            return Ok(());
        };
        parsed.for_each(|later| alternative.add(later));
        let best = alternative.best().as_bytes();
        let link = format!("{ALTERNATIVE_LINKS}/{name}");
        for number in (0..self.0.len()).rev() {
            if self.link(number, &link)?.is_none_or(|to| to != best) {
                continue;
            }
            for follower in alternative.followers() {
                let path = format!("{ALTERNATIVE_LINKS}/{follower}");
                if let Some(to) = self.link(number, &path)? {
                    merged.links.push((path, to));
                }
            }
            merged.links.push((link, best.to_vec()));
            break;
        }
        merged
            .files
            .push(own_file(&path, alternative.to_text(), &last));
        Ok(())
    }

    /// Where a layer's link leads, if it has one there.
    fn link(&self, number: usize, path: &str) -> InLayer<Option<Vec<u8>>> {
        let image = &self.0[number].0;
        let found = image.lookup(path.as_bytes());
        let found = found.map_err(|error| (number, error))?;
        Ok(found.and_then(|inode| image.read_link(&inode).ok()))
    }
}
