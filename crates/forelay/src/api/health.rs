//! Health of the daemon: what it does without, and who waits for bytes.

use std::net::SocketAddr;

use forelay_image::Digest;
use serde::{Deserialize, Serialize};

/// An accelerator that is not known: no kernel has been listed yet.
pub const NOT_PROBED: &str = "not probed yet";

/// The name of loopback under which browsers look at the dashboard of whom has this token: no
/// other page knows it, so none can have a browser go to another port of it, which would be told
/// its cookies.
pub fn dashboard_name(token: &str) -> String {
    let digest = Digest::of(format!("name of {token}").as_bytes()).hex();
    format!("forelay-{}.localhost", &digest[..16])
}

/// The daemon's state of health.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Health {
    /// Version of the daemon.
    pub version: String,
    /// Process that answers.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: f64,
    /// Where the dashboard is served over loopback TCP, if it is; `forelay dashboard` prints its
    /// address for browsers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dashboard: Option<SocketAddr>,
    /// What VMs run under, or [`NOT_PROBED`].
    pub accelerator: String,
    /// What the daemon does without; empty if all is well.
    #[serde(default)]
    pub degraded: Vec<Degraded>,
    /// VMs that wait for bytes.
    #[serde(default)]
    pub waiting: Vec<WaitingVm>,
}

/// A VM that waits for bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WaitingVm {
    /// Its name.
    pub vm: String,
    /// What it waits for.
    #[serde(flatten)]
    pub wait: PendingFault,
}

/// Something that the daemon does without.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Degraded {
    /// What is missing.
    pub what: String,
    /// What is wrong with it.
    pub problem: String,
    /// Since when, milliseconds since the epoch.
    pub since_ms: i64,
}

/// Bytes that a VM waits for; its vCPU stands still until they are there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PendingFault {
    /// Since when, milliseconds since the epoch. A daemon that took the VM over counts from
    /// then.
    pub since_ms: i64,
    /// For how long.
    pub waited_s: f64,
    /// Component that the bytes belong to.
    pub component: Option<String>,
    /// Its image.
    pub image: Digest,
    /// First byte in the image.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// What holds them up.
    pub culprit: WaitCulprit,
    /// What the last attempt failed with; absent while the first one has not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What holds up bytes that a VM waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitCulprit {
    /// The repository is unreachable, does not answer, or lacks them.
    Repository,
    /// The repository has other bytes than it should.
    Content,
    /// The disk cache does not answer.
    DiskCache,
    /// Something else; `error` says what.
    Other,
}

impl std::fmt::Display for WaitCulprit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Repository => "the repository",
            Self::Content => "the repository's content",
            Self::DiskCache => "the disk cache",
            Self::Other => "the daemon",
        })
    }
}

impl std::fmt::Display for PendingFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let component = self.component.as_deref().unwrap_or("its image");
        let Self {
            waited_s,
            len,
            offset,
            culprit,
            ..
        } = self;
        write!(
            f,
            "waits {waited_s:.1} s for {len} bytes of {component} at {offset}: {culprit}"
        )?;
        match &self.error {
            Some(error) => write!(f, " fails: {error}"),
            None => f.write_str(" has not answered"),
        }
    }
}

/// An error as the API reports it: problem details (RFC 9457).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ApiError {
    /// What it is about, as a URI: `urn:forelay:problem:` and a word.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// The HTTP status in words.
    #[serde(default)]
    pub title: String,
    /// The HTTP status.
    #[serde(default)]
    pub status: u16,
    /// As `error`.
    #[serde(default)]
    pub detail: String,
    /// Names the request, here and in the daemon's log.
    #[serde(default)]
    pub request_id: String,
    /// What failed, why, and what to do.
    pub error: String,
}

impl ApiError {
    /// An error in words.
    pub fn new(error: impl Into<String>) -> Self {
        Self {
            error: error.into(),
            ..Self::default()
        }
    }
}
