//! What makes a clone a machine of its own: applied before anything of the image runs on.
//!
//! Two halves: what the kernel knows ([`kernel`]), which a clone without a root has too, and
//! what lies in files ([`RootFiles`]). What cannot be done is said and holds nothing up, except
//! entropy: clones that draw the same random numbers must not run.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use forelay_guest_protocol::snapshot::{
    MACHINE_IDS, MAX_FAILURES, Release, Resume, Tier, is_host_key,
};

use crate::boot::context;
use crate::{pmem_state, process, sys};

/// Host name of the maker, where an image was composed before its VM had a name.
const PLACEHOLDER: &str = "forelay";
const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";
/// Programs that an image wants run in a clone, in the order of their names.
const HOOKS: &str = "/etc/forelay/resume.d";
/// How long one of them may take, and all that a clone runs of its image.
const HOOK_LIMIT: Duration = Duration::from_secs(20);
const LIMIT: Duration = Duration::from_secs(60);

/// Runs a program to its end; kills it after a time.
pub type Run<'a> = &'a dyn Fn(&mut Command, Duration) -> io::Result<()>;

/// A program that ended with this code.
pub fn ended(code: i32) -> io::Error {
    io::Error::other(format!("it ended with code {code}"))
}

/// Has a VM go on that was saved and is the same: it draws other random numbers than what else
/// may be made of what was saved, and its clock is right.
pub fn same(release: &Release) -> Vec<String> {
    let mut failures = Vec::new();
    let mut note = |what: &str, done: io::Result<()>| {
        failures.extend(done.err().map(|error| format!("{what}: {error}")));
    };
    if let Some(entropy) = release.entropy_bytes() {
        note("entropy", sys::reseed(&entropy));
    }
    note("clock", sys::set_clock(release.unix_time_us));
    note("pmem devices", pmem_state::set_again());
    failures
}

/// Gives this kernel what is the clone's; what failed is added to `failures`.
pub fn kernel(resume: &Resume, failures: &mut Vec<String>) -> io::Result<()> {
    let entropy = resume.entropy_bytes().ok_or(io::ErrorKind::InvalidData)?;
    sys::reseed(&entropy).map_err(context("entropy"))?;
    let mut note = |what: &str, done: io::Result<()>| {
        failures.extend(done.err().map(|error| format!("{what}: {error}")));
    };
    note("clock", sys::set_clock(resume.unix_time_us));
    note("host name", sys::set_hostname(&resume.hostname));
    if let Some(mac) = resume.mac_address() {
        let set = UnixDatagram::unbound().and_then(|any| sys::set_mac(&any, "eth0", mac));
        note("MAC address", set);
    }
    note("pmem devices", pmem_state::set_again());
    Ok(())
}

/// What of the root a clone changes, found before it was saved: under emulation a kernel
/// takes long for what it does for the first time.
pub struct RootFiles {
    hostname: EditableFile,
    machine_ids: Vec<EditableFile>,
    /// With what it says of the maker.
    hosts: Option<(EditableFile, String)>,
    /// The maker's name: in a clone of a VM that ran, it has the placeholder's place.
    before: String,
    host_keys: Vec<PathBuf>,
    hooks: Vec<PathBuf>,
}

/// A file, or its path and why it cannot be written.
type EditableFile = Result<OwnFile, (String, String)>;

impl RootFiles {
    /// Those of the root as it is now, `keeps` aside. Files that are part of the image are the
    /// VM's own then.
    pub fn find(tier: Tier, keeps: &[String]) -> Self {
        let keeps = |path: &str| keeps.iter().any(|kept| kept == path);
        let [main, dbus] = MACHINE_IDS;
        let has_dbus = fs::symlink_metadata(dbus).is_ok_and(|found| found.is_file());
        let machine_ids = [(main, 0o444, true), (dbus, 0o644, has_dbus)].into_iter();
        let machine_ids = machine_ids.filter(|(path, _, is_made)| *is_made && !keeps(path));
        let hosts = fs::read_to_string(HOSTS).ok();
        let before = fs::read_to_string(HOSTNAME).unwrap_or_default();
        let before = before.trim().to_owned();
        let hosts = hosts.filter(|hosts| with_name(hosts, &before, "").is_some());
        Self {
            hostname: OwnFile::make(HOSTNAME, 0o644),
            machine_ids: machine_ids
                .map(|(path, mode, _)| OwnFile::make(path, mode))
                .collect(),
            hosts: hosts.map(|text| (OwnFile::make(HOSTS, 0o644), text)),
            before,
            host_keys: host_keys(tier, keeps),
            hooks: hooks(),
        }
    }

