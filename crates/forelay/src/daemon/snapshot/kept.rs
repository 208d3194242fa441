//! One snapshot, as its shelf knows it, and what it says of a launch that it was of no use.

use std::sync::{Arc, Weak};

use forelay_cache::Domain;
use forelay_image::snapshot::SnapshotOf;
use forelay_image::{Component, ComponentId};

use crate::daemon::error::HostError;
use crate::daemon::snapshot::on_disk::FileStamp;

/// Why a launch could not resume from a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum NotResumed {
    /// It is wrong: it is not to be tried again.
    #[error("{0}")]
    Snapshot(HostError),
    /// Something else, such as the host or what the guest did.
    #[error("{0}")]
    Other(HostError),
}

impl From<HostError> for NotResumed {
    fn from(error: HostError) -> Self {
        Self::Other(error)
    }
}

impl From<NotResumed> for HostError {
    fn from(error: NotResumed) -> Self {
        match error {
            NotResumed::Snapshot(error) | NotResumed::Other(error) => error,
        }
    }
}

/// A snapshot that there is.
#[derive(Clone, Debug)]
pub struct Kept {
    pub domain: Domain,
    pub id: ComponentId,
    pub component: Arc<Component>,
    pub of: SnapshotOf,
    /// Why it is not used any more.
    pub aside: Option<String>,
    /// Launches that resumed from it since this daemon started.
    pub uses: u64,
    /// When the last one did, whatever daemon it was of; 0 if none has.
    pub last_used_ms: i64,
    /// Launches that could not resume from it since one did.
    pub(super) failures: u32,
    /// The files that hold it, as they were when all of them were right.
    pub(super) verified: Vec<FileStamp>,
    /// Launches that are about to resume from it.
    pub(super) held: Weak<()>,
}

impl Kept {
    /// A component as one; in words why it is none.
    pub(super) fn new(
        domain: &Domain,
        id: ComponentId,
        component: Arc<Component>,
    ) -> Result<Self, String> {
        let of = component.snapshot.as_deref().cloned();
        let of = of.ok_or("it is no snapshot")?;
        of.check(&component.image)?;
        Ok(Self {
            domain: domain.clone(),
            id,
            component,
            of,
            aside: None,
            uses: 0,
            last_used_ms: 0,
            failures: 0,
            verified: Vec::new(),
            held: Weak::new(),
        })
    }

    /// Whether all of it was found to be right since this daemon started.
    pub fn was_verified(&self) -> bool {
        !self.verified.is_empty()
    }

    /// When it was made, milliseconds since the epoch.
    pub fn made_ms(&self) -> i64 {
        self.component.version.parse().unwrap_or(0)
    }
}
