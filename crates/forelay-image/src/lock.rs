//! The lock: a manifest's resolved, digest-pinned form.
//!
//! A lock lists what a VM is composed of in compose order: the base first, every
//! component after those that it requires. The kernel stands apart, since it is not part
//! of the composed tree.
//!
//! Invariant: equal locks have equal TOML, hence equal digests, on any host.

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::NameOf;
use crate::component::{Component, ComponentId, Role};
use crate::manifest::position;

/// Format that this code writes, and the newest it reads.
pub const LOCK_FORMAT: u32 = 1;

/// A resolved manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// Format of the file.
    pub format: u32,
    /// Digest of the manifest that was resolved ([`crate::manifest::Manifest::digest`]).
    pub manifest_digest: Digest,
    /// The kernel.
    pub kernel: LockedComponent,
    /// What the VM's tree is composed of, in compose order, base first.
    #[serde(rename = "component")]
    pub components: Vec<LockedComponent>,
}

/// One component, pinned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedComponent {
    /// Name.
    pub name: String,
    /// Version in Debian's syntax.
    pub version: String,
    /// What it is for.
    pub role: Role,
    /// Digest of its metadata.
    pub id: ComponentId,
    /// Identity of its image.
    pub image: Digest,
    /// Size of the image in bytes.
    pub image_bytes: u64,
    /// Bytes at the image's start that hold all metadata.
    pub metadata_bytes: u64,
}

impl From<&Component> for LockedComponent {
    fn from(component: &Component) -> Self {
        Self {
            name: component.name.clone(),
            version: component.version.clone(),
            role: component.role,
            id: component.id(),
            image: component.image.digest,
            image_bytes: component.image.bytes,
            metadata_bytes: component.image.metadata_bytes,
        }
    }
}

impl LockedComponent {
    /// Whether all that it says is what the metadata of its id says.
    pub fn describes(&self, component: &Component) -> bool {
        let image = &component.image;
        self.name == component.name
            && self.version == component.version
            && self.role == component.role
            && self.image == image.digest
            && (self.image_bytes, self.metadata_bytes) == (image.bytes, image.metadata_bytes)
    }
}

/// Why a lock was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// Not TOML, or not the shape of a lock.
    #[error(
        "line {line}, column {column}: {message}\n  help: locks are written by `forelay lock`; make a new one"
    )]
    Syntax {
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// Written by a newer version.
    #[error(
        "the lock has format {found}; this forelay reads up to {LOCK_FORMAT}: update forelay or run `forelay lock` again"
    )]
    Format {
        /// Format of the file.
        found: u32,
    },
    /// The contents contradict each other.
    #[error("the lock is inconsistent: {0}; run `forelay lock` again")]
    Inconsistent(String),
}

impl Lock {
    /// Reads a lock.
    pub fn parse(text: &str) -> Result<Self, LockError> {
        #[derive(Deserialize)]
        struct Header {
            format: u32,
        }
        let syntax = |error: toml::de::Error| {
            let (line, column) = position(text, error.span().map_or(0, |span| span.start));
            LockError::Syntax {
                line,
                column,
                message: error.message().trim().replace('\n', "; "),
            }
        };
        let header: Header = toml::from_str(text).map_err(syntax)?;
        if header.format > LOCK_FORMAT {
            return Err(LockError::Format {
                found: header.format,
            });
        }
        let lock: Self = toml::from_str(text).map_err(syntax)?;
        lock.validate()?;
        Ok(lock)
    }

    fn validate(&self) -> Result<(), LockError> {
        let inconsistent = |text: String| Err(LockError::Inconsistent(text));
        for one in self.all() {
            let checked = NameOf::Component.check(&one.name);
            let checked = checked.and_then(|()| NameOf::Version.check(&one.version));
            checked.map_err(|error| LockError::Inconsistent(error.to_string()))?;
        }
        if self.kernel.role != Role::Kernel {
            return inconsistent(format!("{} is no kernel", self.kernel.name));
        }
        if self
            .components
            .first()
            .is_none_or(|first| first.role != Role::Base)
        {
            return inconsistent("the first component is not a base".into());
        }
        for (index, component) in self.components.iter().enumerate() {
            if index > 0 && component.role == Role::Base || component.role == Role::Kernel {
                return inconsistent(format!("{} is a second base or kernel", component.name));
            }
            if self.components[..index]
                .iter()
                .any(|other| other.name == component.name)
            {
                return inconsistent(format!("{} is listed twice", component.name));
            }
            let (metadata, image) = (component.metadata_bytes, component.image_bytes);
            if metadata > image || metadata == 0 {
                return inconsistent(format!("{} has impossible sizes", component.name));
            }
        }
        Ok(())
    }

    /// The lock as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a lock always serialises")
    }

    /// Digest of the lock's TOML.
    pub fn digest(&self) -> Digest {
        Digest::of(self.to_toml().as_bytes())
    }

    /// All pinned components, kernel last.
    pub fn all(&self) -> impl Iterator<Item = &LockedComponent> {
        self.components.iter().chain(std::iter::once(&self.kernel))
    }

    /// Bytes of all images of the composed tree (without the kernel's).
    pub fn image_bytes(&self) -> u64 {
        self.components
            .iter()
            .map(|component| component.image_bytes)
            .sum()
    }
}
