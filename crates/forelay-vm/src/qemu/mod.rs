//! QEMU as the VMM: stock, unpatched, one process for each VM.
//!
//! Launch: command line ([`command_line`]) -> start in a process group of its own, output
//! into `qemu.log` -> monitor connects -> state file -> guest channel connects. Everything
//! later goes over the three sockets that QEMU serves in the runtime directory.
//!
//! QEMU up to at least 7.2 cannot unplug virtio-pmem: [`Detachment::Retained`] says so, and
//! the device is used again when the same component is attached again.

pub mod command_line;
mod control;
pub(crate) mod migration;
mod qmp;
pub(crate) mod saved;

pub use command_line::HotplugBus;
pub use control::QemuControl;
pub use qmp::{Event, Qmp, QmpError};

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;

use crate::accelerator::{Accelerator, Probe, in_path, probe_accelerator};
use crate::confined::{self, Incoming, Sockets, VmmNeeds};
use crate::driver::{LaunchError, ReattachError, VmmDriver};
use crate::handle::{Parts, VmHandle, file_tail};
use crate::lifecycle::{Cause, Ended};
use crate::process::{Exit, Process, ProcessId, output_within};
use crate::spec::{Boot, GuestMemory, Upper, VmSpec};
use crate::state::{STATE_FILE, VmState};
use crate::{kernel, lines, scratch, stray};

/// How long QEMU may take to open its sockets.
const START: Duration = Duration::from_secs(60);
/// How long a QEMU that closed its monitor may take to end.
const LAST_WORDS: Duration = Duration::from_secs(30);
/// Interval of attempts to connect.
const POLL: Duration = Duration::from_millis(3);
/// What QEMU prints goes here, in the runtime directory.
pub(crate) const LOG_FILE: &str = "qemu.log";

/// Launches VMs with QEMU.
#[derive(Clone, Debug)]
pub struct QemuDriver {
    /// The program.
    pub binary: PathBuf,
    /// Fixed accelerator; `None` probes once for each kernel and caches the answer.
    pub accelerator: Option<Accelerator>,
    /// Where probe results are cached.
    pub state_dir: PathBuf,
    /// What the program says of its version, and which file said so.
    version: Arc<tokio::sync::Mutex<Option<(ProgramStamp, String)>>>,
    /// Kernels are prepared one after the other: who asks for one that is being prepared waits.
    preparing: Arc<tokio::sync::Mutex<()>>,
}

/// Which file a program is now.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ProgramStamp {
    inode: u64,
    bytes: u64,
    changed_ns: (i64, i64),
}

impl ProgramStamp {
    /// Of a program by its path or, as a shell finds it, by its name.
    fn of(program: &Path) -> std::io::Result<Self> {
        use std::os::unix::fs::MetadataExt as _;
        let paths = std::env::var_os("PATH").unwrap_or_default();
        let in_path = match program.components().count() {
            1 => std::env::split_paths(&paths)
                .map(|dir| dir.join(program))
                .find(|path| path.is_file()),
            _ => None,
        };
        let meta = in_path.as_deref().unwrap_or(program).metadata()?;
        Ok(Self {
            inode: meta.ino(),
            bytes: meta.len(),
            changed_ns: (meta.ctime(), meta.ctime_nsec()),
        })
    }
}

/// A kernel that is ready to be booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedKernel {
    /// The file to boot: under TCG its uncompressed form, if it can be had.
    pub kernel: PathBuf,
    /// How its VMs run, and why.
    pub probe: Probe,
}

