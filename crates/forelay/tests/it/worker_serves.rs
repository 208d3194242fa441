//! A worker serves running VMs whatever else is missing, wrong or gone, and says what it does
//! without.

use serde_json::Value;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::fixture::{FORELAY, Host, RepositoryOf, Settings, bench, idle, lives, signal};
use crate::full_disk::{Disk, mount};

/// A file of the base that nothing uses by itself, its first chunk several windows long.
const FILE: &str = "/usr/bin/perl";

/// A host with a VM that reads pages of [`FILE`] at the test's bidding.
struct ReadingVm {
    host: Host,
    pid: u64,
    pages_read: u64,
    digests: Vec<String>,
}

impl ReadingVm {
    fn new(host: Host) -> Self {
        let manifest = Self::manifest(&host);
        let vm = host.launch(&manifest, "reader", &["--prefetch", "none"]);
        let mut reader = Self {
            host,
            pid: vm["pid"].as_u64().unwrap(),
            pages_read: 0,
            digests: Vec::new(),
        };
        // From now on the disk cache has the whole chunk; its first window is resident.
        reader.read_fresh_page();
        reader
    }

    fn manifest(host: &Host) -> PathBuf {
        host.write("reader.toml", &idle("reader", "[]", ""))
    }

    /// A reader whose memory comes from a snapshot.
    fn clone_in(host: Host) -> Self {
        let manifest = Self::manifest(&host);
        host.ok([
            "snapshot",
            "create",
            "--at",
            "kernel",
            manifest.to_str().unwrap(),
        ]);
        let reader = Self::new(host);
        assert_eq!(reader.host.vm("reader")["launch"]["resumed"], "kernel");
        reader
    }

    /// Reads a page of which nothing was read before: a demand fault.
    fn read_fresh_page(&mut self) {
        let fetches = |host: &Host| {
            // Answered once the VMs are known.
            assert!(host.get("/v1/memory").is_some(), "{}", host.log());
            let vm = vms(host).into_iter().find(|vm| vm["name"] == "reader");
            vm.unwrap()["waits"]["demand_fetches"].as_u64().unwrap()
        };
        let before = fetches(&self.host);
        let skip = self.pages_read * 48;
        self.pages_read += 1;
        let script = format!("dd if={FILE} bs=4096 skip={skip} count=1 2>/dev/null | md5sum");
        let digest = self.with_good_config(&["exec", "reader", "--", "sh", "-c", &script]);
        assert!(
            digest.len() > 32 && !self.digests.contains(&digest),
            "{digest}"
        );
        self.digests.push(digest);
        assert!(fetches(&self.host) > before, "it was a demand fault");
    }

    /// Runs a command with the configuration that the daemon was started with.
    fn with_good_config(&self, words: &[&str]) -> String {
        let config = self.host.dir().join("good.toml");
        let config = if config.exists() {
            config
        } else {
            self.host.dir().join("forelay.toml")
        };
        let output = std::process::Command::new(FORELAY)
            .arg("--config")
            .arg(config)
            .args(words)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}\n{}",
            String::from_utf8_lossy(&output.stderr),
            self.host.log()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn kill_worker(&self) {
        let worker = self.host.worker().unwrap();
        signal("KILL", worker);
        next_worker(&self.host, worker);
    }

    /// The VM is as it was.
    fn check_vm(&self) {
        assert!(lives(self.pid));
        let vm = vms(&self.host)
            .into_iter()
            .find(|vm| vm["name"] == "reader");
        assert_eq!(vm.unwrap()["pid"], self.pid);
    }
}

/// Waits until another worker than `worker` answers.
fn next_worker(host: &Host, worker: u32) {
    host.until("another worker answers", |host| {
        let answers = host.get("/v1/health").is_some();
        host.worker().is_some_and(|next| next != worker) && answers
    });
}

fn health(host: &Host) -> Value {
    host.get("/v1/health").unwrap_or_default()
}

