//! Random trees, a comparable description of a tree, and a plain model of what composing
//! layers means.

use std::collections::BTreeMap;

use forelay_image::Digest;
use forelay_image::erofs::xattr::{OPAQUE, REPLACES};
use forelay_image::tree::{Attributes, FileData, Kind, Node, NodeId, ROOT, Tree, split_path};
use proptest::prelude::*;

/// Everything that can be said about one path. Hard links name the first path of their
/// inode, so that two descriptions are equal if and only if the trees are.
#[derive(Clone, Debug, PartialEq)]
pub struct Described {
    pub attributes: Attributes,
    pub what: String,
    pub first_path: String,
}

pub type Description = BTreeMap<String, Described>;

fn show(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}

fn what(kind: &Kind) -> String {
    match kind {
        Kind::File(FileData::Bytes(bytes)) => {
            format!("file {} {}", bytes.len(), Digest::of(bytes))
        }
        Kind::File(FileData::HostFile { path, .. }) => {
            let bytes = std::fs::read(path).unwrap();
            format!("file {} {}", bytes.len(), Digest::of(&bytes))
        }
        Kind::File(data) => {
            let bytes = data.read().unwrap();
            format!("file {} {}", bytes.len(), Digest::of(&bytes))
        }
        Kind::Directory(_) => "directory".to_owned(),
        Kind::Symlink(target) => format!("symlink {}", show(target)),
        Kind::CharDevice { major, minor } => format!("char {major} {minor}"),
        Kind::BlockDevice { major, minor } => format!("block {major} {minor}"),
        Kind::Fifo => "fifo".to_owned(),
        Kind::Socket => "socket".to_owned(),
    }
}

/// A layer has a file where those below have a directory.
#[derive(Debug)]
pub struct Refused;

/// What a link leads to.
enum Behind {
    Directory(Vec<Vec<u8>>),
    /// What only a running VM has.
    Hidden,
    Nothing,
}

/// A node of the model: plain, owned, slow.
#[derive(Clone, Debug)]
pub struct Model {
    attributes: Attributes,
    what: String,
    /// Equal for the names of one inode.
    inode: (usize, u32),
    target: Option<Vec<u8>>,
    children: Option<BTreeMap<Vec<u8>, Model>>,
}

impl Model {
    /// The model of one layer.
    pub fn of(tree: &Tree, layer: usize) -> Self {
        Self::of_node(tree, layer, ROOT)
    }

    fn of_node(tree: &Tree, layer: usize, id: NodeId) -> Self {
        let node = tree.node(id);
        Self {
            attributes: node.attributes.clone(),
            what: what(&node.kind),
            inode: (layer, id.0),
            target: match &node.kind {
                Kind::Symlink(target) => Some(target.clone()),
                _ => None,
            },
            children: tree.entries(id).map(|entries| {
                let models = entries.iter();
                models
                    .map(|(name, &child)| (name.clone(), Self::of_node(tree, layer, child)))
                    .collect()
            }),
        }
    }

    fn is_implied(&self) -> bool {
        self.inode.0 > 0 && self.attributes == Attributes::with_mode(0o755)
    }

    fn is_marked(&self, mark: &[u8]) -> bool {
        let value = self.attributes.xattrs.get(mark);
        value.is_some_and(|value| value == b"y")
    }

    fn is_opaque(&self) -> bool {
        self.children.is_some() && self.is_marked(OPAQUE)
    }

    fn without_marks(mut self) -> Self {
        if self.children.is_some() || self.is_marked(REPLACES) {
            self.attributes.xattrs.remove(OPAQUE);
        }
        self.attributes.xattrs.remove(REPLACES);
        self.children = self.children.map(|children| {
            let kept = children.into_iter();
            let kept = kept.filter(|(_, child)| child.what != "char 0 0");
            kept.map(|(name, child)| (name, child.without_marks()))
                .collect()
        });
        self
    }

    fn at(&mut self, path: &[Vec<u8>]) -> Option<&mut Self> {
        path.iter()
            .try_fold(self, |model, name| model.children.as_mut()?.get_mut(name))
    }

    /// Where `path` leads if that is a directory.
    fn directory_behind(&self, path: &[Vec<u8>]) -> Behind {
        let mut pending: Vec<Vec<u8>> = path.iter().rev().cloned().collect();
        let mut at: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(name) = pending.pop() {
            if name == b".." {
                at.pop();
                continue;
            }
            let here = at
                .iter()
                .try_fold(self, |model, name| model.children.as_ref()?.get(name));
            let child = here.and_then(|here| here.children.as_ref()?.get(&name));
            at.push(name);
            let Some(child) = child else {
                return match &at[0][..] {
                    b"run" => Behind::Hidden,
                    _ => Behind::Nothing,
                };
            };
            if let Some(target) = &child.target {
                links += 1;
                if links > 40 {
                    return Behind::Nothing;
                }
                at.pop();
                if target.starts_with(b"/") {
                    at.clear();
                }
                let parts: Vec<Vec<u8>> = split_path(target).map(<[u8]>::to_vec).collect();
                pending.extend(parts.into_iter().rev());
            } else if child.children.is_none() {
                return Behind::Nothing;
            }
        }
        Behind::Directory(at)
    }

