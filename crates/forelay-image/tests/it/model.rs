//! Random trees, a comparable description of a tree, and a plain model of what composing
//! layers means.

use std::collections::BTreeMap;

use forelay_image::Digest;
use forelay_image::erofs::xattr::OPAQUE;
use forelay_image::tree::{Attributes, FileData, Kind, Node, NodeId, ROOT, Tree};
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
        Kind::Directory(_) => "directory".to_owned(),
        Kind::Symlink(target) => format!("symlink {}", show(target)),
        Kind::CharDevice { major, minor } => format!("char {major} {minor}"),
        Kind::BlockDevice { major, minor } => format!("block {major} {minor}"),
        Kind::Fifo => "fifo".to_owned(),
        Kind::Socket => "socket".to_owned(),
    }
}

/// A node of the model: plain, owned, slow.
#[derive(Clone, Debug)]
pub struct Model {
    attributes: Attributes,
    what: String,
    /// Equal for the names of one inode.
    inode: (usize, u32),
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
            children: tree.entries(id).map(|entries| {
                let models = entries.iter();
                models
                    .map(|(name, &child)| (name.clone(), Self::of_node(tree, layer, child)))
                    .collect()
            }),
        }
    }

    fn is_implied(&self) -> bool {
        self.attributes == Attributes::with_mode(0o755)
    }

    fn is_opaque(&self) -> bool {
        self.attributes
            .xattrs
            .get(OPAQUE)
            .is_some_and(|value| value == b"y")
    }

    /// Lays `upper` over `lower` by the rules that `compose` documents.
    pub fn overlay(lower: Option<Self>, mut upper: Self) -> Option<Self> {
        if upper.what == "char 0 0" {
            return None;
        }
        let Some(children) = upper.children.take() else {
            return Some(upper);
        };
        let opaque = upper.is_opaque();
        let lower = lower.filter(|lower| lower.children.is_some() && !opaque);
        if opaque {
            upper.attributes.xattrs.remove(OPAQUE);
        }
        let mut merged = BTreeMap::new();
        if let Some(lower) = lower {
            if upper.is_implied() {
                upper.attributes = lower.attributes;
            }
            merged = lower.children.unwrap();
        }
        for (name, child) in children {
            let below = merged.remove(&name);
            if let Some(result) = Self::overlay(below, child) {
                merged.insert(name, result);
            }
        }
        upper.children = Some(merged);
        Some(upper)
    }

    /// Lays all `layers` over each other, the first lowest.
    pub fn stack<'t>(layers: impl IntoIterator<Item = &'t Tree>) -> Self {
        let models = layers.into_iter().enumerate();
        models
            .map(|(layer, tree)| Self::of(tree, layer))
            .fold(None, Self::overlay)
            .unwrap()
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
