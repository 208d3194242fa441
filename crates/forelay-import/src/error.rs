//! Errors of the importers.
//!
//! `Display` says what failed and what to do; the cause is in `source()`. A full disk
//! is its own case whatever reported it, since the cure is the same.

use std::io;
use std::path::{Path, PathBuf};

use forelay_image::tree::{Tree, TreeError};

/// Why a component could not be built from its source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// A file operation failed.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was being done, e.g. `reading`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// No space left.
    #[error("no space left while {doing}; free some space and build again")]
    DiskFull {
        /// What was being done.
        doing: String,
    },
    /// An archive is damaged, hostile or of an unknown kind.
    #[error("{}: {problem}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An archive or directory exceeds a limit that guards against hostile input.
    #[error("{}: more than {limit} {unit}; raise the limit if this is meant", path.display())]
    TooLarge {
        /// The archive.
        path: PathBuf,
        /// The limit.
        limit: u64,
        /// What is counted.
        unit: &'static str,
    },
    /// A source that does not fit on the disk where it would be unpacked.
    #[error(
        "{} takes {bytes} bytes at the least, and {} has {free} free: free some space, or put \
         the state directory elsewhere", source_path.display(), dir.display()
    )]
    NoRoom {
        /// The source.
        source_path: PathBuf,
        /// What it takes.
        bytes: u64,
        /// Where it would be unpacked.
        dir: PathBuf,
        /// What is free there.
        free: u64,
    },
    /// A name or path that cannot be in a component.
    #[error("{}: {source}", path.display())]
    Tree {
        /// The archive or directory it came from.
        path: PathBuf,
        /// The cause.
        source: TreeError,
    },
    /// A host tool is not installed.
    #[error("{tool} is not installed; install it with `apt-get install {package}`")]
    MissingTool {
        /// Its command.
        tool: String,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// A host tool failed.
    #[error("{tool} failed ({status}) while {doing}:\n{tail}")]
    Tool {
        /// Its command.
        tool: String,
        /// Exit status in words.
        status: String,
        /// What it was to do.
        doing: String,
        /// The end of what it printed.
        tail: String,
    },
    /// A build took more of the host than it may.
    #[error("{doing} {why}, and was ended; the limits are `[build]` in the configuration")]
    Limit {
        /// What it was to do.
        doing: String,
        /// What it took.
        why: String,
    },
    /// A package that the apt sources do not have.
    #[error("package {name:?} does not exist in {sources}{}", suggestion(.nearest))]
    NoSuchPackage {
        /// The name asked for.
        name: String,
        /// The sources searched.
        sources: String,
        /// Names that are close to it, nearest first.
        nearest: Vec<String>,
    },
    /// A package is in the base already, so there is nothing to build.
    #[error("{name} {version} is part of the base already: a manifest needs no component for it")]
    InBase {
        /// The package.
        name: String,
        /// Its version in the base.
        version: String,
    },
    /// apt found no way to install the packages together.
    #[error("apt cannot install {packages} on this base:\n{explanation}")]
    Unsolvable {
        /// What was asked for.
        packages: String,
        /// apt's explanation.
        explanation: String,
    },
    /// Package archive or index could not be downloaded.
    #[error("cannot download from the apt sources (is the network up?):\n{explanation}")]
    Network {
        /// apt's messages.
        explanation: String,
    },
    /// Building needs rights that the process does not have.
    #[error("{doing} needs root (mounts, device nodes and chroot); run it as root")]
    NotRoot {
        /// What needs them.
        doing: &'static str,
    },
    /// The request does not make a valid component.
    #[error("{0}")]
    Request(String),
    /// Two components define the same account or line differently.
    #[error(transparent)]
    Merge(#[from] forelay_guest_protocol::accounts::MergeError),
    /// The image could not be written.
    #[error("writing the component image")]
    Image(#[source] Box<dyn std::error::Error + Send + Sync>),
}

fn suggestion(nearest: &[String]) -> String {
    match nearest {
        [] => String::new(),
        names => format!("; did you mean {}?", names.join(", ")),
    }
}

/// Wraps an I/O error with what was being done, telling a full disk apart.
pub(crate) fn io_error(
    doing: &'static str,
    path: impl AsRef<Path>,
) -> impl FnOnce(io::Error) -> ImportError {
    let path = path.as_ref().to_owned();
    move |source| match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ImportError::DiskFull {
            doing: format!("{doing} {}", path.display()),
        },
        _ => ImportError::Io {
            doing,
            path,
            source,
        },
    }
}

/// Wraps a tree error with the archive or directory it came from.
pub(crate) fn tree_error(path: impl AsRef<Path>) -> impl FnOnce(TreeError) -> ImportError {
    let path = path.as_ref().to_owned();
    move |source| ImportError::Tree { path, source }
}

/// The text of a file of `tree`, if it has it.
pub(crate) fn text_of(tree: &Tree, path: &str) -> Result<Option<String>, ImportError> {
    tree.text_of(path).map_err(io_error("reading", path))
}

/// An archive error.
pub(crate) fn archive_error(path: impl AsRef<Path>, problem: impl Into<String>) -> ImportError {
    ImportError::Archive {
        path: path.as_ref().to_owned(),
        problem: problem.into(),
    }
}
