//! Optional side file of a trace: which components a profile uses, their size and load time.
//!
//! Owns its reader: CSV `profile,component,bytes[,load_s]`. Profiles that name the same component
//! share it. Refuses to guess: an unreadable row is an error with its line.

use crate::trace::Trace;
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
