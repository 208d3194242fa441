//! Launch traces: what was launched when.
//!
//! Owns the in-memory trace, read from rows of launches ([`crate::launch_rows`]) or from Azure
//! Functions' published per-minute counts (`invocations_per_function_md.anon.d*.csv`: four key
//! columns, then one column a minute). Refuses to know policies. Invariants: launches are
//! ordered by time; rows that cannot be read are reported with their line number and never
//! guessed.

use std::collections::HashMap;
use std::io::BufRead;
use std::path::{Path, PathBuf};

use forelay_predict::time::{MINUTE_MS, Timestamp};

use crate::launch_rows::{self, BadRow, CsvLines, Fields, LaunchColumns, LaunchRow, OnBadRow};

/// A launch, or several of one profile at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TracedLaunch {
    /// When.
    pub at: Timestamp,
    /// Index into [`Trace::profiles`].
    pub profile: u32,
    /// Index into [`Trace::owners`].
    pub owner: u32,
    /// How many at this moment, at least one.
    pub count: u32,
    /// What it consisted of: index into [`Trace::compositions`].
    pub composition: u32,
}

/// The components of a launch, as indices into [`Trace::components`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Composition {
    /// Those that it started with.
    pub components: Vec<u32>,
    /// Those attached while it ran.
    pub attached: Vec<u32>,
}

/// A whole trace.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// Launches by time.
    pub launches: Vec<TracedLaunch>,
    /// Names of profiles.
    pub profiles: Vec<String>,
    /// Names of owners.
    pub owners: Vec<String>,
    /// Names of components.
    pub components: Vec<String>,
    /// Sets of components that launches had; the first is empty: nothing is known.
    pub compositions: Vec<Composition>,
    /// End of the observed time.
    pub horizon: Timestamp,
    /// Rows left out.
    pub bad_rows: Vec<BadRow>,
}

/// Why a trace could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file could not be opened or read.
    #[error("cannot read trace {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The header is of neither known form.
    #[error(
        "{path}: neither a launch trace (needs the columns time_s, profile, owner) nor Azure \
         invocation counts (HashOwner, HashApp, HashFunction, Trigger, 1, 2, ...)"
    )]
    Header {
        /// The file.
        path: PathBuf,
    },
    /// A row is unreadable and the caller asked to stop there.
    #[error("{path}, line {line}: {reason} (use --on-bad-row skip to leave such rows out)")]
    Row {
        /// The file.
        path: PathBuf,
        /// Line in the file.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// No row could be used.
    #[error("{path}: no launches")]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Numbers names as they come.
#[derive(Default)]
struct Interner {
    names: Vec<String>,
    index: HashMap<String, u32>,
}

impl Interner {
    fn key(&mut self, name: &str) -> u32 {
        if let Some(&key) = self.index.get(name) {
            return key;
        }
        let key = self.names.len() as u32;
        self.names.push(name.to_owned());
        self.index.insert(name.to_owned(), key);
        key
    }
}

impl Trace {
    /// Reads a trace; the format is told by the header, compression by the content.
    ///
    /// # Errors
    /// If the file cannot be read, has an unknown header, a bad row (unless skipped) or no rows.
    pub fn read(path: &Path, on_bad_row: OnBadRow) -> Result<Self, TraceError> {
        let read_error = |source| TraceError::Read {
            path: path.to_owned(),
            source,
        };
        let input = launch_rows::open(path).map_err(read_error)?;
        let mut trace = Self::parse(input, path, on_bad_row)?;
        if trace.launches.is_empty() {
            return Err(TraceError::Empty {
                path: path.to_owned(),
            });
        }
        trace.finish();
        Ok(trace)
    }

    fn parse(input: impl BufRead, path: &Path, on_bad_row: OnBadRow) -> Result<Self, TraceError> {
        let read_error = |source| TraceError::Read {
            path: path.to_owned(),
            source,
        };
        let mut lines = CsvLines::new(input);
        let layout = match lines.next_line().map_err(read_error)? {
            Some(header) => header.ok().as_ref().and_then(Layout::of),
            None => {
                return Err(TraceError::Empty {
                    path: path.to_owned(),
                });
            }
        };
        let layout = layout.ok_or_else(|| TraceError::Header {
            path: path.to_owned(),
        })?;
        let mut builder = Builder::default();
        while let Some(row) = lines.next_line().map_err(read_error)? {
            let outcome = row.and_then(|row| {
                let line = row.line;
                let outcome = builder.row(&row, &layout);
                outcome.map_err(|reason| BadRow { line, reason })
            });
            match outcome {
                Ok(()) => {}
                Err(bad) if on_bad_row == OnBadRow::Skip => builder.bad_rows.push(bad),
                Err(BadRow { line, reason }) => {
                    return Err(TraceError::Row {
                        path: path.to_owned(),
                        line,
                        reason,
                    });
                }
            }
        }
        Ok(builder.into_trace())
    }

    /// Orders launches and fixes the horizon: the end of the last minute for traces of whole
    /// minutes, the last launch otherwise.
    pub fn finish(&mut self) {
        self.launches.sort_by_key(|launch| launch.at);
        let whole_minutes = self
            .launches
            .iter()
            .all(|launch| launch.at.0 % MINUTE_MS == 0);
        let last = self
            .launches
            .last()
            .map_or(Timestamp(0), |launch| launch.at);
        self.horizon = if whole_minutes {
            last.plus_ms(MINUTE_MS)
        } else {
            last
        };
    }

    /// Launches per profile, repeats included.
    #[must_use]
    pub fn launch_counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.profiles.len()];
        for launch in &self.launches {
            counts[launch.profile as usize] += u64::from(launch.count);
        }
        counts
    }

    /// First launch of the trace.
    #[must_use]
    pub fn start(&self) -> Timestamp {
        self.launches
            .first()
            .map_or(Timestamp(0), |launch| launch.at)
    }
}