fn vms(host: &Host) -> Vec<Value> {
    let vms = host.get("/v1/vms").unwrap_or_default();
    vms.as_array().cloned().unwrap_or_default()
}

/// What is wrong with a part that the daemon does without.
fn lacks(host: &Host, part: &str) -> Option<String> {
    let health = health(host);
    let parts = health["degraded"].as_array()?;
    let found = parts.iter().find(|one| one["what"] == part)?;
    Some(found["problem"].as_str()?.to_owned())
}

#[track_caller]
fn until_lacks(host: &Host, part: &str, lacking: bool) {
    host.until(&format!("{part} is missing: {lacking}"), |host| {
        host.get("/v1/health").is_some() && lacks(host, part).is_some() == lacking
    });
}

#[test]
fn privileged_faults_are_answered_whatever_else_is_missing() {
    let test = "privileged_faults_are_answered_whatever_else_is_missing";
    let Some(bench) = bench(test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path().join("disk"), "600m");
    let settings = Settings {
        repository: RepositoryOf::Test,
        state: Some(disk.0.join("state")),
        ..Settings::default()
    };
    let mut reader = ReadingVm::clone_in(Host::started(&bench, &settings));

    invalid_configuration(&mut reader);
    damaged_history(&mut reader, &disk.0.join("state/history.db"));
    full_disk(&mut reader, &disk);
    read_only_disk(&mut reader, &disk);
    missing_repository(&mut reader);
    reader.check_vm();
    assert_eq!(health(&reader.host)["degraded"], serde_json::json!([]));
    let log = reader.host.log();
    assert!(!log.contains("snapshot cannot be opened"), "{log}");
    assert_eq!(reader.host.terminate(), Some(0));
    assert!(
        reader
            .host
            .mounts()
            .iter()
            .all(|mount| !mount.contains("memory"))
    );
}

fn invalid_configuration(reader: &mut ReadingVm) {
    let path = reader.host.dir().join("forelay.toml");
    let good = std::fs::read_to_string(&path).unwrap();
    reader.host.write("good.toml", &good);
    std::fs::write(&path, good.replace("budget_bytes", "buget_bytes")).unwrap();
    let worker = reader.host.worker();
    signal("HUP", reader.host.holder());
    reader.host.until("the restart is refused", |host| {
        host.log().contains("not restarted")
    });
    assert_eq!(reader.host.worker(), worker, "it goes on as it is");
    assert!(
        reader.host.log().contains("buget_bytes"),
        "and the log says why"
    );
    reader.kill_worker();
    reader.read_fresh_page();
    let told = lacks(&reader.host, "configuration").unwrap();
    assert!(told.contains("buget_bytes"), "{told}");
    let doctor = reader.with_good_config(&["doctor", "--json"]);
    assert!(doctor.contains("configuration: "), "{doctor}");
    std::fs::write(&path, good).unwrap();
    until_lacks(&reader.host, "configuration", false);
}

fn damaged_history(reader: &mut ReadingVm, path: &Path) {
    let worker = reader.host.worker().unwrap();
    signal("STOP", worker);
    let files = ["", "-wal", "-shm"].map(|end| PathBuf::from(format!("{}{end}", path.display())));
    for file in files {
        let _ = std::fs::remove_file(file);
    }
    std::fs::write(path, "this is no database, whatever its name says").unwrap();
    signal("KILL", worker);
    next_worker(&reader.host, worker);
    reader.read_fresh_page();
    until_lacks(&reader.host, "history", true);
    let ran = reader.host.run(["ps"]);
    assert!(ran.stderr.contains("degraded: history"), "{}", ran.stderr);
    let told = reader.host.refused(["history"]);
    assert!(told.contains("forelay doctor"), "{told}");
    std::fs::remove_file(path).unwrap();
    until_lacks(&reader.host, "history", false);
}

