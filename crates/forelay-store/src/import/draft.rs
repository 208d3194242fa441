//! What an importer hands over: a tree, and the component's metadata without the image.

use forelay_image::component::{
    Capability, Component, ImageRef, NameRange, Requirement, Role, SbomPackage,
};
use forelay_image::tree::Tree;

use super::spool::Spool;

/// Metadata of a component whose image is not written yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    /// Name.
    pub name: String,
    /// Version in Debian's syntax.
    pub version: String,
    /// What it is for.
    pub role: Role,
    /// Its function in one line.
    pub description: String,
    /// Architecture as Debian names it.
    pub architecture: String,
    /// Names it offers besides its own.
    pub provides: Vec<Capability>,
    /// What it needs beside it.
    pub requires: Vec<Requirement>,
    /// What must not be beside it.
    pub conflicts: Vec<NameRange>,
    /// Command that a VM runs if its manifest names none.
    pub entrypoint: Vec<String>,
    /// Kernel command line, for role `kernel`.
    pub cmdline: Option<String>,
    /// Things that could not be reproduced, in words.
    pub notes: Vec<String>,
    /// Packages it was built from.
    pub sbom: Vec<SbomPackage>,
}

impl Draft {
    /// A component of plain files: nothing provided, required or known about it.
    pub fn new(name: &str, version: &str, role: Role) -> Self {
        Self {
            name: name.to_owned(),
            version: version.to_owned(),
            role,
            description: String::new(),
            architecture: host_architecture().to_owned(),
            provides: Vec::new(),
            requires: Vec::new(),
            conflicts: Vec::new(),
            entrypoint: Vec::new(),
            cmdline: None,
            notes: Vec::new(),
            sbom: Vec::new(),
        }
    }

    /// The component's metadata, with its image.
    pub fn with_image(self, image: ImageRef) -> Component {
        Component {
            name: self.name,
            version: self.version,
            role: self.role,
            description: self.description,
            architecture: self.architecture,
            image,
            provides: self.provides,
            requires: self.requires,
            conflicts: self.conflicts,
            entrypoint: self.entrypoint,
            cmdline: self.cmdline,
            notes: self.notes,
            sbom: self.sbom,
        }
    }
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

/// A tree with its metadata. Its content lies in `spools`, which must live until the
/// image is written.
#[derive(Debug)]
pub struct Imported {
    /// The files.
    pub tree: Tree,
    /// The metadata.
    pub draft: Draft,
    /// Components that were split off, which this one requires. Their content lies in the
    /// same spools.
    pub parts: Vec<Part>,
    /// Temporary files that the trees point into.
    pub spools: Vec<Spool>,
}

/// A component that was split off another.
#[derive(Debug)]
pub struct Part {
    /// The files.
    pub tree: Tree,
    /// The metadata.
    pub draft: Draft,
}
