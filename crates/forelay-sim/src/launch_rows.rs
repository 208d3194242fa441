//! Rows of launch traces, for the simulator and for a host's history alike.
//!
//! Owns what a row may say: when (`time_s`, or `time_ms` in milliseconds), `profile`, `owner`,
//! and optionally how many at once (`count`, one if empty), for how long (`duration_s`), of what
//! (`components`) and what came to it while it ran (`attached`), names with `|` between them.
//! Names of columns may be in any case, their order is free, further columns are left alone;
//! the text may be gzipped. Refuses to know what launches are read for.
//!
//! Invariants: a row is one line, and a bad one is reported with the line's number, never
//! guessed; memory does not grow with the file, whatever it holds.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use forelay_predict::time::Timestamp;
use serde::{Deserialize, Serialize};

/// Longest line that is read, in bytes.
const MAX_LINE_BYTES: usize = 64 << 10;
/// Longest name of a profile or an owner, in bytes.
const MAX_NAME_BYTES: usize = 512;
/// Most components of one launch.
const MAX_COMPONENTS: usize = 1024;
/// Seconds beyond this are the year 5138, or milliseconds under the wrong name.
const MAX_SECONDS: f64 = 1e11;

/// What to do with a row that cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBadRow {
    /// Leave it out and report it.
    Skip,
    /// Stop there.
    #[default]
    Stop,
}

/// A row that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRow {
    /// Line in the file, the header is line 1.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// Opens a trace, unpacking it if its content is gzipped.
///
/// # Errors
/// If the file cannot be opened or read.
pub fn open(path: &Path) -> io::Result<Box<dyn BufRead + Send>> {
    let mut reader = BufReader::new(File::open(path)?);
    if reader.fill_buf()?.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(BufReader::new(MultiGzDecoder::new(reader))));
    }
    Ok(Box::new(reader))
}

/// The lines of a CSV text, split into fields.
pub struct CsvLines<R> {
    input: R,
    parser: csv_core::Reader,
    number: u64,
    line: Vec<u8>,
    unquoted: Vec<u8>,
    ends: Vec<usize>,
}

impl<R: BufRead> CsvLines<R> {
    /// The lines of `input`.
    pub fn new(input: R) -> Self {
        let terminator = csv_core::Terminator::Any(b'\n');
        Self {
            input,
            parser: csv_core::ReaderBuilder::new()
                .terminator(terminator)
                .build(),
            number: 0,
            line: Vec::new(),
            unquoted: Vec::new(),
            ends: Vec::new(),
        }
    }

    /// The next line that is not blank; `None` at the end.
    ///
    /// # Errors
    /// If the input cannot be read.
    pub fn next_line(&mut self) -> io::Result<Option<Result<Fields<'_>, BadRow>>> {
        let is_whole = loop {
            self.number += 1;
            match self.read_line()? {
                Some(true) if self.line.iter().all(u8::is_ascii_whitespace) => {}
                Some(is_whole) => break is_whole,
                None => return Ok(None),
            }
        };
        let line = self.number;
        let fields = match is_whole {
            true => self.split(),
            false => Err(format!("longer than {MAX_LINE_BYTES} bytes")),
        };
        Ok(Some(fields.map_err(|reason| BadRow { line, reason })))
    }

    /// Reads one line; `Some(false)` if it was too long and was passed over, `None` at the end.
    fn read_line(&mut self) -> io::Result<Option<bool>> {
        self.line.clear();
        let (mut is_empty, mut is_whole) = (true, true);
        loop {
            let bytes = self.input.fill_buf()?;
            if bytes.is_empty() {
                break;
            }
            is_empty = false;
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let used = end.map_or(bytes.len(), |at| at + 1);
            if self.line.len() + used <= MAX_LINE_BYTES {
                self.line.extend_from_slice(&bytes[..used]);
            } else {
                is_whole = false;
            }
            self.input.consume(used);
            if end.is_some() {
                break;
            }
        }
        Ok((!is_empty).then_some(is_whole))
    }

    fn split(&mut self) -> Result<Fields<'_>, String> {
        while let Some(b'\n' | b'\r') = self.line.last() {
            self.line.pop();
        }
        let commas = self.line.iter().filter(|byte| **byte == b',').count();
        self.line.push(b'\n');
        self.unquoted.resize(self.line.len(), 0);
        self.ends.resize(commas + 2, 0);
        self.parser.reset();
        let (result, _, bytes, ends) =
            self.parser
                .read_record(&self.line, &mut self.unquoted, &mut self.ends);
        if result != csv_core::ReadRecordResult::Record {
            return Err("a quote is not closed".to_owned());
        }
        let text = std::str::from_utf8(&self.unquoted[..bytes]);
        Ok(Fields {
            line: self.number,
            text: text.map_err(|_| "not UTF-8".to_owned())?,
            ends: &self.ends[..ends],
        })
    }
}