fn full_disk(reader: &mut ReadingVm, disk: &Disk) {
    let worker = reader.host.worker().unwrap();
    signal("STOP", worker);
    let filler = disk.0.join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    // The history is to be made again, for which there is no room; what the worker has open of
    // the old one must not be given back with its end.
    for end in ["", "-wal", "-shm"] {
        let path = disk.0.join(format!("state/history.db{end}"));
        if std::fs::write(&path, "").is_ok() {
            std::fs::remove_file(&path).unwrap();
        }
    }
    while file.write_all(&[1; 1 << 16]).is_ok() {}
    while file.write_all(&[1]).is_ok() {}
    // An open file would keep its room when it is removed.
    drop(file);
    signal("KILL", worker);
    next_worker(&reader.host, worker);
    reader.read_fresh_page();
    until_lacks(&reader.host, "history", true);
    std::fs::remove_file(filler).unwrap();
    until_lacks(&reader.host, "history", false);
}

/// A directory that cannot be written to, as after an error of its disk.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn new(path: PathBuf) -> Self {
        let text = path.to_str().unwrap();
        mount(&["--bind", text, text]);
        let bound = Self(path.clone());
        mount(&["-o", "remount,bind,ro", text]);
        bound
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let umount = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
        assert!(umount.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

fn read_only_disk(reader: &mut ReadingVm, disk: &Disk) {
    let worker = reader.host.worker().unwrap();
    signal("STOP", worker);
    let read_only = ReadOnly::new(disk.0.join("state"));
    signal("KILL", worker);
    next_worker(&reader.host, worker);
    reader.read_fresh_page();
    until_lacks(&reader.host, "history", true);
    drop(read_only);
    until_lacks(&reader.host, "history", false);
}

fn missing_repository(reader: &mut ReadingVm) {
    let repository = reader.host.repository();
    let away = repository.with_extension("away");
    std::fs::rename(&repository, &away).unwrap();
    reader.kill_worker();
    reader.read_fresh_page();
    until_lacks(&reader.host, "repository", true);
    reader.host.refused(["component", "list"]);
    let manifest = reader.host.dir().join("reader.toml");
    let told = reader.host.refused([
        "run",
        "--detach",
        "--name",
        "other",
        manifest.to_str().unwrap(),
    ]);
    assert!(told.contains("no repository"), "{told}");
    assert!(!repository.exists(), "nothing is made in its place");
    std::fs::rename(&away, &repository).unwrap();
    until_lacks(&reader.host, "repository", false);
}

#[test]
fn privileged_a_worker_that_hangs_or_panics_is_replaced_and_a_vmm_that_hangs_is_not_killed() {
    let test =
        "privileged_a_worker_that_hangs_or_panics_is_replaced_and_a_vmm_that_hangs_is_not_killed";
    let Some(bench) = bench(test) else { return };
    let mut reader = ReadingVm::new(Host::started(&bench, &Settings::default()));
    for name in ["STOP", "USR2"] {
        let worker = reader.host.worker().unwrap();
        signal(name, worker);
        next_worker(&reader.host, worker);
        reader.read_fresh_page();
        reader.check_vm();
    }

    let vmm = u32::try_from(reader.pid).unwrap();
    signal("STOP", vmm);
    reader.kill_worker();
    let state = |host: &Host| vms(host).first().map(|vm| vm["state"].clone());
    reader
        .host
        .until("the VM is seen to be unreachable", |host| {
            state(host) == Some("unreachable".into())
        });
    // The worker was ready before it gave the VMM's monitor up.
    let log = reader.host.log();
    let (_, given_up) = log.rsplit_once(" ready socket=").unwrap();
    assert!(given_up.contains("a VM is unreachable"), "{log}");
    assert!(lives(reader.pid));
    signal("CONT", vmm);
    reader.host.until("the VM is there again", |host| {
        state(host) == Some("ready".into())
    });
    reader.read_fresh_page();
    reader.check_vm();

    // One that never answers can be stopped all the same, also if nothing says which process
    // it is.
    signal("STOP", vmm);
    let state_file = reader.host.dir().join("run/vms/reader/vm-state.json");
    std::fs::write(state_file, "{").unwrap();
    reader.kill_worker();
    reader
        .host
        .until("the VM is seen to be unreachable", |host| {
            state(host) == Some("unreachable".into())
        });
    reader.host.ok(["stop", "reader"]);
    assert!(!lives(reader.pid));
}

#[test]
fn privileged_mounts_without_any_vm_are_taken_over() {
    let test = "privileged_mounts_without_any_vm_are_taken_over";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    // No statx was ever asked of these mounts, so one would wait for the next worker.
    for owner in ["aaa", "zzz"] {
        let manifest = idle("ahead", "[]", "").replace("\"tests\"", &format!("{owner:?}"));
        let manifest = host.write("ahead.toml", &manifest);
        host.ok(["prefetch", manifest.to_str().unwrap()]);
    }
    // Each as all see it, and as it can be opened for writing.
    assert_eq!(host.mounts().len(), 4);
    for name in ["HUP", "KILL"] {
        let worker = host.worker().unwrap();
        signal(name, if name == "HUP" { host.holder() } else { worker });
        next_worker(&host, worker);
        assert_eq!(host.json(["memory"])["totals"]["demand_fetches"], 0);
    }
}

#[test]
fn privileged_a_prefetched_neighbour_keeps_no_vm_waiting() {
    let test = "privileged_a_prefetched_neighbour_keeps_no_vm_waiting";
    let Some(bench) = bench(test) else { return };
    let mut reader = ReadingVm::new(Host::started(&bench, &Settings::default()));
    let manifest = idle("ahead", "[]", "").replace("\"tests\"", "\"aaa\"");
    let manifest = reader.host.write("ahead.toml", &manifest);
    reader.host.ok(["prefetch", manifest.to_str().unwrap()]);
    let worker = reader.host.worker().unwrap();
    signal("HUP", reader.host.holder());
    next_worker(&reader.host, worker);
    reader.read_fresh_page();
    reader.kill_worker();
    reader.read_fresh_page();
    reader.check_vm();
}

/// Starts a daemon that fails before it holds anything: its program is gone when it looks.
fn refuse_to_hold(host: &Host) {
    let program = host.dir().join("gone");
    std::fs::copy(FORELAY, &program).unwrap();
    let script = "exec 9<\"$0\"; rm \"$0\"; exec /proc/self/fd/9 \"$@\"";
    let daemon = host.command(["daemon"]);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script]).arg(&program);
    let ended = command.args(daemon.get_args()).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        !ended.status.success() && said.contains("cannot start the worker"),
        "{said}"
    );
}

