//! `forelay daemon`: the holder as this program runs it, and what it runs on the side.
//!
//! Owns what the holder itself must not know: command lines, the configuration's check
//! before a restart, the records by which VMs are ended when no worker can, and the mounts of
//! a worker whose holder was killed.

use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use forelay_memory::holder::{self, Holder, HolderConfig, HolderLimits, PROTOCOL_VERSION};
use forelay_memory::pinner;
use forelay_vm::process::Process;

use super::startup::load_config;
use crate::config::Config;

/// How long a worker may take to notice that its holder has ended.
const NOTICE_LIMIT: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long VMMs that were killed may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// `forelay daemon`: holds the FUSE sessions and keeps a worker running.
pub fn run_holder(config: Config, path: Option<&Path>) -> Result<()> {
    super::log();
    super::keep_private();
    let path = path.map(Path::canonicalize).transpose()?;
    let words = |role: &str| -> Vec<OsString> {
        let mut words = Vec::new();
        if let Some(path) = &path {
            words.push("--config".into());
            words.push(path.into());
        }
        words.push(role.into());
        words
    };
    let mut worker = words("internal-worker");
    worker.extend(["--runtime-dir".into(), config.runtime_dir.clone().into()]);
    let mut check = words("internal-check");
    check.extend(["--runtime-dir".into(), config.runtime_dir.clone().into()]);
    check.extend(["--protocol".into(), PROTOCOL_VERSION.to_string().into()]);
    let vmm_dirs = [config.vms_dir(), config.standby_dir(), config.makers_dir()];
    let holder = Holder::new(HolderConfig {
        clock: Instant::now,
        program: std::env::current_exe().context("cannot find this program")?,
        worker,
        pinner: vec!["internal-pinner".into()],
        check: Some(check),
        last_resort: Box::new(move || end_recorded(&vmm_dirs)),
        limits: HolderLimits::default(),
    })?;
    // Last of what can fail: with the mounts lost, so are the VMs.
    let code = holder.run(take_place(&config)?)?;
    if code != 0 {
        bail!("the daemon ended with exit code {code}");
    }
    Ok(())
}

/// Whether a worker that starts now could serve in a running one's place; in words if not.
pub fn run_check(path: Option<&Path>, runtime_dir: &Path, protocol: u32) -> Result<()> {
    if protocol != PROTOCOL_VERSION {
        bail!(
            "this program speaks version {PROTOCOL_VERSION} with the holder, which runs version \
             {protocol}: stop the daemon and start it again"
        );
    }
    load_config(path, runtime_dir).map(drop)
}

/// The pinner's process.
pub fn run_pinner() -> Result<()> {
    let socket = holder::pinner_socket()?.context("`forelay daemon` starts this")?;
    Ok(pinner::run(socket)?)
}

/// A socket on which somebody answers belongs to another daemon, unless that has lost its
/// holder: then its mounts are taken over.
fn take_place(config: &Config) -> Result<Vec<holder::Domain>> {
    let socket = config.socket();
    let deadline = Instant::now() + NOTICE_LIMIT;
    loop {
        let taken = holder::take_mounts(&config.handover_socket());
        if let Some(domains) =
            taken.context("a worker without a holder does not hand its mounts over")?
        {
            let names: Vec<&str> = domains.iter().map(|domain| domain.name.as_str()).collect();
            tracing::warn!(domains = ?names, "took the mounts of a worker whose holder was gone");
            return Ok(domains);
        }
        if UnixStream::connect(&socket).is_err() {
            return Ok(Vec::new());
        }
        if Instant::now() >= deadline {
            bail!(
                "a daemon answers on {} already: stop it first, or give this one its own \
                 `runtime_dir` in the configuration",
                socket.display()
            );
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Kills the VMMs whose records lie below these directories, and waits until they are gone: the
/// holder's last resort, before it unmounts what they map.
fn end_recorded(vmm_dirs: &[PathBuf]) {
    let entries = vmm_dirs
        .iter()
        .filter_map(|dir| std::fs::read_dir(dir).ok());
    let entries = entries.flatten().flatten();
    let dirs: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    let mut killed = Vec::new();
    for dir in dirs {
        let Ok(state) = forelay_vm::state::VmState::read(&dir) else {
            continue;
        };
        match Process::hold(state.process) {
            Ok(Some(process)) => {
                tracing::error!(vm = state.name, pid = state.process.pid, "killing a VM");
                if let Err(error) = process.kill() {
                    tracing::error!(%error, vm = state.name, "it cannot be killed");
                }
                killed.push(state.process);
            }
            Ok(None) => {}
            Err(error) => tracing::error!(%error, vm = state.name, "a VM may be left behind"),
        }
    }
    let deadline = Instant::now() + KILL_LIMIT;
    while killed.iter().any(|process| process.is_running()) && Instant::now() < deadline {
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use forelay_vm::process::ProcessId;
    use forelay_vm::state::VmState;

    use super::*;

    #[test]
    #[expect(clippy::zombie_processes, reason = "`Process` reaps it")]
    fn recorded_vmms_are_killed_and_processes_of_the_same_pid_are_not() {
        let vms = tempfile::tempdir().unwrap();
        let started = || {
            let child = Command::new("sleep").arg("600").spawn().unwrap();
            ProcessId::of(child.id()).unwrap()
        };
        let record = |name: &str, process: ProcessId| {
            let dir = vms.path().join(name);
            std::fs::create_dir(&dir).unwrap();
            let state = VmState {
                user: None,
                name: name.to_owned(),
                driver: "qemu".to_owned(),
                process,
                launched_ms: 0,
                accelerator: "tcg".to_owned(),
                console_log: dir.join("console.log"),
                pmem: Vec::new(),
                forwards: Vec::new(),
                hold: None,
                launch_slots: 0,
                hotplug_bus: Default::default(),
                hotplugged: Vec::new(),
                can_be_saved: true,
                vmm: String::new(),
            };
            state.write(&dir).unwrap();
        };
        let (recorded, other) = (started(), started());
        record("recorded", recorded);
        let earlier = ProcessId {
            start_ticks: other.start_ticks - 1,
            ..other
        };
        record("earlier", earlier);
        std::fs::create_dir(vms.path().join("never-started")).unwrap();
        end_recorded(&[vms.path().to_owned()]);
        assert!(!recorded.is_running() && other.is_running());
        Process::hold(other).unwrap().unwrap().kill().unwrap();
    }
}
