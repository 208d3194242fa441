//! History: what was launched, attached, touched, fetched and used on this host.
//!
//! Owns the vocabulary of events, the [`History`] trait that every backend implements, and the
//! embedded SQLite backend ([`SqliteHistory`]). Refuses to know what is forecast from it: readers
//! get it back through [`Sink`], event by event.
//!
//! ```text
//! append --> raw events (days) --roll_up--> one row a profile and day --> one row a week
//!                  |                  \--> working sets, compositions, memory sketches (folded)
//!                  +--------- replay: rolled-up rows first, then raw events ---------> Sink
//! ```
//!
//! Invariants:
//! - an event is its id: appending it again changes nothing;
//! - what is rolled up is closed: an event older than that is refused and counted as late, so
//!   that it can never be counted twice;
//! - the size is bounded by [`Limits`], whatever is appended;
//! - a database that is corrupt, of another program or of a later schema is refused untouched.

mod append;
mod codec;
mod csv;
mod names;
mod query;
mod replay;
mod rollup;
mod schema;
mod sqlite;
mod working_sets;

use async_trait::async_trait;
use forelay_image::{Digest, Touch};
use forelay_predict::resources::Sketch;
use forelay_predict::time::Timestamp;
use forelay_predict::working_set::WorkingSet;
use serde::{Deserialize, Serialize};

pub use csv::{ImportOptions, ImportReport, import_csv};
pub use query::{LaunchRecord, ProfileSummary};
pub use sqlite::{OnCorrupt, OpenOptions, SqliteHistory};

/// Identity of an event: when it happened, and a number that tells apart what happened in the
/// same millisecond. The same event always gets the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EventId {
    /// When it happened.
    pub at: Timestamp,
    /// Distinguishes events of one millisecond: random, or a hash of the event's source.
    pub nonce: u64,
}

impl EventId {
    /// An id derived from the event's content: `parts` name it among those of its millisecond.
    pub fn derive(at: Timestamp, parts: &[&[u8]]) -> Self {
        let mut hasher = forelay_image::digest::Hasher::new();
        hasher.update(&at.0.to_le_bytes());
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let digest = hasher.finish();
        let mut nonce = [0; 8];
        nonce.copy_from_slice(&digest.as_bytes()[..8]);
        Self {
            at,
            nonce: u64::from_le_bytes(nonce),
        }
    }
}

/// Identity of a launch, and of the VM that came of it: the nonce of its launch event.
///
/// Files have it as a signed number.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(from = "i64", into = "i64")]
pub struct LaunchId(pub u64);

impl From<i64> for LaunchId {
    fn from(signed: i64) -> Self {
        Self(signed.cast_unsigned())
    }
}

impl From<LaunchId> for i64 {
    fn from(id: LaunchId) -> Self {
        id.0.cast_signed()
    }
}

/// A profile and who owns it. Two owners may use the same profile name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProfileRef {
    /// Profile name.
    pub profile: String,
    /// Owner, the default trust domain.
    pub owner: String,
}

impl ProfileRef {
    /// `profile` of `owner`.
    pub fn new(profile: impl Into<String>, owner: impl Into<String>) -> Self {
        Self {
            profile: profile.into(),
            owner: owner.into(),
        }
    }
}

/// A component as a VM had it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ComponentRef {
    /// Component name, which outlives versions.
    pub name: String,
    /// Digest of its image.
    pub image: Digest,
}