#[derive(Default)]
struct Builder {
    profiles: Interner,
    owners: Interner,
    components: Interner,
    compositions: HashMap<Composition, u32>,
    launches: Vec<TracedLaunch>,
    bad_rows: Vec<BadRow>,
}

/// What the rows below a header are.
enum Layout {
    /// One launch each, or several at one moment.
    Launches(LaunchColumns),
    /// Azure's: all launches of one function, counted by minute.
    Minutes {
        function: usize,
        owner: usize,
        /// Columns and the minutes that they count, from 0.
        minutes: Vec<(usize, i64)>,
    },
}

impl Layout {
    fn of(header: &Fields<'_>) -> Option<Self> {
        if let Some(columns) = LaunchColumns::of(header) {
            return Some(Self::Launches(columns));
        }
        let minute = |(at, name): (usize, &str)| Some((at, name.parse::<i64>().ok()? - 1));
        let minutes: Vec<(usize, i64)> = header.iter().enumerate().filter_map(minute).collect();
        let (function, owner) = header
            .column("HashFunction")
            .zip(header.column("HashOwner"))?;
        (!minutes.is_empty()).then_some(Self::Minutes {
            function,
            owner,
            minutes,
        })
    }
}

impl Builder {
    fn row(&mut self, row: &Fields<'_>, layout: &Layout) -> Result<(), String> {
        match layout {
            Layout::Launches(columns) => {
                let launch = columns.launch(row)?;
                let composition = self.composition(&launch);
                self.launches.push(TracedLaunch {
                    at: launch.at,
                    profile: self.profiles.key(&launch.profile),
                    owner: self.owners.key(&launch.owner),
                    count: launch.count,
                    composition,
                });
                Ok(())
            }
            Layout::Minutes {
                function,
                owner,
                minutes,
            } => self.minutes_row(row, *function, *owner, minutes),
        }
    }

