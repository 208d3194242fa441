//! A launched VM: its progress, commands in it, hot attach, stop.
//!
//! A handle is cheap to clone and dropping it changes nothing for the VM. One task watches
//! the VMM's process; its end is what makes a VM ended, whatever else was said.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_guest_protocol::messages::{
    Attach, Attached, Exec, ExitStatus, GuestCommand, Reply, Status, Traffic,
};
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::channel::{Channel, ChannelError};
use crate::driver::{AttachError, Detachment, VmControl};
use crate::exec::{ExecEvent, Execution};
use crate::lifecycle::{Cause, Ended, Phase, Progress};
use crate::process::Process;
use crate::spec::PmemDevice;
use crate::state::VmState;

/// Bytes of console that an error shows.
const CONSOLE_TAIL_BYTES: u64 = 4096;
/// Lines of it: a kernel's panic message is above its call trace.
const CONSOLE_TAIL_LINES: usize = 30;
/// Most output of a program that is collected in memory.
pub const MAX_COLLECTED_BYTES: usize = 8 << 20;
/// How long the guest may take for a request that does little.
const SHORT: Duration = Duration::from_secs(60);
/// How long an attach may take.
const ATTACH: Duration = Duration::from_secs(60);
/// How long what a VMM and its guest said last is read for: it is there once they have ended,
/// and its end with it, unless somebody else holds their sockets.
const LAST_WORDS: Duration = Duration::from_secs(30);
/// How long a VMM may take to quit before it is killed.
const QUIT: Duration = Duration::from_secs(5);

