//! A full disk: told in words, nothing half-published, and work goes on once there is room.

use std::path::PathBuf;
use std::process::Command;

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::fixture::{Host, RepositoryOf, Settings, bench, idle};

/// A small file system of the test's own.
pub struct Disk(pub PathBuf);

impl Disk {
    pub fn new(path: PathBuf, size: &str) -> Self {
        std::fs::create_dir_all(&path).unwrap();
        let options = format!("size={size}");
        mount(&[
            "-t",
            "tmpfs",
            "-o",
            &options,
            "tmpfs",
            path.to_str().unwrap(),
        ]);
        Self(path)
    }

    fn grow(&self, size: &str) {
        let options = format!("remount,size={size}");
        mount(&["-o", &options, self.0.to_str().unwrap()]);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

pub fn mount(arguments: &[&str]) {
    let status = Command::new("mount").args(arguments).status().unwrap();
    assert!(status.success(), "mount {arguments:?}");
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut out);
    out
}

#[test]
fn privileged_a_full_repository_publishes_nothing() {
    let test = "privileged_a_full_repository_publishes_nothing";
    let Some(bench) = bench(test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path().join("disk"), "2m");
    let settings = Settings {
        repository: RepositoryOf::Path(disk.0.join("repository")),
        ..Settings::default()
    };
    let host = Host::new(&bench, &settings);
    let tree = host.dir().join("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("blob"), noise(6 << 20)).unwrap();
    let build = [
        "component",
        "build",
        "--dir",
        tree.to_str().unwrap(),
        "--name",
        "blob",
    ];
    let build: Vec<&str> = build
        .iter()
        .chain(&["--component-version", "1"])
        .copied()
        .collect();
    let refused = host.refused(&build);
    assert!(refused.contains("No space left"), "{refused}");
    assert_eq!(host.json(["component", "list"]), serde_json::json!([]));
    host.ok(["verify"]);
    disk.grow("32m");
    host.ok(&build);
    assert_eq!(host.json(["component", "list"])[0]["name"], "blob");
    host.ok(["verify"]);
}

#[test]
fn privileged_a_launch_on_a_full_disk_fails_in_words_and_the_daemon_goes_on() {
    let test = "privileged_a_launch_on_a_full_disk_fails_in_words_and_the_daemon_goes_on";
    let Some(bench) = bench(test) else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::new(dir.path().join("disk"), "4m");
    let settings = Settings {
        state: Some(disk.0.join("state")),
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let manifest = host.write("plain.toml", &idle("plain", "[]", ""));
    let manifest_text = manifest.to_str().unwrap();
    let refused = host.refused(["run", "--detach", "--name", "plain", manifest_text]);
    assert!(refused.contains("No space left"), "{refused}");
    let vm = host.vm("plain");
    assert_eq!((&vm["state"], &vm["pid"]), (&"failed".into(), &().into()));
    disk.grow("400m");
    assert_eq!(host.launch(&manifest, "plain", &[])["state"], "ready");
    assert_eq!(host.sh("plain", "echo fine"), "fine\n");
}
