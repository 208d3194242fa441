//! Importing launches from CSV: `time_s,profile,owner` and `duration_s` or `count`.
//!
//! Event ids are derived from the rows' content and their occurrence among equal rows, so that
//! importing a file twice (or a longer file that begins alike) stores each launch once. Rows are
//! appended in batches; memory does not grow with the file.

use std::collections::HashMap;
use std::io::BufRead;

use forelay_predict::time::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Appended, Event, EventId, History, HistoryError, ProfileRef, What};

/// Rows per transaction.
const BATCH_ROWS: usize = 20_000;
/// Bad rows that are reported in full.
const REPORTED_BAD_ROWS: usize = 20;
/// Longest line that is read, in bytes.
const MAX_LINE_BYTES: usize = 64 << 10;

/// What to do with a row that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBadRow {
    /// Count it and go on.
    #[default]
    Skip,
    /// Stop with its line number; what came before stays imported.
    Stop,
}

/// How to import.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImportOptions {
    /// What the file's time zero is.
    pub origin: Timestamp,
    /// What to do with bad rows.
    pub on_bad_row: OnBadRow,
}

/// A row that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRow {
    /// Line, the header being 1.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
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

/// Positions of the columns.
struct Columns {
    time: usize,
    profile: usize,
    owner: usize,
    duration: Option<usize>,
    count: Option<usize>,
}

/// Imports a CSV trace into any history.
pub async fn import_csv(
    history: &dyn History,
    mut input: impl BufRead + Send,
    options: ImportOptions,
) -> Result<ImportReport, HistoryError> {
    let mut report = ImportReport::default();
    let mut line = Vec::new();
    let header = read_line(&mut input, &mut line)
        .and_then(|more| {
            if more {
                text(&line)
            } else {
                Err("the file is empty".to_owned())
            }
        })
        .and_then(columns);
    let columns = header.map_err(|reason| HistoryError::BadRow { line: 1, reason })?;
    let mut batch: Vec<Event> = Vec::with_capacity(BATCH_ROWS);
    let mut equal_rows = Occurrences::default();
    let mut number: u64 = 1;
    loop {
        number += 1;
        let row = match read_line(&mut input, &mut line) {
            Ok(false) => break,
            Ok(true) if line.iter().all(u8::is_ascii_whitespace) => continue,
            Ok(true) => text(&line).and_then(|line| parse(line, &columns, options.origin)),
            Err(reason) => Err(reason),
        };
        report.rows += 1;
        match row {
            Ok(row) => row.events(&mut equal_rows, &mut batch),
            Err(reason) if options.on_bad_row == OnBadRow::Skip => {
                report.bad_rows += 1;
                if report.bad.len() < REPORTED_BAD_ROWS {
                    let line = number;
                    report.bad.push(BadRow { line, reason });
                }
            }
            Err(reason) => {
                flush(history, &mut batch, &mut report).await?;
                let line = number;
                return Err(HistoryError::BadRow { line, reason });
            }
        }
        if batch.len() >= BATCH_ROWS {
            flush(history, &mut batch, &mut report).await?;
        }
    }
    flush(history, &mut batch, &mut report).await?;
    Ok(report)
}

async fn flush(
    history: &dyn History,
    batch: &mut Vec<Event>,
    report: &mut ImportReport,
) -> Result<(), HistoryError> {
    if batch.is_empty() {
        return Ok(());
    }
    let done = history.append(batch).await?;
    batch.clear();
    report.appended.stored += done.stored;
    report.appended.duplicates += done.duplicates;
    report.appended.late += done.late;
    Ok(())
}

/// Reads one line without its end; `false` at the end of the input. A line that is too long is
/// read past and reported.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> Result<bool, String> {
    line.clear();
    let mut too_long = false;
    loop {
        let bytes = input
            .fill_buf()
            .map_err(|e| format!("cannot be read: {e}"))?;
        if bytes.is_empty() {
            break;
        }
        let (used, ended) = match bytes.iter().position(|b| *b == b'\n') {
            Some(at) => (at + 1, true),
            None => (bytes.len(), false),
        };
        if line.len() + used <= MAX_LINE_BYTES {
            line.extend_from_slice(&bytes[..used]);
        } else {
            too_long = true;
        }
        input.consume(used);
        if ended {
            break;
        }
    }
    if too_long {
        return Err(format!("longer than {MAX_LINE_BYTES} bytes"));
    }
    Ok(!line.is_empty())
}

fn text(line: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(line)
        .map(|line| line.trim_end_matches(['\n', '\r']))
        .map_err(|_| "not UTF-8".to_owned())
}

