//! The embedded backend: opening (with all the ways a file can be wrong) and appending.
//!
//! One connection pool reads; writes go through one mutex that also holds the cache of ids, so
//! that a transaction never waits for another of this process.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use forelay_predict::time::Timestamp;
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx::{Connection, Row, SqliteConnection};
use tokio::sync::Mutex;

use super::names::Names;
use super::schema::{APPLICATION_ID, STEPS};
use super::{
    Appended, Event, History, HistoryError, LaunchRecord, Limits, ProfileSummary, Replayed,
    RolledUp, Sink,
};

/// What to do with a corrupt database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCorrupt {
    /// Refuse to open and touch nothing.
    #[default]
    Refuse,
    /// Rename it (and its journal) to `<name>.corrupt-<n>` and start again.
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

    pub(super) fn failed(&self, operation: &'static str, source: sqlx::Error) -> HistoryError {
        database(&self.path, operation, source)
    }

    /// Events older than the first, and touches older than the second, are rolled up and closed.
    pub(super) async fn closed_before(
        db: &mut SqliteConnection,
    ) -> Result<(i64, i64), sqlx::Error> {
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
        // A full check of a large file takes seconds.
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
}
