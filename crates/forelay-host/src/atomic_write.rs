//! Files that are seen whole or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// Puts a file of `bytes` in the place of whatever is at `path`, and returns it, open for
/// writing behind them.
///
/// A reader of `path` sees all of the old or all of the new content, also if this process
/// is killed meanwhile, and also if several write at once (the last one stays). A failure
/// leaves the old file as it is. What a killed writer leaves behind is one file, the name
/// with `.new` behind it, which the next writer takes over; if somebody
/// else put a link or a pipe at that name, the write is refused. The disk is not waited for:
/// after a power failure the content may be the old one, the new one or, on file systems
/// that do not order a rename after the data, damaged; where that matters, the caller
/// uses [`File::sync_all`].
pub fn atomic_write(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let Some(name) = path.file_name() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut unfinished = name.to_owned();
    unfinished.push(".new");
    let unfinished = path.with_file_name(unfinished);
    let mut file = lock_unfinished(&unfinished)?;
    let written = file
        .set_len(0)
        .and_then(|()| file.write_all(bytes))
        .and_then(|()| fs::rename(&unfinished, path));
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    file.unlock()?;
    written.map(|()| file)
}

/// The unfinished file, locked against other writers.
fn lock_unfinished(unfinished: &Path) -> io::Result<File> {
    loop {
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            // In a directory of somebody else's: no link is followed, no pipe waited for.
            .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
            .open(unfinished)?;
        file.lock()?;
        let own = file.metadata()?;
        match fs::symlink_metadata(unfinished) {
            Ok(there) if (there.dev(), there.ino()) == (own.dev(), own.ino()) => return Ok(file),
            // Another writer has put it in its place before we had the lock.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_can_be_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        // What a writer left that was killed.
        fs::write(dir.path().join("record.json.new"), [b'x'; 1000]).unwrap();
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

    #[test]
    fn what_somebody_else_put_at_the_unfinished_name_is_neither_followed_nor_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("x.lock"), dir.path().join("victim"));
        std::os::unix::fs::symlink(&victim, dir.path().join("x.lock.new")).unwrap();
        assert!(atomic_write(&path, b"new").is_err());
        assert!(!victim.exists() && !path.exists());
        let pipe = dir.path().join("y.lock.new");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        assert!(atomic_write(&dir.path().join("y.lock"), b"new").is_err());
    }
}
