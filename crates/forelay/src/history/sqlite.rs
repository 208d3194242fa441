//! The embedded backend: opening (with all the ways a file can be wrong) and appending.
//!
//! One connection pool reads; writes go through one mutex that also holds the cache of ids, so
//! that a transaction never waits for another of this process.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use forelay_image::Digest;
use forelay_predict::time::Timestamp;
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx::{Connection, QueryBuilder, Row, Sqlite, SqliteConnection};
use tokio::sync::Mutex;

use super::codec::{TouchedImage, encode_members, encode_touches};
use super::schema::{APPLICATION_ID, STEPS};
use super::{
    Appended, ComponentRef, Event, History, HistoryError, HistorySize, LaunchRecord, Limits,
    ProfileRef, ProfileSummary, Replayed, RolledUp, Sink, What,
};

/// What to do with a corrupt database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCorrupt {
    /// Refuse to open and touch nothing.
    #[default]
    Refuse,
    /// Rename it (and its journal) to `<name>.corrupt-<n>` and start anew.
    MoveAside,
}

/// How to open a history.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// What to do with a corrupt database.
    pub on_corrupt: OnCorrupt,
    /// Bounds.
    pub limits: Limits,
}

/// History in one SQLite file.
pub struct SqliteHistory {
    pub(super) pool: SqlitePool,
    pub(super) writer: Mutex<Names>,
    pub(super) limits: Limits,
    path: PathBuf,
}

/// Ids of names, cached. Bounded: cleared when it grows past [`Names::MAX`].
#[derive(Default)]
pub(super) struct Names {
    profiles: HashMap<ProfileRef, i64>,
    components: HashMap<Digest, i64>,
    compositions: HashMap<Vec<u8>, i64>,
}

impl Names {
    const MAX: usize = 100_000;

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    fn bound(&mut self) {
        let len = self.profiles.len() + self.components.len() + self.compositions.len();
        if len > Self::MAX {
            self.clear();
        }
    }

    async fn profile(
        &mut self,
        db: &mut SqliteConnection,
        of: &ProfileRef,
    ) -> Result<i64, sqlx::Error> {
        if let Some(id) = self.profiles.get(of) {
            return Ok(*id);
        }
        let row = sqlx::query(
            "INSERT INTO profile (name, owner) VALUES (?, ?)
             ON CONFLICT (owner, name) DO UPDATE SET name = name RETURNING id",
        )
        .bind(&of.profile)
        .bind(&of.owner)
        .fetch_one(db)
        .await?;
        let id = row.try_get(0)?;
        self.profiles.insert(of.clone(), id);
        Ok(id)
    }

    /// The id of an image; an empty name leaves a known name as it is.
    async fn component(
        &mut self,
        db: &mut SqliteConnection,
        image: &Digest,
        name: &str,
    ) -> Result<i64, sqlx::Error> {
        if let Some(id) = self.components.get(image) {
            return Ok(*id);
        }
        let row = sqlx::query(
            "INSERT INTO component (image, name) VALUES (?1, ?2)
             ON CONFLICT (image) DO UPDATE SET name = iif(?2 = '', name, ?2) RETURNING id",
        )
        .bind(image.as_bytes().to_vec())
        .bind(name.to_owned())
        .fetch_one(db)
        .await?;
        let id = row.try_get(0)?;
        if !name.is_empty() {
            self.components.insert(*image, id);
        }
        Ok(id)
    }

    async fn composition(
        &mut self,
        db: &mut SqliteConnection,
        components: &[ComponentRef],
    ) -> Result<Option<i64>, sqlx::Error> {
        if components.is_empty() {
            return Ok(None);
        }
        let mut ids = Vec::with_capacity(components.len());
        for component in components {
            ids.push(
                self.component(db, &component.image, &component.name)
                    .await?,
            );
        }
        self.composition_of(db, encode_members(&ids))
            .await
            .map(Some)
    }

    pub(super) async fn composition_of(
        &mut self,
        db: &mut SqliteConnection,
        members: Vec<u8>,
    ) -> Result<i64, sqlx::Error> {
        if let Some(id) = self.compositions.get(&members) {
            return Ok(*id);
        }
        let row = sqlx::query(
            "INSERT INTO composition (members) VALUES (?)
             ON CONFLICT (members) DO UPDATE SET members = members RETURNING id",
        )
        .bind(members.clone())
        .fetch_one(db)
        .await?;
        let id = row.try_get(0)?;
        self.compositions.insert(members, id);
        Ok(id)
    }
}

impl SqliteHistory {
    /// Opens the history at `path`, creating or migrating it as needed.
    pub async fn open(path: &Path, options: OpenOptions) -> Result<Self, HistoryError> {
        match Self::try_open(path, options.limits).await {
            Err(HistoryError::Corrupt { .. }) if options.on_corrupt == OnCorrupt::MoveAside => {
                move_aside(path)?;
                Self::try_open(path, options.limits).await
            }
            other => other,
        }
    }

