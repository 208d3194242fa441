//! What an importer hands over: a tree, and the component's metadata without the image.

use forelay_image::component::{Component, Role};
use forelay_image::tree::Tree;

use crate::spool::Spool;

/// Metadata of a component whose image is not written yet.
pub type Draft = Component<()>;

/// A component of plain files of this host's architecture: nothing provided, required or
/// known about it.
pub fn plain_files(name: &str, version: &str, role: Role) -> Draft {
    Draft::new(name, version, role, host_architecture(), ())
}

/// The host's architecture as Debian names it.
pub fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64el",
        other => other,
    }
}

/// What a directory or an archive gave.
#[derive(Debug)]
pub struct Files {
    /// The files.
    pub tree: Tree,
    /// What is not in the tree as it is in the source, in words.
    pub notes: Vec<String>,
}

/// A component that is to be written.
#[derive(Debug)]
pub struct Part {
    /// The files.
    pub tree: Tree,
    /// The metadata.
    pub draft: Draft,
    /// The component that it is already: nothing is to be written.
    pub at_hand: Option<Component>,
}

impl Part {
    /// One that is to be written.
    pub(crate) fn new(tree: Tree, draft: Draft) -> Self {
        Self {
            tree,
            draft,
            at_hand: None,
        }
    }
}

/// What was read from a source. Its content lies in `spools`, which must live until the
/// images are written.
#[derive(Debug)]
pub struct Imported {
    /// The component that was asked for.
    pub main: Part,
    /// Components that were split off it.
    pub split_off: Vec<Part>,
    /// Temporary files that the trees point into.
    pub spools: Vec<Spool>,
}

impl Imported {
    /// One component from which nothing was split off.
    pub fn alone(tree: Tree, draft: Draft, spools: Vec<Spool>) -> Self {
        Self {
            main: Part::new(tree, draft),
            split_off: Vec::new(),
            spools,
        }
    }
}
