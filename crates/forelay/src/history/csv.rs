//! Importing launches from CSV ([`forelay_sim::launch_rows`]).
//!
//! Event ids are derived from the rows' content and their occurrence among equal rows, so that
//! importing a file twice (or a longer file that begins alike) stores each launch once. Rows are
//! appended in batches; memory does not grow with the file.

use std::collections::HashMap;
use std::io::BufRead;

use forelay_image::Digest;
use forelay_predict::time::Timestamp;
use forelay_sim::launch_rows::{BadRow, CsvLines, Fields, LaunchColumns, LaunchRow, OnBadRow};
use serde::{Deserialize, Serialize};

use super::{Appended, ComponentRef, Event, EventId, History, HistoryError, ProfileRef, What};

/// Rows per transaction.
const BATCH_ROWS: usize = 20_000;
/// Bad rows that are reported in full.
const REPORTED_BAD_ROWS: usize = 20;
/// How to import.
#[derive(Clone, Copy, Debug)]
pub struct ImportOptions {
    /// What the file's time zero is.
    pub origin: Timestamp,
    /// What to do with bad rows; what came before one stays imported.
    pub on_bad_row: OnBadRow,
}

/// What an import did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportReport {
    /// Rows read, without the header.
    pub rows: u64,
    /// Rows that could not be read.
    pub bad_rows: u64,
    /// The first of them.
    pub bad: Vec<BadRow>,
    /// What became of the events.
    #[serde(flatten)]
    pub appended: Appended,
}

/// Imports a CSV trace into any history.
pub async fn import_csv(
    history: &dyn History,
    input: impl BufRead + Send,
    options: ImportOptions,
) -> Result<ImportReport, HistoryError> {
    let mut import = Import {
        history,
        options,
        equal_rows: Occurrences::default(),
        batch: Vec::with_capacity(BATCH_ROWS),
        report: ImportReport::default(),
    };
    let mut lines = CsvLines::new(input);
    let columns = columns(lines.next_line().map_err(unreadable)?)?;
    while let Some(row) = lines.next_line().map_err(unreadable)? {
        let row = row.and_then(|row| {
            let line = row.line;
            let launch = columns.launch(&row);
            launch.map_err(|reason| BadRow { line, reason })
        });
        import.take(row).await?;
    }
    import.flush().await?;
    Ok(import.report)
}

fn unreadable(source: std::io::Error) -> HistoryError {
    HistoryError::BadRow {
        line: 0,
        reason: format!("the file cannot be read: {source}"),
    }
}

fn columns(header: Option<Result<Fields<'_>, BadRow>>) -> Result<LaunchColumns, HistoryError> {
    let refused = |reason: &str| HistoryError::BadRow {
        line: 1,
        reason: reason.to_owned(),
    };
    let header = header.ok_or_else(|| refused("the file is empty"))?;
    let header = header.map_err(|bad| refused(&bad.reason))?;
    LaunchColumns::of(&header).ok_or_else(|| {
        refused(
            "expected the columns time_s (or time_ms), profile and owner, and count or duration_s",
        )
    })
}

/// An import under way.
struct Import<'a> {
    history: &'a dyn History,
    options: ImportOptions,
    equal_rows: Occurrences,
    batch: Vec<Event>,
    report: ImportReport,
}

impl Import<'_> {
    async fn take(&mut self, row: Result<LaunchRow, BadRow>) -> Result<(), HistoryError> {
        self.report.rows += 1;
        match row {
            Ok(row) => self.events(row),
            Err(bad) if self.options.on_bad_row == OnBadRow::Skip => {
                self.report.bad_rows += 1;
                if self.report.bad.len() < REPORTED_BAD_ROWS {
                    self.report.bad.push(bad);
                }
            }
            Err(BadRow { line, reason }) => {
                self.flush().await?;
                return Err(HistoryError::BadRow { line, reason });
            }
        }
        if self.batch.len() >= BATCH_ROWS {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), HistoryError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let done = self.history.append(&self.batch).await?;
        self.batch.clear();
        let appended = &mut self.report.appended;
        appended.stored += done.stored;
        appended.duplicates += done.duplicates;
        appended.late += done.late;
        Ok(())
    }

    /// The launch, and the stop if the row says how long it ran.
    fn events(&mut self, row: LaunchRow) {
        let at = self.options.origin.plus_ms(row.at.0);
        let of = ProfileRef::new(row.profile, row.owner);
        let nth = self.equal_rows.next(at, &of).to_le_bytes();
        let (profile, owner) = (of.profile.as_bytes(), of.owner.as_bytes());
        let id = EventId::derive(at, &[b"csv", profile, owner, &nth]);
        if let Some(ran_ms) = row.ran_ms {
            let at = at.plus_ms(i64::try_from(ran_ms).unwrap_or(i64::MAX));
            self.batch.push(Event {
                id: EventId {
                    at,
                    nonce: id.nonce,
                },
                vm: id.nonce,
                of: of.clone(),
                what: What::Stop { ran_ms },
            });
        }
        let launched = id.nonce.to_le_bytes();
        for (nth, name) in (1..).zip(&row.attached) {
            let component = traced_component(name);
            // Later than the launch, in the order of the row.
            let at = at.plus_ms(nth);
            let parts = [b"csv attached", &launched[..], component.image.as_bytes()];
            self.batch.push(Event {
                id: EventId::derive(at, &parts),
                vm: id.nonce,
                of: of.clone(),
                what: What::Attach { component },
            });
        }
        self.batch.push(Event {
            id,
            vm: id.nonce,
            of,
            what: What::Launch {
                components: row
                    .components
                    .iter()
                    .map(|name| traced_component(name))
                    .collect(),
                count: row.count,
            },
        });
    }
}

/// A trace knows components by name alone: the digest is the name's.
fn traced_component(name: &str) -> ComponentRef {
    ComponentRef {
        image: Digest::of(format!("component of a trace: {name}").as_bytes()),
        name: name.to_owned(),
    }
}

/// Counts equal rows: those of the latest times only, since traces are nearly in order.
#[derive(Default)]
struct Occurrences {
    newest: i64,
    seen: HashMap<(i64, ProfileRef), u32>,
}

impl Occurrences {
    fn next(&mut self, at: Timestamp, of: &ProfileRef) -> u32 {
        // Rows of one millisecond lie within a minute of each other in any sane file; bounded.
        if at.0 > self.newest {
            self.newest = at.0;
            if self.seen.len() > 100_000 {
                let keep = self.newest - 60_000;
                self.seen.retain(|(at, _), _| *at >= keep);
            }
        }
        let count = self.seen.entry((at.0, of.clone())).or_insert(0);
        *count += 1;
        *count
    }
}
