//! Child processes of the holder, and the signals that end it.
//!
//! Each child gets one end of a socket pair, its number in an environment variable, and
//! no other descriptor of the holder's.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus};
use std::time::Instant;

use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::HolderError;
use crate::packet;

/// A child with a socket to talk over.
pub(super) struct Process {
    child: Child,
    pub pidfd: OwnedFd,
    pub control: OwnedFd,
    pub started: Instant,
}

impl Process {
    /// Starts `argv` with the number of its socket in `fd_variable`.
    pub fn start(
        what: &'static str,
        argv: &[OsString],
        fd_variable: &str,
    ) -> Result<Self, HolderError> {
        Self::spawn(argv, fd_variable).map_err(|source| HolderError::Start { what, source })
    }

    fn spawn(argv: &[OsString], fd_variable: &str) -> io::Result<Self> {
        let (program, args) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let (ours, theirs) = packet::pair()?;
        let inherited = theirs.as_raw_fd();
        let mut command = Command::new(program);
        command.args(args).env(fd_variable, inherited.to_string());
        // SAFETY: between fork and exec only two system calls are made, on a descriptor
        // that is open until `spawn` returns and on the child's own signal mask.
        unsafe { command.pre_exec(move || prepare(inherited)) };
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        Ok(Self {
            pidfd: pidfd_open(pid, PidfdFlags::empty())?,
            control: ours,
            started: Instant::now(),
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

    /// Waits for the end.
    pub fn reap(&mut self) -> io::Result<Option<i32>> {
        Ok(self.child.wait()?.code())
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