#[test]
fn privileged_a_daemon_takes_over_from_a_worker_whose_holder_was_killed() {
    let test = "privileged_a_daemon_takes_over_from_a_worker_whose_holder_was_killed";
    let Some(bench) = bench(test) else { return };
    let mut reader = ReadingVm::new(Host::started(&bench, &Settings::default()));
    let worker = reader.host.worker().unwrap();
    reader.host.kill_holder();
    reader
        .host
        .until("the worker knows", |host| lacks(host, "holder").is_some());
    reader.read_fresh_page();
    refuse_to_hold(&reader.host);
    reader.read_fresh_page();
    reader.host.start();
    next_worker(&reader.host, worker);
    reader
        .host
        .until("the worker of before ends", |_| !lives(u64::from(worker)));
    assert_eq!(lacks(&reader.host, "holder"), None);
    reader.read_fresh_page();
    reader.check_vm();

    // Nobody is left who could hand the mounts over.
    let worker = reader.host.worker().unwrap();
    signal("STOP", worker);
    reader.host.kill_holder();
    signal("KILL", worker);
    reader
        .host
        .until("the worker is gone", |_| !lives(u64::from(worker)));
    reader.host.start();
    reader.host.until("the VM is told", |host| {
        vms(host).first().is_some_and(|vm| vm["state"] == "failed")
    });
    let told = vms(&reader.host)[0]["error"].to_string();
    assert!(told.contains("its memory is gone"), "{told}");
    reader
        .host
        .until("its VMM is ended", |_| !lives(reader.pid));
}
