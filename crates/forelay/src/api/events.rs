//! What happens on a host, as it is told to those who watch.

use serde::{Deserialize, Serialize};

/// What kind of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A launch was asked for.
    Launching,
    /// The VMM runs.
    Started,
    /// The guest has mounted its image.
    Mounted,
    /// The guest says that its work is ready.
    Ready,
    /// Its CPUs stand still, as asked.
    Paused,
    /// It is kept as a snapshot of its own, without a VMM.
    Hibernated,
    /// The VMM lives and does not answer.
    Unreachable,
    /// A VM stopped as asked, or ended by itself with success.
    Stopped,
    /// A VM ended by an error.
    Failed,
    /// Bytes of a component leave shared memory.
    Evicting,
    /// A VM waits for bytes for longer than a fetch takes.
    Waiting,
    /// It waits no longer.
    WaitOver,
    /// A snapshot was made.
    SnapshotMade,
    /// A launch that was to resume from a snapshot did not.
    SnapshotFailed,
    /// Something is missing that the daemon goes on without.
    Degraded,
    /// It is there again.
    Restored,
    /// The host is shorter of memory than before, or less short.
    Pressure,
}

impl EventKind {
    /// All kinds, in the order in which they are declared.
    pub const ALL: [Self; 17] = [
        Self::Launching,
        Self::Started,
        Self::Mounted,
        Self::Ready,
        Self::Paused,
        Self::Hibernated,
        Self::Unreachable,
        Self::Stopped,
        Self::Failed,
        Self::Evicting,
        Self::Waiting,
        Self::WaitOver,
        Self::SnapshotMade,
        Self::SnapshotFailed,
        Self::Degraded,
        Self::Restored,
        Self::Pressure,
    ];

    /// As in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Launching => "launching",
            Self::Started => "started",
            Self::Mounted => "mounted",
            Self::Ready => "ready",
            Self::Paused => "paused",
            Self::Hibernated => "hibernated",
            Self::Unreachable => "unreachable",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Evicting => "evicting",
            Self::Waiting => "waiting",
            Self::WaitOver => "wait-over",
            Self::SnapshotMade => "snapshot-made",
            Self::SnapshotFailed => "snapshot-failed",
            Self::Degraded => "degraded",
            Self::Restored => "restored",
            Self::Pressure => "pressure",
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostEvent {
    /// Grows with each event; starts again with the daemon's worker.
    pub id: u64,
    /// When, milliseconds since the epoch.
    pub at_ms: i64,
    /// What kind.
    pub kind: EventKind,
    /// The VM that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Its profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// What there is to say about it: one line of at most 500 bytes.
    pub message: String,
    /// Bytes that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Seconds that it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_kind_is_missing_from_all() {
        for (at, kind) in EventKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, at);
            let named = serde_json::to_value(kind).unwrap();
            assert_eq!(named, kind.name());
        }
    }
}
