//! The kernel's mount and the erofs tools, for tests that are skipped loudly without them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Runs a command and fails the test with its output if it fails.
pub fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Says why `test` cannot run here, if so.
pub fn skip(test: &str, programs: &[&str]) -> bool {
    let is_root = Command::new("id").arg("-u").output();
    let is_root = is_root.is_ok_and(|output| output.stdout == b"0\n");
    let missing: Vec<_> = programs
        .iter()
        .filter(|program| !is_there(program))
        .collect();
    if !is_root || !missing.is_empty() {
        println!("SKIPPED {test}: root: {is_root}, missing programs: {missing:?}");
    }
    !is_root || !missing.is_empty()
}

fn is_there(program: &str) -> bool {
    let script = format!("command -v {program}");
    let output = Command::new("sh").args(["-c", &script]).output();
    output.is_ok_and(|output| output.status.success())
}

/// A loop device over a file; detached when dropped.
pub struct LoopDevice(pub String);

impl LoopDevice {
    /// Attaches `file` read-only.
    pub fn attach(file: &Path) -> Self {
        let output = run(
            "losetup",
            &["--find", "--show", "--read-only", file.to_str().unwrap()],
        );
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// An EROFS mount; unmounted when dropped.
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    _devices: Vec<LoopDevice>,
}

impl Mount {
    /// Mounts `image` with the component images `extra` at `point`.
    pub fn new(image: &Path, extra: &[PathBuf], point: &Path) -> Self {
        std::fs::create_dir_all(point).unwrap();
        let mut devices: Vec<_> = extra.iter().map(|file| LoopDevice::attach(file)).collect();
        let main = LoopDevice::attach(image);
        let mut options = "ro".to_owned();
        for device in &devices {
            options += &format!(",device={}", device.0);
        }
        let point_text = point.to_str().unwrap();
        run(
            "mount",
            &["-t", "erofs", "-o", &options, &main.0, point_text],
        );
        devices.push(main);
        Self {
            point: point.to_owned(),
            _devices: devices,
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.point).status();
    }
}
