//! A read-only mapping of a whole file, for asking about it rather than reading it.
//!
//! Invariant: nobody reads the mapping except through [`FileMapping::byte_at`] and
//! [`FileMapping::read_at`], which only tests and replays may use on files of our own mount:
//! a daemon that faults on what it serves waits for itself.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr::NonNull;

use forelay_image::extent::{Extent, PAGE_BYTES};

/// How much is asked of `mincore` at a time.
const MINCORE_WINDOW_BYTES: u64 = 64 << 20;
/// Granule at which `cachestat` rules out empty parts before `mincore` looks.
const CACHESTAT_WINDOW_BYTES: u64 = 2 << 20;
const SYS_CACHESTAT: libc::c_long = 451;

/// A shared, read-only mapping of a file and the descriptor it came from.
#[derive(Debug)]
pub struct FileMapping {
    file: File,
    address: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping is plain read-only memory owned by this value; the address is
// never handed out for writing, and unmapping needs exclusive ownership (Drop).
unsafe impl Send for FileMapping {}
// SAFETY: as above; all methods that take `&self` only read.
unsafe impl Sync for FileMapping {}

impl FileMapping {
    /// Maps `len` bytes of `file` without touching any.
    pub fn new(file: File, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a descriptor
        // that we hold; nothing else can alias it.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_fd().as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the range is the mapping just made; the advice keeps it out of core
        // dumps (which would fault it in), and its failure changes nothing.
        unsafe { libc::madvise(address.as_ptr(), len, libc::MADV_DONTDUMP) };
        Ok(Self { file, address, len })
    }

    /// The file mapped.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes mapped.
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether nothing is mapped (the kernel refuses that, so never).
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// One byte of the content; reading it faults. Panics behind the end. There is no slice
    /// of it all: the kernel may replace pages under it, and the file's owner its bytes.
    pub fn byte_at(&self, offset: u64) -> u8 {
        assert!(
            offset < self.len(),
            "{offset} lies behind the mapping's end"
        );
        // SAFETY: the byte lies inside the mapping, which lives as long as `self`; a volatile
        // read assumes nothing of what others do to the file. One that shrank meanwhile ends
        // this process by a signal, and no wrong byte is read.
        unsafe {
            let address = self.address.as_ptr().byte_add(offset as usize);
            address.cast::<u8>().read_volatile()
        }
    }

    /// Fills `buf` with content from `offset` on, as [`FileMapping::byte_at`] reads it.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) {
        for (byte, at) in buf.iter_mut().zip(offset..) {
            *byte = self.byte_at(at);
        }
    }

    /// Locks the pages of `extent` in memory, faulting in those that are absent.
    pub fn lock(&self, extent: Extent) -> io::Result<()> {
        let (address, len) = self.range(extent)?;
        // SAFETY: the range lies inside our own mapping; locking changes no bytes.
        check(unsafe { libc::mlock(address, len) })
    }

    /// Lets go of the pages of `extent`.
    pub fn unlock(&self, extent: Extent) -> io::Result<()> {
        let (address, len) = self.range(extent)?;
        // SAFETY: as for `lock`.
        check(unsafe { libc::munlock(address, len) })
    }

    fn range(&self, extent: Extent) -> io::Result<(*mut libc::c_void, usize)> {
        let inside = extent.offset.is_multiple_of(PAGE_BYTES)
            && extent.end() <= self.len()
            && extent.len > 0;
        if !inside {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: `extent` was checked to lie inside the mapping.
        let address = unsafe { self.address.as_ptr().byte_add(extent.offset as usize) };
        Ok((address, extent.len as usize))
    }

    /// The pages of `within` that are in the page cache, as sorted extents. Faults
    /// nothing in.
    pub fn resident(&self, within: Extent) -> io::Result<Vec<Extent>> {
        let mut found = Vec::new();
        let end = within.end().min(self.len());
        let mut at = within.offset / PAGE_BYTES * PAGE_BYTES;
        while at < end {
            let window = Extent::new(at, MINCORE_WINDOW_BYTES.min(end - at));
            match cached_pages(&self.file, window) {
                // In-flight pages count as cached there, so only emptiness is certain.
                Some(0) => {}
                Some(_) => self.resident_sparse(window, &mut found)?,
                None => self.mincore(window, &mut found)?,
            }
            at += window.len;
        }
        if let Some(last) = found.last_mut() {
            last.len = last.len.min(end.next_multiple_of(PAGE_BYTES) - last.offset);
        }
        Ok(found)
    }

    fn resident_sparse(&self, window: Extent, found: &mut Vec<Extent>) -> io::Result<()> {
        let mut at = window.offset;
        while at < window.end() {
            let part = Extent::new(at, CACHESTAT_WINDOW_BYTES.min(window.end() - at));
            if cached_pages(&self.file, part) != Some(0) {
                self.mincore(part, found)?;
            }
            at += part.len;
        }
        Ok(())
    }

    fn mincore(&self, window: Extent, found: &mut Vec<Extent>) -> io::Result<()> {
        let (address, len) = self.range(window)?;
        let mut pages = vec![0u8; len.div_ceil(PAGE_BYTES as usize)];
        // SAFETY: the range lies inside our mapping and `pages` has a byte for each page.
        check(unsafe { libc::mincore(address, len, pages.as_mut_ptr()) })?;
        for (page, state) in pages.iter().enumerate() {
            if state & 1 != 0 {
                let offset = window.offset + page as u64 * PAGE_BYTES;
                push_joined(found, Extent::new(offset, PAGE_BYTES));
            }
        }
        Ok(())
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: address and length are those of the mapping made in `new`, which no
        // borrow outlives.
        unsafe { libc::munmap(self.address.as_ptr(), self.len) };
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn push_joined(found: &mut Vec<Extent>, extent: Extent) {
    match found.last_mut() {
        Some(last) if last.end() == extent.offset => last.len += extent.len,
        _ => found.push(extent),
    }
}

/// Pages of `extent` in the page cache; `None` where the kernel (before 6.5) or the
/// file's owner does not let us ask.
fn cached_pages(file: &File, extent: Extent) -> Option<u64> {
    let range = [extent.offset, extent.len];
    let mut stat = [0u64; 5];
    // SAFETY: `range` and `stat` have the layout of `struct cachestat_range` (two u64)
    // and `struct cachestat` (five u64, cached pages first) and live through the call.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_fd().as_raw_fd(),
            range.as_ptr(),
            stat.as_mut_ptr(),
            0u32,
        )
    };
    (result == 0).then_some(stat[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn residency_of_an_ordinary_file_is_exact_after_reading() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; 3 * PAGE_BYTES as usize]).unwrap();
        file.set_len(16 * PAGE_BYTES).unwrap();
        let mapping = FileMapping::new(file, 16 * PAGE_BYTES).unwrap();
        let whole = Extent::new(0, mapping.len());
        assert_eq!(mapping.byte_at(5), 7);
        let resident = mapping.resident(whole).unwrap();
        assert_eq!(resident[0].offset, 0);
        assert!(resident[0].len >= 3 * PAGE_BYTES);
        assert!(mapping.lock(Extent::new(1, 1)).is_err());
        assert!(mapping.lock(Extent::new(0, 17 * PAGE_BYTES)).is_err());
    }
}
