//! Optional side file of a trace: which components a profile uses, their size and load time.
//!
//! Owns its reader: CSV `profile,component,bytes[,load_s]`. Profiles that name the same component
//! share it. Refuses to guess: an unreadable row is an error with its line.

use crate::trace::Trace;
use forelay_predict::time::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Components of each profile.
#[derive(Debug, Clone, Default)]
pub struct Sides {
    /// Per profile of the trace: indices into `components`.
    pub uses: Vec<Vec<u32>>,
    /// Every component.
    pub components: Vec<ComponentSide>,
}

/// Size and load time of a component.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ComponentSide {
    /// Bytes in memory.
    pub bytes: u64,
    /// Seconds to load it.
    pub load_s: f64,
}

/// Why a side file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SidesError {
    /// The file could not be opened or is not CSV.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: csv::Error,
    },
    /// A row is unreadable.
    #[error("{path}, line {line}: {reason}")]
    Row {
        /// The file.
        path: PathBuf,
        /// Line in the file.
        line: u64,
        /// What is wrong.
        reason: String,
    },
}

impl Sides {
    /// Reads the side file for a trace; rows of profiles not in the trace are ignored.
    ///
    /// # Errors
    /// If the file cannot be read or has an unreadable row.
    pub fn read(path: &Path, trace: &Trace) -> Result<Self, SidesError> {
        let read_error = |source| SidesError::Read {
            path: path.to_owned(),
            source,
        };
        let mut rows = csv::ReaderBuilder::new()
            .flexible(true)
            .trim(csv::Trim::All)
            .from_path(path)
            .map_err(read_error)?;
        let profiles: HashMap<&str, usize> = trace
            .profiles
            .iter()
            .enumerate()
            .map(|(i, name)| (name.as_str(), i))
            .collect();
        let mut names: HashMap<String, u32> = HashMap::new();
        let mut sides = Self {
            uses: vec![Vec::new(); trace.profiles.len()],
            ..Self::default()
        };
        for row in rows.records() {
            let row = row.map_err(read_error)?;
            let line = row.position().map_or(0, csv::Position::line);
            let side = parse(&row).map_err(|reason| SidesError::Row {
                path: path.to_owned(),
                line,
                reason,
            })?;
            let Some(&profile) = profiles.get(row.get(0).unwrap_or("")) else {
                continue;
            };
            let name = row.get(1).unwrap_or("");
            let key = *names.entry(name.to_owned()).or_insert_with(|| {
                sides.components.push(side);
                (sides.components.len() - 1) as u32
            });
            if !sides.uses[profile].contains(&key) {
                sides.uses[profile].push(key);
            }
        }
        Ok(sides)
    }

    /// Seconds until everything of a profile is loaded, if nothing is.
    #[must_use]
    pub fn load_s(&self, profile: usize) -> f64 {
        self.uses[profile]
            .iter()
            .map(|&key| self.components[key as usize].load_s)
            .sum()
    }
}

/// Figures that count components instead of profiles: what two profiles share is held once, and a
/// launch waits only for what nobody holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SharedComponents {
    /// Seconds that launches waited for loads, in all.
    pub stall_s: f64,
    /// Launches that waited.
    pub stalled_launches: u64,
    /// Memory over time.
    pub memory_gib_minutes: f64,
}

/// A span over which a profile was loaded and idle.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    pub profile: u32,
    pub from: Timestamp,
    pub to: Timestamp,
}

