//! Logs that others go on writing while only their newest part is kept.
//!
//! QEMU writes a VM's console, and what it says itself, at the end of files that it holds open
//! for as long as it runs. Nobody has to come between: the oldest bytes are given back to the
//! file system where they are (a hole, which fallocate(2) punches), so that no line is moved,
//! none that is just written is lost, and nothing waits. The file's length goes on growing; the
//! room that it takes does not.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

/// What is given back at a time: the largest page that a file system of these has.
const STEP_BYTES: u64 = 64 << 10;

/// Gives back what is older than the newest `keep_bytes` of a log, to the next 64 KiB. Files that
/// are not there, and short ones, are left as they are.
pub fn keep_newest(path: &Path, keep_bytes: u64) -> io::Result<()> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata()?;
    let old = metadata.len().saturating_sub(keep_bytes) / STEP_BYTES * STEP_BYTES;
    if !metadata.is_file() || old == 0 || first_kept(&file)? >= old {
        return Ok(());
    }
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(&file, punch, 0, old)?)
}

/// Where the part begins that is kept; 0 as long as nothing was given back.
pub fn first_kept(file: &File) -> io::Result<u64> {
    kept_from(file, 0)
}

/// The first byte from `at` on that is kept; `at` itself behind the end.
pub fn kept_from(file: &File, at: u64) -> io::Result<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(found) => Ok(found),
        Err(Errno::NXIO) => Ok(at),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _, Write as _};
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn the_newest_part_is_kept_and_takes_no_more_room() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("log");
        keep_newest(&path, 1).unwrap();
        let mut log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .unwrap();
        let keep = 256 << 10;
        let mut written = Vec::new();
        for number in 0..200_000 {
            let line = format!("line {number}\n");
            log.write_all(line.as_bytes()).unwrap();
            written.extend_from_slice(line.as_bytes());
            if number % 10_000 == 0 {
                keep_newest(&path, keep).unwrap();
            }
        }
        keep_newest(&path, keep).unwrap();
        let metadata = log.metadata().unwrap();
        assert_eq!(metadata.len(), written.len() as u64);
        assert!(
            metadata.blocks() * 512 <= keep + 2 * STEP_BYTES,
            "{metadata:?}"
        );
        let mut read = File::open(&path).unwrap();
        let first = first_kept(&read).unwrap();
        assert!(metadata.len() - first >= keep);
        read.seek(io::SeekFrom::Start(first)).unwrap();
        let mut kept = Vec::new();
        read.read_to_end(&mut kept).unwrap();
        assert_eq!(kept, written[first as usize..]);
        assert_eq!(kept_from(&read, metadata.len()).unwrap(), metadata.len());
        assert!(
            keep_newest(dir.path(), keep).is_err(),
            "a directory is no log"
        );
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        assert!(keep_newest(&dir.path().join("link"), keep).is_err());
    }
}
