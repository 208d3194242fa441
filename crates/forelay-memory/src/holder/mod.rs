//! The holder: the process that owns what must outlive a daemon.
//!
//! It holds the `/dev/fuse` descriptor of each trust domain's mount and the pinner, and
//! keeps a daemon running: requests that VMs make while none runs simply wait. It knows
//! nothing of images, answers no requests, and does so little that it has no reason to
//! crash.
//!
//! ```text
//!     are passed on                      goodbye(stop), exit after SIGTERM, exit code 0,
//!                   ▼                    or exit before ready with no mount held
//!   start ──▶ daemon running ───────────────────────────────────▶ unmount, end
//!               ▲       │ killed, crashed, goodbye(restart), canary died
//!               └───────┘ at once, then with growing delays
//! ```
//! The canary is a thread of the daemon that does nothing. When a daemon is killed, that
//! thread is gone at once, while the process may hang: a thread inside a notification can
//! wait for a page that only an answer unlocks, and only the successor's answer comes.

mod client;
mod process;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use forelay_host::error_chain;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

pub use client::{Client, ClientError, Domain, Farewell, pinner_socket};
use process::{Process, StopSignals};

use crate::fuse::mount;
use crate::packet::{self, Packet};

/// Environment variable that names the daemon's descriptor to the holder.
pub const HOLDER_FD: &str = "FORELAY_HOLDER_FD";
/// Environment variable that names the pinner's descriptor.
pub const PINNER_FD: &str = "FORELAY_PINNER_FD";

/// A daemon that was ready and lived this long did not die of its start.
const STEADY: Duration = Duration::from_millis(500);
const MAX_DELAY: Duration = Duration::from_secs(5);
/// Daemons that are started to stop the VMs and die before they can.
const STOP_ATTEMPTS: u32 = 5;

/// What the holder starts.
#[derive(Clone, Debug)]
pub struct HolderConfig {
    /// The daemon's command line.
    pub daemon: Vec<OsString>,
    /// The pinner's command line.
    pub pinner: Vec<OsString>,
}

