//! What a repository is: a flat space of immutable objects named by keys.
//!
//! The trait is small enough for a directory, S3, an OCI registry or IPFS. Everything
//! above it (packs, indexes, components, gc) is written in terms of it alone.
//!
//! Refuses to know what the objects contain.
//!
//! Invariants that implementations keep:
//! - An object is visible whole or not at all, also after a crash.
//! - [`Repository::put_if_absent`] never changes an existing object. Callers use keys
//!   whose content is determined by the key, or for which any writer's content is right,
//!   so an implementation whose "if absent" is not atomic is still safe.
//! - Errors say whether trying again can help ([`RepositoryError::is_transient`]).

use std::path::PathBuf;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use forelay_image::Extent;

/// What to store under a key.
#[derive(Clone, Debug)]
pub enum Body {
    /// Bytes in memory.
    Bytes(Bytes),
    /// The contents of a host file.
    File(PathBuf),
}

impl Body {
    /// Its size; 0 for a file that cannot be looked at.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(path) => std::fs::metadata(path).map_or(0, |metadata| metadata.len()),
        }
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Bytes(bytes.into())
    }
}

/// What [`Repository::put_if_absent`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The object is new.
    Created,
    /// There was one already; it is unchanged.
    Present,
}

/// What is known of an object without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its size in bytes.
    pub bytes: u64,
    /// When it was stored, by the repository's clock.
    pub modified: SystemTime,
}

/// What and where a repository is, for people and counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Kind, e.g. `directory`.
    pub kind: &'static str,
    /// Where it is, e.g. a path.
    pub location: String,
}

/// A repository that is set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// Where it is.
    pub location: String,
    /// Why.
    pub problem: String,
    /// Since when.
    pub since: SystemTime,
}

/// Why a repository operation failed.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    /// There is no such object.
    #[error("the repository has no object {key}")]
    NotFound {
        /// The key asked for.
        key: String,
    },
    /// The object ends before the requested range does.
    #[error("object {key} has {bytes} bytes, but bytes {} to {} were asked for: it is truncated", extent.offset, extent.end())]
    Truncated {
        /// The key asked for.
        key: String,
        /// Size of the object.
        bytes: u64,
        /// The range asked for.
        extent: Extent,
    },
    /// The object is larger than any of its kind.
    #[error(
        "object {key} has more than {most_bytes} bytes, which no object of its kind has: it is damaged or forged"
    )]
    TooLarge {
        /// The key asked for.
        key: String,
        /// Most bytes that were asked for.
        most_bytes: u64,
    },
    /// No space is left.
    #[error("no space left for {} ({bytes} bytes): free some and try again; nothing was published", path.display())]
    NoSpace {
        /// File that could not be written.
        path: PathBuf,
        /// Bytes that were to be written.
        bytes: u64,
        /// The cause.
        source: std::io::Error,
    },
    /// A key that could leave the repository or is no key.
    #[error("{0:?} is not a valid object key")]
    Key(String),
    /// A failure that may pass.
    #[error("{operation} of {key} failed for now")]
    Transient {
        /// What was attempted.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A failure that will not pass by itself.
    #[error("{operation} of {key} failed")]
    Permanent {
        /// What was attempted.
        operation: &'static str,
        /// The key.
        key: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl RepositoryError {
    /// True if trying again may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Transient { .. })
    }

    /// True if the object does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }
}

/// A place where components are published and fetched from.
#[async_trait]
pub trait Repository: Send + Sync + 'static {
    /// What and where it is.
    fn describe(&self) -> Description;

    /// The whole object; [`RepositoryError::TooLarge`], before memory is taken for it, if it has
    /// more than `most_bytes`.
    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError>;

    /// Exactly the bytes of `extent`; [`RepositoryError::Truncated`] if there are fewer.
    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError>;

    /// Stores an object unless the key is taken. When this returns `Ok`, the object is durable.
    async fn put_if_absent(&self, key: &str, body: Body) -> Result<Put, RepositoryError>;

    /// Keys of all objects that are in the folder `prefix` (`folder/`), sorted.
    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError>;

    /// Size and age of an object, without its bytes.
    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError>;

    /// Deletes an object; one that does not exist counts as deleted.
    async fn delete(&self, key: &str) -> Result<(), RepositoryError>;

    /// Takes note that bytes read from `key` were wrong. Means nothing where there is but one
    /// place that they can come from.
    fn doubt(&self, _key: &str, _problem: &str) {}

    /// Which of several places are set aside at the moment, because they failed.
    fn set_aside(&self) -> Vec<SetAside> {
        Vec::new()
    }
}

/// Accepts keys of one or more `/`-separated parts of letters, digits and `. _ -`; parts
/// do not start with a dot.
pub fn check_key(key: &str) -> Result<(), RepositoryError> {
    let part_ok = |part: &str| {
        !part.is_empty()
            && part.len() <= 200
            && !part.starts_with('.')
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    if key.split('/').all(part_ok) {
        Ok(())
    } else {
        Err(RepositoryError::Key(key.to_owned()))
    }
}