    fn minutes_row(
        &mut self,
        row: &Fields<'_>,
        function: usize,
        owner: usize,
        minutes: &[(usize, i64)],
    ) -> Result<(), String> {
        let present = |at: usize| row.get(at).filter(|text| !text.is_empty());
        let profile = present(function).ok_or("no HashFunction")?;
        let owner = present(owner).ok_or("no HashOwner")?;
        let mut launches = Vec::new();
        for &(column, minute) in minutes {
            let text = row.get(column).unwrap_or("");
            if text.is_empty() || text == "0" {
                continue;
            }
            let count: u32 = text
                .parse()
                .map_err(|_| format!("minute {} is not a count: {text:?}", minute + 1))?;
            launches.push((Timestamp(minute * MINUTE_MS), count));
        }
        let profile = self.profiles.key(profile);
        let owner = self.owners.key(owner);
        self.launches
            .extend(launches.into_iter().map(|(at, count)| TracedLaunch {
                at,
                profile,
                owner,
                count,
                composition: 0,
            }));
        Ok(())
    }

    fn composition(&mut self, launch: &LaunchRow) -> u32 {
        let mut keys = |names: &[String]| {
            let mut keys: Vec<u32> = names.iter().map(|name| self.components.key(name)).collect();
            keys.sort_unstable();
            keys.dedup();
            keys
        };
        let composition = Composition {
            components: keys(&launch.components),
            attached: keys(&launch.attached),
        };
        if composition == Composition::default() {
            return 0;
        }
        let next = self.compositions.len() as u32 + 1;
        *self.compositions.entry(composition).or_insert(next)
    }

    fn into_trace(self) -> Trace {
        let mut compositions = vec![Composition::default(); self.compositions.len() + 1];
        for (composition, index) in self.compositions {
            compositions[index as usize] = composition;
        }
        Trace {
            launches: self.launches,
            profiles: self.profiles.names,
            owners: self.owners.names,
            components: self.components.names,
            compositions,
            horizon: Timestamp(0),
            bad_rows: self.bad_rows,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, on_bad_row: OnBadRow) -> Result<Trace, TraceError> {
        let mut trace = Trace::parse(text.as_bytes(), Path::new("t.csv"), on_bad_row)?;
        trace.finish();
        Ok(trace)
    }

    #[test]
    fn rows_are_ordered_and_counted() {
        let text = "time_s,profile,owner,count\n60,b,x,2\n0,a,x,1\n";
        let trace = parse(text, OnBadRow::Stop).unwrap();
        assert_eq!(trace.launches[0].at, Timestamp(0));
        assert_eq!(trace.launch_counts(), vec![2, 1]);
        assert_eq!(trace.horizon, Timestamp(120_000));
    }

    #[test]
    fn bad_rows_have_their_line() {
        let text =
            "time_s,profile,owner,count\n0,a,x,1\nnan,a,x,1\n5,,x,1\n9,a,x,0\n1e300,a,x,1\n7";
        let error = parse(text, OnBadRow::Stop).unwrap_err().to_string();
        assert!(error.contains("line 3"), "{error}");
        let trace = parse(text, OnBadRow::Skip).unwrap();
        assert_eq!(trace.launches.len(), 1);
        let lines: Vec<u64> = trace.bad_rows.iter().map(|bad| bad.line).collect();
        assert_eq!(lines, [3, 4, 5, 6, 7]);
    }

    #[test]
    fn azure_columns_are_minutes() {
        let text =
            "HashOwner,HashApp,HashFunction,Trigger,1,2,3\no,a,f,http,0,4,1\no,a,g,timer,1,x,0\n";
        let trace = parse(text, OnBadRow::Skip).unwrap();
        assert_eq!(trace.profiles, ["f"]);
        assert_eq!(trace.launches[0].at, Timestamp(60_000));
        assert_eq!(trace.launches[0].count, 4);
        assert_eq!(trace.bad_rows[0].line, 3);
    }

    #[test]
    fn an_unknown_header_is_refused() {
        assert!(matches!(
            parse("a,b\n1,2\n", OnBadRow::Skip),
            Err(TraceError::Header { .. })
        ));
    }
}