fn columns(header: &str) -> Result<Columns, String> {
    let names = fields(header.trim_start_matches('\u{feff}'))?;
    let find = |name: &str| names.iter().position(|n| n.trim() == name);
    let need = |name: &str| {
        find(name).ok_or_else(|| {
            format!("no column `{name}`; expected time_s, profile, owner and duration_s or count")
        })
    };
    Ok(Columns {
        time: need("time_s")?,
        profile: need("profile")?,
        owner: need("owner")?,
        duration: find("duration_s"),
        count: find("count"),
    })
}

/// Splits a row at commas; a field may be quoted, with doubled quotes inside.
fn fields(row: &str) -> Result<Vec<String>, String> {
    let mut out = Vec::new();
    let mut rest = row;
    loop {
        let (field, after) = match rest.strip_prefix('"') {
            Some(quoted) => take_quoted(quoted)?,
            None => match rest.find(',') {
                Some(at) => (rest[..at].to_owned(), &rest[at..]),
                None => (rest.to_owned(), ""),
            },
        };
        out.push(field);
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None if after.is_empty() => return Ok(out),
            None => return Err("text after a closing quote".to_owned()),
        }
    }
}

fn take_quoted(mut rest: &str) -> Result<(String, &str), String> {
    let mut field = String::new();
    loop {
        let at = rest.find('"').ok_or("a quote is not closed")?;
        field.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match rest.strip_prefix('"') {
            Some(more) => {
                field.push('"');
                rest = more;
            }
            None => return Ok((field, rest)),
        }
    }
}

/// One row, understood.
struct LaunchRow {
    at: Timestamp,
    of: ProfileRef,
    count: u32,
    ran_ms: Option<u64>,
}

fn parse(row: &str, columns: &Columns, origin: Timestamp) -> Result<LaunchRow, String> {
    let fields = fields(row)?;
    let get = |at: usize, name: &str| {
        fields
            .get(at)
            .map(|f| f.trim())
            .ok_or_else(|| format!("column `{name}` is missing"))
    };
    let number = |value: &str, name: &str| {
        value
            .parse::<f64>()
            .ok()
            .filter(|n| n.is_finite() && n.abs() < 1e12)
            .ok_or_else(|| format!("`{name}` is not a number of seconds: {value:?}"))
    };
    let name = |at, column: &str| match get(at, column)? {
        "" => Err(format!("`{column}` is empty")),
        name if name.len() > 512 => Err(format!("`{column}` is longer than 512 bytes")),
        name => Ok(name.to_owned()),
    };
    let time = number(get(columns.time, "time_s")?, "time_s")?;
    let count = match columns.count.map(|at| get(at, "count")).transpose()? {
        None => 1,
        Some(value) => value
            .parse::<u32>()
            .ok()
            .filter(|count| *count > 0)
            .ok_or_else(|| format!("`count` is not a number of launches: {value:?}"))?,
    };
    let ran_ms = match columns
        .duration
        .and_then(|at| fields.get(at))
        .map(|f| f.trim())
    {
        None | Some("") => None,
        Some(value) => {
            let seconds = number(value, "duration_s")?;
            if seconds < 0.0 {
                return Err(format!("`duration_s` is negative: {value}"));
            }
            Some((seconds * 1000.0).round() as u64)
        }
    };
    Ok(LaunchRow {
        at: origin.plus_seconds(time),
        of: ProfileRef::new(
            name(columns.profile, "profile")?,
            name(columns.owner, "owner")?,
        ),
        count,
        ran_ms,
    })
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

impl LaunchRow {
    /// The launch, and the stop if the row says how long it ran.
    fn events(self, equal_rows: &mut Occurrences, out: &mut Vec<Event>) {
        let nth = equal_rows.next(self.at, &self.of).to_le_bytes();
        let (profile, owner) = (self.of.profile.as_bytes(), self.of.owner.as_bytes());
        let id = EventId::derive(self.at, &[b"csv", profile, owner, &nth]);
        if let Some(ran_ms) = self.ran_ms {
            let at = self.at.plus_ms(i64::try_from(ran_ms).unwrap_or(i64::MAX));
            out.push(Event {
                id: EventId {
                    at,
                    nonce: id.nonce,
                },
                vm: id.nonce,
                of: self.of.clone(),
                what: What::Stop { ran_ms },
            });
        }
        out.push(Event {
            id,
            vm: id.nonce,
            of: self.of,
            what: What::Launch {
                components: Vec::new(),
                count: self.count,
            },
        });
    }
}
