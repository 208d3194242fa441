//! Memory that belongs to a process alone, copied out of it while it stands still.
//!
//! Of a range that is a private mapping, what the process has written is its own; the rest is
//! what the file has, or zero where there is none. Looking at the rest could fault on a file that
//! the looking process itself serves, so only what is the process's own is read.
//!
//! Needs CAP_SYS_PTRACE on the process.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use forelay_image::extent::{Extent, PAGE_BYTES, normalise};

/// Entries of pagemap that are read at once, for 128 MiB.
const ENTRIES: u64 = 32 << 10;
/// Memory that is copied at once.
const PIECE_BYTES: u64 = 1 << 20;

/// A process's address space, which stays that process's: once it has ended nothing is read.
pub struct OwnMemory {
    pagemap: File,
    memory: File,
}

impl OwnMemory {
    /// Of the process that has this pid now. That it is the right one is to be looked at after
    /// this, since a pid may be given again.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pagemap: File::open(format!("/proc/{pid}/pagemap"))?,
            memory: File::open(format!("/proc/{pid}/mem"))?,
        })
    }

    /// Which pages of the `bytes` bytes from `address` on are its own, as offsets from there.
    pub fn own_pages(&self, address: u64, bytes: u64) -> io::Result<Vec<Extent>> {
        own_pages(&self.pagemap, address, bytes)
    }

    /// Copies these into a file, each to its offset; pages of zeros are left out.
    pub fn copy(&self, own: &[Extent], address: u64, into: &File) -> io::Result<()> {
        let mut buffer = vec![0; PIECE_BYTES as usize];
        for extent in own {
            for piece in pieces(*extent, PIECE_BYTES) {
                let buffer = &mut buffer[..piece.len as usize];
                self.memory.read_exact_at(buffer, address + piece.offset)?;
                write_pages(into, buffer, piece.offset)?;
            }
        }
        Ok(())
    }
}

/// Writes what is not zero, page by page.
pub fn write_pages(into: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let pages = || bytes.chunks(PAGE_BYTES as usize);
    let mut at = 0;
    for run in pages()
        .collect::<Vec<_>>()
        .chunk_by(|one, other| is_zero(one) == is_zero(other))
    {
        let len: usize = run.iter().map(|page| page.len()).sum();
        if !is_zero(run[0]) {
            into.write_all_at(&bytes[at..at + len], offset + at as u64)?;
        }
        at += len;
    }
    Ok(())
}

/// An extent in parts of at most so many bytes.
pub fn pieces(extent: Extent, bytes: u64) -> impl Iterator<Item = Extent> {
    let starts = (extent.offset..extent.end()).step_by(bytes as usize);
    starts.map(move |offset| Extent::new(offset, bytes.min(extent.end() - offset)))
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// Pages that are neither a file's nor nothing: anonymous ones, in memory or swapped out.
fn own_pages(pagemap: &File, address: u64, bytes: u64) -> io::Result<Vec<Extent>> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;
    let mut own = Vec::new();
    let mut buffer = vec![0; (ENTRIES * 8) as usize];
    for part in pieces(Extent::new(0, bytes), ENTRIES * PAGE_BYTES) {
        let buffer = &mut buffer[..(part.len / PAGE_BYTES * 8) as usize];
        pagemap.read_exact_at(buffer, (address + part.offset) / PAGE_BYTES * 8)?;
        let mut offset = part.offset;
        for entry in buffer.as_chunks::<8>().0 {
            let entry = u64::from_ne_bytes(*entry);
            if entry & SWAPPED != 0 || entry & (PRESENT | OF_FILE) == PRESENT {
                own.push(Extent::new(offset, PAGE_BYTES));
            }
            offset += PAGE_BYTES;
        }
    }
    Ok(normalise(own))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;

    use super::*;

    const PAGE: usize = PAGE_BYTES as usize;

    #[test]
    fn what_a_process_wrote_is_its_own_and_nothing_else_is_read() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 8 * PAGE]).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new private mapping of a file that is open and as long.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                8 * PAGE,
                protection,
                libc::MAP_PRIVATE,
                file.as_file().as_raw_fd(),
                0,
            )
        };
        assert_ne!(mapped, libc::MAP_FAILED);
        // SAFETY: the mapping is that long, nobody else knows it, and it stays.
        let pages = unsafe { std::slice::from_raw_parts_mut(mapped.cast::<u8>(), 8 * PAGE) };
        pages[2 * PAGE..3 * PAGE].fill(1);
        pages[3 * PAGE..4 * PAGE].fill(0);
        assert_eq!(pages[5 * PAGE], 7);
        let copy = tempfile::tempfile().unwrap();
        copy.set_len(8 * PAGE_BYTES).unwrap();
        copy.write_all_at(&[9; PAGE], 3 * PAGE_BYTES).unwrap();
        let (pid, bytes) = (std::process::id(), 8 * PAGE_BYTES);
        let memory = OwnMemory::open(pid).unwrap();
        let own = memory.own_pages(mapped as u64, bytes).unwrap();
        memory.copy(&own, mapped as u64, &copy).unwrap();
        assert_eq!(own, [Extent::new(2 * PAGE_BYTES, 2 * PAGE_BYTES)]);
        let mut read = vec![0; 8 * PAGE];
        copy.read_exact_at(&mut read, 0).unwrap();
        let first: Vec<u8> = read.chunks(PAGE).map(|page| page[0]).collect();
        // Zeros are not written: they are what a new file has.
        assert_eq!(first, [0, 0, 1, 9, 0, 0, 0, 0]);
    }
}