impl Sides {
    /// Accounts for a policy that held profiles over `spans`.
    pub(crate) fn account(&self, trace: &Trace, spans: &[Span]) -> SharedComponents {
        let mut held: Vec<Vec<(Timestamp, Timestamp)>> = vec![Vec::new(); self.components.len()];
        for span in spans {
            for &component in &self.uses[span.profile as usize] {
                held[component as usize].push((span.from, span.to));
            }
        }
        let mut memory_gib_minutes = 0.0;
        for (spans, component) in held.iter_mut().zip(&self.components) {
            *spans = union(std::mem::take(spans));
            let minutes: f64 = spans
                .iter()
                .map(|&(from, to)| to.seconds_since(from) / 60.0)
                .sum();
            memory_gib_minutes += minutes * component.bytes as f64 / (1u64 << 30) as f64;
        }
        let mut shared = SharedComponents {
            stall_s: 0.0,
            stalled_launches: 0,
            memory_gib_minutes,
        };
        for launch in &trace.launches {
            let wait: f64 = self.uses[launch.profile as usize]
                .iter()
                .filter(|&&component| !covers(&held[component as usize], launch.at))
                .map(|&component| self.components[component as usize].load_s)
                .sum();
            shared.stall_s += wait;
            shared.stalled_launches += u64::from(wait > 0.0);
        }
        shared
    }
}

/// Sorted, disjoint spans with the same points.
fn union(mut spans: Vec<(Timestamp, Timestamp)>) -> Vec<(Timestamp, Timestamp)> {
    spans.sort_unstable();
    let mut merged: Vec<(Timestamp, Timestamp)> = Vec::with_capacity(spans.len());
    for (from, to) in spans {
        match merged.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(to),
            _ => merged.push((from, to)),
        }
    }
    merged
}

fn covers(spans: &[(Timestamp, Timestamp)], at: Timestamp) -> bool {
    let after = spans.partition_point(|&(from, _)| from <= at);
    // A span that begins at this very moment was not there before it.
    after
        .checked_sub(1)
        .is_some_and(|i| spans[i].1 >= at && spans[i].0 < at)
}

fn parse(row: &csv::StringRecord) -> Result<ComponentSide, String> {
    let text = |index: usize, name: &str| {
        row.get(index)
            .filter(|v| !v.is_empty())
            .ok_or_else(|| format!("no {name}"))
    };
    text(0, "profile")?;
    text(1, "component")?;
    let bytes = text(2, "bytes")?;
    let bytes = bytes
        .parse()
        .map_err(|_| format!("bytes is not a number: {bytes:?}"))?;
    let load_s = match row.get(3) {
        None | Some("") => 0.0,
        Some(text) => text
            .parse::<f64>()
            .ok()
            .filter(|value| value.is_finite() && *value >= 0.0)
            .ok_or_else(|| format!("load_s is not a duration: {text:?}"))?,
    };
    Ok(ComponentSide { bytes, load_s })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::TracedLaunch;

    #[test]
    fn shared_components_are_held_once_and_wait_for_nobody() {
        let launch = |at_s: i64, profile| TracedLaunch {
            at: Timestamp(at_s * 1000),
            profile,
            owner: 0,
            count: 1,
            composition: 0,
        };
        let trace = Trace {
            launches: vec![launch(0, 0), launch(60, 1)],
            profiles: vec!["a".to_owned(), "b".to_owned()],
            ..Trace::default()
        };
        let base = ComponentSide {
            bytes: 1 << 30,
            load_s: 4.0,
        };
        let own = ComponentSide {
            bytes: 1 << 29,
            load_s: 1.0,
        };
        let sides = Sides {
            uses: vec![vec![0], vec![0, 1]],
            components: vec![base, own],
        };
        let minute = |profile, from: i64, to: i64| Span {
            profile,
            from: Timestamp(from * 60_000),
            to: Timestamp(to * 60_000),
        };
        let shared = sides.account(&trace, &[minute(0, 0, 2), minute(1, 1, 3)]);
        // The base is held from 0 to 3, the other component from 1 to 3.
        assert_eq!(shared.memory_gib_minutes, 4.0);
        // The first launch loads the base, the second finds it and loads only its own.
        assert_eq!(shared.stall_s, 5.0);
        assert_eq!(shared.stalled_launches, 2);
    }
}