    /// Whether [`Self::set`] runs hooks of the image.
    pub fn has_hooks(&self) -> bool {
        !self.hooks.is_empty()
    }

    /// Gives them what is the clone's, and runs the image's hooks.
    pub fn set(&self, resume: &Resume, run: Run<'_>, failures: &mut Vec<String>) {
        let mut note = |what: &str, done: io::Result<()>| {
            failures.extend(done.err().map(|error| format!("{what}: {error}")));
        };
        let Resume {
            hostname,
            machine_id,
            ..
        } = resume;
        let (name, id) = (format!("{hostname}\n"), format!("{machine_id}\n"));
        let hosts = self.hosts.as_ref().and_then(|(file, hosts)| {
            let text = with_name(hosts, &self.before, hostname)?;
            Some((file, text))
        });
        let ids = self.machine_ids.iter().map(|file| (file, id.clone()));
        let texts = std::iter::once((&self.hostname, name)).chain(hosts);
        for (file, text) in texts.chain(ids) {
            match file {
                Ok(file) => note(&file.path, file.set(&text)),
                Err((path, why)) => note(path, Err(io::Error::other(why.clone()))),
            }
        }
        let deadline = Instant::now() + LIMIT;
        let within = |command: &mut Command| {
            let left = deadline.saturating_duration_since(Instant::now());
            run(command, left.min(HOOK_LIMIT))
        };
        for key in &self.host_keys {
            note(&key.display().to_string(), make_host_key(key, &within));
        }
        for hook in &self.hooks {
            note(&hook.display().to_string(), within(&mut command(hook)));
        }
        failures.truncate(MAX_FAILURES);
    }
}

/// A file of the VM's own, open to be written.
struct OwnFile {
    path: String,
    file: File,
    bytes: u64,
}

impl OwnFile {
    /// With the content that it has; what was there is replaced, not followed.
    fn make(path: &str, mode: u32) -> EditableFile {
        let make = || -> io::Result<Self> {
            let content = match fs::read(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                content => content.unwrap_or_default(),
            };
            let new = format!("{path}.forelay-new");
            let mut file = File::create(&new)?;
            file.write_all(&content)?;
            file.set_permissions(fs::Permissions::from_mode(mode))?;
            fs::rename(&new, path)?;
            Ok(Self {
                path: path.to_owned(),
                file,
                bytes: content.len() as u64,
            })
        };
        make().map_err(|error| (path.to_owned(), error.to_string()))
    }

    fn set(&self, text: &str) -> io::Result<()> {
        self.file.write_all_at(text.as_bytes(), 0)?;
        let bytes = text.len() as u64;
        match bytes < self.bytes {
            true => self.file.set_len(bytes),
            false => Ok(()),
        }
    }
}

/// The hosts file with `hostname` for the placeholder and the name of before; `None` if neither
/// is there.
fn with_name(hosts: &str, before: &str, hostname: &str) -> Option<String> {
    let rename = |word: &str| match word.trim_end() {
        old if old == PLACEHOLDER || (old == before && old != "localhost" && !old.is_empty()) => {
            word.replace(old, hostname)
        }
        _ => word.to_owned(),
    };
    let line = |line: &str| match line.trim_start().starts_with('#') {
        true => line.to_owned(),
        false => line.split_inclusive([' ', '\t']).map(rename).collect(),
    };
    let renamed: String = hosts.split_inclusive('\n').map(line).collect();
    (renamed != hosts).then_some(renamed)
}

