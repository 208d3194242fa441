//! One worker of the holder's: from its start to its end, and what it asks for meanwhile.

use std::io;
use std::ops::Bound;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::client::Shutdown;
use super::process::{Preferred, Process};
use super::{HOLDER_FD, Held, Holder, HolderLimits, STOP_ATTEMPTS, with_causes};
use crate::fuse::mount;
use crate::packet::{self, Packet, Word};

/// A worker that was ready and lived this long did not die of its start.
pub(super) const STEADY: Duration = Duration::from_millis(500);
const MAX_DELAY: Duration = Duration::from_secs(5);
/// How long a process is waited for whose canary is dead.
const EXIT_GRACE: Duration = Duration::from_millis(100);

/// How long to wait before the next start after so many failures in a row.
pub(super) fn delay_after(failures: u32) -> Duration {
    match failures {
        0 | 1 => Duration::ZERO,
        n => (Duration::from_millis(50) * (1 << n.min(10))).min(MAX_DELAY),
    }
}

/// A worker that runs.
pub(super) struct Worker {
    pub process: Process,
    /// It serves its mounts.
    pub ready: bool,
    /// Shows when it dies, once it is ready.
    pub canary: Option<OwnedFd>,
    /// By when its next sign of life has to come: ready, alive, or its end.
    pub due: Instant,
    /// By when it has to make room, once asked to.
    pub leave_by: Option<Instant>,
    /// What it said is to happen when it ends.
    pub shutdown: Option<Shutdown>,
}

impl Worker {
    fn give_until(&mut self, silence: Duration) {
        let due = Instant::now() + silence;
        self.due = self.leave_by.map_or(due, |leave_by| due.min(leave_by));
    }
}

/// The limit grows with failures: a host that is slow now must not be kept from ever serving.
fn ready_limit(limits: &HolderLimits, failures: u32) -> Duration {
    limits.ready * (1 << failures.min(4))
}

impl Holder {
    pub(super) fn start_worker(&mut self) -> io::Result<()> {
        // A new program that never gets ready is given up in favour of the one before, now and
        // then: what it lacks may come.
        let preferred = match self.worker_failures {
            n if n >= 2 && n.is_multiple_of(2) => Preferred::First,
            _ => Preferred::Path,
        };
        let process = Process::start(&self.program, preferred, &self.config.worker, HOLDER_FD)?;
        self.worker = Some(Worker {
            due: Instant::now() + ready_limit(&self.config.limits, self.worker_failures),
            process,
            ready: false,
            canary: None,
            leave_by: None,
            shutdown: None,
        });
        self.next_worker = None;
        Ok(())
    }

    /// The worker ended, or its canary did: its exit code if that was for good.
    pub(super) fn on_worker_exit(&mut self) -> Option<i32> {
        let worker = self.worker.as_mut()?;
        let exit = worker.process.reap_within(EXIT_GRACE);
        if exit.is_none() && self.stop.is_some() {
            // Nobody comes after it, so nobody is kept waiting: its exit code counts.
            worker.canary = None;
            return None;
        }
        self.after_worker(exit.flatten())
    }

    /// Decides what follows a worker: an exit code, if nothing does.
    fn after_worker(&mut self, code: Option<i32>) -> Option<i32> {
        let worker = self.worker.take()?;
        let (was_ready, shutdown) = (worker.ready, worker.shutdown);
        let lived = worker.process.started.elapsed();
        self.dying.push(worker.process);
        match (shutdown, code) {
            (Some(Shutdown::Restart), _) if self.stop.is_none() => {
                self.worker_failures = 0;
                self.next_worker = Some(Instant::now());
                return None;
            }
            (Some(Shutdown::Stop), code) => return Some(code.unwrap_or(1)),
            // One that makes room for the next one has stopped no VM: a stop that comes
            // meanwhile is the next one's to carry out.
            (said, Some(0)) if said != Some(Shutdown::Restart) => return Some(0),
            // Bad configuration, a socket that is taken: repeating it helps nobody. But with
            // mounts to serve, giving up would kill the VMs that map them.
            (_, code) if self.domains.is_empty() && (!was_ready || self.stop.is_some()) => {
                return Some(code.unwrap_or(1));
            }
            _ => {}
        }
        if let Some(stop) = &mut self.stop {
            stop.failures += 1;
            if stop.failures > STOP_ATTEMPTS {
                return Some(self.stop_without_worker());
            }
        }
        let steady = was_ready && lived > STEADY;
        self.worker_failures = if steady { 0 } else { self.worker_failures + 1 };
        let delay = delay_after(self.worker_failures);
        tracing::warn!(
            ?code,
            ?lived,
            ?delay,
            "the worker died; starting the next one"
        );
        self.next_worker = Some(Instant::now() + delay);
        None
    }

