//! Files of a VM that several of its components have made entries in, found in the
//! components' images and made one. What becomes of the entries is
//! [`forelay_image::aggregate`]'s; which files are compared at all is told by their chunks,
//! so that equal ones are not read.
//!
//! What cannot be made one (settled by hand, no text, too long) is laid as other files are, and told.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use forelay_guest_protocol::accounts::MergedFile;
use forelay_image::aggregate::{
    ALTERNATIVE_LINKS, ALTERNATIVES, Alternative, aggregate_paths, merged_entries,
};
use forelay_image::erofs::layout::FileType;
use forelay_image::erofs::read::{Image, Inode, ReadAt, ReadError};
use forelay_image::{ChunkIndex, Digest};

/// Largest file that is made one with others: some times Debian's certificates.
const LIMIT_BYTES: u64 = 1 << 20;
/// Most that is read to be made one, and made, in all.
const SUM_LIMIT_BYTES: u64 = 16 << 20;
/// Most alternatives of several components.
const NAMES_LIMIT: usize = 4096;

/// One component's image: metadata at hand, content where it is.
pub struct Layer<'a> {
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
    let mut images = Images {
        layers: open.collect::<Result<_, _>>()?,
        left_bytes: SUM_LIMIT_BYTES,
    };
    let mut merged = Aggregates::default();
    for path in aggregate_paths() {
        let Some((texts, last)) = images.texts(images.files(path)?)? else {
            continue;
        };
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        if let Some(text) = merged_entries(path, &texts) {
            images.own_file(path.to_owned(), text, &last, &mut merged);
        }
    }
    let (alternatives, links) = (
        images.folders(ALTERNATIVES)?,
        images.folders(ALTERNATIVE_LINKS)?,
    );
    for (name, numbers) in several(&alternatives) {
        images.settle(&name, numbers, &links, &mut merged)?;
    }
    Ok(merged)
}

/// Names that several layers have, each with its inode numbers by layer. Names that no
/// alternative has, and those beyond [`NAMES_LIMIT`], are laid as other files are.
fn several(folders: &[Folder]) -> impl Iterator<Item = (String, Vec<(usize, u64)>)> {
    let mut names: BTreeMap<&[u8], Vec<(usize, u64)>> = BTreeMap::new();
    for (number, folder) in folders.iter().enumerate() {
        for (name, &nid) in folder {
            names.entry(name).or_default().push((number, nid));
        }
    }
    let several = names.into_iter().filter(|(_, numbers)| numbers.len() > 1);
    let several = several
        .filter_map(|(name, numbers)| Some((String::from_utf8(name.to_vec()).ok()?, numbers)));
    several.take(NAMES_LIMIT)
}

/// The layers' open images with their chunks.
struct Images<'a> {
    layers: Vec<(Image<'a>, &'a ChunkIndex)>,
    /// How much may still be read and made.
    left_bytes: u64,
}

/// Inode numbers by name of one layer's directory.
type Folder = HashMap<Vec<u8>, u64>;

/// What was read of the layers; an error names its layer.
type InLayer<T> = Result<T, (usize, ReadError)>;

