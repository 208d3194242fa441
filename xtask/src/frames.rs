//! Page frame numbers behind a process's mappings: the proof that memory is really shared.
//!
//! Asks the kernel's own `/proc/PID/pagemap` (as root), independent of the product's code on
//! purpose. The tests of other crates take this file by its path.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use procfs::ProcResult;
use procfs::process::{MMapPath, PageInfo, Process};

/// A page of a file.
pub type FilePage = (PathBuf, u64);

/// Maps each page that `pid` has mapped of files at or below `dir`, as file and offset, to its
/// page frame. Without the right to know them, all are zero.
pub fn frames(pid: u64, dir: &Path) -> ProcResult<BTreeMap<FilePage, u64>> {
    let process = Process::new(i32::try_from(pid).unwrap_or(i32::MAX))?;
    let mut pagemap = process.pagemap()?;
    let page_bytes = procfs::page_size();
    let mut found = BTreeMap::new();
    for map in process.maps()? {
        let MMapPath::Path(path) = map.pathname else {
            continue;
        };
        if !path.starts_with(dir) {
            continue;
        }
        let (start, end) = map.address;
        let pages = (start / page_bytes) as usize..(end / page_bytes) as usize;
        let infos = pagemap.get_range_info(pages)?;
        for (index, info) in infos.into_iter().enumerate() {
            if let PageInfo::MemoryPage(page) = info
                && page.contains(procfs::process::MemoryPageFlags::PRESENT)
            {
                let offset = map.offset + index as u64 * page_bytes;
                found.insert((path.clone(), offset), page.get_page_frame_number().0);
            }
        }
    }
    Ok(found)
}
