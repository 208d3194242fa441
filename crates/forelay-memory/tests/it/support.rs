//! What the tests share: images with computable bytes, handlers that serve them, mounts
//! that clean up after themselves.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use forelay_image::digest::Digest;
use forelay_memory::mapping::FileMapping;
use forelay_memory::pinner;
use forelay_memory::{Config, Fault, FaultHandler, FileKey, FileSpec, Session, SharedMemory};

pub const MIB: u64 = 1 << 20;
pub const PAGE: u64 = 4096;

/// Says loudly why a test does nothing here; `true` if it should return.
pub fn skipped(test: &str) -> bool {
    let root = std::fs::metadata("/proc/self").is_ok_and(|meta| {
        use std::os::unix::fs::MetadataExt as _;
        meta.uid() == 0
    });
    let fuse = Path::new("/dev/fuse").exists();
    if !root || !fuse {
        eprintln!("SKIPPED {test}: needs root and /dev/fuse (root: {root}, fuse: {fuse})");
    }
    !root || !fuse
}

/// An image whose every 8 bytes follow from its seed and their offset.
#[derive(Clone, Copy, Debug)]
pub struct TestImage {
    pub seed: u64,
    pub bytes: u64,
}

fn word(seed: u64, index: u64) -> u64 {
    let mut x = (index ^ seed.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 29;
    x.wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1
}

impl TestImage {
    pub fn new(seed: u64, bytes: u64) -> Self {
        Self { seed, bytes }
    }

    pub fn key(&self) -> FileKey {
        Digest::of(format!("{} {}", self.seed, self.bytes).as_bytes())
    }

    pub fn spec(&self) -> FileSpec {
        FileSpec::padded(self.bytes)
    }

    /// Image bytes; zeros behind its end.
    pub fn content(&self, offset: u64, len: usize) -> Vec<u8> {
        assert_eq!(offset % 8, 0);
        let words =
            (0..len.div_ceil(8) as u64).flat_map(|n| word(self.seed, offset / 8 + n).to_ne_bytes());
        let mut out: Vec<u8> = words.take(len).collect();
        let inside = self.bytes.saturating_sub(offset).min(len as u64) as usize;
        out[inside..].fill(0);
        out
    }

    /// Whether the page of `mapping` at `offset` holds the right bytes.
    pub fn page_is_right(&self, mapping: &FileMapping, offset: u64) -> bool {
        let mut got = vec![0; PAGE as usize];
        mapping.read_at(&mut got, offset);
        got == self.content(offset, PAGE as usize)
    }
}

/// Answers every fault at once with the right bytes.
pub struct Images(HashMap<FileKey, TestImage>);

impl Images {
    pub fn new(images: &[TestImage]) -> Arc<Self> {
        Arc::new(Self(
            images.iter().map(|image| (image.key(), *image)).collect(),
        ))
    }
}

impl FaultHandler for Images {
    fn fault(&self, fault: Fault) {
        let image = self.0[&fault.file];
        let data = image.content(fault.offset, fault.len as usize);
        fault.reply.data(&data).unwrap();
    }
}

/// A mount in a fresh directory, with `images` added.
pub struct TestMount {
    pub memory: SharedMemory,
    _dir: tempfile::TempDir,
}

impl TestMount {
    pub fn new(images: &[TestImage]) -> Self {
        Self::with_handler(images, Images::new(images))
    }

    /// One whose files a group may read.
    pub fn for_group(images: &[TestImage], group: u32) -> Self {
        Self::start(images, Images::new(images), Some(group))
    }

    pub fn with_handler(images: &[TestImage], handler: Arc<dyn FaultHandler>) -> Self {
        Self::start(images, handler, None)
    }

    fn start(images: &[TestImage], handler: Arc<dyn FaultHandler>, gid: Option<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path().join("mount"), Session::New);
        config.gid = gid;
        config.pinner = Some(Arc::new(pinner::PinnerClient::in_process().unwrap()));
        let memory = SharedMemory::start(config, handler).unwrap();
        for image in images {
            memory.add_file(image.key(), image.spec()).unwrap();
        }
        Self { memory, _dir: dir }
    }

    /// A mapping as a VMM would make it.
    pub fn map(&self, image: &TestImage) -> FileMapping {
        let file = File::open(self.memory.path(&image.key())).unwrap();
        FileMapping::new(file, image.spec().device_bytes).unwrap()
    }
}

/// Unmounts what a process that was killed had mounted: as all see it, and as it can be opened
/// for writing.
pub fn unmount_both(mountpoint: &Path) {
    let second = mountpoint.with_file_name(".writable");
    let second = second.join(mountpoint.file_name().unwrap());
    let mut command = std::process::Command::new("umount");
    // One that is not mounted any more is what was wanted.
    let _ = command.arg("-l").arg(second).arg(mountpoint).status();
}

/// Waits for something that has to happen; how soon is not asserted.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !holds() {
        let waited = begun.elapsed();
        assert!(
            waited.as_secs() < 240,
            "in {waited:?} it did not come true that {what}"
        );
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// A process of its own that maps a file, touches pages, and stays until dropped:
/// `examples/replay.rs` with `--hold`.
pub struct Mapper {
    process: std::process::Child,
    plan: Option<std::process::ChildStdin>,
}

impl Mapper {
    /// Has mapped and touched when this returns.
    pub fn touching(path: &Path, bytes: u64, offsets: &[u64]) -> Self {
        let mut mapper = Self::prepared(path, bytes, offsets);
        mapper.go();
        mapper
    }

    /// Waits for [`Mapper::go`].
    pub fn prepared(path: &Path, bytes: u64, offsets: &[u64]) -> Self {
        use std::io::Write as _;
        use std::process::{Command, Stdio};
        let mut process = Command::new(example("replay"))
            .arg("--hold")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut plan = process.stdin.take().unwrap();
        writeln!(plan, "file {bytes} {}", path.display()).unwrap();
        for offset in offsets {
            writeln!(plan, "touch 0 {}", offset / PAGE).unwrap();
        }
        Self {
            process,
            plan: Some(plan),
        }
    }

    /// Lets it touch, and waits until it has.
    pub fn go(&mut self) {
        use std::io::{BufRead as _, BufReader};
        self.plan = None;
        let mut line = String::new();
        let mut stdout = BufReader::new(self.process.stdout.take().unwrap());
        stdout.read_line(&mut line).unwrap();
        assert!(line.contains("touches"), "{line}");
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An example of this crate, which a plain `cargo test` builds along with the tests.
pub fn example(name: &str) -> std::path::PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests
        .ancestors()
        .nth(2)
        .unwrap()
        .join("examples")
        .join(name);
    assert!(
        path.exists(),
        "{path:?} is missing: `cargo build --examples -p forelay-memory`"
    );
    path
}
