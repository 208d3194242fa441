//! Stable binary form of a working set, as history stores it: one blob per pair.
//!
//! ```text
//! "FLW" version:u8 | launches inherited weight:f32le | count | count x
//!     (gap since the last end, pages, hits, weight in 1/256 launches, first touch in ms)
//! ```
//! All numbers but the first weight are LEB128. Weights are rounded to 1/256 launch and times to
//! a millisecond, which is finer than what they are used for.
//!
//! Invariant: decoding never trusts a count; what does not decode whole is refused whole.

use forelay_image::PAGE_BYTES;
use forelay_image::numbers::{put_number, take_number};

use super::WorkingSet;
use super::spans::Span;

const MAGIC: &[u8; 3] = b"FLW";
const VERSION: u8 = 1;

/// A working-set snapshot that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Not a snapshot.
    #[error("not a working-set snapshot")]
    Magic,
    /// Written by a later version.
    #[error("working-set snapshot of version {0}; this forelay reads version {VERSION}")]
    Version(u8),
    /// Cut short or damaged.
    #[error("working-set snapshot is damaged at byte {0}")]
    Damaged(usize),
}

impl WorkingSet {
    /// The stable binary form.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + 8 * self.spans.len());
        out.extend_from_slice(MAGIC);
        out.push(VERSION);
        put_number(&mut out, self.launches.into());
        put_number(&mut out, self.inherited.into());
        out.extend_from_slice(&self.weight.to_le_bytes());
        put_number(&mut out, self.spans.len() as u64);
        let mut last_end = 0;
        for span in &self.spans {
            put_number(&mut out, (span.start - last_end).into());
            put_number(&mut out, span.pages().into());
            put_number(&mut out, span.hits.into());
            put_number(&mut out, (span.weight * 256.0).round().max(1.0) as u64);
            put_number(&mut out, span.first_ms.round().max(0.0) as u64);
            last_end = span.end;
        }
        out
    }

    /// Reads what [`WorkingSet::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SnapshotError> {
        if bytes.get(..3) != Some(MAGIC) {
            return Err(SnapshotError::Magic);
        }
        let mut reader = SnapshotReader { bytes, at: 4 };
        match bytes.get(3) {
            Some(&VERSION) => {}
            Some(&other) => return Err(SnapshotError::Version(other)),
            None => return Err(SnapshotError::Damaged(3)),
        }
        let launches = reader.u32()?;
        let inherited = reader.u32()?;
        let weight = reader.f32()?;
        let count = reader.u32()?;
        // Five bytes is the least a span takes: a larger count is a lie.
        if count as usize > bytes.len() / 5 {
            return Err(SnapshotError::Damaged(reader.at));
        }
        let mut spans = Vec::with_capacity(count as usize);
        let mut last_end: u32 = 0;
        for _ in 0..count {
            let damaged = SnapshotError::Damaged(reader.at);
            let start = last_end.checked_add(reader.u32()?);
            let pages = reader.u32()?;
            let end = start.and_then(|s| s.checked_add(pages));
            let hits = reader.u32()?;
            let weight = reader.u32()? as f32 / 256.0;
            let first_ms = reader.u32()? as f32;
            let (Some(start), Some(end), true) = (start, end, pages > 0) else {
                return Err(damaged);
            };
            last_end = end;
            spans.push(Span {
                start,
                end,
                weight,
                hits,
                first_ms,
            });
        }
        if reader.at != bytes.len() {
            return Err(SnapshotError::Damaged(reader.at));
        }
        Ok(Self {
            weight,
            launches,
            inherited,
            predecessor: None,
            spans,
        })
    }

    /// Bytes that are touched in at least half of the launches: the size to quote to a person.
    pub fn likely_bytes(&self) -> u64 {
        self.spans
            .iter()
            .filter(|s| s.weight * 2.0 >= self.weight)
            .map(|s| u64::from(s.pages()) * PAGE_BYTES)
            .sum()
    }
}

struct SnapshotReader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl SnapshotReader<'_> {
    fn u32(&mut self) -> Result<u32, SnapshotError> {
        let mut rest = self.bytes.get(self.at..).unwrap_or_default();
        let value = take_number(&mut rest);
        self.at = self.bytes.len() - rest.len();
        let value = value.and_then(|value| u32::try_from(value).ok());
        value.ok_or(SnapshotError::Damaged(self.at))
    }

    fn f32(&mut self) -> Result<f32, SnapshotError> {
        let end = self.at + 4;
        let raw = self
            .bytes
            .get(self.at..end)
            .and_then(|b| b.try_into().ok())
            .ok_or(SnapshotError::Damaged(self.at))?;
        self.at = end;
        let value = f32::from_le_bytes(raw);
        if value.is_finite() && value >= 0.0 {
            Ok(value)
        } else {
            Err(SnapshotError::Damaged(end))
        }
    }
}
