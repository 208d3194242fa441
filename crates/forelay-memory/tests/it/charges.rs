//! Who pays for pages, and what reclaim may take: with real memory cgroups (v1 here; v2
//! hosts say that they skip).

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use forelay_image::extent::Extent;
use forelay_memory::mapping::FileMapping;
use forelay_memory::{Config, Session, SharedMemory, pinner};

use crate::support::{Images, MIB, Mapper, PAGE, TestImage, example, skipped, unmount_both};

/// How far a cgroup's usage may be off: the kernel charges each CPU 64 pages ahead
/// (`MEMCG_CHARGE_BATCH`), so that up to that many are charged before they are touched.
const CHARGED_AHEAD: u64 = 2 * MIB;

/// A memory cgroup of its own, removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(test: &str) -> Option<Self> {
        let root = PathBuf::from("/sys/fs/cgroup/memory");
        let dir = root.join(format!("forelay-{}-{test}", std::process::id()));
        if !root.join("memory.force_empty").exists() || fs::create_dir(&dir).is_err() {
            eprintln!("SKIPPED {test}: no memory cgroup (v1) that can be made here");
            return None;
        }
        Some(Self(dir))
    }

    fn usage_bytes(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("memory.usage_in_bytes")).unwrap();
        text.trim().parse().unwrap()
    }

    fn add_process(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    /// Reclaims whatever may be reclaimed.
    fn reclaim(&self) {
        // It says EBUSY when something stays, which is the point.
        let _ = fs::write(self.0.join("memory.force_empty"), "0");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.reclaim();
        let _ = fs::remove_dir(&self.0);
    }
}