    /// Takes over the attributes of `upper` if they are meant for a directory that exists.
    fn take_attributes(&mut self, upper: &Self, own: bool) {
        let means = !upper.is_implied() && (own || self.is_implied());
        if means || upper.is_marked(REPLACES) {
            (self.attributes, self.inode) = (upper.attributes.clone(), upper.inode);
            self.attributes.xattrs.remove(OPAQUE);
            self.attributes.xattrs.remove(REPLACES);
        }
    }

    /// Unpacks what is in the directory `upper` at `path`, by the rules that `compose`
    /// documents. `below` is what there was before this layer.
    fn unpack(
        &mut self,
        below: &Self,
        path: &[Vec<u8>],
        upper: Self,
        own: bool,
    ) -> Result<(), Refused> {
        for (name, child) in upper.children.unwrap() {
            let path = [path, &[name]].concat();
            self.entry(below, &path, child, own)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        below: &Self,
        path: &[Vec<u8>],
        mut upper: Self,
        own: bool,
    ) -> Result<(), Refused> {
        let (name, parents) = path.split_last().unwrap();
        let Some(entries) = self.at(parents).and_then(|at| at.children.as_mut()) else {
            // The layer itself has removed where this was to go.
            return Ok(());
        };
        let here = entries.get_mut(name);
        let is_directory = here.as_ref().is_some_and(|here| here.children.is_some());
        let is_link = here.as_ref().is_some_and(|here| here.target.is_some());
        let meant = upper.is_opaque() || upper.is_marked(REPLACES);
        if upper.what == "char 0 0" {
            entries.remove(name);
        } else if upper.children.is_none() {
            if !is_directory || meant {
                entries.insert(name.clone(), upper.without_marks());
            } else if upper.target.is_none() {
                return Err(Refused);
            }
        } else if is_directory && !upper.is_opaque() {
            here.unwrap().take_attributes(&upper, own);
            self.unpack(below, path, upper, own)?;
        } else if is_link && !meant {
            match below.directory_behind(path) {
                Behind::Directory(behind) if behind.is_empty() => {
                    self.take_attributes(&upper, own);
                    self.unpack(below, &[], upper, own)?;
                }
                Behind::Directory(behind) => self.entry(below, &behind, upper, own)?,
                Behind::Hidden => {}
                Behind::Nothing => {
                    entries.remove(name);
                    self.entry(below, path, upper, own)?;
                }
            }
        } else {
            let content = upper.clone();
            upper.children = Some(BTreeMap::new());
            entries.insert(name.clone(), upper.without_marks());
            self.unpack(below, path, content, own)?;
        }
        Ok(())
    }

    /// Lays all `layers` over each other, the first lowest, the last the VM's own.
    pub fn stack<'t>(layers: impl IntoIterator<Item = &'t Tree>) -> Result<Self, Refused> {
        let models = layers.into_iter().enumerate();
        let models: Vec<Self> = models.map(|(layer, tree)| Self::of(tree, layer)).collect();
        let own = models.len() - 1;
        let mut models = models.into_iter().enumerate();
        let (_, base) = models.next().unwrap();
        let mut stacked = base.without_marks();
        for (number, upper) in models {
            let below = stacked.clone();
            stacked.take_attributes(&upper, number == own);
            stacked.unpack(&below, &[], upper, number == own)?;
        }
        Ok(stacked)
    }

    /// Path by path.
    pub fn describe(&self) -> Description {
        let mut out = Description::new();
        let mut first_paths = BTreeMap::new();
        self.describe_into("", &mut first_paths, &mut out);
        out
    }

    fn describe_into(
        &self,
        path: &str,
        first_paths: &mut BTreeMap<(usize, u32), String>,
        out: &mut Description,
    ) {
        let first = first_paths.entry(self.inode);
        let described = Described {
            attributes: self.attributes.clone(),
            what: self.what.clone(),
            first_path: first.or_insert_with(|| path.to_owned()).clone(),
        };
        out.insert(path.to_owned(), described);
        for (name, child) in self.children.iter().flatten() {
            let path = format!("{path}/{}", show(name));
            child.describe_into(&path, first_paths, out);
        }
    }
}

/// Path by path.
pub fn describe(tree: &Tree) -> Description {
    Model::of(tree, 0).describe()
}

/// One thing to add to a random tree.
#[derive(Clone, Debug)]
enum Addition {
    Node(Node),
    /// A second name for the node that the given earlier addition made.
    Link(prop::sample::Index),
}

