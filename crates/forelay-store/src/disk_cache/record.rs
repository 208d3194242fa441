//! Records of a segment's log.
//!
//! ```text
//! chunk digest 32 | offset u64 | len u32 | flags u32 (1 = dropped) | sums u32 | sums x u64 |
//! xxh3 of all before it u64
//! ```
//! Invariant: [`parse`] never panics and stops at the first record that is torn or does
//! not make sense.

use std::collections::BTreeMap;

use forelay_image::Digest;
use forelay_image::chunk::MAX_CHUNK_BYTES;
use twox_hash::XxHash3_64;

use super::BLOCK_BYTES;
use crate::sealed::{Reader, SealError};

/// A chunk written or dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheRecord {
    /// The chunk.
    pub chunk: Digest,
    /// Where it starts in the segment's data.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u32,
    /// True if it was dropped.
    pub dropped: bool,
    /// One xxh3 checksum per block.
    pub sums: Box<[u64]>,
}

impl CacheRecord {
    /// The record's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(60 + self.sums.len() * 8);
        out.extend_from_slice(self.chunk.as_bytes());
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.len.to_le_bytes());
        out.extend_from_slice(&u32::from(self.dropped).to_le_bytes());
        out.extend_from_slice(&(self.sums.len() as u32).to_le_bytes());
        for sum in &self.sums {
            out.extend_from_slice(&sum.to_le_bytes());
        }
        let check = XxHash3_64::oneshot(&out);
        out.extend_from_slice(&check.to_le_bytes());
        out
    }
}

/// The records of a log up to the first bad one.
pub fn parse(log: &[u8]) -> Vec<CacheRecord> {
    let mut records = Vec::new();
    let mut rest = log;
    while let Ok((record, bytes)) = parse_one(rest) {
        records.push(record);
        rest = &rest[bytes..];
    }
    records
}

/// The chunks that a log says are there, by offset.
pub fn live(log: &[u8]) -> BTreeMap<u64, CacheRecord> {
    let mut live = BTreeMap::new();
    for record in parse(log) {
        if record.dropped {
            live.remove(&record.offset);
        } else {
            live.insert(record.offset, record);
        }
    }
    live
}

fn parse_one(log: &[u8]) -> Result<(CacheRecord, usize), SealError> {
    let mut reader = Reader(log);
    let chunk = reader.digest()?;
    let offset = reader.u64()?;
    let len = reader.u32()?;
    let flags = reader.u32()?;
    let count = reader.u32()? as usize;
    let dropped = flags & 1 == 1;
    let expected = if dropped {
        0
    } else {
        (len as usize).div_ceil(BLOCK_BYTES)
    };
    if len == 0 || u64::from(len) > MAX_CHUNK_BYTES || count != expected || offset > 1 << 40 {
        return Err(SealError::Body("impossible record"));
    }
    let sums = (0..count).map(|_| reader.u64()).collect::<Result<_, _>>()?;
    let bytes = log.len() - reader.0.len();
    if reader.u64()? != XxHash3_64::oneshot(&log[..bytes]) {
        return Err(SealError::Checksum);
    }
    Ok((
        CacheRecord {
            chunk,
            offset,
            len,
            dropped,
            sums,
        },
        bytes + 8,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(len: u32, dropped: bool) -> CacheRecord {
        let sums = if dropped {
            0
        } else {
            (len as usize).div_ceil(BLOCK_BYTES)
        };
        CacheRecord {
            chunk: Digest::of(&len.to_le_bytes()),
            offset: u64::from(len) * 4096,
            len,
            dropped,
            sums: (0..sums as u64).collect(),
        }
    }

    #[test]
    fn a_torn_log_gives_its_whole_records() {
        let records = [record(1, false), record(200_000, false), record(1, true)];
        let log: Vec<u8> = records.iter().flat_map(CacheRecord::encode).collect();
        assert_eq!(parse(&log), records);
        let mut ends = vec![0];
        for record in &records {
            ends.push(ends[ends.len() - 1] + record.encode().len());
        }
        for cut in 0..log.len() {
            let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
            assert_eq!(parse(&log[..cut]), records[..whole], "cut at {cut}");
        }
    }
}
