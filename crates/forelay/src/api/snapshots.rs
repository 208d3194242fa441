//! Snapshots: what is asked and what is told of one.

use forelay_guest_protocol::snapshot::Tier;
use forelay_image::Digest;
use forelay_image::snapshot::SnapshotOrigin;
use serde::{Deserialize, Serialize};

/// A snapshot to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// The manifest's text (TOML).
    pub manifest: String,
    /// A lock's text; solved again if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<String>,
    /// How far its VM is to come; as far as the manifest says if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Tier>,
}

/// A snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its component's id.
    pub id: Digest,
    /// How far its VM had come.
    pub tier: Tier,
    /// Trust domain, which alone may use it.
    pub domain: String,
    /// Profile or kernel that it was made of.
    pub made_of: String,
    /// When, milliseconds since the epoch.
    pub made_ms: i64,
    /// Its memory image, the key of shared memory.
    pub image: Digest,
    /// Size of the memory image.
    pub image_bytes: u64,
    /// Bytes of it that are the state of devices.
    pub state_bytes: u64,
    /// Bytes on disk of all snapshots of the domain, which share what is the same in them.
    pub domain_stored_bytes: u64,
    /// All that a launch must have the same.
    pub origin: SnapshotOrigin,
    /// Launches that resumed from it since the daemon started.
    pub uses: u64,
    /// VMs that run on its memory.
    pub vms: Vec<String>,
    /// Whether all of it was read and found right since the daemon started: only then is it used.
    pub verified: bool,
    /// Why it is not used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}
