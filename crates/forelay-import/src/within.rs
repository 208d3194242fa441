//! Reading files of a root that may be anybody's: its links lead nowhere outside of it.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};

/// The longest file that is read so: dpkg's status of a large system takes some MiB.
const LIMIT_BYTES: u64 = 64 << 20;

/// The bytes of the regular file at `path` within `root`, links as seen there.
pub(crate) fn read_within(root: &Path, path: &str) -> io::Result<Vec<u8>> {
    let directory = rustix::fs::open(root, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // What is no file must not keep us waiting.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = rustix::fs::openat2(directory, path, flags, Mode::empty(), resolve)?;
    let file = File::from(file);
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > LIMIT_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a file of at most 64 MiB",
        ));
    }
    let mut bytes = Vec::new();
    file.take(LIMIT_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_of_a_root_lead_nowhere_outside_of_it() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("passwd"), "the host's").unwrap();
        symlink(outside.path(), root.path().join("etc")).unwrap();
        assert!(read_within(root.path(), "etc/passwd").is_err());
        let up = format!("{}{}", "../".repeat(40), outside.path().display());
        symlink(up, root.path().join("up")).unwrap();
        assert!(read_within(root.path(), "up/passwd").is_err());
        std::fs::create_dir(root.path().join("usr")).unwrap();
        std::fs::write(root.path().join("usr/passwd"), "its own").unwrap();
        symlink("/usr", root.path().join("own")).unwrap();
        assert_eq!(read_within(root.path(), "own/passwd").unwrap(), b"its own");
        symlink("/proc/self/exe", root.path().join("usr/exe")).unwrap();
        assert!(read_within(root.path(), "usr/exe").is_err());
        assert!(read_within(root.path(), "usr").is_err());
    }
}
