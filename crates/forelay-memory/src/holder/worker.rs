//! One worker of the holder's: from its start to its end, and what it asks for meanwhile.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::client::Shutdown;
use super::process::{Preferred, Process};
use super::{HOLDER_FD, Held, Holder, HolderLimits, LOOK_EVERY, STOP_ATTEMPTS, with_causes};
use crate::fuse::mount;
use crate::packet::{self, Packet, Word};

/// A process that lived this long did not die of its start: the next one need not be delayed.
pub(super) const SERVED: Duration = Duration::from_millis(500);
/// A worker that was ready for this long is not given up in favour of an earlier program.
pub(super) const STEADY: Duration = Duration::from_secs(30);
/// So many killed processes may hang in the kernel before no more workers are killed: what
/// they wait for, a disk say, is what the next worker would wait for, too.
const MAX_DYING: usize = 3;
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
    /// Since when it serves its mounts.
    pub ready: Option<Instant>,
    /// Shows when it dies, once it is ready.
    pub canary: Option<OwnedFd>,
    /// By when its next sign of life has to come: ready, alive, or its end.
    pub due: Instant,
    /// By when it has to make room, once asked to.
    pub leave_by: Option<Instant>,
    /// What it said is to happen when it ends.
    pub shutdown: Option<Shutdown>,
    /// Overdue, and not killed: see [`MAX_DYING`].
    spared: bool,
    /// Given time since its last sign of life because the host stood still: once is enough, or
    /// a host that always stutters would keep a worker that hangs.
    looked_again: bool,
    /// To be asked to make room as soon as it is ready: until then a signal would end it.
    restart_when_ready: bool,
}

impl Worker {
    fn give_until(&mut self, now: Instant, silence: Duration) {
        let due = now + silence;
        self.due = self.leave_by.map_or(due, |leave_by| due.min(leave_by));
        // One that is to make room has no more time, whatever it says.
        self.looked_again &= self.leave_by.is_some();
        self.spared = false;
    }

    /// Asks a ready worker to make room within `limit`.
    pub(super) fn ask_to_leave(&mut self, now: Instant, limit: Duration) {
        if self.ready.is_none() {
            self.restart_when_ready = true;
            return;
        }
        self.process.signal(Signal::HUP);
        let leave_by = now + limit;
        self.leave_by = Some(leave_by);
        self.due = self.due.min(leave_by);
    }
}

/// The limit grows with failures: a host that is slow now must not be kept from ever serving.
fn ready_limit(limits: &HolderLimits, failures: u32) -> Duration {
    limits.ready * (1 << failures.min(4))
}

