//! The daemon dies, the mount does not: holder, pinner, daemon and mappers as real
//! processes (`examples/held_mount.rs`).

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use forelay_memory::{Config, Session, SharedMemory};

use crate::support::{Images, PAGE, TestImage, eventually, example, skipped};

const IMAGES: &str = "3";
const IMAGE_MIB: &str = "12";
/// The first of the images that the example serves.
pub const FIRST_IMAGE: TestImage = TestImage {
    seed: 0,
    bytes: 12 << 20,
};

pub struct Holder {
    pub process: Child,
    daemons: Receiver<u32>,
    dir: tempfile::TempDir,
}

impl Holder {
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Command::new(example("held_mount"))
            .arg("holder")
            .arg(dir.path().join("mount"))
            .args([IMAGES, IMAGE_MIB])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, daemons) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(pid) = line.strip_prefix("serving ") {
                    // The test may be over.
                    let _ = sender.send(pid.parse().unwrap());
                }
            }
        });
        Self {
            process,
            daemons,
            dir,
        }
    }

    /// The pid of the next daemon that is ready.
    pub fn next_daemon(&self) -> u32 {
        self.daemons.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.dir.path().join("mount")
    }

    fn mapper(&self, seconds: u64, seed: u64) -> Child {
        Command::new(example("held_mount"))
            .arg("map")
            .arg(self.mountpoint())
            .args([IMAGES, IMAGE_MIB, &seconds.to_string(), &seed.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(self.mountpoint().to_str().unwrap())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        signal(self.process.id(), "TERM");
        let _ = self.process.wait();
        if self.is_mounted() {
            let _ = Command::new("umount")
                .arg("-l")
                .arg(self.mountpoint())
                .status();
        }
    }
}

pub fn signal(pid: u32, name: &str) {
    // The process may have ended.
    let _ = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .status();
}

fn locked_kib(mountpoint: &Path) -> u64 {
    let Ok(found) = std::fs::read_dir("/proc") else {
        return 0;
    };
    let smaps = found.filter_map(|entry| {
        let dir = entry.ok()?.path();
        let command = std::fs::read(dir.join("cmdline")).ok()?;
        let is_pinner = command.split(|&byte| byte == 0).nth(1) == Some(b"pinner");
        let of_this_mount = String::from_utf8_lossy(&command).contains(mountpoint.to_str()?);
        (is_pinner && of_this_mount).then(|| std::fs::read_to_string(dir.join("status")).ok())?
    });
    smaps
        .filter_map(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("VmLck:"))?
                .to_owned();
            line.split_ascii_whitespace().next()?.parse::<u64>().ok()
        })
        .sum()
}

#[test]
fn privileged_killed_daemons_are_followed_without_a_wrong_byte() {
    if skipped("privileged_killed_daemons_are_followed_without_a_wrong_byte") {
        return;
    }
    let holder = Holder::start();
    let mut daemon = holder.next_daemon();
    let mut mappers: Vec<Child> = (0..3).map(|seed| holder.mapper(7, seed)).collect();
    for _ in 0..6 {
        std::thread::sleep(Duration::from_millis(700));
        signal(daemon, "KILL");
        daemon = holder.next_daemon();
    }
    for mapper in &mut mappers {
        let status = mapper.wait().unwrap();
        assert!(status.success(), "wrong bytes, or SIGBUS: {status}");
    }
    assert!(holder.is_mounted());
}

#[test]
fn privileged_pins_outlive_the_daemon_and_orderly_ends_unmount() {
    if skipped("privileged_pins_outlive_the_daemon_and_orderly_ends_unmount") {
        return;
    }
    let mut holder = Holder::start();
    let daemon = holder.next_daemon();
    let mountpoint = holder.mountpoint();
    eventually("the daemon pins something", || locked_kib(&mountpoint) > 0);
    // Stopped, so that it lets go of nothing between the look and the kill.
    signal(daemon, "STOP");
    std::thread::sleep(Duration::from_millis(50));
    let before = locked_kib(&mountpoint);
    signal(daemon, "KILL");
    // The next daemon pins and evicts at random, too: look before it can.
    let after = locked_kib(&mountpoint);
    assert!(
        after > 0 && before > 0,
        "{before} KiB before, {after} KiB after"
    );
    holder.next_daemon();

    signal(holder.process.id(), "TERM");
    let status = holder.process.wait().unwrap();
    assert!(status.success(), "{status}");
    assert!(!holder.is_mounted());
    eventually("the pinner ends", || locked_kib(&mountpoint) == 0);
}

#[test]
fn privileged_a_second_holder_on_the_same_mountpoint_is_refused() {
    if skipped("privileged_a_second_holder_on_the_same_mountpoint_is_refused") {
        return;
    }
    let holder = Holder::start();
    holder.next_daemon();
    let second = Command::new(example("held_mount"))
        .arg("holder")
        .arg(holder.mountpoint())
        .args([IMAGES, IMAGE_MIB])
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("served already"), "{said}");
    assert!(
        holder.mapper(1, 9).wait().unwrap().success(),
        "the first is unharmed"
    );
}

#[test]
fn privileged_a_mount_whose_holder_was_killed_is_cleared_and_used_again() {
    if skipped("privileged_a_mount_whose_holder_was_killed_is_cleared_and_used_again") {
        return;
    }
    let mut holder = Holder::start();
    let daemon = holder.next_daemon();
    signal(holder.process.id(), "KILL");
    holder.process.wait().unwrap();
    signal(daemon, "KILL");
    let dead = || {
        let error = std::fs::read_dir(holder.mountpoint()).err();
        error.and_then(|error| error.raw_os_error()) == Some(libc::ENOTCONN)
    };
    eventually("the mount is dead", dead);
    let image = TestImage::new(1, PAGE);
    let config = Config::new(holder.mountpoint(), Session::New);
    let memory = SharedMemory::start(config, Images::new(&[image])).unwrap();
    memory.add_file(image.key(), image.spec()).unwrap();
    let bytes = std::fs::read(memory.path(&image.key())).unwrap();
    assert_eq!(bytes[..PAGE as usize], image.content(0, PAGE as usize));
    drop(memory);
    assert!(!holder.is_mounted());
}
