//! Files of a VM that several of its components have made entries in, found in the
//! components' images and made one; a container image is one of them with all its layers. What becomes of the entries is
//! [`forelay_image::aggregate`]'s; which files are compared at all is told by their chunks,
//! so that equal ones are not read.
//!
//! What cannot be made one (settled by hand, no text, too long) is laid as other files are, and told.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use forelay_guest_protocol::accounts::MergedFile;
use forelay_image::Digest;
use forelay_image::aggregate::{
    ALTERNATIVE_LINKS, ALTERNATIVES, Alternative, aggregate_paths, merged_entries,
};
use forelay_image::erofs::layout::FileType;
use forelay_image::erofs::read::Inode;

use crate::stacked::{FilePlace, FoundFile, InLayer, Stacked};

/// Largest file that is made one with others: some times Debian's certificates.
const LIMIT_BYTES: u64 = 1 << 20;
/// Most that is read to be made one, and made, in all.
const SUM_LIMIT_BYTES: u64 = 16 << 20;
/// Most alternatives of several components.
const NAMES_LIMIT: usize = 4096;

/// What a VM has of its own because its components have it differently.
#[derive(Debug, Default)]
pub struct Aggregates {
    pub files: Vec<MergedFile>,
    /// Paths and targets of symbolic links.
    pub links: Vec<(String, Vec<u8>)>,
}

/// Makes one of what the components have, the base first.
pub fn merge(stacks: &[Stacked<'_>]) -> InLayer<Aggregates> {
    let mut images = Images {
        stacks,
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

/// Names that several components have, each with its places by component. Names that no
/// alternative has, and those beyond [`NAMES_LIMIT`], are laid as other files are.
fn several(folders: &[Folder]) -> impl Iterator<Item = (String, Vec<(usize, FilePlace)>)> {
    let mut names: BTreeMap<&[u8], Vec<(usize, FilePlace)>> = BTreeMap::new();
    for (number, folder) in folders.iter().enumerate() {
        for (name, &place) in folder {
            names.entry(name).or_default().push((number, place));
        }
    }
    let several = names.into_iter().filter(|(_, numbers)| numbers.len() > 1);
    let several = several
        .filter_map(|(name, numbers)| Some((String::from_utf8(name.to_vec()).ok()?, numbers)));
    several.take(NAMES_LIMIT)
}

/// The components' open images.
struct Images<'a> {
    stacks: &'a [Stacked<'a>],
    /// How much may still be read and made.
    left_bytes: u64,
}

/// Places by name of one component's directory.
type Folder = HashMap<Vec<u8>, FilePlace>;

impl Images<'_> {
    /// What the components have at a path.
    fn files(&self, path: &str) -> InLayer<Vec<(usize, FoundFile)>> {
        let found = self.stacks.iter().enumerate().map(|(number, stack)| {
            let found = stack.find(path);
            found.map(|found| found.map(|found| (number, found)))
        });
        found.filter_map(Result::transpose).collect()
    }

    /// Each component's directory at a path, read once; none where there is something else.
    fn folders(&self, path: &str) -> InLayer<Vec<Folder>> {
        let folders = self.stacks.iter().map(|stack| stack.folder(path));
        folders.collect()
    }

    /// What those of the files say that differ from all before, and the last of them; `None`
    /// where there is nothing to be made one, or something that is no text or too long.
    fn texts(&mut self, files: Vec<(usize, FoundFile)>) -> InLayer<Option<(Vec<String>, Inode)>> {
        let mut seen: BTreeSet<Vec<Digest>> = BTreeSet::new();
        let mut versions = Vec::new();
        for (number, found) in files {
            let record = &found.inode.record;
            // A link, a directory, or no list that a package made: laid as such.
            if record.file_type != FileType::File || record.size > LIMIT_BYTES {
                return Ok(None);
            }
            if seen.insert(self.stacks[number].chunks(&found)?) {
                versions.push((number, found));
            }
        }
        let [_, .., (_, last)] = &versions[..] else {
            return Ok(None);
        };
        let last = last.inode;
        let sizes = versions.iter().map(|(_, found)| found.inode.record.size);
        if !self.spend(sizes.sum()) {
            return Ok(None);
        }
        let mut texts = Vec::new();
        for (number, found) in versions {
            let read = self.stacks[number].read(&found, LIMIT_BYTES)?;
            match String::from_utf8(read) {
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
        numbers: Vec<(usize, FilePlace)>,
        links: &[Folder],
        merged: &mut Aggregates,
    ) -> InLayer<()> {
        let files = numbers.into_iter().map(|(number, place)| {
            let found = self.stacks[number].at(place);
            found.map(|found| (number, found))
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
        let stack = &self.stacks[number];
        let Some(&place) = links.get(name.as_bytes()) else {
            return Ok(None);
        };
        Ok(stack.link(&stack.at(place)?))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use forelay_image::erofs::write::write_image;
    use forelay_image::tree::{Attributes, Kind, Node, Tree};

    use super::*;
    use crate::stacked::Layer;

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
        let layers = (0..).zip(&built).map(|(number, (bytes, written))| Layer {
            number,
            metadata: &bytes[..written.image.metadata_bytes as usize],
            chunks: &written.chunks,
            reader: bytes,
        });
        let layers: Vec<_> = layers.collect();
        let stacks = layers
            .chunks(1)
            .map(|layers| Stacked::open(layers).unwrap());
        merge(&stacks.collect::<Vec<_>>()).unwrap()
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
