//! Files that are seen whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Tells apart the unfinished files of one process.
static UNFINISHED: AtomicU64 = AtomicU64::new(0);

/// Puts a file of `bytes` in the place of whatever is at `path`, and returns it, open for
/// writing behind them.
///
/// Whoever opens `path` sees all of the old or all of the new content, also if this process
/// is killed meanwhile, and also if several write at once (the last one stays). A failure
/// leaves the old file as it is. The disk is not waited for: after a power failure the
/// content may be the old one, the new one or, on file systems that do not order a rename
/// after the data, damaged; what needs more calls [`File::sync_all`] on what it writes.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let Some(name) = path.file_name() else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let number = UNFINISHED.fetch_add(1, Relaxed);
    let mut unfinished = OsString::from(name);
    unfinished.push(format!(".{}-{number}.new", std::process::id()));
    let unfinished = path.with_file_name(unfinished);
    let written = File::create(&unfinished).and_then(|mut file| {
        file.write_all(bytes)?;
        fs::rename(&unfinished, path)?;
        Ok(file)
    });
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_can_be_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        atomic_write(&path, b"a long first content").unwrap();
        let old = File::open(&path).unwrap();
        let mut new = atomic_write(&path, b"second").unwrap();
        new.write_all(b", and more").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second, and more");
        assert_eq!(io::read_to_string(old).unwrap(), "a long first content");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_leaves_nothing_but_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        // A directory that is not empty cannot be renamed over.
        let path = dir.path().join("taken");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("inside"), b"x").unwrap();
        assert!(atomic_write(&path, b"y").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(atomic_write(&dir.path().join("gone/file"), b"y").is_err());
        assert!(atomic_write(Path::new("/"), b"y").is_err());
    }

    #[test]
    fn a_reader_never_sees_a_part_while_several_write() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shared");
        atomic_write(&path, &[0; 10_000]).unwrap();
        std::thread::scope(|scope| {
            let writers: Vec<_> = (1..4u8)
                .map(|byte| {
                    let path = &path;
                    scope.spawn(move || {
                        for _ in 0..200 {
                            atomic_write(path, &[byte; 10_000]).unwrap();
                        }
                    })
                })
                .collect();
            while !writers.iter().all(|writer| writer.is_finished()) {
                let seen = fs::read(&path).unwrap();
                assert_eq!(seen.len(), 10_000);
                assert!(seen.iter().all(|&byte| byte == seen[0]));
            }
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