/// A daemon in a process of its own, so that a cgroup can hold it: `held_mount solo`.
struct Daemon {
    process: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start(cgroup: &Cgroup, image_mib: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Command::new(example("held_mount"))
            .arg("solo")
            .arg(dir.path().join("mount"))
            .args(["1", &image_mib.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut daemon = Self {
            stdin: process.stdin.take().unwrap(),
            stdout: BufReader::new(process.stdout.take().unwrap()),
            process,
            dir,
        };
        assert_eq!(daemon.line(), "ready");
        cgroup.add_process(daemon.process.id());
        daemon
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn tell(&mut self, command: &str) -> String {
        writeln!(self.stdin, "{command}").unwrap();
        self.line()
    }

    fn push(&mut self, extent: Extent) {
        let told = self.tell(&format!("push {} {}", extent.offset, extent.len));
        assert_eq!(told, "pushed");
    }

    fn resident(&mut self) -> Vec<Extent> {
        let told = self.tell("resident");
        let numbers: Vec<u64> = told
            .split_whitespace()
            .map(|word| word.parse().unwrap())
            .collect();
        numbers
            .chunks(2)
            .map(|pair| Extent::new(pair[0], pair[1]))
            .collect()
    }

    fn path(&self, image: &TestImage) -> PathBuf {
        self.dir
            .path()
            .join("mount")
            .join(format!("{}.img", image.key().hex()))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        unmount_both(&self.dir.path().join("mount"));
    }
}

#[test]
fn privileged_who_pushes_pays_and_who_touches_pushed_pages_does_not() {
    let test = "privileged_who_pushes_pays_and_who_touches_pushed_pages_does_not";
    if skipped(test) {
        return;
    }
    let (Some(pusher), Some(toucher)) = (Cgroup::new("pusher"), Cgroup::new("toucher")) else {
        return;
    };
    let image = TestImage::new(0, 32 * MIB);
    let mut daemon = Daemon::start(&pusher, 32);
    let pushed = Extent::new(0, 16 * MIB);
    let before = pusher.usage_bytes();
    daemon.push(pushed);
    // The kernel takes none of it away meanwhile.
    let pin = format!("pin {} {}", pushed.offset, pushed.len);
    assert_eq!(daemon.tell(&pin), format!("pinned {}", pushed.len));
    let paid = pusher.usage_bytes().saturating_sub(before);
    assert!(
        paid + CHARGED_AHEAD >= pushed.len,
        "the pusher pays: {paid} bytes charged for 16 MiB"
    );

    let path = daemon.path(&image);
    let touch = |extent: Extent| {
        let offsets: Vec<u64> = (extent.offset..extent.end())
            .step_by(PAGE as usize)
            .collect();
        let mut mapper = Mapper::prepared(&path, image.spec().device_bytes, &offsets);
        toucher.add_process(mapper.pid());
        let before = toucher.usage_bytes();
        mapper.go();
        toucher.usage_bytes().saturating_sub(before)
    };
    let hot = touch(pushed);
    let cold = touch(Extent::new(16 * MIB, 16 * MIB));
    assert!(
        hot < 4 * MIB,
        "{hot} bytes charged for touching 16 MiB of pushed pages"
    );
    assert!(
        cold + CHARGED_AHEAD >= 16 * MIB,
        "{cold} bytes charged for 16 MiB that were not pushed"
    );
}

#[test]
fn privileged_reclaim_takes_what_is_not_pinned_and_nothing_else() {
    let test = "privileged_reclaim_takes_what_is_not_pinned_and_nothing_else";
    if skipped(test) {
        return;
    }
    let Some(cgroup) = Cgroup::new("reclaim") else {
        return;
    };
    let image = TestImage::new(0, 8 * MIB);
    let mut daemon = Daemon::start(&cgroup, 8);
    daemon.push(Extent::new(0, 8 * MIB));
    let pins = [Extent::new(0, MIB), Extent::new(3 * MIB, 10 * PAGE)];
    for pin in pins {
        let told = daemon.tell(&format!("pin {} {}", pin.offset, pin.len));
        assert_eq!(told, format!("pinned {}", pin.len));
    }
    for _ in 0..5 {
        cgroup.reclaim();
    }
    let left = daemon.resident();
    for pin in pins {
        let kept = left
            .iter()
            .any(|extent| extent.intersection(&pin) == Some(pin));
        assert!(kept, "{pin:?} is pinned, yet only {left:?} is left");
    }
    let left_bytes: u64 = left.iter().map(|extent| extent.len).sum();
    assert!(
        left_bytes < 4 * MIB,
        "reclaim took little: {left_bytes} bytes are left"
    );
    let file = fs::File::open(daemon.path(&image)).unwrap();
    let mapping = FileMapping::new(file, image.spec().device_bytes).unwrap();
    for offset in (0..8 * MIB).step_by(PAGE as usize) {
        assert!(image.page_is_right(&mapping, offset), "refaulted: {offset}");
    }
}

#[test]
fn privileged_pins_return_when_the_pinner_is_lost() {
    if skipped("privileged_pins_return_when_the_pinner_is_lost") {
        return;
    }
    let image = TestImage::new(7, 4 * MIB);
    let dir = tempfile::tempdir().unwrap();
    let pinner = Arc::new(pinner::PinnerClient::in_process().unwrap());
    let mut config = Config::new(dir.path().join("mount"), Session::New);
    config.pinner = Some(Arc::clone(&pinner));
    let memory = SharedMemory::start(config, Images::new(&[image])).unwrap();
    let key = image.key();
    memory.add_file(key, image.spec()).unwrap();
    memory.push(&key, 0, &image.content(0, 1 << 20)).unwrap();
    let here = Extent::new(0, 1 << 20);
    assert_eq!(memory.pin(&key, &[here]).unwrap(), here.len);
    let held = |of: &pinner::PinnerClient| -> u64 {
        let rows = of.table().unwrap();
        rows.iter()
            .flat_map(|row| &row.extents)
            .map(|one| one.len)
            .sum()
    };
    assert_eq!(held(&pinner), here.len);

    // Another pinner, which knows nothing.
    assert!(!pinner.is_gone());
    pinner.renew(pinner::PinnerClient::in_process().unwrap());
    assert_eq!(held(&pinner), 0);
    assert_eq!(memory.pin_again().unwrap(), here.len);
    assert_eq!(held(&pinner), here.len);
    assert_eq!(
        memory.evict(&key, &[here]).unwrap(),
        here.len,
        "and can be let go"
    );
    assert_eq!(held(&pinner), 0);
}
