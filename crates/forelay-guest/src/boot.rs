//! From the initramfs to the VM's root: what PID 1 does before anything of the image runs.
//!
//! ```text
//! mount /proc /sys /dev -> load modules -> root (see root.rs) -> network -> agent
//!                                                                  |
//!                              entrypoint: agent is PID 1 <--------+---> init: exec init,
//!                                                                        agent is a child
//! ```
//! Kernel command line: `forelay.map=<uuid>` mounts the map image over pmem,
//! `forelay.flat=1` mounts a flat image from the disk with serial `forelay-flat`,
//! `forelay.root=<device>` mounts a disk with an ext4 root. `forelay.scratch=1` puts the
//! overlay's upper on the disk with serial `forelay-scratch`, else it is a tmpfs.
//! `forelay.hold=<tier>` holds the boot for a snapshot (see hold.rs).
//!
//! Invariant: any failure ends in a message on the console and a power-off, never a hang.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::Duration;

use forelay_guest_protocol::config::{Run, VM_CONFIG_PATH, VmConfig};
use forelay_guest_protocol::messages::{BootSteps, GuestMessage, encode_line};
use forelay_guest_protocol::snapshot::Tier;

use crate::hold::{self, HeldBoot};
use crate::{agent, devices, identity, network, root, sys};

/// List of modules in the initramfs: one path a line, in load order.
const MODULE_LIST: &str = "/modules.list";

/// Descriptors that a process may have, and may ask for: what servers and container engines
/// expect. An image's own init sets limits of its own for its services.
const OPEN_FILES_SOFT: u64 = 65_536;
const OPEN_FILES_HARD: u64 = 1_048_576;

/// Boots the VM; returns only the reason why that failed.
pub fn run() -> io::Error {
    match boot() {
        Ok(never) => match never {},
        Err(error) => {
            console(&format!("boot failed: {error}"));
            report_failure(&error);
            error
        }
    }
}

/// Writes a line to the console.
pub fn console(text: &str) {
    let line = format!("forelay-guest: {text}\r\n");
    let written = fs::OpenOptions::new()
        .write(true)
        .open("/dev/console")
        .and_then(|mut console| io::Write::write_all(&mut console, line.as_bytes()));
    if written.is_err() {
        eprint!("{line}");
    }
}

