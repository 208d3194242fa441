//! Component metadata: what a component is, offers and needs.
//!
//! A component's id is the digest of its metadata in canonical form; the metadata pins
//! the image digest, so the id pins every byte. Versions compare by Debian's rules.
//!
//! Invariant: [`Component::canonical_json`] is a pure function of the value (struct
//! order, sorted lists), so the id is the same on any host.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::snapshot::SnapshotOf;
use crate::{Digest, NameError, NameOf};

/// Digest of a component's canonical metadata.
pub type ComponentId = Digest;

/// What a component is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A bootable root file system.
    Base,
    /// Kernel, its modules and the initramfs.
    Kernel,
    /// A language runtime.
    Runtime,
    /// An application.
    Package,
    /// Shared libraries.
    Library,
    /// Configuration.
    Config,
    /// A VM's memory and the state of its devices; no file tree.
    Snapshot,
    /// A layer of container images, which they name by its id.
    Layer,
}

/// A name that a component offers, with the version it offers it at, if any.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Capability {
    /// Real or virtual name.
    pub name: String,
    /// Version, in Debian's syntax.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// One alternative of a requirement, or a conflict: a name and a range of versions.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NameRange {
    /// Real or virtual name.
    pub name: String,
    /// Comma-separated constraints such as `>= 1.2, << 2`; empty for any version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub range: String,
}

/// A requirement: any one of the alternatives satisfies it.
pub type Requirement = Vec<NameRange>;

/// A package that a component was built from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SbomPackage {
    /// Package name.
    pub name: String,
    /// Package version.
    pub version: String,
    /// Architecture as the package system names it.
    pub architecture: String,
    /// Package URL (purl), e.g. `pkg:deb/debian/nginx@1.22.1-9`.
    pub purl: String,
}

/// A component's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRef {
    /// Identity of the EROFS image: SHA-256 of its bytes with the superblock's UUID zeroed.
    /// A snapshot's image has no superblock: all of its bytes.
    pub digest: Digest,
    /// Size in bytes, a multiple of 4096.
    pub bytes: u64,
    /// Bytes at the image's start that hold all metadata (superblock, inodes, directories).
    pub metadata_bytes: u64,
    /// Number of inodes.
    pub inodes: u64,
    /// SHA-256 of the encoded chunk index ([`crate::ChunkIndex::digest`]): what is fetched
    /// chunk by chunk is checked against that index, so the component pins it too.
    pub chunk_index: Digest,
}

/// What makes a base a container image: its layers, and how it runs unless a manifest says
/// otherwise. The program to which [`Self::command`] adds is [`Component::entrypoint`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerImage {
    /// Where it is from, e.g. `docker.io/library/nginx:1.25`.
    pub reference: String,
    /// Its layers, the lowest first. They lie above the base and below all else.
    pub layers: Vec<ComponentId>,
    /// Arguments of the entrypoint, or the whole command if that is empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Environment.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// `user`, `user:group` or their numbers; root if empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user: String,
    /// Working directory; `/` if empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub workdir: String,
    /// Ports that it listens on, as `80/tcp`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<String>,
    /// Directories for data.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
    /// Number of the signal that asks it to end; 0 is SIGTERM.
    pub stop_signal: i32,
    /// Command that succeeds while it is well.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub health: Vec<String>,
}

/// Metadata of one component, with its image; with another `I`, of one whose image is not
/// written yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component<I = ImageRef> {
    /// Name, e.g. `nginx`.
    pub name: String,
    /// Version in Debian's syntax.
    pub version: String,
    /// What it is for.
    pub role: Role,
    /// Its function in one line.
    #[serde(default)]
    pub description: String,
    /// Architecture, e.g. `amd64`.
    pub architecture: String,
    /// The EROFS image.
    pub image: I,
    /// Names it offers besides its own.
    #[serde(default)]
    pub provides: Vec<Capability>,
    /// What it needs beside it.
    #[serde(default)]
    pub requires: Vec<Requirement>,
    /// What must not be beside it.
    #[serde(default)]
    pub conflicts: Vec<NameRange>,
    /// Command that a VM runs if its manifest names none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// What it is as a container image, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ContainerImage>,
    /// Kernel command line, for role `kernel`: modules to load and the like go into the initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Things the builder could not reproduce, in words (for example maintainer scripts).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Packages it was built from.
    #[serde(default)]
    pub sbom: Vec<SbomPackage>,
    /// What it holds, for role `snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Box<SnapshotOf>>,
}

