//! The holder: the process that owns what must outlive a worker.
//!
//! It holds the `/dev/fuse` descriptor of each trust domain's mount and the pinner, and
//! keeps a worker running: requests that VMs make while none runs simply wait. It knows
//! nothing of images, answers no requests, and does so little that it has no reason to
//! crash.
//!
//! ```text
//!              ready within its limit           SIGTERM passed on, exit code 0
//!   starting ------------------------> serving --------------------------------> unmount, end
//!      ^  |                               |
//!      |  | ended, killed for its limit   | ended, killed, canary died, silent for too long,
//!      |  v                               v or asked to make room (SIGHUP)
//!      +-------- at once, then with growing delays
//! ```
//! The canary is a thread of the worker that does nothing. When a worker is killed, that
//! thread is gone at once, while the process may hang: a thread inside a notification can
//! wait for a page that only an answer unlocks, and only the successor's answer comes.
//!
//! Invariants: while a mount is held, nothing but an orderly stop or its last resort ends the
//! holder, so a failed fork, exec or poll is tried again; no call here waits for another
//! process.

mod client;
mod handover;
mod process;
mod worker;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use forelay_host::error_chain;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Signal;

pub use client::{Client, ClientError, Domain, Shutdown, pinner_socket};
pub use handover::{Handover, take_mounts};
use process::{Preferred, Process, Program, StopSignals};
use worker::{SERVED, Worker, delay_after};

use crate::fuse::mount;
use crate::packet;

/// Environment variable that names the worker's descriptor to the holder.
pub const HOLDER_FD: &str = "FORELAY_HOLDER_FD";
/// Environment variable that names the pinner's descriptor.
pub const PINNER_FD: &str = "FORELAY_PINNER_FD";
/// Environment variable that names the descriptor of the process that checks; unused by it.
const CHECK_FD: &str = "FORELAY_CHECK_FD";

/// Version of what holder, pinner and worker say to each other: a program of another version
/// cannot be this holder's next worker.
pub const PROTOCOL_VERSION: u32 = packet::VERSION;

/// Workers that are started to stop the VMs and die before they can.
const STOP_ATTEMPTS: u32 = 5;
/// Between two looks at what the kernel gives no event for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A holder that runs so much later than it meant to is one of many that did not run.
const STALL: Duration = Duration::from_millis(500);

/// How long the holder waits.
#[derive(Clone, Copy, Debug)]
pub struct HolderLimits {
    /// For a worker to serve its mounts, after the first failures longer.
    pub ready: Duration,
    /// For a sign of life.
    pub silence: Duration,
    /// For a worker that was asked to make room for the next one.
    pub restart: Duration,
    /// For an orderly stop.
    pub stop: Duration,
}

impl Default for HolderLimits {
    fn default() -> Self {
        Self {
            ready: Duration::from_secs(30),
            silence: Duration::from_secs(10),
            restart: Duration::from_secs(20),
            stop: Duration::from_secs(50),
        }
    }
}

/// What the holder starts.
pub struct HolderConfig {
    /// The program of all processes.
    pub program: PathBuf,
    /// Arguments of the worker.
    pub worker: Vec<OsString>,
    /// Arguments of the pinner.
    pub pinner: Vec<OsString>,
    /// Arguments of a run that says, by its exit code, whether a next worker could start.
    /// SIGHUP is passed on only if it could; without arguments, always.
    pub check: Option<Vec<OsString>>,
    /// Ends the VMs when no worker could.
    pub last_resort: Box<dyn Fn()>,
    /// How long to wait.
    pub limits: HolderLimits,
    /// Tells the time.
    pub clock: fn() -> Instant,
}

/// Why the holder ended badly.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// A process could not be started, and no mount was held yet.
    #[error("cannot start the {what}")]
    Start {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The signals that end it cannot be had.
    #[error("the holder cannot wait for signals")]
    Signals(#[source] io::Error),
}

struct Held {
    mountpoint: PathBuf,
    fuse: OwnedFd,
}

/// An orderly stop under way.
struct Stop {
    by: Instant,
    failures: u32,
    /// Put off because the host stood still; once at most.
    looked_again: bool,
}

/// Holds mounts and keeps a worker running.
pub struct Holder {
    config: HolderConfig,
    program: Program,
    signals: StopSignals,
    /// When it last looked at what has happened.
    looked: Instant,
    domains: BTreeMap<String, Held>,
    pinner: Option<Process>,
    pinner_failures: u32,
    /// When to start the next pinner, while there is none.
    next_pinner: Option<Instant>,
    worker: Option<Worker>,
    /// Workers in a row that hardly served.
    worker_failures: u32,
    /// Workers in a row that were not steady: see [`worker::STEADY`].
    unsteady_workers: u32,
    /// When to start the next worker, while there is none.
    next_worker: Option<Instant>,
    /// Killed processes that still hang in the kernel.
    dying: Vec<Process>,
    /// Finds out whether a next worker could start.
    check: Option<Process>,
    stop: Option<Stop>,
}

/// What the holder waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Watched {
    Signals,
    Check,
    Pinner,
    Control,
    Worker,
    Canary,
}

