//! Child processes of the holder, and the signals that end it.
//!
//! Each child gets one end of a socket pair, its number in an environment variable, and
//! no other descriptor of the holder's. Nothing here waits: the holder's end of the pair
//! is non-blocking, and a process that does not end is left to itself.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::packet;

/// The program that the holder starts: what its path leads to, which is another file after
/// an upgrade, and the file that it led to at first, which stays when the path does not.
#[derive(Debug)]
pub(super) struct Program {
    path: PathBuf,
    first: OwnedFd,
}

/// Which file of a [`Program`] to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Preferred {
    /// The one at the path; the first one if that cannot be started.
    Path,
    /// The first one.
    First,
}

impl Program {
    pub fn open(path: &Path) -> io::Result<Self> {
        let first = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self {
            path: path.to_owned(),
            first,
        })
    }

    fn command(&self, preferred: Preferred) -> Command {
        match preferred {
            Preferred::Path => Command::new(&self.path),
            Preferred::First => {
                // Looked up by the child, which has the descriptor until it has called exec.
                let mut command = Command::new(format!("/proc/self/fd/{}", self.first.as_raw_fd()));
                command.arg0(&self.path);
                command
            }
        }
    }
}

/// True for a failure of the file rather than of the host.
fn is_of_the_file(error: &io::Error) -> bool {
    let host = [libc::EAGAIN, libc::ENOMEM, libc::EMFILE, libc::ENFILE];
    !error
        .raw_os_error()
        .is_some_and(|errno| host.contains(&errno))
}

/// A child with a socket to talk over.
pub(super) struct Process {
    child: Child,
    pub pidfd: OwnedFd,
    pub control: OwnedFd,
    pub started: Instant,
}

impl Process {
    /// Starts the program with the number of its socket in `fd_variable`.
    pub fn start(
        program: &Program,
        preferred: Preferred,
        args: &[OsString],
        fd_variable: &str,
        now: Instant,
    ) -> io::Result<Self> {
        match Self::spawn(program.command(preferred), args, fd_variable, now) {
            Err(error) if preferred == Preferred::Path && is_of_the_file(&error) => {
                let path = program.path.display();
                tracing::warn!(%error, %path, "not startable; starting the file that was there");
                Self::spawn(program.command(Preferred::First), args, fd_variable, now)
            }
            started => started,
        }
    }

    fn spawn(
        mut command: Command,
        args: &[OsString],
        fd_variable: &str,
        now: Instant,
    ) -> io::Result<Self> {
        let (ours, theirs) = packet::pair()?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let inherited = theirs.as_raw_fd();
        command.args(args).env(fd_variable, inherited.to_string());
        // SAFETY: between fork and exec only two system calls are made, on a descriptor
        // that is open until `spawn` returns and on the child's own signal mask.
        unsafe { command.pre_exec(move || prepare(inherited)) };
        let mut child = command.spawn()?;
        let pidfd = match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                // Not watchable, so it may not stay. It has not done anything yet.
                child.kill()?;
                child.wait()?;
                return Err(error.into());
            }
        };
        Ok(Self {
            pidfd,
            control: ours,
            started: now,
            child,
        })
    }

    /// Exit code (none after a signal) once the process has ended.
    pub fn try_reap(&mut self) -> Option<Option<i32>> {
        match self.child.try_wait() {
            Ok(status) => status.as_ref().map(ExitStatus::code),
            // Reaped already.
            Err(_) => Some(None),
        }
    }

    /// As [`Process::try_reap`], after waiting for the end for at most `limit`.
    pub fn reap_within(&mut self, limit: Duration) -> Option<Option<i32>> {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let limit = Timespec::try_from(limit).ok();
        // Whatever comes of it, the next line tells.
        let _ = poll(&mut fds, limit.as_ref());
        self.try_reap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal. One that has ended hears nothing, which is no error.
    pub fn signal(&self, signal: Signal) {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => {
                let pid = self.child.id();
                tracing::warn!(%error, ?signal, pid, "a process cannot be signalled");
            }
        }
    }

    /// Closes our end of its socket.
    pub fn hang_up(&mut self) {
        // What takes its place is never readable and never ends.
        if let Ok(silent) = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC) {
            self.control = silent;
        }
    }
}

/// In the child: keep the socket over exec, and unblock what the holder blocks.
fn prepare(inherited: RawFd) -> io::Result<()> {
    // SAFETY: the parent keeps the descriptor open until the child has called exec.
    let inherited = unsafe { BorrowedFd::borrow_raw(inherited) };
    rustix::io::fcntl_setfd(inherited, FdFlags::empty())?;
    set_stop_signals(libc::SIG_UNBLOCK)
}

fn set_stop_signals(how: libc::c_int) -> io::Result<()> {
    // SAFETY: `set` is initialised by sigemptyset before it is read; changing the signal
    // mask of the calling thread touches no other memory.
    let result = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigaddset(&raw mut set, libc::SIGHUP);
        libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// SIGTERM, SIGINT and SIGHUP as a descriptor.
pub(super) struct StopSignals(OwnedFd);

/// Signals that arrived.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arrived {
    /// SIGTERM or SIGINT: end.
    pub stop: bool,
    /// SIGHUP: replace the daemon.
    pub restart: bool,
}

impl StopSignals {
    /// Blocks them for this process.
    pub fn take() -> io::Result<Self> {
        set_stop_signals(libc::SIG_BLOCK)?;
        // SAFETY: sets the default for a signal that is blocked; `nohup` has it ignored,
        // and an ignored signal never arrives.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
        // SAFETY: `set` is initialised before it is read; the returned descriptor is new and owned by nobody else.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            libc::sigaddset(&raw mut set, libc::SIGHUP);
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The signals that arrived since the last call.
    pub fn take_arrived(&self) -> Arrived {
        const INFO_BYTES: usize = size_of::<libc::signalfd_siginfo>();
        let mut arrived = Arrived::default();
        let mut info = [0u8; INFO_BYTES];
        while rustix::io::read(&self.0, &mut info) == Ok(INFO_BYTES) {
            // The signal's number is the first field.
            match i32::from_ne_bytes([info[0], info[1], info[2], info[3]]) {
                libc::SIGHUP => arrived.restart = true,
                _ => arrived.stop = true,
            }
        }
        arrived
    }
}