    async fn try_open(path: &Path, limits: Limits) -> Result<Self, HistoryError> {
        let failed = |operation| move |source| database(path, operation, source);
        if std::fs::metadata(path).is_ok_and(|file| file.len() > 0) {
            inspect(path).await?;
        }
        let connect = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .auto_vacuum(SqliteAutoVacuum::Incremental)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .foreign_keys(false)
            .busy_timeout(Duration::from_secs(10))
            .pragma("cache_size", "-65536");
        let pool = SqlitePoolOptions::new()
            .max_connections(4)
            .connect_with(connect)
            .await
            .map_err(failed("open"))?;
        migrate(path, &pool).await?;
        Ok(Self {
            pool,
            writer: Mutex::new(Names::default()),
            limits,
            path: path.to_owned(),
        })
    }

    /// Closes the database after a last checkpoint. Dropping it is safe too.
    pub async fn close(self) {
        self.pool.close().await;
    }

    /// Checks every page of the database; the message of the first damage, if any.
    pub async fn verify(&self) -> Result<(), HistoryError> {
        let mut db = self
            .pool
            .acquire()
            .await
            .map_err(|e| self.failed("verify", e))?;
        check(&self.path, &mut db).await
    }

    pub(super) fn failed(&self, operation: &'static str, source: sqlx::Error) -> HistoryError {
        database(&self.path, operation, source)
    }

    /// Events older than the first, and touches older than the second, are rolled up and closed.
    async fn closed_before(db: &mut SqliteConnection) -> Result<(i64, i64), sqlx::Error> {
        let row = sqlx::query(
            "SELECT (SELECT value FROM state WHERE name = 'closed_before_ms'),
                    (SELECT value FROM state WHERE name = 'touched_closed_before_ms')",
        )
        .fetch_one(db)
        .await?;
        let mark = |i| row.try_get(i).map(|at: Option<i64>| at.unwrap_or(i64::MIN));
        Ok((mark(0)?, mark(1)?))
    }
}

/// Turns an SQLite error into ours: damage is told apart from failure.
fn database(path: &Path, operation: &'static str, source: sqlx::Error) -> HistoryError {
    // 11 is SQLITE_CORRUPT, 26 SQLITE_NOTADB; extended codes have them in the low byte.
    let code = source
        .as_database_error()
        .and_then(|e| e.code())
        .and_then(|code| code.parse::<i32>().ok());
    match code.map(|code| code & 0xff) {
        Some(11 | 26) => HistoryError::Corrupt {
            path: path.display().to_string(),
            detail: source.to_string(),
        },
        _ => HistoryError::Database { operation, source },
    }
}

/// Looks at an existing file without changing a byte of it.
async fn inspect(path: &Path) -> Result<(), HistoryError> {
    let failed = |source| database(path, "open", source);
    let options = SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(Duration::from_secs(10));
    let mut db = SqliteConnection::connect_with(&options)
        .await
        .map_err(failed)?;
    let found = async {
        let pragma = async |db: &mut SqliteConnection, sql: &'static str| -> Result<i64, _> {
            sqlx::query(sql).fetch_one(db).await?.try_get::<i64, _>(0)
        };
        let application = pragma(&mut db, "PRAGMA application_id").await?;
        let version = pragma(&mut db, "PRAGMA user_version").await?;
        let tables = pragma(&mut db, "SELECT count(*) FROM sqlite_schema").await?;
        Ok::<_, sqlx::Error>((application, version, tables))
    }
    .await;
    let (application, version, tables) = found.map_err(failed)?;
    let known = STEPS.len() as i64;
    let result = if application != APPLICATION_ID && (application, version, tables) != (0, 0, 0) {
        Err(HistoryError::Foreign {
            path: path.display().to_string(),
        })
    } else if version > known {
        Err(HistoryError::Newer {
            path: path.display().to_string(),
            found: version,
            known,
        })
    } else {
        // A full check of a large file takes seconds: `verify` is there for it.
        match std::fs::metadata(path) {
            Ok(file) if file.len() <= 64 << 20 => check(path, &mut db).await,
            _ => Ok(()),
        }
    };
    let _ = db.close().await;
    result
}

async fn check(path: &Path, db: &mut SqliteConnection) -> Result<(), HistoryError> {
    let detail: String = sqlx::query("PRAGMA quick_check(1)")
        .fetch_one(db)
        .await
        .and_then(|row| row.try_get(0))
        .map_err(|source| database(path, "verify", source))?;
    if detail == "ok" {
        return Ok(());
    }
    Err(HistoryError::Corrupt {
        path: path.display().to_string(),
        detail,
    })
}