impl Images<'_> {
    /// The layers' inodes at a path.
    fn files(&self, path: &str) -> InLayer<Vec<(usize, Inode)>> {
        let found = self.layers.iter().enumerate().map(|(number, (image, _))| {
            let inode = image.lookup(path.as_bytes());
            let inode = inode.map_err(|error| (number, error))?;
            Ok(inode.map(|inode| (number, inode)))
        });
        found.filter_map(Result::transpose).collect()
    }

    /// Each layer's directory at a path, read once; none where there is something else.
    fn folders(&self, path: &str) -> InLayer<Vec<Folder>> {
        let mut folders = vec![Folder::new(); self.layers.len()];
        for (number, inode) in self.files(path)? {
            if inode.record.file_type == FileType::Directory {
                let entries = self.layers[number].0.read_dir(&inode);
                let entries = entries.map_err(|error| (number, error))?.into_iter();
                folders[number] = entries.map(|entry| (entry.name, entry.nid)).collect();
            }
        }
        Ok(folders)
    }

    /// What those of the files say that differ from all before, and the last of them; `None`
    /// where there is nothing to be made one, or something that is no text or too long.
    fn texts(&mut self, files: Vec<(usize, Inode)>) -> InLayer<Option<(Vec<String>, Inode)>> {
        let mut seen: BTreeSet<Vec<Digest>> = BTreeSet::new();
        let mut versions = Vec::new();
        for (number, inode) in files {
            let (image, chunks) = &self.layers[number];
            // A link, a directory, or no list that a package made: laid as such.
            if inode.record.file_type != FileType::File || inode.record.size > LIMIT_BYTES {
                return Ok(None);
            }
            let extents = image.extents_of(&inode).map_err(|error| (number, error))?;
            let of_file = extents
                .iter()
                .flat_map(|one| chunks.overlapping(one.extent));
            if seen.insert(of_file.map(|chunk| chunk.digest).collect()) {
                versions.push((number, inode));
            }
        }
        let [_, .., (_, last)] = versions[..] else {
            return Ok(None);
        };
        if !self.spend(versions.iter().map(|(_, inode)| inode.record.size).sum()) {
            return Ok(None);
        }
        let mut texts = Vec::new();
        for (number, inode) in versions {
            let read = self.layers[number].0.read_whole(&inode, LIMIT_BYTES);
            match String::from_utf8(read.map_err(|error| (number, error))?) {
                Ok(text) => texts.push(text),
                Err(_) => return Ok(None),
            }
        }
        Ok(Some((texts, last)))
    }

    /// Takes so much of what may still be read and made, if there is so much.
    fn spend(&mut self, bytes: u64) -> bool {
        let left = self.left_bytes.checked_sub(bytes);
        self.left_bytes = left.unwrap_or(self.left_bytes);
        left.is_some()
    }

    /// Adds a file with the attributes of `like`; false if there would be too much.
    fn own_file(
        &mut self,
        path: String,
        text: String,
        like: &Inode,
        merged: &mut Aggregates,
    ) -> bool {
        let fits = self.spend(text.len() as u64);
        if fits {
            merged.files.push(MergedFile {
                path,
                bytes: text.into_bytes(),
                mode: like.record.mode,
                uid: like.record.uid,
                gid: like.record.gid,
            });
        }
        fits
    }

    /// Unites the choices of one alternative, with the links of the component that has the
    /// best of them.
    fn settle(
        &mut self,
        name: &str,
        numbers: Vec<(usize, u64)>,
        links: &[Folder],
        merged: &mut Aggregates,
    ) -> InLayer<()> {
        let files = numbers.into_iter().map(|(number, nid)| {
            let inode = self.layers[number].0.inode(nid);
            inode
                .map(|inode| (number, inode))
                .map_err(|error| (number, error))
        });
        let files = files.collect::<Result<_, _>>()?;
        let Some((texts, last)) = self.texts(files)? else {
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
        let Some(text) = alternative.to_text() else {
            return Ok(());
        };
        let path = format!("{ALTERNATIVES}/{name}");
        if !self.own_file(path, text, &last, merged) {
            return Ok(());
        }
        let best = alternative.best().as_bytes();
        for (number, links) in links.iter().enumerate().rev() {
            if self.link(number, links, name)?.is_none_or(|to| to != best) {
                continue;
            }
            for name in alternative.followers().chain([name]) {
                if let Some(to) = self.link(number, links, name)? {
                    let path = format!("{ALTERNATIVE_LINKS}/{name}");
                    merged.links.push((path, to));
                }
            }
            break;
        }
        Ok(())
    }

    /// Where a layer's link leads, if it has one of this name.
    fn link(&self, number: usize, links: &Folder, name: &str) -> InLayer<Option<Vec<u8>>> {
        let image = &self.layers[number].0;
        let Some(&nid) = links.get(name.as_bytes()) else {
            return Ok(None);
        };
        let inode = image.inode(nid).map_err(|error| (number, error))?;
        Ok(image.read_link(&inode).ok())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use forelay_image::erofs::write::write_image;
    use forelay_image::tree::{Attributes, Kind, Node, Tree};

    use super::*;

    fn tree(files: &[(String, String)]) -> Tree {
        let mut tree = Tree::new();
        for (path, text) in files {
            let attributes = Attributes::with_mode(0o644);
            tree.put_file(path, text.as_bytes(), attributes).unwrap();
        }
        tree
    }

    fn merged(trees: &[Tree]) -> Aggregates {
        let built = trees.iter().map(|tree| {
            let mut bytes = Cursor::new(Vec::new());
            let written = write_image(tree, &mut bytes).unwrap();
            (bytes.into_inner(), written)
        });
        let built: Vec<_> = built.collect();
        let layers = built.iter().map(|(bytes, written)| Layer {
            metadata: &bytes[..written.image.metadata_bytes as usize],
            chunks: &written.chunks,
            reader: bytes,
        });
        merge(&layers.collect::<Vec<_>>()).unwrap()
    }

    /// What dpkg keeps of an alternative with one choice.
    fn kept(name: &str, choice: &str, follower: &str) -> (String, String) {
        (
            format!("{ALTERNATIVES}/{name}"),
            format!("auto\n/bin/{name}\n{follower}\n/man/x\n\n/bin/{choice}\n1\n\n\n"),
        )
    }

    #[test]
    fn too_many_alternatives_and_too_many_bytes_are_laid_as_other_files() {
        let many = |choice: &str| {
            let names = (0..NAMES_LIMIT + 9).map(|number| format!("n{number:05}"));
            tree(
                &names
                    .map(|name| kept(&name, choice, "f"))
                    .collect::<Vec<_>>(),
            )
        };
        let found = merged(&[many("a"), many("b")]);
        assert_eq!(found.files.len(), NAMES_LIMIT);
        let path = "var/lib/ucf/registry";
        let list = |from: usize, count: usize| {
            let lines = (from..from + count).map(|number| format!("package /etc/{number:011}\n"));
            tree(&[(path.to_owned(), lines.collect())])
        };
        assert_eq!(merged(&[list(0, 9), list(9, 9)]).files.len(), 1);
        let most = LIMIT_BYTES as usize / 25;
        assert_eq!(merged(&[list(0, 9), list(9, most + 9)]).files.len(), 0);
        let lists: Vec<Tree> = (0..9).map(|number| list(number * most, most)).collect();
        assert_eq!(merged(&lists[..8]).files.len(), 1);
        assert_eq!(merged(&lists).files.len(), 0);
    }

    #[test]
    fn followers_outside_the_folder_of_links_are_not_followed() {
        let with = |choice: &str, follower: &str| {
            let mut tree = tree(&[kept("editor", choice, follower)]);
            for (path, to) in [("etc/alternatives/editor", choice), ("etc/shadow", "x")] {
                let kind = Kind::Symlink(format!("/bin/{to}").into_bytes());
                let attributes = Attributes::with_mode(0o777);
                let node = Node { attributes, kind };
                tree.insert_path(path.as_bytes(), node).unwrap();
            }
            tree
        };
        let found = merged(&[with("a", "page"), with("b", "page")]);
        let link = ("etc/alternatives/editor".to_owned(), b"/bin/a".to_vec());
        assert_eq!((found.files.len(), found.links), (1, vec![link]));
        for follower in ["../shadow", ".."] {
            let found = merged(&[with("a", "page"), with("b", follower)]);
            assert_eq!((found.files, found.links), (vec![], vec![]));
        }
    }
}
