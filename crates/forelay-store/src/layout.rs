//! Where things are in a repository, and which features it uses.
//!
//! ```text
//! forelay-repository.json     descriptor: format and feature flags
//! packs/<pack>.pack           chunks, each a zstd frame or stored as is; <pack> is the SHA-256 of the object
//! packs/<pack>.idx            which chunks the pack holds and where
//! chunks/<index>.idx          an image's chunks, in image order; <index> is the SHA-256 of the object
//! locations/<index>.loc       for each chunk of that index, where in which pack it is
//! components/<id>.json        canonical metadata; its presence makes the component visible
//! condemned/<digest>          that pack or chunk index was found unreferenced; a later gc may delete it
//! ```
//! The catalog is the listing of `components/`. No object is ever changed.
//!
//! Refuses to do I/O. Invariant: the order of publication is pack, pack index, chunk
//! index, locations, component, so whatever is visible has all that it refers to.

use forelay_image::Digest;
use serde::{Deserialize, Serialize};

/// Key of the descriptor.
pub const DESCRIPTOR: &str = "forelay-repository.json";
/// Folder of packs and their indexes.
pub const PACKS: &str = "packs/";
/// Folder of chunk indexes.
pub const CHUNKS: &str = "chunks/";
/// Folder of chunk locations.
pub const LOCATIONS: &str = "locations/";
/// Folder of component metadata.
pub const COMPONENTS: &str = "components/";
/// Folder of marks on unreferenced packs.
pub const CONDEMNED: &str = "condemned/";

/// Format that this code writes.
pub const FORMAT: u32 = 1;

/// Key of a pack.
pub fn pack(pack: Digest) -> String {
    format!("{PACKS}{}.pack", pack.hex())
}

/// Key of a pack's index.
pub fn pack_index(pack: Digest) -> String {
    format!("{PACKS}{}.idx", pack.hex())
}

/// Key of a chunk index.
pub fn chunk_index(index: Digest) -> String {
    format!("{CHUNKS}{}.idx", index.hex())
}

/// Key of the locations of a chunk index's chunks.
pub fn locations(index: Digest) -> String {
    format!("{LOCATIONS}{}.loc", index.hex())
}

/// Key of a component's metadata.
pub fn component(id: Digest) -> String {
    format!("{COMPONENTS}{}.json", id.hex())
}

/// Key of the mark on an unreferenced pack or chunk index.
pub fn condemned(dead: Digest) -> String {
    format!("{CONDEMNED}{}", dead.hex())
}

/// Most bytes that an object has, by its key. Who can write to a repository can put objects
/// of any size there; larger ones are refused before memory is taken for them.
pub fn most_bytes(key: &str) -> u64 {
    const MIB: u64 = 1 << 20;
    let within = |folder: &str| key.starts_with(folder);
    match key {
        _ if within(CHUNKS) || within(LOCATIONS) => 256 * MIB,
        _ if within(PACKS) && key.ends_with(".pack") => 64 * MIB,
        _ if within(PACKS) || within(COMPONENTS) => 16 * MIB,
        _ => 64 << 10,
    }
}

/// The digest in a key such as `packs/<hex>.idx`, if it has this folder and suffix.
pub fn digest_in(key: &str, folder: &str, suffix: &str) -> Option<Digest> {
    key.strip_prefix(folder)?.strip_suffix(suffix)?.parse().ok()
}

/// The repository's descriptor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Format of the layout.
    pub format: u32,
    /// Features that a reader and writer may ignore.
    #[serde(default)]
    pub compatible: Vec<String>,
    /// Features that a writer must know.
    #[serde(default)]
    pub ro_compatible: Vec<String>,
    /// Features that a reader must know.
    #[serde(default)]
    pub incompatible: Vec<String>,
}

/// What a descriptor permits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading and publishing.
    ReadWrite,
    /// Reading only: these features are unknown.
    ReadOnly(Vec<String>),
}

/// Why a descriptor was refused.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// Not a descriptor.
    #[error("{DESCRIPTOR} is not a repository descriptor")]
    Syntax(#[from] serde_json::Error),
    /// Written by newer code.
    #[error(
        "the repository has format {format} and needs {features:?}, which this version does not know: update forelay"
    )]
    Incompatible {
        /// Its format.
        format: u32,
        /// Unknown features.
        features: Vec<String>,
    },
}

const KNOWN_INCOMPATIBLE: [&str; 2] = ["sha256", "zstd-packs"];
const KNOWN_RO_COMPATIBLE: [&str; 0] = [];

impl Descriptor {
    /// The descriptor of a new repository.
    pub fn current() -> Self {
        Self {
            format: FORMAT,
            compatible: Vec::new(),
            ro_compatible: Vec::new(),
            incompatible: KNOWN_INCOMPATIBLE.map(String::from).to_vec(),
        }
    }

    /// Reads a descriptor and says what it permits.
    pub fn parse(bytes: &[u8]) -> Result<(Self, Access), DescriptorError> {
        let descriptor: Self = serde_json::from_slice(bytes)?;
        let unknown = |features: &[String], known: &[&str]| -> Vec<String> {
            features
                .iter()
                .filter(|name| !known.contains(&name.as_str()))
                .cloned()
                .collect()
        };
        let features = unknown(&descriptor.incompatible, &KNOWN_INCOMPATIBLE);
        if descriptor.format > FORMAT || !features.is_empty() {
            return Err(DescriptorError::Incompatible {
                format: descriptor.format,
                features,
            });
        }
        let features = unknown(&descriptor.ro_compatible, &KNOWN_RO_COMPATIBLE);
        let access = if features.is_empty() {
            Access::ReadWrite
        } else {
            Access::ReadOnly(features)
        };
        Ok((descriptor, access))
    }

    /// The descriptor as JSON.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("a descriptor always serialises")
    }
}
