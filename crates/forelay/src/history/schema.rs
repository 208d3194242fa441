//! The SQLite schema, as the steps that lead to it.
//!
//! Invariant: a published step never changes; a change of schema is a further step. The database's
//! `user_version` is the number of steps it has seen, its `application_id` says that it is ours.
//!
//! Raw tables are keyed by (at_ms, nonce), the event's id, without rowid: the key is the
//! time index, and inserting in order of time appends.

/// "Fore" in ASCII.
pub(super) const APPLICATION_ID: i64 = 0x466f_7265;

/// Each step's statements, executed in one transaction.
pub(super) const STEPS: &[&str] = &[RAW, ROLLED_UP, TOUCHED_LATE];

/// Step 1: names and raw events.
const RAW: &str = "
CREATE TABLE profile (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    owner TEXT NOT NULL,
    UNIQUE (owner, name)
);
CREATE TABLE component (
    id INTEGER PRIMARY KEY,
    image BLOB NOT NULL UNIQUE,
    name TEXT NOT NULL
);
CREATE TABLE composition (
    id INTEGER PRIMARY KEY,
    members BLOB NOT NULL UNIQUE
);
CREATE TABLE launch (
    at_ms INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    composition INTEGER,
    count INTEGER NOT NULL,
    PRIMARY KEY (at_ms, nonce)
) WITHOUT ROWID;
CREATE TABLE ready (
    at_ms INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    vm INTEGER NOT NULL,
    mounted_ms INTEGER NOT NULL,
    ready_ms INTEGER NOT NULL,
    PRIMARY KEY (at_ms, nonce)
) WITHOUT ROWID;
CREATE TABLE stop (
    at_ms INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    vm INTEGER NOT NULL,
    ran_ms INTEGER NOT NULL,
    PRIMARY KEY (at_ms, nonce)
) WITHOUT ROWID;
CREATE TABLE attachment (
    at_ms INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    vm INTEGER NOT NULL,
    component INTEGER NOT NULL,
    PRIMARY KEY (at_ms, nonce)
) WITHOUT ROWID;
CREATE TABLE touched (
    at_ms INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    vm INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (at_ms, nonce)
) WITHOUT ROWID;
CREATE TABLE sample (
    at_ms INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    vm INTEGER NOT NULL,
    since_launch_ms INTEGER NOT NULL,
    cpu_ms INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL,
    read_bytes INTEGER NOT NULL,
    written_bytes INTEGER NOT NULL,
    received_bytes INTEGER NOT NULL,
    sent_bytes INTEGER NOT NULL,
    PRIMARY KEY (at_ms, nonce)
) WITHOUT ROWID;
CREATE TABLE demand_fetch (
    at_ms INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    vm INTEGER NOT NULL,
    component INTEGER NOT NULL,
    fetches INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    stall_ns INTEGER NOT NULL,
    PRIMARY KEY (at_ms, nonce)
) WITHOUT ROWID;
CREATE TABLE prefetch (
    at_ms INTEGER NOT NULL,
    nonce INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    vm INTEGER NOT NULL,
    component INTEGER NOT NULL,
    prefetched_bytes INTEGER NOT NULL,
    used_bytes INTEGER NOT NULL,
    PRIMARY KEY (at_ms, nonce)
) WITHOUT ROWID;
";

/// Step 2: what raw events are rolled up into.
const ROLLED_UP: &str = "
CREATE TABLE state (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID;
-- One profile in `days` days (1 or 7) from day `day` since the epoch.
CREATE TABLE rollup (
    day INTEGER NOT NULL,
    profile INTEGER NOT NULL,
    days INTEGER NOT NULL,
    launches INTEGER NOT NULL,
    cold INTEGER NOT NULL,
    stops INTEGER NOT NULL,
    ran_ms INTEGER NOT NULL,
    attachments INTEGER NOT NULL,
    samples INTEGER NOT NULL,
    cpu_ms INTEGER NOT NULL,
    memory_bytes_sum INTEGER NOT NULL,
    memory_bytes_max INTEGER NOT NULL,
    io_bytes INTEGER NOT NULL,
    fetches INTEGER NOT NULL,
    fetched_bytes INTEGER NOT NULL,
    stall_ns INTEGER NOT NULL,
    prefetched_bytes INTEGER NOT NULL,
    used_bytes INTEGER NOT NULL,
    times BLOB NOT NULL,
    PRIMARY KEY (day, profile)
) WITHOUT ROWID;
CREATE TABLE working_set (
    profile INTEGER NOT NULL,
    component INTEGER NOT NULL,
    last_ms INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (profile, component)
) WITHOUT ROWID;
CREATE TABLE composition_use (
    profile INTEGER NOT NULL,
    composition INTEGER NOT NULL,
    uses INTEGER NOT NULL,
    last_ms INTEGER NOT NULL,
    PRIMARY KEY (profile, composition)
) WITHOUT ROWID;
CREATE TABLE memory_use (
    profile INTEGER PRIMARY KEY,
    data BLOB NOT NULL
);
";

/// Step 3: touches that count to a launch whose touches were told before.
const TOUCHED_LATE: &str = "
ALTER TABLE touched ADD COLUMN late INTEGER NOT NULL DEFAULT 0;
";
