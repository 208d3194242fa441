//! The daemon dies, the mount does not: holder, pinner, daemon and mappers as real
//! processes (`examples/held_mount.rs`).

use std::cell::Cell;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use forelay_memory::{Config, Session, SharedMemory};

use crate::support::{Images, PAGE, TestImage, eventually, example, skipped, unmount_both};

const IMAGES: &str = "3";
const IMAGE_MIB: &str = "12";
/// The first of the images that the example serves.
pub const FIRST_IMAGE: TestImage = TestImage {
    seed: 0,
    bytes: 12 << 20,
};

pub struct Holder {
    pub process: Child,
    lines: Receiver<String>,
    dir: tempfile::TempDir,
    /// By how many days its clock is ahead.
    days: Cell<u32>,
}

impl Holder {
    pub fn start() -> Self {
        Self::with_program(tempfile::tempdir().unwrap(), &example("held_mount"))
    }

    /// Of a program that a test may move away.
    fn movable() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        std::fs::copy(example("held_mount"), &program).unwrap();
        Self::with_program(dir, &program)
    }

    fn with_program(dir: tempfile::TempDir, program: &Path) -> Self {
        let mut process = Command::new(program)
            .arg("holder")
            .arg(dir.path().join("mount"))
            .args([IMAGES, IMAGE_MIB])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines(process.stdout.take().unwrap());
        Self {
            process,
            lines,
            dir,
            days: Cell::new(0),
        }
    }

    /// Lets a day pass by its clock, longer than it waits for anything.
    fn let_a_day_pass(&self) {
        self.days.set(self.days.get() + 1);
        let new = self.dir.path().join("days.new");
        std::fs::write(&new, self.days.get().to_string()).unwrap();
        std::fs::rename(new, self.dir.path().join("mount.days")).unwrap();
    }

    /// Has it look at what is due, by asking for a restart, which is refused from now on; goes
    /// on `then`, and returns once it has looked.
    fn look(&self, then: impl FnOnce()) {
        eventually("no check runs", || self.children("check").is_empty());
        let checked = self.mountpoint().with_extension("checked");
        // It may be the first look.
        let _ = std::fs::remove_file(&checked);
        self.set("refuse", true);
        signal(self.process.id(), "HUP");
        then();
        eventually("the holder looks", || checked.exists());
    }

    /// Has it end a daemon that says nothing. The first time it sees that, it may be the host
    /// that stood still.
    fn lose_patience(&self) {
        self.let_a_day_pass();
        self.look(|| ());
        self.let_a_day_pass();
        signal(self.process.id(), "HUP");
    }

    /// Stops a daemon, and returns once the holder has heard all that it said.
    fn silence(&self, daemon: u32) {
        signal(daemon, "STOP");
        eventually("the daemon stands still", || is_in_state(daemon, 'T'));
        eventually("the holder waits", || is_in_state(self.process.id(), 'S'));
    }

    fn program(&self) -> PathBuf {
        self.dir.path().join("program")
    }

    /// Makes something go wrong, or right again: see the example's head.
    fn set(&self, what: &str, on: bool) {
        let file = self.dir.path().join(format!("mount.{what}"));
        match on {
            true => std::fs::write(file, "").unwrap(),
            false => std::fs::remove_file(file).unwrap(),
        }
    }

    /// The pid of the next daemon that is ready.
    pub fn next_daemon(&self) -> u32 {
        let line = self.lines.recv_timeout(PATIENCE).unwrap();
        line.strip_prefix("serving ").unwrap().parse().unwrap()
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.dir.path().join("mount")
    }

    fn mapper(&self, seed: u64) -> Mapper {
        let mut process = Command::new(example("held_mount"))
            .arg("map")
            .arg(self.mountpoint())
            .args([IMAGES, IMAGE_MIB, &seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines(process.stdout.take().unwrap());
        Mapper { process, lines }
    }

    fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(self.mountpoint().to_str().unwrap())
    }

    /// Its children with this role.
    fn children(&self, role: &str) -> Vec<u32> {
        let pid = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        let pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
        pids.filter(|pid| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split(|&byte| byte == 0).nth(1) == Some(role.as_bytes())
        })
        .collect()
    }
}

/// A process that maps all images, as a VMM would, and checks what it reads.
struct Mapper {
    process: Child,
    lines: Receiver<String>,
}

impl Mapper {
    /// Waits until it has read a good many pages from now on.
    fn progress(&self) {
        while self.lines.try_recv().is_ok() {}
        for _ in 0..3 {
            self.lines.recv_timeout(PATIENCE).unwrap();
        }
    }

    /// Ends it; it has read no wrong byte.
    fn finish(mut self) {
        drop(self.process.stdin.take());
        let status = self.process.wait().unwrap();
        assert!(status.success(), "wrong bytes, or SIGBUS: {status}");
    }
}

