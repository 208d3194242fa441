//! What a VM touched, seen from outside: the page tables of its VMM.
//!
//! A page of an image counts as touched when the VMM's mapping of the file has it. Pages
//! that are not in memory are never mapped, so what was not pushed and not faulted is not
//! reported; of the pages that are in memory, the kernel maps up to 64 KiB around a fault
//! (fault-around), so observation is exact where exact sets were pushed and blurs up to
//! 16 pages where more is resident.
//!
//! Reads other processes' maps only; changes nothing. Needs CAP_SYS_PTRACE on them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use forelay_image::extent::{Extent, PAGE_BYTES, normalise};

/// Which file a mapping is of, as `/proc/PID/maps` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileIdentity {
    /// Device number: major, minor.
    pub device: (u32, u32),
    /// Inode number.
    pub inode: u64,
}

/// A part of a file in a process's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// Where it begins there.
    pub address: u64,
    /// The part of the file.
    pub extent: Extent,
}

/// Why a process could not be observed.
#[derive(Debug, thiserror::Error)]
#[error("cannot observe process {pid}: {what}")]
pub struct ObserveError {
    /// The process.
    pub pid: u32,
    what: &'static str,
    #[source]
    source: io::Error,
}

impl FileIdentity {
    /// The identity of the file at `path`.
    pub fn of(path: &Path) -> io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        let device = meta.dev();
        Ok(Self {
            device: (rustix::fs::major(device), rustix::fs::minor(device)),
            inode: meta.ino(),
        })
    }
}

/// Where `pid` maps the file.
pub fn mappings(pid: u32, file: FileIdentity) -> Result<Vec<MappedRange>, ObserveError> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))
        .map_err(fail(pid, "reading its mappings"))?;
    Ok(maps
        .lines()
        .filter_map(parse_mapping)
        .filter(|(identity, _)| *identity == file)
        .map(|(_, range)| range)
        .collect())
}

/// The pages of the file that `pid` has in its page tables, as sorted extents.
pub fn touched(pid: u32, file: FileIdentity) -> Result<Vec<Extent>, ObserveError> {
    let ranges = mappings(pid, file)?;
    if ranges.is_empty() {
        return Ok(Vec::new());
    }
    let pagemap = open_pagemap(pid)?;
    let mut pages = Vec::new();
    for range in ranges {
        let scanned = scan(&pagemap, range, &mut pages);
        match scanned {
            Ok(()) => {}
            // Before Linux 6.7.
            Err(error) if is_unknown(&error) => {
                let found = entries(&pagemap, range).map_err(fail(pid, "reading pagemap"))?;
                pages.extend(found);
            }
            Err(error) => return Err(fail(pid, "scanning its page tables")(error)),
        }
    }
    Ok(normalise(pages))
}

fn fail(pid: u32, what: &'static str) -> impl Fn(io::Error) -> ObserveError {
    move |source| ObserveError { pid, what, source }
}

fn open_pagemap(pid: u32) -> Result<File, ObserveError> {
    File::open(format!("/proc/{pid}/pagemap")).map_err(fail(pid, "opening pagemap"))
}

/// `address-end perms offset major:minor inode path`
fn parse_mapping(line: &str) -> Option<(FileIdentity, MappedRange)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let (start, end) = (hex(start)?, hex(end)?);
    let offset = hex(fields.nth(1)?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let identity = FileIdentity {
        device: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode: fields.next()?.parse().ok()?,
    };
    let range = MappedRange {
        address: start,
        extent: Extent::new(offset, end.checked_sub(start)?),
    };
    Some((identity, range))
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Appends the mapped pages of `range`, asked of the kernel in one go (Linux 6.7).
fn scan(pagemap: &File, range: MappedRange, pages: &mut Vec<Extent>) -> io::Result<()> {
    const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
    const PAGE_IS_PRESENT: u64 = 1 << 3;
    let mut regions = vec![PageRegion::default(); 1024];
    let end = range.address + range.extent.len;
    let mut at = range.address;
    while at < end {
        let mut arg = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_mask: PAGE_IS_PRESENT,
            return_mask: PAGE_IS_PRESENT,
            ..PmScanArg::default()
        };
        // SAFETY: `arg` is the struct that this ioctl takes, says its own size, and points
        // to `regions`, which is as long as it says and outlives the call.
        let found = unsafe { libc::ioctl(pagemap.as_fd().as_raw_fd(), PAGEMAP_SCAN, &mut arg) };
        if found < 0 {
            return Err(io::Error::last_os_error());
        }
        for region in regions.iter().take(found as usize) {
            let offset = region.start - range.address + range.extent.offset;
            pages.push(Extent::new(offset, region.end - region.start));
        }
        if arg.walk_end <= at {
            break;
        }
        at = arg.walk_end;
    }
    Ok(())
}

/// Whether an error says that the kernel does not know the call at all.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::ENOTTY))
}

/// The mapped pages of `range`, from one entry for each.
fn entries(pagemap: &File, range: MappedRange) -> io::Result<Vec<Extent>> {
    const PRESENT: u64 = 1 << 63;
    let mut bytes = vec![0; (range.extent.len / PAGE_BYTES * 8) as usize];
    pagemap.read_exact_at(&mut bytes, range.address / PAGE_BYTES * 8)?;
    let mut offset = range.extent.offset;
    let mut found = Vec::new();
    for entry in bytes.as_chunks::<8>().0 {
        let entry = u64::from_ne_bytes(*entry);
        if entry & PRESENT != 0 {
            found.push(Extent::new(offset, PAGE_BYTES));
        }
        offset += PAGE_BYTES;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_understood() {
        let file = FileIdentity {
            device: (0, 0x2a),
            inode: 123_456,
        };
        let line = "7f0000000000-7f0000200000 r--s 00001000 00:2a 123456 /run/x.img";
        let (identity, range) = parse_mapping(line).unwrap();
        assert_eq!(identity, file);
        assert_eq!(range.extent, Extent::new(4096, 2 << 20));
        assert_eq!(parse_mapping("Rss:     64 kB"), None);
    }

    #[test]
    fn own_touches_are_seen() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        io::Write::write_all(&mut file, &vec![1; 64 * PAGE_BYTES as usize]).unwrap();
        let identity = FileIdentity::of(file.path()).unwrap();
        let opened = File::open(file.path()).unwrap();
        let mapping = crate::mapping::FileMapping::new(opened, 64 * PAGE_BYTES).unwrap();
        let pid = std::process::id();
        assert_eq!(touched(pid, identity).unwrap(), []);
        assert_eq!(mapping.byte_at(40 * PAGE_BYTES), 1);
        let seen = touched(pid, identity).unwrap();
        let page = Extent::new(40 * PAGE_BYTES, PAGE_BYTES);
        assert!(
            seen.iter()
                .any(|extent| extent.intersection(&page) == Some(page)),
            "{seen:?}"
        );
        // As kernels without the scan are asked.
        let (pagemap, range) = (
            open_pagemap(pid).unwrap(),
            mappings(pid, identity).unwrap()[0],
        );
        assert_eq!(normalise(entries(&pagemap, range).unwrap()), seen);
    }
}