/// Few names, so that layers collide; some sort before or between `.` and `..`.
const NAMES: &[&str] = &[
    "a",
    "b",
    "c",
    "usr",
    "-x",
    "!",
    ".-",
    ".a",
    "..b",
    "...",
    "+",
    "longer-name",
    "\u{e9}t\u{e9}",
];

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        20 => prop::sample::select(NAMES).prop_map(|name| name.as_bytes().to_vec()),
        1 => (200usize..=255).prop_map(|len| vec![b'n'; len]),
    ]
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let xattr_name = prop::sample::select(
        &[
            "user.one",
            "user.two",
            "security.capability",
            "trusted.overlay.opaque",
            "trusted.forelay.replaces",
            "system.posix_acl_access",
        ][..],
    );
    let value = prop_oneof![
        Just(b"y".to_vec()),
        prop::collection::vec(any::<u8>(), 0..300)
    ];
    let xattrs = prop::collection::btree_map(
        xattr_name.prop_map(|name| name.as_bytes().to_vec()),
        value,
        0..3,
    );
    let random = (
        0u16..=0o7777,
        any::<u32>(),
        any::<u32>(),
        any::<i64>(),
        0u32..1_000_000_000,
        xattrs,
    );
    let random = random.prop_map(|(mode, uid, gid, mtime_s, mtime_ns, xattrs)| Attributes {
        mode,
        uid,
        gid,
        mtime_s,
        mtime_ns,
        xattrs,
    });
    prop_oneof![2 => Just(Attributes::with_mode(0o755)), 3 => random]
}

fn kind() -> impl Strategy<Value = Kind> {
    let content = prop_oneof![
        4 => (any::<u8>(), 0usize..64),
        3 => (any::<u8>(), 4000usize..9000),
        1 => (any::<u8>(), Just((1 << 20) + 5)),
    ];
    prop_oneof![
        8 => content.prop_map(|(byte, len)| {
            Kind::File(FileData::Bytes(vec![byte; len].into()))
        }),
        3 => Just(Kind::Directory(BTreeMap::new())),
        2 => (1usize..4096).prop_map(|len| Kind::Symlink(vec![b't'; len])),
        2 => Just(Kind::CharDevice { major: 0, minor: 0 }),
        1 => (0u32..4096, 0u32..1 << 20).prop_map(|(major, minor)| {
            Kind::BlockDevice { major, minor }
        }),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
    ]
}

/// A random tree with up to `max` additions.
pub fn tree(max: usize) -> impl Strategy<Value = Tree> {
    let node = (attributes(), kind());
    let addition = prop_oneof![
        9 => node.prop_map(|(attributes, kind)| Addition::Node(Node { attributes, kind })),
        1 => any::<prop::sample::Index>().prop_map(Addition::Link),
    ];
    let path = prop::collection::vec(name(), 1..4);
    prop::collection::vec((path, addition), 0..max).prop_map(|additions| {
        let mut tree = Tree::new();
        let mut made = Vec::new();
        for (parts, addition) in additions {
            let path = parts.join(&b'/');
            match addition {
                // A path through a file is refused; that is fine here.
                Addition::Node(node) => made.extend(tree.insert_path(&path, node)),
                Addition::Link(_) if made.is_empty() => {}
                Addition::Link(index) => {
                    let target: NodeId = *index.get(&made);
                    let _ = tree.link(ROOT, &parts[0], target);
                }
            }
        }
        tree
    })
}

/// A random layer for others below it: as overlayfs would have it, or one that is unpacked
/// over them, with links that lead to directories and without deletions, or with all of it.
pub fn layer(max: usize) -> impl Strategy<Value = Tree> {
    (tree(max), 0..3).prop_map(|(mut tree, sort)| {
        let (overlay, unpacked) = (sort == 0, sort == 1);
        for index in 0..tree.len() {
            let node = tree.node_mut(NodeId(index as u32));
            if overlay {
                let mark = || (REPLACES.to_vec(), b"y".to_vec());
                node.attributes.xattrs.extend((index > 0).then(mark));
                continue;
            }
            for mark in [OPAQUE, REPLACES] {
                let xattrs = &mut node.attributes.xattrs;
                if xattrs.remove(mark).is_some() && !unpacked {
                    xattrs.insert(mark.to_vec(), b"y".to_vec());
                }
            }
            match &mut node.kind {
                Kind::Symlink(target) => *target = leading(target.len()),
                kind if unpacked && kind.is_whiteout() => *kind = Kind::Fifo,
                _ => {}
            }
        }
        tree
    })
}

/// A link's target that may be there.
fn leading(number: usize) -> Vec<u8> {
    let name = |number: usize| NAMES[number % NAMES.len()];
    let start = ["/", "", "../"][number % 3];
    match number / 3 % 2 {
        0 => format!("{start}{}", name(number / 6)).into_bytes(),
        _ => format!("{start}{}/{}", name(number / 6), name(number / 100)).into_bytes(),
    }
}