const PATIENCE: Duration = Duration::from_secs(240);

fn lines(output: std::process::ChildStdout) -> Receiver<String> {
    let output = BufReader::new(output);
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            // The test may be over.
            let _ = sender.send(line);
        }
    });
    lines
}

impl Drop for Holder {
    fn drop(&mut self) {
        signal(self.process.id(), "TERM");
        let _ = self.process.wait();
        if self.is_mounted() {
            unmount_both(&self.mountpoint());
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

/// True if the process is in this state: `T` once it is stopped, `S` while it waits.
fn is_in_state(pid: u32, state: char) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with(state))
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
    let mappers: Vec<Mapper> = (0..3).map(|seed| holder.mapper(seed)).collect();
    for _ in 0..6 {
        mappers.iter().for_each(Mapper::progress);
        signal(daemon, "KILL");
        daemon = holder.next_daemon();
    }
    mappers.into_iter().for_each(Mapper::finish);
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
    eventually("the daemon stands still", || is_in_state(daemon, 'T'));
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
    let mapper = holder.mapper(9);
    mapper.progress();
    mapper.finish();
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

#[test]
fn privileged_a_program_that_is_away_for_a_moment_ends_no_mount() {
    if skipped("privileged_a_program_that_is_away_for_a_moment_ends_no_mount") {
        return;
    }
    let holder = Holder::movable();
    let daemon = holder.next_daemon();
    let mapper = holder.mapper(1);
    mapper.progress();
    let away = holder.dir.path().join("away");
    std::fs::rename(holder.program(), &away).unwrap();
    signal(daemon, "KILL");
    // It runs from the file that was there, which needs no path.
    holder.next_daemon();
    mapper.progress();
    for pinner in holder.children("pinner") {
        signal(pinner, "KILL");
    }
    // This daemon cannot do without; the next one has the next pinner.
    holder.next_daemon();
    assert!(!holder.children("pinner").is_empty());

    // An upgrade: another file at the path, whole from its first moment there, is what is
    // started from then on. What was started before that may still be on its way up.
    let upgrade = holder.dir.path().join("upgrade");
    std::fs::copy(&away, &upgrade).unwrap();
    std::fs::rename(&upgrade, holder.program()).unwrap();
    let program = |pid: u32| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    eventually("the new file runs", || {
        let daemons = holder.children("daemon");
        let outdated = daemons
            .iter()
            .filter(|pid| program(**pid).as_deref() == Some(&away));
        outdated.for_each(|pid| signal(*pid, "KILL"));
        let mut started = daemons.into_iter().filter_map(program);
        started.any(|path| path == holder.program())
    });
    mapper.progress();
    mapper.finish();
    assert!(holder.is_mounted());
}

#[test]
fn privileged_a_holder_without_descriptors_tries_again_until_it_has_some() {
    if skipped("privileged_a_holder_without_descriptors_tries_again_until_it_has_some") {
        return;
    }
    let holder = Holder::movable();
    let daemon = holder.next_daemon();
    let mapper = holder.mapper(1);
    mapper.progress();
    let limit = |descriptors: &str| {
        let status = Command::new("prlimit")
            .args(["--pid", &holder.process.id().to_string()])
            .arg(format!("--nofile={descriptors}"))
            .status();
        assert!(status.unwrap().success());
    };
    // Enough to wait for what it has, too few for a new process.
    limit("7:4096");
    for process in [daemon].into_iter().chain(holder.children("pinner")) {
        signal(process, "KILL");
    }
    eventually("neither runs", || {
        holder.children("daemon").is_empty() && holder.children("pinner").is_empty()
    });
    assert!(holder.is_mounted());
    limit("1024:4096");
    holder.next_daemon();
    mapper.progress();
    mapper.finish();
}

#[test]
fn privileged_a_daemon_that_hangs_is_replaced() {
    if skipped("privileged_a_daemon_that_hangs_is_replaced") {
        return;
    }
    let holder = Holder::movable();
    let daemon = holder.next_daemon();
    let mapper = holder.mapper(1);
    mapper.progress();
    // After it was ready: it gives no sign of life, nor when it was given time once more.
    holder.silence(daemon);
    holder.lose_patience();
    let next = holder.next_daemon();
    assert_ne!(next, daemon);
    mapper.progress();
    // In its start, waiting for itself.
    holder.set("hang", true);
    signal(next, "KILL");
    let line = holder.lines.recv_timeout(PATIENCE).unwrap();
    let hung: u32 = line.strip_prefix("hanging ").unwrap().parse().unwrap();
    holder.set("hang", false);
    holder.lose_patience();
    assert_ne!(holder.next_daemon(), hung);
    mapper.progress();
    mapper.finish();
}

#[test]
fn privileged_a_stop_that_no_daemon_carries_out_ends_all_the_same() {
    if skipped("privileged_a_stop_that_no_daemon_carries_out_ends_all_the_same") {
        return;
    }
    let mut holder = Holder::movable();
    let daemon = holder.next_daemon();
    holder.set("hang", true);
    signal(daemon, "KILL");
    let pid = holder.process.id();
    signal(pid, "TERM");
    let mut status = None;
    eventually("it ends", || {
        // Which has it look.
        holder.let_a_day_pass();
        signal(pid, "HUP");
        status = holder.process.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().code(), Some(1));
    let said: Vec<String> = holder.lines.iter().collect();
    assert_eq!(said.last().unwrap(), "last resort");
    assert!(!holder.is_mounted());
    assert!(holder.children("daemon").is_empty());
}

#[test]
fn privileged_a_restart_that_could_not_serve_is_refused() {
    if skipped("privileged_a_restart_that_could_not_serve_is_refused") {
        return;
    }
    let holder = Holder::movable();
    let daemon = holder.next_daemon();
    holder.set("refuse", true);
    signal(holder.process.id(), "HUP");
    let checked = holder.mountpoint().with_extension("checked");
    eventually("it is refused", || checked.exists());
    holder.set("refuse", false);
    signal(holder.process.id(), "HUP");
    assert_ne!(holder.next_daemon(), daemon);
    assert!(holder.lines.try_recv().is_err(), "replaced once");
}

#[test]
fn privileged_a_new_program_that_dies_soon_after_it_was_ready_is_given_up() {
    if skipped("privileged_a_new_program_that_dies_soon_after_it_was_ready_is_given_up") {
        return;
    }
    let holder = Holder::movable();
    let daemon = holder.next_daemon();
    let mapper = holder.mapper(1);
    mapper.progress();
    // An upgrade that serves for a moment longer than it takes to start.
    let upgrade = holder.dir.path().join("upgrade");
    let program = example("held_mount");
    let text = format!(
        "#!/bin/sh\nHELD_MOUNT_CRASH_MS=700 exec {} \"$@\"\n",
        program.display()
    );
    std::fs::write(&upgrade, text).unwrap();
    std::fs::set_permissions(&upgrade, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&upgrade, holder.program()).unwrap();
    signal(holder.process.id(), "HUP");
    let said: Vec<String> = std::iter::repeat_with(|| holder.lines.recv_timeout(PATIENCE).unwrap())
        .take(5)
        .collect();
    let words: Vec<&str> = said
        .iter()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(
        words,
        ["serving", "crashing", "serving", "crashing", "serving"]
    );
    // The program of before, whose path leads elsewhere by now.
    let last: u32 = said[4].strip_prefix("serving ").unwrap().parse().unwrap();
    assert_ne!(last, daemon);
    let runs = std::fs::read_link(format!("/proc/{last}/exe")).unwrap();
    assert!(runs.to_string_lossy().ends_with(" (deleted)"), "{runs:?}");
    mapper.progress();
    mapper.finish();
}

#[test]
fn privileged_a_host_that_stood_still_costs_no_daemon_its_life() {
    if skipped("privileged_a_host_that_stood_still_costs_no_daemon_its_life") {
        return;
    }
    let holder = Holder::movable();
    let daemon = holder.next_daemon();
    let mapper = holder.mapper(1);
    mapper.progress();
    let pid = holder.process.id();
    for process in [daemon, pid] {
        signal(process, "STOP");
        eventually("it stands still", || is_in_state(process, 'T'));
    }
    // Time passes, and nobody sees it pass. The holder sees that the daemon is overdue before
    // that can say a word.
    holder.let_a_day_pass();
    holder.look(|| signal(pid, "CONT"));
    signal(daemon, "CONT");
    mapper.progress();
    assert_eq!(holder.children("daemon"), [daemon]);
    mapper.finish();
}

#[test]
fn privileged_a_stop_during_a_restart_is_carried_out_by_the_next_daemon() {
    if skipped("privileged_a_stop_during_a_restart_is_carried_out_by_the_next_daemon") {
        return;
    }
    let mut holder = Holder::movable();
    let first = holder.next_daemon();
    holder.set("linger", true);
    signal(holder.process.id(), "HUP");
    let lingering = holder.lines.recv_timeout(PATIENCE).unwrap();
    assert_eq!(lingering, format!("lingering {first}"));
    signal(holder.process.id(), "TERM");
    holder.set("linger", false);
    let status = holder.process.wait().unwrap();
    assert!(status.success(), "{status}");
    // The one that made room has stopped nothing.
    let said: Vec<String> = holder.lines.iter().collect();
    let [serving, stopped] = &said[..] else {
        panic!("{said:?}");
    };
    let next = serving.strip_prefix("serving ").unwrap();
    assert_eq!(stopped, &format!("stopped {next}"));
    assert_ne!(next, first.to_string());
    assert!(!holder.is_mounted());
}
