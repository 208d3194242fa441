//! Errors of the store as a whole. Each layer below has its own enum in its own module.

use std::io;
use std::path::PathBuf;

use forelay_image::{ComponentId, Digest};

use crate::disk_cache::DiskCacheError;
use crate::fetch::FetchError;
use crate::layout::DescriptorError;
use crate::repository::RepositoryError;

/// Why an operation of the store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// Nothing there is a repository.
    #[error(
        "there is no repository at {location}: mount it, set repository.url in the configuration, or make one with `forelay component build`"
    )]
    NoRepository {
        /// Where it was looked for.
        location: String,
    },
    /// The repository's descriptor was refused.
    #[error("the repository at {location} cannot be used")]
    Descriptor {
        /// Where the repository is.
        location: String,
        /// The cause.
        source: DescriptorError,
    },
    /// The repository has features that this version must not write to.
    #[error(
        "the repository uses {features:?}, which this version can only read: update forelay to publish"
    )]
    ReadOnly {
        /// The unknown features.
        features: Vec<String>,
    },
    /// A component is not in the repository (any more).
    #[error(
        "component {id} is not in the repository: it was removed or never published; build it again or lock again"
    )]
    ComponentMissing {
        /// The component.
        id: ComponentId,
    },
    /// A lock says of a component what its metadata does not say.
    #[error(
        "the lock does not say of {name} {version} what its metadata says: run `forelay lock` again"
    )]
    NotAsLocked {
        /// Its name in the lock.
        name: String,
        /// Its version in the lock.
        version: String,
    },
    /// An image is not in the repository (any more).
    #[error(
        "image {image} is not in the repository: its component was removed; build it again or lock again"
    )]
    ImageMissing {
        /// The image.
        image: Digest,
    },
    /// An image was asked for by its digest alone.
    #[error("image {image} is not known on this host: open it through its component")]
    ImageUnknown {
        /// The image.
        image: Digest,
    },
    /// Two components claim the same image, with different chunk indexes or sizes or from
    /// different repositories.
    #[error(
        "image {image} is in use as another component has it, which was built differently: use that component, or stop its VMs"
    )]
    Disputed {
        /// The image.
        image: Digest,
    },
    /// An object does not decode or contradicts another.
    #[error("object {key} is corrupted: {problem}; run `forelay verify`")]
    Corrupted {
        /// Its key.
        key: String,
        /// What is wrong.
        problem: String,
    },
    /// A range beyond an image's end.
    #[error("bytes {offset} to {end} lie beyond the end of image {image} ({image_bytes} bytes)")]
    BeyondEnd {
        /// The image.
        image: Digest,
        /// Its size in bytes.
        image_bytes: u64,
        /// First byte asked for.
        offset: u64,
        /// Byte after the last one asked for.
        end: u64,
    },
    /// A chunk could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The disk cache cannot be used.
    #[error(transparent)]
    DiskCache(#[from] DiskCacheError),
    /// The cache directory cannot be used.
    #[error("the cache directory {} cannot be used", path.display())]
    CacheDirectory {
        /// The directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The image file given for publication is not what its index says.
    #[error("chunk {chunk_no} of {} does not have the digest that the chunk index names: the file changed or is incomplete; nothing was published", path.display())]
    ImageChanged {
        /// The image file.
        path: PathBuf,
        /// The first chunk that differs.
        chunk_no: usize,
    },
    /// The component, chunk index and image given for publication do not belong together.
    #[error("the component cannot be published: {0}")]
    Inconsistent(String),
    /// A local file could not be read or written.
    #[error("{doing} {} failed", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}