/// One sample of what a VM uses. Byte and time counters are since the previous sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceSample {
    /// Milliseconds since the VM's launch.
    pub since_launch_ms: u64,
    /// CPU time used, in milliseconds.
    pub cpu_ms: u64,
    /// Memory in use now.
    pub memory_bytes: u64,
    /// Bytes read from disks.
    pub read_bytes: u64,
    /// Bytes written to disks.
    pub written_bytes: u64,
    /// Bytes received from the network.
    pub received_bytes: u64,
    /// Bytes sent to the network.
    pub sent_bytes: u64,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum What {
    /// A VM was launched (`count` of them: traces give several launches a minute as one row).
    Launch {
        /// Components its map image was composed of; empty if unknown, as in imported traces.
        components: Vec<ComponentRef>,
        /// Launches that this event stands for.
        count: u32,
    },
    /// The VM became ready.
    Ready {
        /// Milliseconds from launch until its root was mounted.
        mounted_ms: u64,
        /// Milliseconds from launch until its ready probe succeeded.
        ready_ms: u64,
    },
    /// The VM stopped.
    Stop {
        /// How long it ran.
        ran_ms: u64,
    },
    /// A component was attached to the running VM.
    Attach {
        /// The component.
        component: ComponentRef,
    },
    /// What a launch touched, reported once per launch when its window has passed.
    Touched {
        /// All component images the VM had.
        images: Vec<Digest>,
        /// What it touched of them.
        touches: Vec<Touch>,
    },
    /// What a launch touched after its [`What::Touched`], of the same images: counted to that
    /// launch, not as another.
    TouchedLate {
        /// What it touched.
        touches: Vec<Touch>,
    },
    /// Resources in use.
    Sample(ResourceSample),
    /// Demand fetches that a VM waited for, summed over a reporting interval.
    DemandFetch {
        /// Image fetched from.
        image: Digest,
        /// Number of fetches.
        fetches: u64,
        /// Bytes fetched.
        bytes: u64,
        /// Time the VM stood still, in nanoseconds.
        stall_ns: u64,
    },
    /// What was prefetched for a VM, and how much of it was touched in the end.
    Prefetch {
        /// Image prefetched from.
        image: Digest,
        /// Bytes prefetched.
        prefetched_bytes: u64,
        /// Of these, bytes that the VM touched.
        used_bytes: u64,
    },
}

/// One event of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its identity.
    pub id: EventId,
    /// The VM: the nonce of its launch event.
    pub vm: u64,
    /// Whose it is.
    pub of: ProfileRef,
    /// What happened.
    pub what: What,
}

/// What became of appended events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Appended {
    /// Events stored.
    pub stored: u64,
    /// Events that were there already.
    pub duplicates: u64,
    /// Events of a time that is rolled up already.
    pub late: u64,
}

/// Bounds of what is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Days of raw events.
    pub raw_days: u32,
    /// Hours of raw touches, the bulkiest of raw events; older ones live on in working sets.
    pub touched_hours: u32,
    /// Days that keep a row of their own per profile; older ones share a row a week.
    pub daily_days: u32,
    /// Days after which rolled-up rows are deleted.
    pub kept_days: u32,
    /// Size of the database; when it is exceeded, raw events are rolled up and rolled-up rows
    /// deleted sooner.
    pub max_bytes: u64,
    /// Component compositions kept per profile, the most used.
    pub compositions_per_profile: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            raw_days: 7,
            touched_hours: 6,
            daily_days: 56,
            kept_days: 400,
            max_bytes: 1 << 30,
            compositions_per_profile: 32,
        }
    }
}

/// What a [`History::roll_up`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolledUp {
    /// Days of raw events rolled up.
    pub days: u64,
    /// Raw events rolled up.
    pub events: u64,
    /// Daily rows that became weekly ones.
    pub weekly_merged: u64,
    /// Rolled-up rows deleted by age or size.
    pub deleted: u64,
    /// Events dated more than a day ahead of `now` (a clock that jumped), deleted.
    pub misdated: u64,
    /// `now` itself looked wrong (over a year past the newest event): nothing was done.
    pub clock_suspect: bool,
}

/// Receives the history at daemon start, oldest first.
///
/// Rolled-up state comes before raw events; launches come in order of time.
pub trait Sink {
    /// `count` launches at about `at`; the time is exact to `resolution_ms`.
    fn launches(&mut self, of: &ProfileRef, at: Timestamp, count: u32, resolution_ms: i64);

    /// VMs that in the end had `components`, counted `weight` times, as rolled up, with the time
    /// they were last seen.
    fn composition(
        &mut self,
        of: &ProfileRef,
        at: Timestamp,
        components: &[ComponentRef],
        weight: f64,
    );