/// The fields of one line, without blanks around them.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a> {
    /// Line in the file, the first is 1.
    pub line: u64,
    text: &'a str,
    ends: &'a [usize],
}

impl<'a> Fields<'a> {
    /// Field number `at`.
    pub fn get(&self, at: usize) -> Option<&'a str> {
        let start = match at {
            0 => 0,
            _ => *self.ends.get(at - 1)?,
        };
        Some(self.text[start..*self.ends.get(at)?].trim())
    }

    /// All fields in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a str> {
        let fields = *self;
        (0..self.ends.len()).filter_map(move |at| fields.get(at))
    }

    /// Where the column of this name is, if the line is a header.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.iter()
            .position(|field| field.eq_ignore_ascii_case(name))
    }
}

/// Positions of the columns of launches.
#[derive(Clone, Copy, Debug)]
pub struct LaunchColumns {
    time: (usize, TimeUnit),
    profile: usize,
    owner: usize,
    count: Option<usize>,
    duration: Option<usize>,
    components: Option<usize>,
    attached: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
enum TimeUnit {
    Seconds,
    Milliseconds,
}

impl LaunchColumns {
    /// Those that a header names; `None` if one is missing that launches need.
    pub fn of(header: &Fields<'_>) -> Option<Self> {
        let seconds = header.column("time_s").map(|at| (at, TimeUnit::Seconds));
        let time = seconds.or_else(|| Some((header.column("time_ms")?, TimeUnit::Milliseconds)));
        Some(Self {
            time: time?,
            profile: header.column("profile")?,
            owner: header.column("owner")?,
            count: header.column("count"),
            duration: header.column("duration_s"),
            components: header.column("components"),
            attached: header.column("attached"),
        })
    }

    /// Reads a row below that header.
    ///
    /// # Errors
    /// If a field is missing or makes no sense; says which.
    pub fn launch(&self, row: &Fields<'_>) -> Result<LaunchRow, String> {
        let optional = |column: Option<usize>| {
            let field = column.and_then(|at| row.get(at));
            field.filter(|text| !text.is_empty())
        };
        let name = |at: usize, column: &str| match row.get(at) {
            None | Some("") => Err(format!("no value in column {column}")),
            Some(name) if name.len() > MAX_NAME_BYTES => {
                Err(format!("{column} is longer than {MAX_NAME_BYTES} bytes"))
            }
            Some(name) => Ok(name.to_owned()),
        };
        let count = match optional(self.count) {
            None => 1,
            Some(text) => {
                let count = text.parse::<u32>().ok().filter(|&count| count > 0);
                count.ok_or_else(|| format!("count is not a positive number: {text:?}"))?
            }
        };
        let ran_ms = match optional(self.duration) {
            None => None,
            Some(text) => {
                let ran_s = seconds(text, "duration_s")?;
                if ran_s < 0.0 {
                    return Err(format!("duration_s is negative: {text}"));
                }
                Some((ran_s * 1000.0).round() as u64)
            }
        };
        let names = |column: Option<usize>, what: &str| {
            let names = optional(column)
                .into_iter()
                .flat_map(|text| text.split('|'));
            let names: Vec<String> = names
                .map(|name| name.trim().to_owned())
                .filter(|name| !name.is_empty())
                .collect();
            match names.iter().any(|name| name.len() > MAX_NAME_BYTES) {
                true => Err(format!(
                    "a name in {what} is longer than {MAX_NAME_BYTES} bytes"
                )),
                false if names.len() > MAX_COMPONENTS => {
                    Err(format!("more than {MAX_COMPONENTS} names in {what}"))
                }
                false => Ok(names),
            }
        };
        Ok(LaunchRow {
            components: names(self.components, "components")?,
            attached: names(self.attached, "attached")?,
            at: self.moment(row)?,
            profile: name(self.profile, "profile")?,
            owner: name(self.owner, "owner")?,
            count,
            ran_ms,
        })
    }

