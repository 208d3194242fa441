//! How several VMMs share pages, told by the page frames behind their mappings.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

use crate::frames::{FilePage, frames};

const PAGE_BYTES: u64 = 4096;

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
        let mapped = frames(pid, dir);
        for (page, frame) in mapped.with_context(|| format!("cannot look at process {pid}"))? {
            ensure!(
                frame != 0,
                "the kernel hides page frame numbers: run as root"
            );
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