impl Holder {
    /// Does all that can fail: what is handed over is lost if this process ends. Call it with
    /// no other threads running: it blocks signals.
    pub fn new(config: HolderConfig) -> Result<Self, HolderError> {
        let what = "worker";
        let program = Program::open(&config.program);
        let now = (config.clock)();
        Ok(Self {
            domains: BTreeMap::new(),
            pinner: None,
            pinner_failures: 0,
            next_pinner: Some(now),
            worker: None,
            worker_failures: 0,
            unsteady_workers: 0,
            next_worker: Some(now),
            looked: now,
            dying: Vec::new(),
            check: None,
            stop: None,
            program: program.map_err(|source| HolderError::Start { what, source })?,
            signals: StopSignals::take().map_err(HolderError::Signals)?,
            config,
        })
    }

    fn now(&self) -> Instant {
        (self.config.clock)()
    }

    /// Starts the program with the number of its socket in `fd_variable`.
    fn start(
        &self,
        preferred: Preferred,
        args: &[OsString],
        fd_variable: &str,
    ) -> io::Result<Process> {
        Process::start(&self.program, preferred, args, fd_variable, self.now())
    }

    /// Holds until told to stop, beginning with the mounts of a worker whose holder has ended
    /// (see [`take_mounts`]). Returns the worker's last exit code.
    pub fn run(mut self, handed_over: Vec<Domain>) -> Result<i32, HolderError> {
        for domain in handed_over {
            let (mountpoint, fuse) = (domain.mountpoint, domain.fuse);
            self.domains.insert(domain.name, Held { mountpoint, fuse });
        }
        if self.domains.is_empty() {
            let start_error = |what| move |source| HolderError::Start { what, source };
            self.start_pinner().map_err(start_error("pinner"))?;
            self.start_worker().map_err(start_error("worker"))?;
        }
        let code = self.hold();
        self.end();
        Ok(code)
    }

    /// Until the worker has ended for good; its exit code.
    fn hold(&mut self) -> i32 {
        loop {
            let (ready, overslept) = self.wait();
            // All that is judged now is judged by this moment: what the host stands still from
            // here on is seen the next time.
            let now = self.looked;
            if overslept > STALL {
                self.look_again(overslept);
            }
            if ready.contains(&Watched::Signals)
                && let Some(code) = self.on_signals()
            {
                return code;
            }
            if ready.contains(&Watched::Check) {
                self.on_checked();
            }
            if ready.contains(&Watched::Pinner) {
                self.on_pinner_exit();
            }
            // What the worker said last counts before its end does.
            if ready.contains(&Watched::Control) {
                self.read_control();
            }
            let ended = ready.contains(&Watched::Worker) || ready.contains(&Watched::Canary);
            if ended && let Some(code) = self.on_worker_exit() {
                return code;
            }
            if let Some(code) = self.enforce_limits(now) {
                return code;
            }
            self.start_what_is_due();
            self.dying
                .retain_mut(|process| process.try_reap().is_none());
        }
    }

    fn watched(&self) -> Vec<(Watched, BorrowedFd<'_>)> {
        let mut watched = vec![(Watched::Signals, self.signals.as_fd())];
        let processes = [
            (Watched::Check, &self.check),
            (Watched::Pinner, &self.pinner),
        ];
        for (source, process) in processes {
            watched.extend(process.iter().map(|one| (source, one.pidfd.as_fd())));
        }
        if let Some(worker) = &self.worker {
            watched.push((Watched::Control, worker.process.control.as_fd()));
            watched.push((Watched::Worker, worker.process.pidfd.as_fd()));
            let canary = worker.canary.iter();
            watched.extend(canary.map(|canary| (Watched::Canary, canary.as_fd())));
        }
        watched
    }

