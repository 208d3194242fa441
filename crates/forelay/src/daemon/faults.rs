//! Whose faults were they: counts of demand fetches and stalls for each VM.
//!
//! The kernel says which thread waited; which VMM that thread belongs to is looked up
//! once for each thread. Faults of processes that are no VM count for nobody. Why bytes of a
//! launch's plan were not there is told from what was missing when it was asked for and from
//! what was evicted since.
//!
//! Invariant: a thread belongs to one process for as long as that lives, so the answer
//! is kept until the VM is forgotten.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use forelay_cache::SharedImage;
use forelay_cache::page_set::{PageRun, PageSet};
use forelay_image::{Digest, Extent};
use parking_lot::Mutex;

use crate::api::WaitCauses;

/// Pages of images.
type Pages = BTreeMap<Digest, PageSet>;

/// What a launch was expected to touch.
#[derive(Debug, Default)]
pub struct Plan {
    all: Pages,
    /// Of it, what was not in shared memory when the launch was asked for.
    missing: Pages,
}

impl Plan {
    /// A plan of these extents, of which some were missing.
    pub fn new(
        all: impl IntoIterator<Item = (Digest, Extent)>,
        missing: impl IntoIterator<Item = (Digest, Extent)>,
    ) -> Self {
        fn pages(extents: impl IntoIterator<Item = (Digest, Extent)>) -> Pages {
            let mut pages = Pages::new();
            for (image, extent) in extents {
                pages
                    .entry(image)
                    .or_default()
                    .insert(PageRun::covering(extent));
            }
            pages
        }
        let (all, missing) = (pages(all), pages(missing));
        Self { all, missing }
    }
}

fn any_of(pages: Option<&PageSet>, extent: Extent) -> bool {
    pages.is_some_and(|pages| pages.count_within(PageRun::covering(extent)) > 0)
}

/// What one VM waited for.
#[derive(Debug, Default)]
pub struct Waits {
    fetches: AtomicU64,
    bytes: AtomicU64,
    stall_ns: AtomicU64,
    plan: Mutex<Plan>,
    causes: Mutex<WaitCauses>,
}

/// A snapshot of [`Waits`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitFigures {
    /// Why it waited.
    pub causes: WaitCauses,
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
            causes: figures.causes,
        }
    }
}

impl Waits {
    /// From now on causes are told by this plan.
    pub fn expect(&self, plan: Plan) {
        *self.plan.lock() = plan;
    }

    /// Notes why bytes had to be waited for; `evicted` says that they were here and were
    /// given back.
    fn note_cause(&self, image: &Digest, extent: Extent, evicted: bool) {
        let plan = self.plan.lock();
        let mut causes = self.causes.lock();
        let cause = if !any_of(plan.all.get(image), extent) {
            &mut causes.unforeseen
        } else if any_of(plan.missing.get(image), extent) {
            &mut causes.late
        } else if evicted {
            &mut causes.evicted
        } else {
            &mut causes.reclaimed
        };
        *cause += 1;
    }

    /// The figures now.
    pub fn figures(&self) -> WaitFigures {
        WaitFigures {
            causes: *self.causes.lock(),
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
    /// What was given back and has not returned.
    evicted: Mutex<BTreeMap<SharedImage, PageSet>>,
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

    /// Bytes were given back.
    pub fn evicted(&self, image: &SharedImage, extents: &[Extent]) {
        let mut evicted = self.evicted.lock();
        let pages = evicted.entry(image.clone()).or_default();
        for &extent in extents {
            pages.insert(PageRun::covering(extent));
        }
    }

    /// Bytes are in shared memory; whether they had been evicted.
    pub fn returned(&self, image: &SharedImage, extent: Extent) -> bool {
        let mut evicted = self.evicted.lock();
        let pages = evicted.get_mut(image);
        pages.is_some_and(|pages| pages.remove(PageRun::covering(extent)) > 0)
    }

    /// A fault of `thread` for these bytes was answered after `stall`.
    pub fn answered(&self, thread: u32, image: &SharedImage, extent: Extent, stall: Duration) {
        let evicted = self.returned(image, extent);
        self.total.add(extent.len, stall);
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
            waits.add(extent.len, stall);
            waits.note_cause(&image.image, extent, evicted);
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
        let image = SharedImage::new("d".into(), Digest::of(b"image"));
        let page = Extent::new(0, 4096);
        attribution.answered(own, &image, page, Duration::from_micros(5));
        attribution.answered(1, &image, page, Duration::from_micros(5));
        let figures = waits.figures();
        assert_eq!(
            (figures.fetches, figures.bytes, figures.stall_ns),
            (1, 4096, 5_000)
        );
        assert_eq!(attribution.total.figures().fetches, 2);
        assert_eq!(attribution.figures(own), Some(figures));
        attribution.remove(own);
        assert_eq!(attribution.figures(own), None);
        attribution.answered(own, &image, page, Duration::ZERO);
        assert_eq!(waits.figures().fetches, 1);
    }

    #[test]
    fn each_wait_has_one_cause() {
        let attribution = Attribution::default();
        let own = std::process::id();
        let waits = attribution.add(own);
        let image = SharedImage::new("d".into(), Digest::of(b"image"));
        let page = |number: u64| Extent::new(number * 4096, 4096);
        let of_image = |number| (image.image, page(number));
        waits.expect(Plan::new([0, 1, 2].map(of_image), [0].map(of_image)));
        attribution.evicted(&image, &[page(1), page(2), page(3)]);
        // Loaded again, and then the kernel took it.
        assert!(attribution.returned(&image, page(2)));
        for number in 0..4 {
            attribution.answered(own, &image, page(number), Duration::ZERO);
        }
        let causes = WaitCauses {
            late: 1,
            evicted: 1,
            reclaimed: 1,
            unforeseen: 1,
        };
        assert_eq!(waits.figures().causes, causes);
        assert!(!attribution.returned(&image, page(1)), "it has returned");
    }
}
