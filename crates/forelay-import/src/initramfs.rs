//! The initramfs: an uncompressed cpio archive (`newc`) with the guest's init, the
//! modules it loads and the order to load them in.
//!
//! Uncompressed, because decompressing costs an emulated guest more than reading.
//! Invariant: the bytes depend only on the content given (times 0, owner root, inode
//! numbers in sequence).

use std::io::{self, Write};

use cpio::newc::{Builder, ModeFileType, trailer};

/// Where init finds the modules to load: one path a line, relative to the root.
pub const MODULES_LIST: &str = "modules.list";

/// Writes the archive. `modules`: (path without leading `/`, content) in load order.
pub fn build_initramfs(init: &[u8], modules: &[(String, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let mut archive = Archive {
        bytes: Vec::new(),
        inode: 0,
        directories: Vec::new(),
    };
    for directory in ["dev", "proc", "sys", "run"] {
        archive.directory(directory)?;
    }
    // The kernel opens it before init runs; without it, init has no standard output.
    let console = archive.entry("dev/console", 0o600, ModeFileType::Char);
    let console = console.rdev_major(5).rdev_minor(1);
    archive.write(console, &[])?;
    archive.file("init", 0o755, init)?;
    let mut list = String::new();
    for (path, bytes) in modules {
        archive.parents(path)?;
        archive.file(path, 0o644, bytes)?;
        list.push_str(path);
        list.push('\n');
    }
    archive.file(MODULES_LIST, 0o644, list.as_bytes())?;
    trailer(&mut archive.bytes)?;
    Ok(archive.bytes)
}

struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    directories: Vec<String>,
}

impl Archive {
    fn entry(&mut self, path: &str, mode: u32, kind: ModeFileType) -> Builder {
        self.inode += 1;
        Builder::new(path)
            .ino(self.inode)
            .mode(mode)
            .set_mode_file_type(kind)
            .nlink(1)
    }

    fn write(&mut self, entry: Builder, content: &[u8]) -> io::Result<()> {
        let len = u32::try_from(content.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let mut writer = entry.write(&mut self.bytes, len);
        writer.write_all(content)?;
        writer.finish().map(drop)
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let entry = self.entry(path, mode, ModeFileType::Regular);
        self.write(entry, content)
    }

    fn directory(&mut self, path: &str) -> io::Result<()> {
        if self.directories.iter().any(|known| known == path) {
            return Ok(());
        }
        self.directories.push(path.to_owned());
        let entry = self.entry(path, 0o755, ModeFileType::Directory);
        self.write(entry.nlink(2), &[])
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        for (at, _) in path.match_indices('/') {
            self.directory(&path[..at])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let modules = [
            ("lib/modules/6.1/a.ko".to_owned(), b"module a".to_vec()),
            ("lib/modules/6.1/b.ko".to_owned(), b"b".to_vec()),
        ];
        build_initramfs(b"#!init", &modules).unwrap()
    }

    #[test]
    fn the_archive_is_deterministic_and_lists_modules_in_order() {
        let bytes = sample();
        assert_eq!(bytes, sample());
        let list = b"lib/modules/6.1/a.ko\nlib/modules/6.1/b.ko\n";
        assert!(bytes.windows(list.len()).any(|part| part == list));
    }

    /// GNU cpio is the referee, where it is installed.
    #[test]
    fn cpio_lists_the_archive() {
        let Ok(mut child) = Command::new("cpio")
            .args(["-t", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            println!("SKIPPED cpio_lists_the_archive: cpio is not installed");
            return;
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let listed = child.wait_with_output().unwrap();
        let listed = String::from_utf8(listed.stdout).unwrap();
        let expected = "dev\nproc\nsys\nrun\ndev/console\ninit\nlib\nlib/modules\n\
                        lib/modules/6.1\nlib/modules/6.1/a.ko\nlib/modules/6.1/b.ko\nmodules.list\n";
        assert_eq!(listed, expected);
    }
}