    /// One VM that was launched with `components`; told after [`Sink::launches`], if its
    /// components are known.
    fn launched_with(
        &mut self,
        of: &ProfileRef,
        at: Timestamp,
        vm: u64,
        components: &[ComponentRef],
    );

    /// A component was attached to a running VM.
    fn attached(&mut self, of: &ProfileRef, at: Timestamp, vm: u64, component: &ComponentRef);

    /// The working set of a profile on an image, as rolled up.
    fn working_set(&mut self, of: &ProfileRef, image: Digest, set: WorkingSet);

    /// What one launch touched.
    fn touched(&mut self, of: &ProfileRef, images: &[Digest], touches: &[Touch]);

    /// What one launch touched after that.
    fn touched_late(&mut self, of: &ProfileRef, touches: &[Touch]);

    /// Memory in use over time, as rolled up.
    fn memory_sketch(&mut self, of: &ProfileRef, sketch: Sketch);

    /// One sample of a VM.
    fn sample(&mut self, of: &ProfileRef, at: Timestamp, vm: u64, sample: &ResourceSample);

    /// A VM stopped after `ran_ms`.
    fn stopped(&mut self, of: &ProfileRef, at: Timestamp, vm: u64, ran_ms: u64);
}

/// How much [`History::replay`] gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    /// Launches, rolled-up ones included.
    pub launches: u64,
    /// Working sets restored.
    pub working_sets: u64,
    /// Raw events other than launches.
    pub events: u64,
    /// Stored state that could not be read and was left out.
    pub unreadable: u64,
}

/// Why the history could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The file is damaged.
    #[error(
        "history {path} is corrupt ({detail}); move it away, or let forelay set it aside and \
         start again with `forelay daemon --history-reset`"
    )]
    Corrupt {
        /// The database file.
        path: String,
        /// What SQLite said.
        detail: String,
    },
    /// The file is a database of another program.
    #[error("{path} is an SQLite database, but not a forelay history; it is left untouched")]
    Foreign {
        /// The database file.
        path: String,
    },
    /// The file was written by a later forelay.
    #[error(
        "history {path} has schema {found}, this forelay knows up to {known}; upgrade forelay, \
         or name another history file"
    )]
    Newer {
        /// The database file.
        path: String,
        /// Its schema.
        found: i64,
        /// The latest schema this program knows.
        known: i64,
    },
    /// A CSV row was bad and the caller asked to stop there.
    #[error("line {line}: {reason}")]
    BadRow {
        /// Line, the header being 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The database failed.
    #[error("history: {operation}")]
    Database {
        /// What was being done.
        operation: &'static str,
        /// Why it failed.
        #[source]
        source: sqlx::Error,
    },
    /// A file could not be read, written or moved.
    #[error("history: {operation} {path}")]
    Io {
        /// What was being done.
        operation: &'static str,
        /// The file.
        path: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A store of history. [`SqliteHistory`] is the embedded one; a fleet's goes behind the same trait.
#[async_trait]
pub trait History: Send + Sync {
    /// Stores events, in any order; those already there or too late are counted, not stored.
    async fn append(&self, events: &[Event]) -> Result<Appended, HistoryError>;

    /// Rolls up what is older than the limits say. The daemon calls it when it has started, and
    /// every day.
    async fn roll_up(&self, now: Timestamp) -> Result<RolledUp, HistoryError>;

    /// Gives everything to `sink`, launches from `since` on.
    async fn replay(
        &self,
        since: Timestamp,
        sink: &mut (dyn Sink + Send),
    ) -> Result<Replayed, HistoryError>;

    /// The latest `limit` launches (of one profile, if given), newest first, with what they cost.
    async fn launches(
        &self,
        profile: Option<&str>,
        limit: u32,
    ) -> Result<Vec<LaunchRecord>, HistoryError>;

    /// Totals per profile, ordered by owner and name.
    async fn profiles(&self) -> Result<Vec<ProfileSummary>, HistoryError>;
}

#[cfg(test)]
mod tests;
