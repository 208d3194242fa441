//! Page frame numbers behind the VMMs' mappings, read from the kernel's own
//! `/proc/PID/pagemap` (needs root): the proof that memory is really shared.
//!
//! Independent of the product's code on purpose.

use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

const PAGE_BYTES: u64 = 4096;
const PRESENT: u64 = 1 << 63;
const FRAME_MASK: u64 = (1 << 55) - 1;

/// A page of a file.
pub type FilePage = (PathBuf, u64);

/// Maps each page that `pid` has mapped of files below `dir` to its page frame number.
pub fn frames(pid: u64, dir: &Path) -> Result<BTreeMap<FilePage, u64>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))
        .with_context(|| format!("cannot read the mappings of process {pid}"))?;
    let mut pagemap = std::fs::File::open(format!("/proc/{pid}/pagemap"))?;
    let mut found = BTreeMap::new();
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(offset)) = (fields.next(), fields.nth(1)) else {
            continue;
        };
        let Some(path) = fields
            .nth(2)
            .filter(|path| Path::new(path).starts_with(dir))
        else {
            continue;
        };
        let (start, end) = range.split_once('-').context("malformed line in maps")?;
        let start = u64::from_str_radix(start, 16)?;
        let end = u64::from_str_radix(end, 16)?;
        let offset = u64::from_str_radix(offset, 16)?;
        let mut entries = vec![0; ((end - start) / PAGE_BYTES * 8) as usize];
        pagemap.seek(SeekFrom::Start(start / PAGE_BYTES * 8))?;
        pagemap.read_exact(&mut entries)?;
        for (index, entry) in entries.chunks_exact(8).enumerate() {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(entry);
            let entry = u64::from_le_bytes(bytes);
            if entry & PRESENT == 0 {
                continue;
            }
            let frame = entry & FRAME_MASK;
            if frame == 0 {
                bail!("the kernel hides page frame numbers: run as root");
            }
            found.insert((path.into(), offset + index as u64 * PAGE_BYTES), frame);
        }
    }
    Ok(found)
}

/// How several processes share pages.
#[derive(Debug, Default, serde::Serialize)]
pub struct Sharing {
    /// Processes looked at.
    pub vms: usize,
    /// Every page that two processes map is the same frame in both.
    pub same_page_frames: bool,
    /// Pages mapped by two processes or more.
    pub shared_pages: usize,
    /// Memory behind all mappings: distinct frames.
    pub host_bytes: u64,
    /// Memory that one copy of each mapped page takes: distinct pages of files.
    pub one_copy_bytes: u64,
    /// Sum of what each process maps.
    pub mapped_sum_bytes: u64,
    /// `host_bytes / one_copy_bytes`.
    pub ratio: f64,
}

/// Compares the page frames of several processes.
pub fn sharing(pids: &[u64], dir: &Path) -> Result<Sharing> {
    let mut pages: BTreeMap<FilePage, Vec<u64>> = BTreeMap::new();
    for &pid in pids {
        for (page, frame) in frames(pid, dir)? {
            pages.entry(page).or_default().push(frame);
        }
    }
    let mut frames: Vec<u64> = pages.values().flatten().copied().collect();
    let mapped_sum_bytes = frames.len() as u64 * PAGE_BYTES;
    frames.sort_unstable();
    frames.dedup();
    let host_bytes = frames.len() as u64 * PAGE_BYTES;
    let one_copy_bytes = pages.len() as u64 * PAGE_BYTES;
    let shared: Vec<_> = pages.values().filter(|frames| frames.len() > 1).collect();
    let same = shared
        .iter()
        .all(|frames| frames.windows(2).all(|pair| pair[0] == pair[1]));
    Ok(Sharing {
        vms: pids.len(),
        same_page_frames: same && !shared.is_empty(),
        shared_pages: shared.len(),
        host_bytes,
        one_copy_bytes,
        mapped_sum_bytes,
        ratio: host_bytes as f64 / one_copy_bytes.max(1) as f64,
    })
}