/// The private keys of the SSH server that another VM may have as well, and would not if both
/// had booted: what nothing has run in has its image's keys either way.
fn host_keys(tier: Tier, keeps: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    if tier < Tier::Ready {
        return Vec::new();
    }
    let is_made = |path: &PathBuf| {
        let path = path.to_string_lossy();
        is_host_key(&path) && !keeps(&path)
    };
    sorted("/etc/ssh", is_made)
}

fn make_host_key(key: &Path, run: &dyn Fn(&mut Command) -> io::Result<()>) -> io::Result<()> {
    let name = key.file_name().unwrap_or_default().to_string_lossy();
    let kind = name
        .trim_start_matches("ssh_host_")
        .trim_end_matches("_key");
    // Rather none than the maker's, which other clones would have too.
    fs::remove_file(key)?;
    let mut command = command(Path::new("ssh-keygen"));
    run(command.args(["-q", "-N", "", "-t", kind, "-f"]).arg(key))
}

fn hooks() -> Vec<PathBuf> {
    let runs = |path: &PathBuf| {
        fs::metadata(path)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    sorted(HOOKS, runs)
}

fn sorted(directory: &str, wanted: impl Fn(&PathBuf) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(wanted).collect();
    paths.sort();
    paths
}

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("PATH", process::DEFAULT_PATH)
        .env("HOME", "/root")
        .current_dir("/")
        .stdin(Stdio::null());
    sys::prepare_child(&mut command, sys::ChildSetup::default());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_placeholder_among_the_names_of_a_hosts_file_is_replaced() {
        let hosts = "127.0.0.1\tlocalhost\n127.0.1.1\tforelay forelay.example\n# forelay\n";
        let expected = "127.0.0.1\tlocalhost\n127.0.1.1\tweb-1 forelay.example\n# forelay\n";
        let with = |hosts, name| with_name(hosts, "web", name);
        assert_eq!(with(hosts, "web-1").as_deref(), Some(expected));
        assert_eq!(with("127.0.1.1 x\n", "web-1"), None);
        assert_eq!(with("::1 a forelay", "b").as_deref(), Some("::1 a b"));
        let renamed = with("127.0.1.1 web web.example\n", "fork");
        assert_eq!(renamed.as_deref(), Some("127.0.1.1 fork web.example\n"));
        assert_eq!(with_name("127.0.0.1 localhost \n", "localhost", "b"), None);
        assert_eq!(with_name("127.0.0.1  x\n", "", "b"), None);
    }

    #[test]
    fn a_hook_that_hangs_is_ended_and_told_and_those_after_it_run() {
        let dir = tempfile::tempdir().unwrap();
        let hook = |name: &str, script: &str| {
            let path = dir.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let ran = dir.path().join("ran");
        let hooks = vec![
            hook("10-hangs", "sleep 1000 & wait"),
            hook("20-runs", &format!("echo > {}", ran.display())),
            hook("30-fails", "exit 3"),
        ];
        let files = RootFiles {
            hostname: OwnFile::make(dir.path().join("hostname").to_str().unwrap(), 0o644),
            machine_ids: Vec::new(),
            hosts: None,
            before: String::new(),
            host_keys: Vec::new(),
            hooks,
        };
        let resume = Resume {
            hostname: "web-1".to_owned(),
            ..Resume::default()
        };
        let reaper = process::Reaper::start().unwrap();
        let within = |command: &mut Command, limit: Duration| {
            assert!(limit <= HOOK_LIMIT && HOOK_LIMIT < LIMIT);
            // That of the first is over at once.
            let hangs = command.get_program().to_string_lossy().ends_with("hangs");
            let limit = if hangs {
                Duration::from_millis(50)
            } else {
                limit
            };
            match process::run_within(&reaper, command, limit)? {
                status if status.success() => Ok(()),
                status => Err(io::Error::other(format!("{status:?}"))),
            }
        };
        let mut failures = Vec::new();
        files.set(&resume, &within, &mut failures);
        assert!(ran.exists(), "{failures:?}");
        let [hung, failed] = &failures[..] else {
            panic!("{failures:?}")
        };
        assert!(hung.contains("10-hangs: it did not end within"), "{hung}");
        assert!(failed.contains("30-fails"), "{failed}");
    }
}