impl Holder {
    pub(super) fn start_worker(&mut self) -> io::Result<()> {
        // A new program that does not get ready, or does not stay so, is given up in favour of
        // the one before, now and then: what it lacks may come.
        let preferred = match self.unsteady_workers {
            n if n >= 2 && n.is_multiple_of(2) => Preferred::First,
            _ => Preferred::Path,
        };
        let now = self.now();
        let process = self.start(preferred, &self.config.worker, HOLDER_FD)?;
        self.worker = Some(Worker {
            due: now + ready_limit(&self.config.limits, self.worker_failures),
            process,
            ready: None,
            canary: None,
            leave_by: None,
            shutdown: None,
            spared: false,
            looked_again: false,
            restart_when_ready: false,
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
        let now = self.now();
        let (was_ready, shutdown) = (worker.ready.is_some(), worker.shutdown);
        let lived = now - worker.process.started;
        let served = worker.ready.map_or(Duration::ZERO, |since| now - since);
        self.dying.push(worker.process);
        match (shutdown, code) {
            (Some(Shutdown::Restart), _) if self.stop.is_none() => {
                (self.worker_failures, self.unsteady_workers) = (0, 0);
                self.next_worker = Some(now);
                return None;
            }
            (Some(Shutdown::Stop), code) => return Some(code.unwrap_or(1)),
            // One that makes room for the next one has stopped no VM: a stop that comes
            // meanwhile is the next one's to carry out.
            // And a program that ends well without ever having served (it printed how it is
            // used) is no stop either while there are mounts.
            (said, Some(0))
                if said != Some(Shutdown::Restart)
                    && (was_ready || self.stop.is_some() || self.domains.is_empty()) =>
            {
                return Some(0);
            }
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
        let count = |failed: bool, before: u32| if failed { before + 1 } else { 0 };
        self.worker_failures = count(served <= SERVED, self.worker_failures);
        self.unsteady_workers = count(served <= STEADY, self.unsteady_workers);
        let delay = delay_after(self.worker_failures);
        tracing::warn!(
            ?code,
            ?lived,
            ?delay,
            "the worker died; starting the next one"
        );
        self.next_worker = Some(now + delay);
        None
    }

    /// Ends what takes longer than it may. The exit code, if that is all that was left to do.
    pub(super) fn enforce_limits(&mut self, now: Instant) -> Option<i32> {
        if self.stop.as_ref().is_some_and(|stop| stop.by <= now) {
            return Some(self.stop_without_worker());
        }
        let worker = self.worker.as_mut().filter(|worker| worker.due <= now)?;
        let pid = worker.process.pid();
        if self.dying.len() >= MAX_DYING {
            worker.due = now + LOOK_EVERY;
            if !std::mem::replace(&mut worker.spared, true) {
                let hanging: Vec<u32> = self.dying.iter().map(Process::pid).collect();
                tracing::error!(
                    pid,
                    ?hanging,
                    "the worker is overdue, and workers that were killed before it hang in the \
                     kernel (a disk that does not answer?): leaving it alone until one of them ends"
                );
            }
            return None;
        }
        if worker.leave_by.is_some_and(|leave_by| leave_by <= now) {
            tracing::error!(
                pid,
                "the worker does not make room for the next one: killing it"
            );
        } else if worker.ready.is_some() {
            tracing::error!(pid, "no sign of life of the worker: killing it");
        } else {
            tracing::error!(pid, "the worker does not get ready: killing it");
        }
        worker.process.signal(Signal::KILL);
        // It may hang in the kernel until its successor answers: not waited for.
        self.after_worker(None)
    }

    /// Gives everybody some time: the holder did not run, so others may not have either, and
    /// what they had to say by now is still to come.
    pub(super) fn look_again(&mut self, overslept: Duration) {
        tracing::warn!(
            ?overslept,
            "the host did not run; looking again before anything ends"
        );
        let soon = self.now() + self.config.limits.silence;
        let later = |by: &mut Instant| *by = soon.max(*by);
        if let Some(worker) = &mut self.worker
            && !std::mem::replace(&mut worker.looked_again, true)
        {
            later(&mut worker.due);
            worker.leave_by.iter_mut().for_each(later);
        }
        if let Some(stop) = &mut self.stop
            && !std::mem::replace(&mut stop.looked_again, true)
        {
            later(&mut stop.by);
        }
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
        let now = self.now();
        let Some(worker) = &mut self.worker else {
            return Ok(());
        };
        let silence = self.config.limits.silence;
        let control = &worker.process.control;
        let ok = Packet::new(Word::Ok);
        match request.word() {
            Word::After | Word::Domain => {
                let name = request.text(0)?.to_owned();
                match find_domain(&self.domains, &name, request.word()) {
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
                worker.ready = Some(now);
                worker.give_until(now, silence);
                if self.stop.is_some() {
                    worker.process.signal(Signal::TERM);
                } else if std::mem::take(&mut worker.restart_when_ready) {
                    worker.ask_to_leave(now, self.config.limits.restart);
                }
                Ok(())
            }
            Word::Alive => {
                if worker.ready.is_some() {
                    worker.give_until(now, silence);
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

/// The mount of this name, or for [`Word::After`] the first one after it.
fn find_domain<'a>(
    domains: &'a BTreeMap<String, Held>,
    name: &str,
    asked: Word,
) -> Option<(&'a String, &'a Held)> {
    match asked {
        Word::After => {
            let after = (Bound::Excluded(name), Bound::Unbounded);
            domains.range::<str, _>(after).next()
        }
        _ => domains.get_key_value(name),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{HolderConfig, HolderError};
    use super::*;

    fn holder_of_sleepers() -> Holder {
        let holder = Holder::new(HolderConfig {
            program: "/bin/sleep".into(),
            worker: vec!["600".into()],
            pinner: vec!["600".into()],
            check: None,
            last_resort: Box::new(|| {}),
            limits: HolderLimits::default(),
            clock: Instant::now,
        });
        holder.unwrap()
    }

    #[test]
    fn no_more_workers_are_killed_while_too_many_hang_in_their_death() {
        let mut holder = holder_of_sleepers();
        for _ in 0..MAX_DYING {
            holder.start_worker().unwrap();
            let hanging = holder.worker.take().unwrap();
            holder.dying.push(hanging.process);
        }
        holder.start_worker().unwrap();
        let worker = holder.worker.as_mut().unwrap();
        let pid = worker.process.pid();
        let now = Instant::now();
        (worker.ready, worker.due) = (Some(now), now);
        assert_eq!(holder.enforce_limits(now), None);
        let worker = holder.worker.as_mut().unwrap();
        assert!(worker.process.pid() == pid && worker.process.try_reap().is_none());
        assert!(worker.due >= now + LOOK_EVERY, "it is looked at again");
        // One of them comes back from its disk and dies.
        let mut ended = holder.dying.pop().unwrap();
        ended.signal(Signal::KILL);
        ended.reap_within(Duration::from_secs(600)).unwrap();
        worker.due = now;
        assert_eq!(holder.enforce_limits(now), None);
        assert!(holder.worker.is_none() && holder.next_worker.is_some());
        let mut killed = holder.dying.pop().unwrap();
        assert_eq!(killed.pid(), pid);
        killed.reap_within(Duration::from_secs(600)).unwrap();
        for process in &holder.dying {
            process.signal(Signal::KILL);
        }
    }

    #[test]
    fn a_holder_that_can_not_hold_says_so_before_it_is_given_anything() {
        let config = HolderConfig {
            program: "/nowhere/forelay".into(),
            ..holder_of_sleepers().config
        };
        let refused = Holder::new(config).err().unwrap();
        assert!(matches!(refused, HolderError::Start { what: "worker", .. }));
    }

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