/// Why waiting for a VM failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// It ended first.
    #[error(
        "VM {name} ended before it was {wanted}: {ended}{reason}; last console lines:\n{console}"
    )]
    Ended {
        /// The VM.
        name: String,
        /// What was waited for.
        wanted: &'static str,
        /// How it ended.
        ended: Ended,
        /// The guest's own words, if any.
        reason: String,
        /// End of its console log.
        console: String,
    },
    /// Not in time.
    #[error("VM {name} was not {wanted} within {limit:?}; last console lines:\n{console}")]
    TimedOut {
        /// The VM.
        name: String,
        /// What was waited for.
        wanted: &'static str,
        /// The limit.
        limit: Duration,
        /// End of its console log.
        console: String,
    },
    /// A command could not be run.
    #[error("VM {name}")]
    Channel {
        /// The VM.
        name: String,
        /// Why.
        source: ChannelError,
    },
    /// The VMM could not be killed.
    #[error("VM {name}: kill the VMM")]
    Kill {
        /// The VM.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// What a hot attach did, and how long its parts took.
#[derive(Clone, Debug)]
pub struct HotAttached {
    /// The VMM's part: backend and device.
    pub plug: Duration,
    /// From asking the guest to its answer; most of it is the guest kernel's probing.
    pub guest_answer: Duration,
    /// What the guest says.
    pub guest: Attached,
}

/// What a program did, all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramOutput {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

/// A launched VM.
#[derive(Clone)]
pub struct VmHandle {
    inner: Arc<Inner>,
}

struct Inner {
    state: VmState,
    runtime_dir: PathBuf,
    process: Arc<Process>,
    channel: Arc<Channel>,
    control: Arc<dyn VmControl>,
    progress: watch::Sender<Progress>,
    launched: Instant,
}

/// What a driver knows of a running VMM.
pub(crate) struct Parts {
    /// The state file's content.
    pub state: VmState,
    /// Where it is.
    pub runtime_dir: PathBuf,
    /// The VMM's process.
    pub process: Process,
    /// Nobody has talked to the guest in this VMM.
    pub is_new_clone: bool,
    /// The guest channel's connection.
    pub channel: crate::lines::LineConnection,
    /// The VMM's control.
    pub control: Arc<dyn VmControl>,
    /// When the VMM was started; for a reattached VM, when it was reattached.
    pub launched: Instant,
}

impl VmHandle {
    /// Puts a handle together and starts watching the process.
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts {
            state,
            runtime_dir,
            process,
            is_new_clone,
            channel,
            control,
            launched,
        } = parts;
        let (progress, _) = watch::channel(Progress::default());
        let channel = Arc::new(Channel::start(
            &state.name,
            channel,
            is_new_clone,
            launched,
            progress.clone(),
        ));
        let process = Arc::new(process);
        tokio::spawn(watch_process(
            process.clone(),
            control.clone(),
            channel.closed(),
            progress.clone(),
        ));
        let inner = Inner {
            state,
            runtime_dir,
            process,
            channel,
            control,
            progress,
            launched,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The VM of this state, of which this is the VMM from now on; its clock starts now.
    pub(crate) async fn renamed(
        &self,
        state: VmState,
        runtime_dir: &Path,
    ) -> Result<Self, AttachError> {
        let before = &self.inner;
        before.control.rename(state.clone(), runtime_dir).await?;
        let launched = Instant::now();
        before.channel.count_from(launched);
        let inner = Inner {
            state,
            runtime_dir: runtime_dir.to_owned(),
            process: Arc::clone(&before.process),
            channel: Arc::clone(&before.channel),
            control: Arc::clone(&before.control),
            progress: before.progress.clone(),
            launched,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Name of the VM.
    pub fn name(&self) -> &str {
        &self.inner.state.name
    }

    /// Pid of the VMM.
    pub fn pid(&self) -> u32 {
        self.inner.process.id().pid
    }

    /// True while the pid is the VMM's, and no process has it that came later.
    pub fn is_running(&self) -> bool {
        self.inner.process.id().is_running()
    }

    /// State as of launch or reattachment.
    pub fn state(&self) -> &VmState {
        &self.inner.state
    }

    /// Directory of the VM's sockets.
    pub fn runtime_dir(&self) -> &Path {
        &self.inner.runtime_dir
    }

    /// When the VMM was started (or this handle reattached).
    pub fn launched(&self) -> Instant {
        self.inner.launched
    }

    /// What is known now.
    pub fn progress(&self) -> Progress {
        self.inner.progress.borrow().clone()
    }

    /// Changes of [`Progress`] as they come.
    pub fn watch(&self) -> watch::Receiver<Progress> {
        self.inner.progress.subscribe()
    }

    /// Waits until the guest is ready. (After a reattachment that event may come before what
    /// was missed of the mount; both are awaited.)
    pub async fn wait_ready(&self, limit: Duration) -> Result<Progress, VmError> {
        let reached = |progress: &Progress| progress.ready.is_some() && progress.mounted.is_some();
        self.wait("ready", limit, reached).await
    }

    /// Waits until the VMM's process is gone.
    pub async fn wait_ended(&self) -> Ended {
        let mut progress = self.watch();
        let found = progress.wait_for(|progress| progress.ended.is_some()).await;
        let ended = found.ok().and_then(|progress| progress.ended.clone());
        // The sender lives in this handle, so the wait cannot fail.
        ended.unwrap_or(Ended {
            cause: Cause::VmmDied,
            exit_code: None,
            signal: None,
        })
    }

    pub(crate) async fn wait(
        &self,
        wanted: &'static str,
        limit: Duration,
        reached: impl Fn(&Progress) -> bool,
    ) -> Result<Progress, VmError> {
        let mut progress = self.watch();
        let found = progress.wait_for(|progress| reached(progress) || progress.ended.is_some());
        let name = self.name().to_owned();
        let found = match tokio::time::timeout(limit, found).await {
            Ok(Ok(found)) => found.clone(),
            Ok(Err(_)) => self.progress(),
            Err(_) => {
                let console = self.console_tail();
                return Err(VmError::TimedOut {
                    name,
                    wanted,
                    limit,
                    console,
                });
            }
        };
        match &found.ended {
            Some(ended) if !reached(&found) => {
                let reason = match &found.failure {
                    Some(failure) => format!("; the guest said: {failure}"),
                    None => String::new(),
                };
                let (ended, console) = (ended.clone(), self.console_tail());
                Err(VmError::Ended {
                    name,
                    wanted,
                    ended,
                    reason,
                    console,
                })
            }
            _ => Ok(found),
        }
    }

    /// The last lines of the serial console.
    pub fn console_tail(&self) -> String {
        file_tail(&self.inner.state.console_log)
    }

    /// Connects to the serial console: bytes in both directions, one client at a time.
    pub async fn console(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self.inner.runtime_dir.join("console.sock")).await
    }

    pub(crate) fn note(&self, change: impl FnOnce(&mut Progress)) {
        self.inner.progress.send_modify(change);
    }

    pub(crate) fn channel(&self) -> &Channel {
        &self.inner.channel
    }

    pub(crate) fn channel_error(&self, source: ChannelError) -> VmError {
        VmError::Channel {
            name: self.name().to_owned(),
            source,
        }
    }

    /// What the agent says of the boot; also proves that it answers.
    pub async fn status(&self) -> Result<Status, VmError> {
        match self
            .inner
            .channel
            .request(GuestCommand::Status, SHORT)
            .await
        {
            Ok(Reply::Status(status)) => Ok(status),
            Ok(_) => Err(self.channel_error(ChannelError::Unexpected)),
            Err(error) => Err(self.channel_error(error)),
        }
    }

    /// What the guest's network interfaces have carried since it booted, by its own word.
    pub async fn traffic(&self, limit: Duration) -> Result<Traffic, VmError> {
        match self
            .inner
            .channel
            .request(GuestCommand::Traffic, limit)
            .await
        {
            Ok(Reply::Traffic(traffic)) => Ok(traffic),
            Ok(_) => Err(self.channel_error(ChannelError::Unexpected)),
            Err(error) => Err(self.channel_error(error)),
        }
    }

    /// Starts a program in the guest, its streams in the hands of the caller.
    pub async fn start_program(&self, exec: Exec) -> Result<Execution, VmError> {
        let started = self.inner.channel.start_program(exec, SHORT).await;
        started.map_err(|error| self.channel_error(error))
    }

    /// Runs a program to its end, without standard input; ends it after `limit`. Output
    /// beyond [`MAX_COLLECTED_BYTES`] is an error, and ends it too.
    pub async fn exec(&self, argv: &[&str], limit: Duration) -> Result<ProgramOutput, VmError> {
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        self.collect(Exec {
            argv,
            timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1),
            ..Exec::default()
        })
        .await
    }

    /// The same with all its settings.
    pub async fn collect(&self, exec: Exec) -> Result<ProgramOutput, VmError> {
        let execution = self.start_program(exec).await?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            match execution.next().await {
                Ok(ExecEvent::Stdout(bytes)) => stdout.extend(bytes),
                Ok(ExecEvent::Stderr(bytes)) => stderr.extend(bytes),
                Ok(ExecEvent::StdinCredit(_)) => {}
                Ok(ExecEvent::Ended(status)) => {
                    return Ok(ProgramOutput {
                        status,
                        stdout,
                        stderr,
                    });
                }
                Err(error) => return Err(self.channel_error(error)),
            }
            if stdout.len() + stderr.len() > MAX_COLLECTED_BYTES {
                return Err(self.channel_error(ChannelError::TooMuchOutput));
            }
        }
    }

    /// Hot-plugs a component's device and makes its files visible in the guest.
    pub async fn attach(
        &self,
        device: &PmemDevice,
        request: Attach,
    ) -> Result<HotAttached, AttachError> {
        let started = Instant::now();
        self.inner.control.attach_pmem(device).await?;
        let plug = started.elapsed();
        match self
            .inner
            .channel
            .request(GuestCommand::Attach(request), ATTACH)
            .await
        {
            Ok(Reply::Attached(guest)) => Ok(HotAttached {
                plug,
                guest_answer: started.elapsed() - plug,
                guest,
            }),
            other => {
                if let Err(error) = self.inner.control.detach_pmem(&device.id).await {
                    tracing::warn!(vm = self.name(), device = device.id, %error, "unplug");
                }
                Err(other.err().unwrap_or(ChannelError::Unexpected).into())
            }
        }
    }

    /// Takes a component's files away from the guest, then its device. The guest refuses
    /// ([`forelay_guest_protocol::messages::ErrorKind::Busy`]) while they are in use.
    pub async fn detach(&self, device_id: &str, uuid: &str) -> Result<Detachment, AttachError> {
        let command = GuestCommand::Detach {
            uuid: uuid.to_owned(),
        };
        match self.inner.channel.request(command, ATTACH).await? {
            Reply::Detached => self.inner.control.detach_pmem(device_id).await,
            _ => Err(ChannelError::Unexpected.into()),
        }
    }

    /// The VMM's control, for devices that the guest mounts itself.
    pub fn control(&self) -> &dyn VmControl {
        &*self.inner.control
    }

    /// Stops the VM: asks the agent, after `grace` tells the VMM to quit, then kills it.
    pub async fn stop(&self, grace: Duration) -> Result<Ended, VmError> {
        self.inner
            .progress
            .send_modify(|progress| progress.advance(Phase::Stopping));
        if self.progress().mounted.is_some() && !grace.is_zero() {
            let asked = self
                .inner
                .channel
                .request(GuestCommand::Poweroff, grace.min(SHORT))
                .await;
            if asked.is_ok()
                && let Ok(ended) = tokio::time::timeout(grace, self.wait_ended()).await
            {
                return Ok(ended);
            }
        }
        let quit = async {
            self.inner.control.quit().await.ok()?;
            Some(self.wait_ended().await)
        };
        if let Ok(Some(ended)) = tokio::time::timeout(QUIT, quit).await {
            return Ok(ended);
        }
        self.kill()?;
        Ok(self.wait_ended().await)
    }

    /// Kills the VMM.
    pub fn kill(&self) -> Result<(), VmError> {
        let name = self.name().to_owned();
        self.inner
            .process
            .kill()
            .map_err(|source| VmError::Kill { name, source })
    }
}

async fn watch_process(
    process: Arc<Process>,
    control: Arc<dyn VmControl>,
    channel_closed: impl Future<Output = ()>,
    progress: watch::Sender<Progress>,
) {
    let exit = process.wait().await;
    // The monitor's last event and the guest's last line may still be in their sockets.
    let (last_words, _) = tokio::join!(
        tokio::time::timeout(LAST_WORDS, control.last_words()),
        tokio::time::timeout(LAST_WORDS, channel_closed),
    );
    let cause = match exit {
        crate::process::Exit {
            signal: Some(_), ..
        } => Cause::VmmDied,
        crate::process::Exit {
            code: Some(1..), ..
        } => Cause::VmmDied,
        _ => last_words.ok().flatten().unwrap_or(Cause::VmmDied),
    };
    progress.send_modify(|progress| {
        progress.advance(Phase::Ended);
        progress.ended = Some(Ended {
            cause,
            exit_code: exit.code,
            signal: exit.signal,
        });
    });
}

/// The end of a text file that someone else wrote, printable.
pub(crate) fn file_tail(path: &Path) -> String {
    use std::os::unix::fs::FileExt;
    let read = || -> io::Result<Vec<u8>> {
        let file = std::fs::File::open(path)?;
        let bytes = file.metadata()?.len();
        let start = bytes.saturating_sub(CONSOLE_TAIL_BYTES);
        let mut tail = vec![0; (bytes - start) as usize];
        file.read_exact_at(&mut tail, start)?;
        Ok(tail)
    };
    let text = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    let printable = |c: &char| *c == '\n' || !c.is_control();
    let text: String = text.chars().filter(printable).collect();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..].join("\n")
}