    /// What has happened, after waiting for it or for the next moment that is due; and by how
    /// much that moment was missed, or this look came late after the one before.
    fn wait(&mut self) -> (Vec<Watched>, Duration) {
        let watched = self.watched();
        let mut fds: Vec<_> = watched
            .iter()
            .map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        let now = self.now();
        let moments = [self.next_pinner, self.next_worker]
            .into_iter()
            .chain([self.worker.as_ref().map(|worker| worker.due)])
            .chain([self.stop.as_ref().map(|stop| stop.by)])
            // Processes that hang in their death are looked at now and then.
            .chain([(!self.dying.is_empty()).then(|| now + LOOK_EVERY)]);
        let next = moments.flatten().min();
        let timeout = next.map(|at| at.saturating_duration_since(now));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                // The kernel is short of memory: nothing to give up mounts for.
                tracing::error!(%error, "the holder cannot wait for its processes; trying again");
                std::thread::sleep(Duration::from_millis(100));
                self.looked = self.now();
                return (Vec::new(), Duration::ZERO);
            }
        }
        let ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let ready: Vec<bool> = ready.collect();
        let ready = watched.iter().zip(ready).filter(|(_, ready)| *ready);
        let ready = ready.map(|((source, _), _)| *source).collect();
        let now = self.now();
        let looked = std::mem::replace(&mut self.looked, now);
        let overslept = next.map_or(Duration::ZERO, |at| now - at.max(looked));
        (ready, overslept)
    }

    /// Passes a stop on, or looks whether a restart can be. The exit code, if it is all over.
    fn on_signals(&mut self) -> Option<i32> {
        let arrived = self.signals.take_arrived();
        if arrived.stop {
            if self.worker.is_none() && self.domains.is_empty() {
                return Some(0);
            }
            let told_before = self.stop.is_some();
            self.expect_stop();
            match &mut self.worker {
                // One that is still taking over is told as soon as it can stop the VMs.
                Some(worker) => {
                    if worker.ready.is_some() || told_before || self.domains.is_empty() {
                        worker.process.signal(Signal::TERM);
                    }
                }
                // Only a worker can stop the VMs in order.
                None => self.next_worker = Some(self.now()),
            }
        } else if arrived.restart && self.stop.is_none() && self.worker.is_some() {
            self.check_restart();
        }
        None
    }

    fn expect_stop(&mut self) {
        let by = self.now() + self.config.limits.stop;
        self.stop.get_or_insert(Stop {
            by,
            failures: 0,
            looked_again: false,
        });
    }

    /// Starts the look whether a next worker could start; without one, restarts.
    fn check_restart(&mut self) {
        let Some(args) = &self.config.check else {
            self.restart_worker();
            return;
        };
        if let Some(earlier) = self.check.take() {
            earlier.signal(Signal::KILL);
            self.dying.push(earlier);
        }
        match self.start(Preferred::Path, args, CHECK_FD) {
            Ok(check) => self.check = Some(check),
            Err(error) => {
                tracing::error!(%error, "not restarted: the next worker's start cannot be checked");
            }
        }
    }

    fn on_checked(&mut self) {
        let Some(code) = self.check.as_mut().and_then(Process::try_reap) else {
            return;
        };
        self.check = None;
        match code {
            Some(0) if self.stop.is_none() => self.restart_worker(),
            _ => tracing::error!(
                ?code,
                "not restarted: the configuration or the program would not serve (see above); \
                 the worker goes on as it is"
            ),
        }
    }

    fn restart_worker(&mut self) {
        let now = self.now();
        if let Some(worker) = &mut self.worker {
            worker.ask_to_leave(now, self.config.limits.restart);
        }
    }

    fn on_pinner_exit(&mut self) {
        let Some(mut pinner) = self.pinner.take() else {
            return;
        };
        let now = self.now();
        let code = pinner.try_reap();
        tracing::error!(?code, "the pinner ended; its locks are lost");
        self.pinner_failures = match now - pinner.started > SERVED {
            true => 0,
            false => self.pinner_failures + 1,
        };
        self.dying.push(pinner);
        self.next_pinner = Some(now + delay_after(self.pinner_failures));
    }

    fn start_what_is_due(&mut self) {
        let now = self.now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_due(self.next_pinner)
            && let Err(error) = self.start_pinner()
        {
            tracing::error!(%error, "the pinner cannot be started; trying again");
            self.pinner_failures += 1;
            self.next_pinner = Some(now + delay_after(self.pinner_failures + 1));
        }
        if is_due(self.next_worker)
            && let Err(error) = self.start_worker()
        {
            tracing::error!(%error, "the worker cannot be started; trying again");
            self.worker_failures += 1;
            self.next_worker = Some(now + delay_after(self.worker_failures + 1));
        }
    }

    fn start_pinner(&mut self) -> io::Result<()> {
        let args = &self.config.pinner;
        let pinner = self.start(Preferred::Path, args, PINNER_FD)?;
        self.pinner = Some(pinner);
        self.next_pinner = None;
        Ok(())
    }

    fn unmount_all(&mut self) {
        // Detaching never waits for the process that serves the mount.
        for (name, held) in std::mem::take(&mut self.domains) {
            if let Err(error) = mount::unmount_lazily(&held.mountpoint) {
                tracing::warn!(%error, domain = name, "cannot unmount");
            }
        }
    }

    /// The end: unmounts lazily. Mappings that are left fault no more, so the VMs were
    /// stopped before, by the worker or as the last resort.
    fn end(&mut self) {
        self.unmount_all();
        for process in self.pinner.iter_mut().chain(&mut self.check) {
            process.hang_up();
            if process.reap_within(LOOK_EVERY).is_none() {
                process.signal(Signal::KILL);
            }
        }
    }
}

fn with_causes(error: mount::MountError) -> io::Error {
    io::Error::other(error_chain(&error))
}