impl QemuDriver {
    /// `qemu-system-x86_64` from `PATH`, probing the accelerator.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            binary: "qemu-system-x86_64".into(),
            accelerator: None,
            state_dir: state_dir.into(),
            version: Arc::default(),
            preparing: Arc::default(),
        }
    }

    /// What QEMU says of its version; asked again when its file is another.
    pub async fn version(&self) -> std::io::Result<String> {
        let mut known = self.version.lock().await;
        let stamp = ProgramStamp::of(&self.binary)?;
        if let Some((of, version)) = &*known
            && *of == stamp
        {
            return Ok(version.clone());
        }
        let mut command = tokio::process::Command::new(&self.binary);
        let output = output_within(command.arg("--version"), START).await?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().next().unwrap_or_default().trim();
        if !output.status.success() || line.is_empty() {
            return Err(std::io::Error::other("QEMU does not say its version"));
        }
        *known = Some((stamp, line.to_owned()));
        Ok(line.to_owned())
    }

    /// Finds out what VMs with this kernel run under and unpacks it, unless that was done
    /// before: up to some seconds that no launch should have to wait for.
    pub async fn prepare(&self, kernel: &Path) -> PreparedKernel {
        let _one_at_a_time = self.preparing.lock().await;
        let mut prepared = PreparedKernel {
            kernel: kernel.to_owned(),
            probe: self.probe(kernel).await,
        };
        if prepared.probe.accelerator == Accelerator::Tcg {
            let (packed, dir) = (kernel.to_owned(), self.state_dir.join("kernels"));
            let unpacking =
                tokio::task::spawn_blocking(move || kernel::uncompressed(&packed, &dir)).await;
            match unpacking.map_err(std::io::Error::other) {
                Ok(Ok(Some(uncompressed))) => prepared.kernel = uncompressed,
                Ok(Ok(None)) => {}
                Ok(Err(error)) | Err(error) => {
                    tracing::warn!(%error, "the kernel boots from its compressed form");
                }
            }
        }
        prepared
    }

    /// The accelerator that VMs with this kernel get, and why.
    async fn probe(&self, kernel: &Path) -> Probe {
        match self.accelerator {
            Some(accelerator) => Probe {
                accelerator,
                reason: "configured".to_owned(),
            },
            None => probe_accelerator(&self.binary, kernel, &self.state_dir).await,
        }
    }

    /// The VMM's command as it is executed, its output aside.
    fn command(&self, spec: &VmSpec, prepared: &PreparedKernel) -> Result<Command, LaunchError> {
        let arguments = arguments(spec, prepared)?;
        let mut command;
        if spec.confined.is_some() {
            command = Command::new(in_path(&self.binary));
            command.env_clear().env("PATH", confined::PATH);
            command.args(arguments);
            command.args(["-sandbox", confined::SANDBOX]);
        } else {
            command = Command::new(&self.binary);
            command.args(arguments);
        }
        command.env(stray::RUNTIME_DIR_VARIABLE, &spec.runtime_dir);
        match &spec.wrap {
            Some(wrap) => (wrap.0)(&mut command),
            None => drop(command.process_group(0)),
        }
        Ok(command)
    }

    /// Starts the VMM; with it comes where a clone takes its state, if it inherited that.
    fn start(
        &self,
        spec: &VmSpec,
        prepared: &PreparedKernel,
    ) -> Result<(Started, Option<Incoming>), LaunchError> {
        let file_error = |(path, source): (PathBuf, std::io::Error)| LaunchError::File {
            name: spec.name.clone(),
            path,
            source,
        };
        let log = spec.runtime_dir.join(LOG_FILE);
        let open = || {
            let output = std::fs::File::create(&log)?;
            Ok((output.try_clone()?, output))
        };
        let (output, errors) = open().map_err(|error| file_error((log.clone(), error)))?;
        let start_error = |source| LaunchError::Start {
            program: self.binary.display().to_string(),
            source,
        };
        let mut spec = spec.clone();
        spec.kernel.clone_from(&prepared.kernel);
        let sockets = match spec.confined.clone() {
            Some(confined) => {
                confined::inherit_memory(&mut spec);
                Some(confined.prepare(&spec).map_err(file_error)?)
            }
            None => None,
        };
        spec.listening = sockets.as_ref().map(Sockets::numbers);
        let mut command = self.command(&spec, prepared)?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = match (&spec.confined, &sockets) {
            (Some(confined), Some(sockets)) => {
                let mut needs = VmmNeeds::of(&spec, prepared.probe.accelerator);
                needs.fds.extend(sockets.inherited());
                (confined.spawn)(&mut command, needs)
            }
            _ => command.spawn(),
        };
        let mut child = child.map_err(start_error)?;
        let held = ProcessId::of(child.id()).and_then(Process::hold);
        // An unreaped child keeps its pid, so it can be held even if it has ended already.
        let held = held.and_then(|held| held.ok_or_else(|| std::io::Error::other("it vanished")));
        match held {
            Ok(process) => {
                let incoming = sockets.and_then(Sockets::leave);
                Ok((Started(Some(process)), incoming))
            }
            Err(error) => {
                let _ = child.kill().and_then(|()| child.wait());
                Err(start_error(error))
            }
        }
    }
}

/// The VMM's arguments for a VM that boots a kernel which was prepared.
fn arguments(spec: &VmSpec, prepared: &PreparedKernel) -> Result<Vec<OsString>, LaunchError> {
    let mut spec = spec.clone();
    spec.kernel.clone_from(&prepared.kernel);
    let arguments = command_line::arguments(&spec, prepared.probe.accelerator);
    arguments.map_err(|reason| LaunchError::Spec {
        name: spec.name.clone(),
        reason,
    })
}

/// A VMM that has no handle yet: killed when dropped, also if the launch is given up.
struct Started(Option<Process>);

impl Started {
    fn process(&self) -> &Process {
        self.0.as_ref().expect("taken by `keep` alone")
    }

    fn keep(mut self) -> Process {
        self.0.take().expect("taken by `keep` alone")
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.as_ref().map(Process::kill) {
            tracing::error!(%error, "a QEMU that did not start well lives on");
        }
    }
}