/// Adds what was being done to an error.
pub fn context(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

enum Never {}

fn boot() -> io::Result<Never> {
    let mut steps = BootSteps {
        kernel_us: sys::uptime_us(),
        ..BootSteps::default()
    };
    mount_kernel_file_systems()?;
    let mut parameters = parameters(&fs::read_to_string("/proc/cmdline")?);
    load_modules();
    let tier = hold::tier(&parameters);
    let mut clone = None;
    if tier == Some(Tier::Kernel) {
        let held = Clone::begin(Tier::Kernel, &mut steps)?;
        held.boot_parameters(&mut parameters);
        clone = Some(held);
    }
    let (mounted, lower) = root::mount(&parameters, &mut steps)?;
    steps.mount_us = sys::uptime_us();
    let config = read_config(&lower)?;
    if tier == Some(Tier::Ready) && matches!(config.run, Run::Init { .. }) {
        return Err(io::Error::other(
            "a VM with an init of its own cannot be held when it is ready: tier composed is the \
             best for it",
        ));
    }
    // A scratch disk is the clone's own: nothing of it may be mounted before.
    let has_scratch = parameters.contains_key("forelay.scratch");
    if tier == Some(Tier::Composed) && has_scratch {
        clone = Some(Clone::begin(Tier::Composed, &mut steps)?);
    }
    root::overlay(&parameters, &config, &lower, &mounted)?;
    root::switch(&mounted)?;
    prepare_root(&config);
    let is_init = matches!(config.run, Run::Init { .. });
    if tier == Some(Tier::Composed) && !has_scratch && is_init {
        clone = Some(Clone::begin(Tier::Composed, &mut steps)?);
    }
    if let Err(error) = sys::limit_open_files(OPEN_FILES_SOFT, OPEN_FILES_HARD) {
        console(&format!("limit of open files: {error}"));
    }
    let finished = clone.map(|clone| clone.finish(&config.keeps)).transpose()?;
    let (port, failures) = finished.map_or((None, Vec::new()), |(port, failures)| {
        (Some(port), failures)
    });
    steps.overlay_us = sys::uptime_us();
    if let Err(error) = network::configure(config.network.as_ref()) {
        console(&format!("network: {error}"));
    }
    steps.network_us = sys::uptime_us();
    let mounted = root::report(&mounted, steps, failures);
    match &config.run {
        Run::Init { path } => {
            agent::spawn_beside_init(&mounted, port)?;
            Err(exec_init(path))
        }
        Run::Entrypoint(_) | Run::AgentOnly => agent::run(agent::Start {
            config,
            mounted,
            is_init: true,
            hold: tier.filter(|_| port.is_none()),
            port,
        }),
    }
}

/// A boot that was held and goes on in a clone: the machine begins there.
struct Clone {
    held: HeldBoot,
    tier: Tier,
    failures: Vec<String>,
}

impl Clone {
    fn begin(tier: Tier, steps: &mut BootSteps) -> io::Result<Self> {
        let mut held = HeldBoot::until_resumed(tier)?;
        let mut failures = Vec::new();
        identity::kernel(&held.resume, &mut failures)?;
        if tier == Tier::Kernel {
            // What follows is a boot like any other, however long its image takes.
            held.resumed(std::mem::take(&mut failures))?;
        }
        *steps = BootSteps {
            kernel_us: sys::uptime_us(),
            ..BootSteps::default()
        };
        Ok(Self {
            held,
            tier,
            failures,
        })
    }

    /// Replaces what its maker's kernel was told by what the clone is.
    fn boot_parameters(&self, parameters: &mut Parameters) {
        let resume = &self.held.resume;
        if let Some(map) = &resume.map {
            parameters.insert("forelay.map".to_owned(), map.clone());
        }
        if resume.scratch {
            parameters.insert("forelay.scratch".to_owned(), "1".to_owned());
        }
    }

    /// Gives the root what is the clone's; returns the guest channel, and what failed that the
    /// host has not heard of.
    fn finish(mut self, keeps: &[String]) -> io::Result<(fs::File, Vec<String>)> {
        // The placeholder's, which `prepare_root` has set.
        sys::set_hostname(&self.held.resume.hostname)?;
        let files = identity::RootFiles::find(self.tier, keeps);
        files.set(&self.held.resume, &run_alone, &mut self.failures);
        let untold = match self.tier {
            Tier::Kernel => self.failures,
            Tier::Composed | Tier::Ready => {
                self.held.resumed(self.failures)?;
                Vec::new()
            }
        };
        Ok((self.held.into_port(), untold))
    }
}

/// Runs a program where nothing else runs yet.
fn run_alone(command: &mut std::process::Command, limit: Duration) -> io::Result<()> {
    let mut child = command.spawn()?;
    match devices::wait_for(limit, || child.try_wait().transpose()) {
        Some(status) => match status?.code() {
            Some(0) => Ok(()),
            code => Err(identity::ended(code.unwrap_or(-1))),
        },
        None => {
            let _ = sys::kill(-(child.id() as i32), libc::SIGKILL);
            child.wait()?;
            Err(io::Error::other(format!("it did not end within {limit:?}")))
        }
    }
}

fn exec_init(path: &str) -> io::Error {
    use std::os::unix::process::CommandExt;
    let error = std::process::Command::new(path)
        .env_clear()
        .env("TERM", "linux")
        .exec();
    context(format!("exec {path}"))(error)
}

fn mount_kernel_file_systems() -> io::Result<()> {
    let flags = sys::MS_NOSUID | sys::MS_NOEXEC | sys::MS_NODEV;
    for (fs_type, target, flags) in [
        ("proc", "/proc", flags),
        ("sysfs", "/sys", flags),
        ("devtmpfs", "/dev", sys::MS_NOSUID),
    ] {
        fs::create_dir_all(target)?;
        let options = if fs_type == "devtmpfs" {
            "mode=0755"
        } else {
            ""
        };
        sys::mount(fs_type, target, fs_type, flags, options)
            .map_err(context(format!("mount {target}")))?;
    }
    Ok(())
}

/// `key=value` words of the kernel command line.
pub type Parameters = BTreeMap<String, String>;

fn parameters(cmdline: &str) -> Parameters {
    cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// Loads the listed modules; one that fails is named on the console, and what needs it will
/// fail with a clearer message than a missing module could give.
fn load_modules() {
    let list = fs::read_to_string(MODULE_LIST).unwrap_or_default();
    for path in list.lines().map(str::trim).filter(|path| !path.is_empty()) {
        let path = std::path::Path::new("/").join(path);
        let loaded = fs::File::open(&path).and_then(|file| sys::load_module(&file));
        match loaded {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => {
                console(&format!("module {}: {error}", path.display()));
            }
            // The kernel has its own copy: give the initramfs's memory back.
            _ => drop(fs::remove_file(&path)),
        }
    }
}

fn read_config(lower: &str) -> io::Result<VmConfig> {
    let path = format!("{lower}{VM_CONFIG_PATH}");
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| io::Error::other(format!("{VM_CONFIG_PATH}: {error}"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(VmConfig::default()),
        Err(error) => Err(context(VM_CONFIG_PATH)(error)),
    }
}

/// What every VM gets on top of its image; failures are named and not fatal.
fn prepare_root(config: &VmConfig) {
    let flags = sys::MS_NOSUID | sys::MS_NODEV;
    let mut failures = Vec::new();
    let is_init = matches!(config.run, Run::Init { .. });
    // What a container image has there is for its program to find.
    let is_free = |target: &str| fs::read_dir(target).map_or(true, |mut all| all.next().is_none());
    let mut mount = |fs_type: &str, target: &str, flags, options: &str| {
        let result = fs::create_dir_all(target)
            .and_then(|()| sys::mount(fs_type, target, fs_type, flags, options));
        if let Err(error) = result {
            failures.push(format!("mount {target}: {error}"));
        }
    };
    if is_init || is_free("/run") {
        mount("tmpfs", "/run", flags, "mode=0755");
    }
    mount(
        "devpts",
        "/dev/pts",
        sys::MS_NOSUID,
        "mode=0620,gid=5,ptmxmode=0666",
    );
    mount("tmpfs", "/dev/shm", flags, "mode=1777");
    if !is_init {
        if is_free("/tmp") {
            mount("tmpfs", "/tmp", flags, "mode=1777");
        }
        let flags = flags | sys::MS_NOEXEC;
        mount("cgroup2", "/sys/fs/cgroup", flags, "nsdelegate");
    }
    let _ = fs::create_dir_all("/run/lock");
    let links = [
        ("/proc/self/fd", "/dev/fd"),
        ("fd/0", "/dev/stdin"),
        ("fd/1", "/dev/stdout"),
        ("fd/2", "/dev/stderr"),
    ];
    for (target, link) in links {
        let target = if target.starts_with('/') {
            target.to_owned()
        } else {
            format!("/proc/self/{target}")
        };
        let _ = std::os::unix::fs::symlink(target, link);
    }
    if !config.hostname.is_empty()
        && let Err(error) = set_hostname(&config.hostname)
    {
        failures.push(format!("host name: {error}"));
    }
    for failure in failures {
        console(&failure);
    }
}

/// Sets the host name, also in the file from which an image's own init would set it again.
fn set_hostname(name: &str) -> io::Result<()> {
    sys::set_hostname(name)?;
    let line = format!("{name}\n");
    if fs::read_to_string("/etc/hostname").is_ok_and(|found| found == line) {
        return Ok(());
    }
    fs::write("/etc/hostname", line).map_err(context("/etc/hostname"))
}

/// Tells the host over the channel, if the channel is there already.
fn report_failure(error: &io::Error) {
    let Some(port) = devices::wait_for(Duration::from_millis(500), devices::channel_port) else {
        return;
    };
    let message = encode_line(&GuestMessage::Failed {
        text: error.to_string(),
    });
    // Non-blocking: nobody may be listening, and the power-off must not wait for them.
    use std::os::unix::fs::OpenOptionsExt;
    let sent = fs::OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(port)
        .and_then(|mut port| io::Write::write_all(&mut port, &message));
    if sent.is_ok() {
        // The host reads it before the VM is gone.
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_words_with_an_equals_sign() {
        let found = parameters("console=ttyS0 quiet forelay.map=00ff  x=a=b\n");
        assert_eq!(found.get("forelay.map").map(String::as_str), Some("00ff"));
        assert_eq!(found.get("x").map(String::as_str), Some("a=b"));
        assert_eq!(found.len(), 3);
    }
}
