//! A process that is identified for good: pid and start time, held by a pidfd.
//!
//! Invariant: no signal ever reaches another process that was given the same pid later. The
//! pidfd is opened first and the start time compared after that.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use procfs::FromRead as _;
use procfs::process::Stat;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Pid and start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since the host booted.
    pub start_ticks: u64,
}

impl ProcessId {
    /// Identifies a running process.
    pub fn of(pid: u32) -> io::Result<Self> {
        let start_ticks = stat(pid)?.starttime;
        Ok(Self { pid, start_ticks })
    }

    /// True if it still runs; false for a zombie that nobody has reaped.
    pub fn is_running(&self) -> bool {
        stat(self.pid).is_ok_and(|stat| {
            stat.starttime == self.start_ticks && !matches!(stat.state, 'Z' | 'X')
        })
    }
}

fn stat(pid: u32) -> io::Result<Stat> {
    Stat::from_file(format!("/proc/{pid}/stat")).map_err(|error| match error {
        procfs::ProcError::NotFound(_) => io::ErrorKind::NotFound.into(),
        error => io::Error::other(error),
    })
}

/// A held process.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    descriptor: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
}

/// How a process ended, as far as this process may know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, if it was a child that exited.
    pub code: Option<i32>,
    /// Signal, if it was a child that was killed.
    pub signal: Option<i32>,
}

impl Process {
    /// Holds the process `id`; `None` if it is gone.
    pub fn hold(id: ProcessId) -> io::Result<Option<Self>> {
        let pid = i32::try_from(id.pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other(format!("{} is not a pid", id.pid)))?;
        let descriptor = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if ProcessId::of(id.pid).ok() != Some(id) {
            return Ok(None);
        }
        let descriptor = Arc::new(descriptor);
        let (sender, exit) = watch::channel(None);
        let for_thread = Arc::clone(&descriptor);
        std::thread::Builder::new()
            .name(format!("pidfd-{}", id.pid))
            .spawn(move || sender.send(Some(await_exit(&for_thread))))?;
        Ok(Some(Self {
            id,
            descriptor,
            exit,
        }))
    }

    /// Its identity.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Kills it; no error if it is gone already.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&*self.descriptor, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until it has ended; it has been reaped then, if it was a child.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        let found = exit.wait_for(Option::is_some).await;
        found.ok().and_then(|found| *found).unwrap_or_default()
    }
}

/// Runs a tool and returns what it said. It is killed when `limit` has passed (the error is of
/// the kind `TimedOut`) or this future is dropped.
pub(crate) async fn output_within(
    command: &mut tokio::process::Command,
    limit: Duration,
) -> io::Result<Output> {
    let running = command.stdin(Stdio::null()).kill_on_drop(true).output();
    match tokio::time::timeout(limit, running).await {
        Ok(output) => output,
        Err(_) => {
            let late = format!("it did not end within {limit:?}");
            Err(io::Error::new(io::ErrorKind::TimedOut, late))
        }
    }
}

/// Blocks until the process has ended. A thread of its own for each process: tokio's way to
/// await a descriptor needs unsafe code, and these threads only sleep.
fn await_exit(descriptor: &OwnedFd) -> Exit {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut descriptors = [PollFd::new(descriptor, PollFlags::IN)];
    while poll(&mut descriptors, None) == Err(rustix::io::Errno::INTR) {}
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match rustix::process::waitid(WaitId::PidFd(descriptor.as_fd()), options) {
        Ok(Some(status)) => Exit {
            code: status.exit_status(),
            signal: status.terminating_signal(),
        },
        _ => Exit::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[expect(clippy::zombie_processes, reason = "`Process` reaps it")]
    async fn a_process_is_held_killed_and_reaped_and_a_wrong_start_time_is_refused() {
        let child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let id = ProcessId::of(child.id()).unwrap();
        let other = ProcessId {
            start_ticks: id.start_ticks + 1,
            ..id
        };
        assert!(Process::hold(other).unwrap().is_none());
        assert!(id.is_running() && !other.is_running());
        let process = Process::hold(id).unwrap().unwrap();
        process.kill().unwrap();
        let exit = process.wait().await;
        assert_eq!((exit.code, exit.signal), (None, Some(9)));
        process.kill().unwrap();
    }
    #[tokio::test]
    async fn a_tool_that_takes_too_long_or_is_given_up_does_not_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let script = format!("echo $$ >{} && exec sleep 600", pid_file.display());
        let mut command = tokio::process::Command::new("sh");
        command.args(["-c", &script]);
        let started = async || loop {
            let pid = std::fs::read_to_string(&pid_file).unwrap_or_default();
            if let Ok(pid) = pid.trim().parse() {
                std::fs::remove_file(&pid_file).unwrap();
                break Process::hold(ProcessId::of(pid).unwrap()).unwrap().unwrap();
            }
            tokio::task::yield_now().await;
        };
        let long = Duration::from_secs(3600);
        let given_up = tokio::select! {
            ended = output_within(&mut command, long) => panic!("{ended:?}"),
            tool = started() => tool,
        };
        given_up.wait().await;
        let late = output_within(&mut command, Duration::ZERO).await;
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let mut quick = tokio::process::Command::new("echo");
        let said = output_within(quick.arg("said"), long).await.unwrap();
        assert_eq!(said.stdout, b"said\n");
    }
}