    /// Ends what takes longer than it may. The exit code, if that is all that was left to do.
    pub(super) fn enforce_limits(&mut self) -> Option<i32> {
        let now = Instant::now();
        if self.stop.as_ref().is_some_and(|stop| stop.by <= now) {
            return Some(self.stop_without_worker());
        }
        let worker = self.worker.as_ref().filter(|worker| worker.due <= now)?;
        let pid = worker.process.pid();
        if worker.leave_by.is_some_and(|leave_by| leave_by <= now) {
            tracing::error!(
                pid,
                "the worker does not make room for the next one: killing it"
            );
        } else if worker.ready {
            tracing::error!(pid, "no sign of life of the worker: killing it");
        } else {
            tracing::error!(pid, "the worker does not get ready: killing it");
        }
        worker.process.signal(Signal::KILL);
        // It may hang in the kernel until its successor answers: not waited for.
        self.after_worker(None)
    }

    /// The last resort of a stop: no worker has stopped the VMs.
    fn stop_without_worker(&mut self) -> i32 {
        tracing::error!("no worker stops the VMs in time: ending them without one");
        if let Some(worker) = self.worker.take() {
            worker.process.signal(Signal::KILL);
            self.dying.push(worker.process);
        }
        (self.config.last_resort)();
        1
    }

    /// Serves one packet of the worker.
    pub(super) fn read_control(&mut self) {
        let Some(worker) = &mut self.worker else {
            return;
        };
        let request = match Packet::receive(&worker.process.control) {
            Ok(Some(request)) => request,
            // Its end shows by its pidfd; until then there is nothing more to hear.
            Ok(None) => {
                worker.process.hang_up();
                return;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                // Of another version, say: it waits for an answer that it would not get.
                tracing::error!(%error, "the worker cannot be understood");
                worker.process.hang_up();
                return;
            }
        };
        if let Err(error) = self.serve(request)
            && let Some(worker) = &self.worker
        {
            let reply = Packet::new(Word::Error).field(error);
            if let Err(error) = reply.send(&worker.process.control, &[]) {
                tracing::warn!(%error, "the worker does not listen");
            }
        }
    }

    fn serve(&mut self, mut request: Packet) -> io::Result<()> {
        let Some(worker) = &mut self.worker else {
            return Ok(());
        };
        let silence = self.config.limits.silence;
        let control = &worker.process.control;
        let ok = Packet::new(Word::Ok);
        match request.word() {
            Word::After | Word::Domain => {
                let name = request.text(0)?.to_owned();
                let first = match request.word() {
                    Word::After => Bound::Excluded(name.clone()),
                    _ => Bound::Included(name.clone()),
                };
                let found = self.domains.range((first, Bound::Unbounded)).next();
                let is_asked = |found: &str| request.word() == Word::After || found == name;
                match found.filter(|(found, _)| is_asked(found)) {
                    Some((name, held)) => Packet::new(Word::Domain)
                        .field(name)
                        .path(&held.mountpoint)
                        .send(control, &[held.fuse.as_fd()]),
                    None => ok.send(control, &[]),
                }
            }
            Word::Create => {
                let (name, mountpoint) = (request.text(0)?.to_owned(), request.path_at(1)?);
                if let Some(held) = self.domains.get(&name) {
                    let message = format!("{name} is mounted on {}", held.mountpoint.display());
                    return Err(io::Error::other(message));
                }
                let fuse = mount::mount(&mountpoint).map_err(with_causes)?;
                let sent = ok.send(control, &[fuse.as_fd()]);
                self.domains.insert(name, Held { mountpoint, fuse });
                sent
            }
            Word::Pinner => {
                let pinner = self.pinner.as_ref();
                let pinner = pinner.ok_or_else(|| io::Error::other("no pinner runs just now"))?;
                let (ours, theirs) = packet::pair()?;
                Packet::new(Word::Connect).send(&pinner.control, &[theirs.as_fd()])?;
                ok.send(control, &[ours.as_fd()])
            }
            Word::Ready => {
                let canary = request.take_fd()?;
                ok.send(control, &[])?;
                worker.canary = Some(canary);
                worker.ready = true;
                worker.give_until(silence);
                if self.stop.is_some() {
                    worker.process.signal(Signal::TERM);
                }
                Ok(())
            }
            Word::Alive => {
                if worker.ready {
                    worker.give_until(silence);
                }
                Ok(())
            }
            Word::Shutdown => {
                let shutdown = request.parse(0)?;
                worker.shutdown = Some(shutdown);
                let sent = ok.send(control, &[]);
                if shutdown == Shutdown::Stop {
                    self.expect_stop();
                }
                sent
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_and_limits_grow_and_end() {
        assert_eq!(delay_after(1), Duration::ZERO);
        assert!(delay_after(2) < delay_after(4));
        assert_eq!(delay_after(1000), MAX_DELAY);
        let limits = HolderLimits::default();
        assert_eq!(ready_limit(&limits, 0), limits.ready);
        assert_eq!(ready_limit(&limits, 1000), limits.ready * 16);
    }
}