impl<I> Component<I> {
    /// Checks name and version, which become parts of paths and are shown to people.
    pub fn check_names(&self) -> Result<(), NameError> {
        NameOf::Component.check(&self.name)?;
        NameOf::Version.check(&self.version)
    }

    /// True if one VM can have both: they are for the same machines, or one is for all.
    pub fn runs_beside<J>(&self, other: &Component<J>) -> bool {
        let (one, other) = (&self.architecture[..], &other.architecture[..]);
        one == other || one == "all" || other == "all"
    }

    /// A component that offers its name alone and needs nothing.
    pub fn new(name: &str, version: &str, role: Role, architecture: &str, image: I) -> Self {
        Self {
            name: name.to_owned(),
            version: version.to_owned(),
            role,
            description: String::new(),
            architecture: architecture.to_owned(),
            image,
            provides: Vec::new(),
            requires: Vec::new(),
            conflicts: Vec::new(),
            entrypoint: Vec::new(),
            container: None,
            cmdline: None,
            notes: Vec::new(),
            sbom: Vec::new(),
            snapshot: None,
        }
    }

    /// The same with another image.
    pub fn with_image<J>(self, image: J) -> Component<J> {
        Component {
            image,
            name: self.name,
            version: self.version,
            role: self.role,
            description: self.description,
            architecture: self.architecture,
            provides: self.provides,
            requires: self.requires,
            conflicts: self.conflicts,
            entrypoint: self.entrypoint,
            container: self.container,
            cmdline: self.cmdline,
            notes: self.notes,
            sbom: self.sbom,
            snapshot: self.snapshot,
        }
    }
}

impl Component {
    /// The bytes that are hashed into the id: compact JSON with sorted lists.
    pub fn canonical_json(&self) -> Vec<u8> {
        let mut sorted = self.clone();
        sorted.provides.sort();
        sorted.requires.sort();
        sorted.conflicts.sort();
        sorted.sbom.sort();
        serde_json::to_vec(&sorted).expect("component metadata always serialises")
    }

    /// The component's identity.
    pub fn id(&self) -> ComponentId {
        Digest::of(&self.canonical_json())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn component() -> Component {
        Component {
            name: "nginx".into(),
            version: "1.22.1-9".into(),
            role: Role::Package,
            description: "web server".into(),
            architecture: "amd64".into(),
            image: ImageRef {
                digest: Digest::of(b"i"),
                bytes: 4096,
                metadata_bytes: 4096,
                inodes: 1,
                chunk_index: Digest::of(b"index"),
            },
            provides: vec![
                Capability {
                    name: "httpd".into(),
                    version: None,
                },
                Capability {
                    name: "a".into(),
                    version: Some("1".into()),
                },
            ],
            requires: vec![],
            conflicts: vec![],
            entrypoint: vec![],
            container: None,
            cmdline: None,
            notes: vec![],
            sbom: vec![],
            snapshot: None,
        }
    }

    #[test]
    fn what_is_hashed_has_its_fields_in_this_order() {
        let image = |digest| format!("\"digest\":\"{digest}\",\"bytes\":4096");
        let (one, index) = (component(), Digest::of(b"index"));
        let expected = format!(
            "{{\"name\":\"nginx\",\"version\":\"1.22.1-9\",\"role\":\"package\",\
             \"description\":\"web server\",\"architecture\":\"amd64\",\"image\":{{{},\
             \"metadata_bytes\":4096,\"inodes\":1,\"chunk_index\":\"{index}\"}},\
             \"provides\":[{{\"name\":\"a\",\"version\":\"1\"}},{{\"name\":\"httpd\"}}],\
             \"requires\":[],\"conflicts\":[],\"sbom\":[]}}",
            image(one.image.digest)
        );
        let hashed = String::from_utf8(one.canonical_json()).unwrap();
        assert_eq!(hashed, expected);
        assert_eq!(one.clone().with_image(()).with_image(one.image), one);
    }

    #[test]
    fn id_ignores_list_order_and_pins_the_image() {
        let one = component();
        let mut reordered = one.clone();
        reordered.provides.reverse();
        assert_eq!(one.id(), reordered.id());
        let mut other = one.clone();
        other.image.digest = Digest::of(b"j");
        assert_ne!(one.id(), other.id());
    }
}
