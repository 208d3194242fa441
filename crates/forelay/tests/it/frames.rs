//! Page frame numbers behind a VMM's mappings, from the kernel's own `/proc/PID/pagemap`.
//!
//! Independent of the product's code on purpose: it is what the product is checked with.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const PAGE_BYTES: u64 = 4096;
const PRESENT: u64 = 1 << 63;
const FRAME_MASK: u64 = (1 << 55) - 1;

/// Maps each page that `pid` has mapped of files below `dir`, as file and offset, to its
/// page frame.
pub fn frames(pid: u64, dir: &Path) -> BTreeMap<(PathBuf, u64), u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let pagemap = std::fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let mut found = BTreeMap::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let Some(path) = fields
            .get(5)
            .filter(|path| Path::new(path).starts_with(dir))
        else {
            continue;
        };
        let (start, end) = fields[0].split_once('-').unwrap();
        let (start, end, offset) = (hex(start), hex(end), hex(fields[2]));
        let mut entries = vec![0; ((end - start) / PAGE_BYTES * 8) as usize];
        let at = start / PAGE_BYTES * 8;
        pagemap.read_exact_at(&mut entries, at).unwrap();
        for (index, entry) in entries.chunks_exact(8).enumerate() {
            let entry = u64::from_le_bytes(entry.try_into().unwrap());
            if entry & PRESENT != 0 {
                let page = offset + index as u64 * PAGE_BYTES;
                found.insert((PathBuf::from(path), page), entry & FRAME_MASK);
            }
        }
    }
    found
}