    fn moment(&self, row: &Fields<'_>) -> Result<Timestamp, String> {
        let (at, unit) = self.time;
        let text = row.get(at).unwrap_or_default();
        match unit {
            TimeUnit::Seconds => seconds(text, "time_s").map(Timestamp::from_seconds),
            TimeUnit::Milliseconds => {
                let ms = text.parse::<i64>().ok();
                let ms = ms.filter(|ms| ms.unsigned_abs() as f64 <= MAX_SECONDS * 1000.0);
                let ms = ms.ok_or_else(|| format!("time_ms is no time: {text:?}"))?;
                Ok(Timestamp(ms))
            }
        }
    }
}

fn seconds(text: &str, column: &str) -> Result<f64, String> {
    let number = text.parse::<f64>();
    let number = number.map_err(|_| format!("{column} is not a number: {text:?}"))?;
    if !number.is_finite() || number.abs() > MAX_SECONDS {
        return Err(format!(
            "{column} is out of range: {text:?} (a column of milliseconds is called time_ms)"
        ));
    }
    Ok(number)
}

/// One row, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchRow {
    /// When, from the trace's time zero.
    pub at: Timestamp,
    /// The profile.
    pub profile: String,
    /// Its owner.
    pub owner: String,
    /// How many at this moment, at least one.
    pub count: u32,
    /// How long it ran, if the trace says.
    pub ran_ms: Option<u64>,
    /// The components that it started with, if the trace says.
    pub components: Vec<String>,
    /// The components attached to it while it ran, if the trace says.
    pub attached: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All rows of a launch trace, bad ones as their line and reason.
    fn rows(text: &[u8]) -> Vec<Result<LaunchRow, BadRow>> {
        let mut lines = CsvLines::new(text);
        let header = lines.next_line().unwrap().unwrap().unwrap();
        let columns = LaunchColumns::of(&header).unwrap();
        let mut rows = Vec::new();
        while let Some(fields) = lines.next_line().unwrap() {
            rows.push(fields.and_then(|row| {
                let line = row.line;
                let launch = columns.launch(&row);
                launch.map_err(|reason| BadRow { line, reason })
            }));
        }
        rows
    }

    fn row(ms: i64, profile: &str, count: u32, ran_ms: Option<u64>) -> LaunchRow {
        LaunchRow {
            at: Timestamp(ms),
            profile: profile.to_owned(),
            owner: "o".to_owned(),
            count,
            ran_ms,
            components: Vec::new(),
            attached: Vec::new(),
        }
    }

    #[test]
    fn components_and_attachments_are_lists_of_names() {
        let text = b"time_s,profile,owner,components,Attached\n1,web,o, a | b:1 ||c,d\n2,web,o,,\n";
        let read: Result<Vec<_>, _> = rows(text).into_iter().collect();
        let read = read.unwrap();
        assert_eq!(read[0].components, ["a", "b:1", "c"]);
        assert_eq!(read[0].attached, ["d"]);
        assert_eq!(read[1], row(2_000, "web", 1, None));
        let many = format!(
            "time_s,profile,owner,components\n1,web,o,{}\n",
            "a|".repeat(2000)
        );
        let refused = rows(many.as_bytes())[0].clone().unwrap_err();
        assert!(refused.reason.contains("more than 1024"), "{refused:?}");
    }

    #[test]
    fn headers_in_any_case_and_order_empty_counts_and_milliseconds_are_understood() {
        let text = b"\xef\xbb\xbfOwner, PROFILE ,Count,Time_S,extra,Duration_s\r\n\
            o,web,,1.5,x,2\r\n\n o ,\"a,\"\"b\" ,3,-2,,\r\no,last,1,0";
        let expected = [
            row(1_500, "web", 1, Some(2_000)),
            row(-2_000, "a,\"b", 3, None),
            row(0, "last", 1, None),
        ];
        let read: Result<Vec<_>, _> = rows(text).into_iter().collect();
        assert_eq!(read.unwrap(), expected);
        let text = b"time_ms,profile,owner\n1700000000123,web,o\n";
        assert_eq!(rows(text), [Ok(row(1_700_000_000_123, "web", 1, None))]);
    }

    #[test]
    fn bad_rows_are_told_by_their_line_and_the_next_one_is_read() {
        let long = format!("1,{},o,,\n", "x".repeat(100_000));
        let mut text = b"time_s,profile,owner,count,duration_s\n".to_vec();
        for line in [
            "nan,web,o\n",
            "1,,o\n",
            "1,web\n",
            "1,web,o,0\n",
            "1,web,o,-1\n",
            "1,web,o,1,-5\n",
            "1700000000123,web,o\n",
            "1,\"web,o\n",
            &long,
            "\n",
            "1e300,web,o\n",
        ] {
            text.extend_from_slice(line.as_bytes());
        }
        text.extend_from_slice(b"1,w\xff,o\n7,web,o\n");
        let rows = rows(&text);
        let bad: Vec<u64> = rows
            .iter()
            .filter_map(|row| Some(row.as_ref().err()?.line))
            .collect();
        assert_eq!(bad, [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13]);
        assert_eq!(rows.last().unwrap(), &Ok(row(7_000, "web", 1, None)));
        let milliseconds = rows[6].as_ref().unwrap_err();
        assert!(milliseconds.reason.contains("time_ms"), "{milliseconds:?}");
    }
}