/// Why the holder ended badly.
#[derive(Debug, thiserror::Error)]
pub enum HolderError {
    /// A process could not be started.
    #[error("cannot start the {what}")]
    Start {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The holder's own system calls failed.
    #[error("the holder cannot wait for its processes")]
    Wait(#[source] io::Error),
}

/// Holds mounts and keeps a daemon running until told to stop. Returns the daemon's last
/// exit code. Call it with no other threads running: it blocks signals.
pub fn run(config: HolderConfig) -> Result<i32, HolderError> {
    let signals = StopSignals::take().map_err(HolderError::Wait)?;
    let mut holder = Holder {
        pinner: Process::start("pinner", &config.pinner, PINNER_FD)?,
        daemon: Process::start("daemon", &config.daemon, HOLDER_FD)?,
        config,
        signals,
        domains: BTreeMap::new(),
        dying: Vec::new(),
        canary: None,
        farewell: None,
        failures: 0,
        stop_failures: 0,
        restart_at: None,
    };
    let code = holder.hold();
    holder.end();
    code.map_err(HolderError::Wait)
}

struct Held {
    mountpoint: PathBuf,
    fuse: OwnedFd,
}

struct Holder {
    config: HolderConfig,
    signals: StopSignals,
    domains: BTreeMap<String, Held>,
    pinner: Process,
    daemon: Process,
    /// Killed daemons that still hang in the kernel.
    dying: Vec<Process>,
    /// Shows that the daemon is ready, and when it dies.
    canary: Option<OwnedFd>,
    farewell: Option<Farewell>,
    failures: u32,
    stop_failures: u32,
    restart_at: Option<Instant>,
}

impl Holder {
    /// Until the daemon has ended for good; its exit code.
    fn hold(&mut self) -> io::Result<i32> {
        loop {
            let ready = self.wait()?;
            if ready.signal {
                let arrived = self.signals.take_arrived();
                if arrived.stop && self.restart_at.take().is_some() {
                    if self.domains.is_empty() {
                        return Ok(0);
                    }
                    // Only a daemon can stop the VMs that map what is held here.
                    self.start_next()?;
                    self.farewell = Some(Farewell::Stop);
                } else if arrived.stop {
                    self.stop_daemon();
                } else if arrived.restart && self.restart_at.is_none() {
                    self.pass_on(Signal::HUP);
                }
            }
            if ready.pinner {
                tracing::error!("the pinner ended; its locks are lost");
                self.pinner = Process::start("pinner", &self.config.pinner, PINNER_FD)
                    .map_err(io::Error::other)?;
            }
            // What the daemon said last counts before its end does.
            if ready.control {
                self.hear();
            }
            if (ready.daemon || ready.canary)
                && let Some(code) = self.bury(ready.daemon)?
            {
                return Ok(code);
            }
            if self.restart_at.is_some_and(|at| at <= Instant::now()) {
                self.restart_at = None;
                self.start_next()?;
            }
            self.dying
                .retain_mut(|process| process.try_reap().is_none());
        }
    }

    /// Passes a stop on: at once to a daemon that is ready, or one that was told before;
    /// to one that is still taking over as soon as it can stop the VMs.
    fn stop_daemon(&mut self) {
        let told_before = self.farewell.replace(Farewell::Stop) == Some(Farewell::Stop);
        if self.canary.is_some() || told_before || self.domains.is_empty() {
            self.pass_on(Signal::TERM);
        }
    }

    fn pass_on(&self, signal: Signal) {
        if let Err(error) = pidfd_send_signal(&self.daemon.pidfd, signal) {
            tracing::warn!(%error, ?signal, "the daemon cannot be signalled");
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let input = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let alive = self.restart_at.is_none();
        let mut fds = vec![
            input(self.signals.as_fd()),
            input(self.pinner.pidfd.as_fd()),
        ];
        if alive {
            fds.push(input(self.daemon.pidfd.as_fd()));
            fds.push(input(self.daemon.control.as_fd()));
            fds.extend(self.canary.iter().map(|canary| input(canary.as_fd())));
        }
        // Processes that hang in their death are looked at now and then.
        let mut timeout = (!self.dying.is_empty()).then_some(Duration::from_secs(1));
        if let Some(at) = self.restart_at {
            let left = at.saturating_duration_since(Instant::now());
            timeout = Some(timeout.unwrap_or(left).min(left));
        }
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_ready = |n: usize| fds.get(n).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Ready {
            signal: is_ready(0),
            pinner: is_ready(1),
            daemon: is_ready(2),
            control: is_ready(3),
            canary: is_ready(4),
        })
    }

    /// The daemon died (or its canary did): its exit code if that was for good, else the
    /// next one is started.
    fn bury(&mut self, ended: bool) -> io::Result<Option<i32>> {
        let was_ready = self.canary.take().is_some();
        let lived = self.daemon.started.elapsed();
        let farewell = self.farewell.take();
        let exit_code = if ended || matches!(farewell, Some(Farewell::Stop)) {
            self.daemon.reap()?
        } else {
            self.daemon.try_reap().flatten()
        };
        let for_good = match (farewell, exit_code) {
            (Some(Farewell::Stop) | None, Some(0)) => true,
            // One that was never ready has not stopped the VMs that map what is held.
            (Some(Farewell::Stop), _) => was_ready || self.stop_again(),
            (Some(Farewell::Restart), _) | (None, None) => false,
            // Bad configuration, a socket that is taken: repeating it helps nobody. But with
            // mounts to serve, giving up would kill the VMs that map them.
            (None, Some(_)) => !was_ready && self.domains.is_empty(),
        };
        if for_good {
            return Ok(Some(exit_code.unwrap_or(1)));
        }
        if self.farewell.is_some() {
            self.start_next()?;
            return Ok(None);
        }
        let steady = was_ready && lived > STEADY;
        self.failures = if steady { 0 } else { self.failures + 1 };
        let delay = match self.failures {
            0 | 1 => Duration::ZERO,
            n => (Duration::from_millis(50) * (1 << n.min(10))).min(MAX_DELAY),
        };
        tracing::warn!(
            ?exit_code,
            ?lived,
            ?delay,
            "the daemon died; starting the next one"
        );
        if delay.is_zero() {
            self.start_next()?;
        } else {
            self.restart_at = Some(Instant::now() + delay);
        }
        Ok(None)
    }

    /// Whether to give up on daemons that are to stop the VMs; else the next one is to.
    fn stop_again(&mut self) -> bool {
        self.stop_failures += 1;
        if self.domains.is_empty() || self.stop_failures > STOP_ATTEMPTS {
            return true;
        }
        self.farewell = Some(Farewell::Stop);
        false
    }

    fn start_next(&mut self) -> io::Result<()> {
        let next = Process::start("daemon", &self.config.daemon, HOLDER_FD);
        let dead = std::mem::replace(&mut self.daemon, next.map_err(io::Error::other)?);
        self.dying.push(dead);
        Ok(())
    }

    /// Serves one packet of the daemon.
    fn hear(&mut self) {
        let request = match Packet::receive(&self.daemon.control) {
            Ok(Some(request)) => request,
            // Its end shows by its pidfd; until then there is nothing more to hear.
            Ok(None) => {
                self.daemon.hang_up();
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "the daemon cannot be understood");
                return;
            }
        };
        if let Err(error) = self.serve(request) {
            let reply = Packet::new("error").word(error.to_string().replace('\0', " "));
            if let Err(error) = reply.send(&self.daemon.control, &[]) {
                tracing::warn!(%error, "the daemon does not listen");
            }
        }
    }

    fn serve(&mut self, mut request: Packet) -> io::Result<()> {
        let control = &self.daemon.control;
        let ok = Packet::new("ok");
        match request.text(0)? {
            "domains" => {
                for (name, held) in &self.domains {
                    let row = Packet::new("domain").word(name).path(&held.mountpoint);
                    row.send(control, &[held.fuse.as_fd()])?;
                }
                ok.send(control, &[])
            }
            "create" => {
                let (name, mountpoint) = (request.text(1)?.to_owned(), request.path_at(2)?);
                if let Some(held) = self.domains.get(&name) {
                    let message = format!("{name} is mounted on {}", held.mountpoint.display());
                    return Err(io::Error::other(message));
                }
                let fuse = mount::mount(&mountpoint).map_err(with_causes)?;
                let sent = ok.send(control, &[fuse.as_fd()]);
                self.domains.insert(name, Held { mountpoint, fuse });
                sent
            }
            "remove" => {
                let held = self.domains.remove(request.text(1)?);
                let held = held.ok_or(io::ErrorKind::NotFound)?;
                mount::unmount_lazily(&held.mountpoint)?;
                ok.send(control, &[])
            }
            "pinner" => {
                let (ours, theirs) = packet::pair()?;
                Packet::new("connect").send(&self.pinner.control, &[theirs.as_fd()])?;
                ok.send(control, &[ours.as_fd()])
            }
            "canary" => {
                self.canary = Some(request.take_fd()?);
                ok.send(control, &[])?;
                if matches!(self.farewell, Some(Farewell::Stop)) {
                    self.pass_on(Signal::TERM);
                }
                Ok(())
            }
            "farewell" => {
                self.farewell = Some(request.parse(1)?);
                ok.send(control, &[])
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// The end: unmounts lazily. Mappings that are left fault no more, so a daemon stops
    /// its VMs, or waits for them, before it says farewell.
    fn end(&mut self) {
        for (name, held) in std::mem::take(&mut self.domains) {
            if let Err(error) = mount::unmount_lazily(&held.mountpoint) {
                tracing::warn!(%error, domain = name, "cannot unmount");
            }
        }
        self.pinner.hang_up();
        if let Err(error) = self.pinner.reap() {
            tracing::warn!(%error, "the pinner does not end");
        }
    }
}

fn with_causes(error: mount::MountError) -> io::Error {
    io::Error::other(error_chain(&error))
}

struct Ready {
    signal: bool,
    pinner: bool,
    daemon: bool,
    control: bool,
    canary: bool,
}