/// Brings the schema to the latest step, in one transaction.
async fn migrate(path: &Path, pool: &SqlitePool) -> Result<(), HistoryError> {
    let failed = |source| database(path, "migrate", source);
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
    let version: i64 = sqlx::query("PRAGMA user_version")
        .fetch_one(&mut *tx)
        .await
        .and_then(|row| row.try_get(0))
        .map_err(failed)?;
    let seen = usize::try_from(version).unwrap_or(0);
    for step in STEPS.iter().skip(seen) {
        sqlx::raw_sql(*step)
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
    }
    if seen < STEPS.len() {
        let stamp = format!(
            "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {}",
            STEPS.len()
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(stamp))
            .execute(&mut *tx)
            .await
            .map_err(failed)?;
    }
    tx.commit().await.map_err(failed)
}

/// Renames a corrupt database and its journal files.
fn move_aside(path: &Path) -> Result<(), HistoryError> {
    let sibling = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let free = (1..)
        .map(|n| format!(".corrupt-{n}"))
        .find(|suffix| !sibling(suffix).exists())
        .unwrap_or_default();
    for journal in ["-wal", "-shm", ""] {
        let from = sibling(journal);
        let to = sibling(&format!("{free}{journal}"));
        match std::fs::rename(&from, &to) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                return Err(HistoryError::Io {
                    operation: "move aside",
                    path: from.display().to_string(),
                    source,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// A raw row, ready to insert.
struct RawRow {
    at_ms: i64,
    nonce: i64,
    profile: i64,
    numbers: Vec<Option<i64>>,
    blob: Option<Vec<u8>>,
}

/// The raw tables with their columns after (at_ms, nonce, profile).
const RAW_TABLES: [(&str, &str); 8] = [
    ("launch", "composition, count"),
    ("ready", "vm, mounted_ms, ready_ms"),
    ("stop", "vm, ran_ms"),
    ("attachment", "vm, component"),
    ("touched", "vm, data"),
    (
        "sample",
        "vm, since_launch_ms, cpu_ms, memory_bytes, read_bytes, written_bytes, received_bytes, \
         sent_bytes",
    ),
    ("demand_fetch", "vm, component, fetches, bytes, stall_ns"),
    ("prefetch", "vm, component, prefetched_bytes, used_bytes"),
];

/// Numbers beyond what SQLite holds saturate.
fn signed(value: u64) -> Option<i64> {
    Some(i64::try_from(value).unwrap_or(i64::MAX))
}

/// The row of an event, and the index of its table.
async fn raw_row(
    names: &mut Names,
    db: &mut SqliteConnection,
    event: &Event,
) -> Result<(usize, RawRow), sqlx::Error> {
    let mut row = RawRow {
        at_ms: event.id.at.0,
        nonce: event.id.nonce.cast_signed(),
        profile: names.profile(db, &event.of).await?,
        numbers: Vec::new(),
        blob: None,
    };
    let vm = Some(event.vm.cast_signed());
    let table = match &event.what {
        What::Launch { components, count } => {
            let composition = names.composition(db, components).await?;
            row.numbers = vec![composition, Some(i64::from(*count))];
            0
        }
        What::Ready {
            mounted_ms,
            ready_ms,
        } => {
            row.numbers = vec![vm, signed(*mounted_ms), signed(*ready_ms)];
            1
        }
        What::Stop { ran_ms } => {
            row.numbers = vec![vm, signed(*ran_ms)];
            2
        }
        What::Attach { component } => {
            let id = names
                .component(db, &component.image, &component.name)
                .await?;
            row.numbers = vec![vm, Some(id)];
            3
        }
        What::Touched { images, touches } => {
            row.numbers = vec![vm];
            let mut lists = Vec::with_capacity(images.len());
            for image in images {
                let component = names.component(db, image, "").await?;
                let extents = touches
                    .iter()
                    .filter(|touch| touch.image == *image)
                    .map(|touch| (touch.extent, touch.first_touch_ms))
                    .collect();
                lists.push(TouchedImage { component, extents });
            }
            row.blob = Some(encode_touches(&mut lists));
            4
        }
        What::Sample(s) => {
            row.numbers = vec![
                vm,
                signed(s.since_launch_ms),
                signed(s.cpu_ms),
                signed(s.memory_bytes),
                signed(s.read_bytes),
                signed(s.written_bytes),
                signed(s.received_bytes),
                signed(s.sent_bytes),
            ];
            5
        }
        What::DemandFetch {
            image,
            fetches,
            bytes,
            stall_ns,
        } => {
            let id = names.component(db, image, "").await?;
            let (fetches, bytes) = (signed(*fetches), signed(*bytes));
            row.numbers = vec![vm, Some(id), fetches, bytes, signed(*stall_ns)];
            6
        }
        What::Prefetch {
            image,
            prefetched_bytes,
            used_bytes,
        } => {
            let id = names.component(db, image, "").await?;
            row.numbers = vec![vm, Some(id), signed(*prefetched_bytes), signed(*used_bytes)];
            7
        }
    };
    Ok((table, row))
}

/// Inserts rows of one table; rows whose key is there already are left out. Returns how many went
/// in.
async fn insert(
    db: &mut SqliteConnection,
    table: usize,
    rows: &[RawRow],
) -> Result<u64, sqlx::Error> {
    let (name, columns) = RAW_TABLES[table];
    let mut stored = 0;
    for chunk in rows.chunks(256) {
        let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(format!(
            "INSERT OR IGNORE INTO {name} (at_ms, nonce, profile, {columns}) "
        ));
        query.push_values(chunk, |mut tuple, row| {
            tuple
                .push_bind(row.at_ms)
                .push_bind(row.nonce)
                .push_bind(row.profile);
            for number in &row.numbers {
                tuple.push_bind(*number);
            }
            if let Some(blob) = &row.blob {
                tuple.push_bind(blob.clone());
            }
        });
        // Full chunks share one statement; odd remainders are not worth caching.
        let query = query.build().persistent(chunk.len() == 256);
        stored += query.execute(&mut *db).await?.rows_affected();
    }
    Ok(stored)
}

impl SqliteHistory {
    async fn append_in_one_transaction(&self, events: &[Event]) -> Result<Appended, sqlx::Error> {
        let mut names = self.writer.lock().await;
        names.bound();
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let (closed, touched_closed) = Self::closed_before(&mut tx).await?;
        let mut tables: [Vec<RawRow>; RAW_TABLES.len()] = Default::default();
        let mut done = Appended::default();
        for event in events {
            let closed = match event.what {
                What::Touched { .. } => touched_closed.max(closed),
                _ => closed,
            };
            if event.id.at.0 < closed {
                done.late += 1;
                continue;
            }
            let (table, row) = raw_row(&mut names, &mut tx, event).await?;
            tables[table].push(row);
        }
        for (table, rows) in tables.iter_mut().enumerate() {
            // In order of key a batch appends to the tree instead of jumping about in it.
            rows.sort_by_key(|row| (row.at_ms, row.nonce));
            let stored = insert(&mut tx, table, rows).await?;
            done.stored += stored;
            done.duplicates += rows.len() as u64 - stored;
        }
        let result = tx.commit().await;
        if result.is_err() {
            names.clear();
        }
        result.map(|()| done)
    }
}

#[async_trait]
impl History for SqliteHistory {
    async fn append(&self, events: &[Event]) -> Result<Appended, HistoryError> {
        let result = self.append_in_one_transaction(events).await;
        if result.is_err() {
            // Ids cached by a transaction that was rolled back would dangle.
            self.writer.lock().await.clear();
        }
        result.map_err(|e| self.failed("append", e))
    }

    async fn roll_up(&self, now: Timestamp) -> Result<RolledUp, HistoryError> {
        let result = self.roll_up_all(now).await;
        self.writer.lock().await.clear();
        result.map_err(|e| self.failed("roll up", e))
    }

    async fn replay(
        &self,
        since: Timestamp,
        sink: &mut (dyn Sink + Send),
    ) -> Result<Replayed, HistoryError> {
        self.replay_all(since, sink)
            .await
            .map_err(|e| self.failed("replay", e))
    }

    async fn launches(
        &self,
        profile: Option<&str>,
        limit: u32,
    ) -> Result<Vec<LaunchRecord>, HistoryError> {
        self.latest_launches(profile, limit)
            .await
            .map_err(|e| self.failed("list launches", e))
    }

    async fn profiles(&self) -> Result<Vec<ProfileSummary>, HistoryError> {
        self.profile_summaries()
            .await
            .map_err(|e| self.failed("list profiles", e))
    }

    async fn size(&self) -> Result<HistorySize, HistoryError> {
        self.measure().await.map_err(|e| self.failed("measure", e))
    }

    async fn forget(&self, of: &ProfileRef) -> Result<bool, HistoryError> {
        let result = self.delete_profile(of).await;
        self.writer.lock().await.clear();
        result.map_err(|e| self.failed("forget", e))
    }
}

/// Every table that names a profile.
pub(super) const PROFILE_TABLES: [&str; 12] = [
    "launch",
    "ready",
    "stop",
    "attachment",
    "touched",
    "sample",
    "demand_fetch",
    "prefetch",
    "rollup",
    "working_set",
    "composition_use",
    "memory_use",
];

/// Names of the raw tables.
pub(super) fn raw_tables() -> impl Iterator<Item = &'static str> {
    RAW_TABLES.iter().map(|(name, _)| *name)
}