/// Checks the files that a VM needs, since QEMU's own words for a missing one are poor.
fn check_files(spec: &VmSpec) -> Result<(), LaunchError> {
    let mut paths = match &spec.memory {
        GuestMemory::Snapshot { path } | GuestMemory::Saved { path, .. } => vec![path],
        GuestMemory::Private | GuestMemory::Shared { .. } => vec![&spec.kernel, &spec.initrd],
    };
    paths.extend(spec.pmem.iter().map(|device| &device.path));
    paths.extend(spec.disks.iter().map(|disk| &disk.path));
    match &spec.boot {
        Boot::Map { .. } => {}
        Boot::Flat { path } => paths.push(path),
        Boot::Root(disk) => paths.push(&disk.path),
    }
    for path in paths {
        std::fs::metadata(path).map_err(|source| {
            let (name, path) = (spec.name.clone(), path.clone());
            LaunchError::File { name, path, source }
        })?;
    }
    Ok(())
}

fn prepare_directory(spec: &VmSpec) -> Result<(), LaunchError> {
    let file_error = |path: &Path| {
        let (name, path) = (spec.name.clone(), path.to_owned());
        move |source| LaunchError::File { name, path, source }
    };
    std::fs::create_dir_all(&spec.runtime_dir).map_err(file_error(&spec.runtime_dir))?;
    if let Some(parent) = spec.console_log.parent() {
        std::fs::create_dir_all(parent).map_err(file_error(parent))?;
    }
    if let GuestMemory::Shared { path } = &spec.memory {
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut options = std::fs::File::options();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        options
            .open(path)
            .and_then(|file| file.set_len(u64::from(spec.memory_mib) << 20))
            .map_err(file_error(path))?;
    }
    // A dead predecessor's sockets and state must not be taken for the new VM's.
    use command_line::{CHANNEL_SOCKET, CONSOLE_SOCKET, MONITOR_SOCKET};
    for name in [STATE_FILE, MONITOR_SOCKET, CHANNEL_SOCKET, CONSOLE_SOCKET] {
        let path = spec.runtime_dir.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(file_error(&path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

#[async_trait]
impl VmmDriver for QemuDriver {
    fn name(&self) -> &'static str {
        "qemu"
    }

    async fn command_line(&self, spec: &VmSpec) -> Result<Vec<OsString>, LaunchError> {
        let mut words = vec![self.binary.clone().into_os_string()];
        let prepared = self.prepare(&spec.kernel).await;
        words.extend(arguments(spec, &prepared)?);
        Ok(words)
    }

    async fn launch(&self, spec: &VmSpec) -> Result<VmHandle, LaunchError> {
        check_files(spec)?;
        let prepared = self.prepare(&spec.kernel).await;
        let accelerator = prepared.probe.accelerator;
        // What is refused is refused before anything is made.
        arguments(spec, &prepared)?;
        if let Upper::Scratch { path, bytes } = &spec.upper {
            let made = scratch::ensure(path, *bytes).await;
            made.map_err(|source| LaunchError::Scratch {
                name: spec.name.clone(),
                source,
            })?;
        }
        prepare_directory(spec)?;
        // Without it a VM runs as well, and is not saved.
        let vmm = self.version().await.unwrap_or_default();
        let launched = Instant::now();
        let (started, incoming) = self.start(spec, &prepared)?;
        let state = VmState {
            name: spec.name.clone(),
            driver: self.name().to_owned(),
            process: started.process().id(),
            user: spec.confined.as_ref().map(|confined| confined.user),
            launched_ms: now_ms(),
            accelerator: accelerator.to_string(),
            vmm,
            console_log: spec.console_log.clone(),
            pmem: spec.pmem.clone(),
            forwards: spec.forwards.clone(),
            hold: spec.hold,
            launch_slots: 0,
            hotplug_bus: HotplugBus::Bridge,
            hotplugged: Vec::new(),
            can_be_saved: true,
        };
        let state = match &spec.memory {
            GuestMemory::Saved { machine, .. } => VmState {
                launch_slots: machine.launch_slots,
                hotplugged: machine.hotplugged.clone(),
                ..state
            },
            _ => state,
        };
        let connected = connect(started.process(), spec, &state).await;
        let process = started.keep();
        let (qmp, channel) = match connected {
            Ok(both) => both,
            Err(error) => {
                let _ = process.kill();
                process.wait().await;
                return Err(error);
            }
        };
        let control = Arc::new(QemuControl::new(
            qmp,
            spec.runtime_dir.clone(),
            state.clone(),
            incoming,
        ));
        let runtime_dir = spec.runtime_dir.clone();
        Ok(VmHandle::new(Parts {
            state,
            runtime_dir,
            process,
            is_new_clone: matches!(spec.memory, GuestMemory::Snapshot { .. }),
            channel,
            control,
            launched,
        }))
    }

    async fn reattach(&self, runtime_dir: &Path) -> Result<VmHandle, ReattachError> {
        let state = VmState::read(runtime_dir).map_err(|source| ReattachError::State {
            path: runtime_dir.join(STATE_FILE),
            source,
        })?;
        let name = state.name.clone();
        let connect_error = |what: &str| {
            let (name, what) = (name.clone(), what.to_owned());
            move |source| ReattachError::Connect { name, what, source }
        };
        let process = Process::hold(state.process)
            .map_err(connect_error("hold the VMM's process"))?
            .filter(|process| process.id().is_running())
            .ok_or_else(|| ReattachError::Ended { name: name.clone() })?;
        let monitor = runtime_dir.join(command_line::MONITOR_SOCKET);
        let qmp = Qmp::connect(&monitor)
            .await
            .map_err(|error| connect_error("QEMU's monitor")(std::io::Error::other(error)))?;
        let channel = runtime_dir.join(command_line::CHANNEL_SOCKET);
        let channel = lines::connect(
            &channel,
            forelay_guest_protocol::messages::MAX_MESSAGE_BYTES,
        )
        .await
        .map_err(connect_error("the guest channel"))?;
        let runtime_dir = runtime_dir.to_owned();
        let control = Arc::new(QemuControl::new(
            qmp,
            runtime_dir.clone(),
            state.clone(),
            None,
        ));
        let launched = Instant::now();
        Ok(VmHandle::new(Parts {
            state,
            runtime_dir,
            process,
            is_new_clone: false,
            channel,
            control,
            launched,
        }))
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Connects to both sockets as soon as QEMU serves them, unless it ends first.
async fn connect(
    process: &Process,
    spec: &VmSpec,
    state: &VmState,
) -> Result<(Qmp, lines::LineConnection), LaunchError> {
    let name = || spec.name.clone();
    let socket = |file: &str| spec.runtime_dir.join(file);
    let connecting = async {
        let monitor = socket(command_line::MONITOR_SOCKET);
        let qmp = loop {
            match Qmp::connect(&monitor).await {
                Err(QmpError::Connect { .. }) => tokio::time::sleep(POLL).await,
                other => break other,
            }
        };
        let qmp = qmp.map_err(|source| LaunchError::Monitor {
            name: name(),
            source,
        })?;
        let path = socket(command_line::CHANNEL_SOCKET);
        let channel =
            lines::connect(&path, forelay_guest_protocol::messages::MAX_MESSAGE_BYTES).await;
        let channel = channel.map_err(|source| LaunchError::File {
            name: name(),
            path,
            source,
        })?;
        state.write(&spec.runtime_dir).map_err(|source| {
            let path = socket(STATE_FILE);
            LaunchError::File {
                name: name(),
                path,
                source,
            }
        })?;
        Ok((qmp, channel))
    };
    let connected = async {
        tokio::time::timeout(START, connecting)
            .await
            .unwrap_or_else(|_| {
                let source = QmpError::TimedOut {
                    command: "at start".to_owned(),
                };
                Err(LaunchError::Monitor {
                    name: name(),
                    source,
                })
            })
    };
    let exit = tokio::select! {
        connected = connected => {
            let Err(error) = connected else { return connected };
            // A QEMU that gives up closes its sockets first: its own words are better.
            match tokio::time::timeout(LAST_WORDS, process.wait()).await {
                Ok(exit) => exit,
                Err(_) => return Err(error),
            }
        }
        exit = process.wait() => exit,
    };
    Err(died(spec, exit))
}

/// A QEMU that ended before it could be talked to, with its own words.
fn died(spec: &VmSpec, exit: Exit) -> LaunchError {
    let ended = Ended {
        cause: Cause::VmmDied,
        exit_code: exit.code,
        signal: exit.signal,
    };
    LaunchError::Died {
        name: spec.name.clone(),
        ended,
        output: file_tail(&spec.runtime_dir.join(LOG_FILE)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn a_qemu_that_was_upgraded_says_another_version() {
        let dir = tempfile::tempdir().unwrap();
        let mut driver = QemuDriver::new(dir.path());
        driver.binary = dir.path().join("qemu");
        let install = |version: &str| {
            let new = dir.path().join("new");
            std::fs::write(&new, format!("#!/bin/sh\necho QEMU {version}\n")).unwrap();
            let mode = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(&new, mode).unwrap();
            std::fs::rename(&new, &driver.binary).unwrap();
        };
        assert!(driver.version().await.is_err(), "there is none yet");
        for version in ["7.2", "10.0"] {
            install(version);
            for _ in 0..2 {
                assert_eq!(driver.version().await.unwrap(), format!("QEMU {version}"));
            }
        }
    }
}
