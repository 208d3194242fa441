//! Signs of life to the holder, for as long as this worker does its work.
//!
//! A worker that is stopped, deadlocked or starved has threads that live and serves nobody.
//! So the holder is told that it is alive only while its planner, its tasks and the threads
//! that answer faults make progress; after a while without a sign the holder kills it and
//! starts the next. A thread of its own, since it has to judge the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::health::Dependency;
use crate::daemon::Host;

/// Between two signs of life.
const EVERY: Duration = Duration::from_secs(1);
/// A planner or a task that should run every second and has not for so long hangs.
const STUCK: Duration = Duration::from_secs(10);
/// A request of the kernel's takes no longer, even from a slow disk.
const STUCK_REQUEST: Duration = Duration::from_secs(30);

/// When something last made progress.
#[derive(Debug)]
struct Pulse {
    since: Instant,
    last_ms: AtomicU64,
}

impl Default for Pulse {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            last_ms: AtomicU64::new(0),
        }
    }
}

impl Pulse {
    /// Progress now.
    fn beat(&self) {
        self.last_ms.store(self.elapsed_ms(), Relaxed);
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// True if the last progress is longer ago than `limit`.
    fn is_older_than(&self, limit: Duration) -> bool {
        let age_ms = self.elapsed_ms().saturating_sub(self.last_ms.load(Relaxed));
        Duration::from_millis(age_ms) > limit
    }
}

/// Starts giving signs of life; `on_orphaned` runs once there is no holder to give them to.
pub fn start(host: &Arc<Host>, on_orphaned: impl FnOnce() + Send + 'static) {
    let tasks = Arc::new(Pulse::default());
    let beating = Arc::clone(&tasks);
    tokio::spawn(async move {
        loop {
            beating.beat();
            tokio::time::sleep(EVERY).await;
        }
    });
    let judged = Arc::clone(host);
    let thread = std::thread::Builder::new().name("heartbeat".to_owned());
    let started = thread.spawn(move || beat(&judged, &tasks, on_orphaned));
    if let Err(error) = started {
        // The holder will find that no sign comes, and start another worker.
        tracing::error!(%error, "no heartbeat");
    }
}

fn beat(host: &Host, tasks: &Pulse, on_orphaned: impl FnOnce()) {
    let sessions = host.domains.sessions();
    loop {
        match stuck(host, tasks) {
            None => {
                if sessions.alive().is_err() {
                    break;
                }
            }
            Some(what) => tracing::error!(what, "stuck; no sign of life"),
        }
        if sessions.wait_for_holders_end(EVERY) {
            break;
        }
    }
    host.health.lack(
        Dependency::Holder,
        "it has ended; `forelay daemon` takes the mounts over from this worker",
    );
    on_orphaned();
}

/// What makes no progress.
fn stuck(host: &Host, tasks: &Pulse) -> Option<&'static str> {
    if host.memory.last_step_age() > STUCK {
        return Some("the planner");
    }
    if tasks.is_older_than(STUCK) {
        return Some("the tasks");
    }
    let domains = host.domains.all();
    let serve = domains
        .iter()
        .all(|memory| memory.shared.is_served(STUCK_REQUEST));
    (!serve).then_some("the threads that answer faults")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pulse_grows_old_until_the_next_beat() {
        let pulse = Pulse::default();
        pulse.last_ms.store(0, Relaxed);
        let old = Pulse {
            since: Instant::now() - Duration::from_secs(60),
            last_ms: AtomicU64::new(1000),
        };
        assert!(!pulse.is_older_than(Duration::from_secs(10)));
        assert!(old.is_older_than(Duration::from_secs(10)));
        old.beat();
        assert!(!old.is_older_than(Duration::from_secs(10)));
    }
}
