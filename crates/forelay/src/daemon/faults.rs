//! Whose faults were they: counts of demand fetches and stalls for each VM.
//!
//! The kernel says which thread waited; which VMM that thread belongs to is looked up
//! once for each thread. Faults of processes that are no VM count for nobody.
//!
//! Invariant: a thread belongs to one process for as long as that lives, so the answer
//! is kept until the VM is forgotten.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;

/// What one VM waited for.
#[derive(Debug, Default)]
pub struct Waits {
    fetches: AtomicU64,
    bytes: AtomicU64,
    stall_ns: AtomicU64,
}

/// A snapshot of [`Waits`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitFigures {
    /// Faults that had to wait for bytes not in shared memory.
    pub fetches: u64,
    /// Bytes they asked for.
    pub bytes: u64,
    /// Sum of the times they waited.
    pub stall_ns: u64,
}

impl From<WaitFigures> for crate::api::Waits {
    fn from(figures: WaitFigures) -> Self {
        Self {
            demand_fetches: figures.fetches,
            demand_bytes: figures.bytes,
            stall_s: figures.stall_ns as f64 / 1e9,
        }
    }
}

impl Waits {
    /// The figures now.
    pub fn figures(&self) -> WaitFigures {
        WaitFigures {
            fetches: self.fetches.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            stall_ns: self.stall_ns.load(Relaxed),
        }
    }

    fn add(&self, bytes: u64, stall: Duration) {
        self.fetches.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
        self.stall_ns
            .fetch_add(u64::try_from(stall.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }
}

/// Finds the VM that a waiting thread belongs to.
#[derive(Debug, Default)]
pub struct Attribution {
    table: Mutex<Table>,
    /// Everything that waited, VM or not.
    pub total: Waits,
}

#[derive(Debug, Default)]
struct Table {
    /// VMM pid to its VM's figures.
    vms: HashMap<u32, Arc<Waits>>,
    /// Thread to pid of its process; 0 for a process that is no VM.
    threads: HashMap<u32, u32>,
}

impl Attribution {
    /// Counts for the VMM `pid` from now on.
    pub fn add(&self, pid: u32) -> Arc<Waits> {
        let mut table = self.table.lock();
        table
            .threads
            .retain(|_, process| *process != 0 && *process != pid);
        Arc::clone(table.vms.entry(pid).or_default())
    }

    /// What the VMM `pid` waited for until now.
    pub fn figures(&self, pid: u32) -> Option<WaitFigures> {
        let table = self.table.lock();
        table.vms.get(&pid).map(|waits| waits.figures())
    }

    /// Forgets the VMM `pid`.
    pub fn remove(&self, pid: u32) {
        let mut table = self.table.lock();
        table.vms.remove(&pid);
        table.threads.retain(|_, process| *process != pid);
    }

    /// A fault of `thread` for `bytes` bytes was answered after `stall`.
    pub fn answered(&self, thread: u32, bytes: u64, stall: Duration) {
        self.total.add(bytes, stall);
        let mut table = self.table.lock();
        let process = match table.threads.get(&thread) {
            Some(&process) => process,
            None => {
                let process = process_of(thread).filter(|pid| table.vms.contains_key(pid));
                let process = process.unwrap_or(0);
                table.threads.insert(thread, process);
                process
            }
        };
        if let Some(waits) = table.vms.get(&process) {
            waits.add(bytes, stall);
        }
    }
}

/// The process that a thread belongs to.
fn process_of(thread: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_of_a_thread_count_for_its_process_and_strangers_for_nobody() {
        let attribution = Attribution::default();
        let own = std::process::id();
        let waits = attribution.add(own);
        let thread = std::thread::spawn(|| rustix::thread::gettid().as_raw_nonzero().get() as u32);
        // The thread has ended, so it cannot be looked up; the main thread can.
        let _ = thread.join();
        attribution.answered(own, 4096, Duration::from_micros(5));
        attribution.answered(1, 4096, Duration::from_micros(5));
        let figures = waits.figures();
        assert_eq!(
            (figures.fetches, figures.bytes, figures.stall_ns),
            (1, 4096, 5_000)
        );
        assert_eq!(attribution.total.figures().fetches, 2);
        assert_eq!(attribution.figures(own), Some(figures));
        attribution.remove(own);
        assert_eq!(attribution.figures(own), None);
        attribution.answered(own, 4096, Duration::ZERO);
        assert_eq!(waits.figures().fetches, 1);
    }
}
