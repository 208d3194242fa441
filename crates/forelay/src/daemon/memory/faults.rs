//! Whose faults were they: counts of demand fetches and stalls for each VM.
//!
//! The kernel says which thread waits; which VMM that thread belongs to is looked up
//! once for each thread. Faults of processes that are no VM count for nobody. Why bytes of a
//! launch's plan were not there is told from what was missing when it was asked for and from
//! what was evicted since.
//!
//! Invariants: a thread belongs to one process for as long as that lives, so the answer
//! is kept until the VM is forgotten. While a VM waits nothing is done but that look-up; all
//! else follows its answer, and what was evicted is looked at for a VM that expected it alone.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use forelay_cache::SharedImage;
use forelay_image::pages::{PageRun, PageSet};
use forelay_image::{Digest, Extent};
use parking_lot::{Mutex, RwLock};

use crate::api::WaitCauses;
use crate::host_stats::HostStats;

/// Pages of several images.
type PagesByImage = BTreeMap<Digest, PageSet>;

/// What a launch was expected to touch.
#[derive(Debug, Default)]
pub struct Plan {
    all: PagesByImage,
    /// Of it, what was not in shared memory when the launch was asked for.
    missing: PagesByImage,
}

impl Plan {
    /// A plan of these extents, of which some were missing.
    pub fn new(
        all: impl IntoIterator<Item = (Digest, Extent)>,
        missing: impl IntoIterator<Item = (Digest, Extent)>,
    ) -> Self {
        fn pages(extents: impl IntoIterator<Item = (Digest, Extent)>) -> PagesByImage {
            let mut pages = PagesByImage::new();
            for (image, extent) in extents {
                pages.entry(image).or_default().extend([extent]);
            }
            pages
        }
        let (all, missing) = (pages(all), pages(missing));
        Self { all, missing }
    }
}

fn any_of(pages: Option<&PageSet>, extent: Extent) -> bool {
    pages.is_some_and(|pages| pages.intersects(PageRun::covering(extent)))
}

/// What one VM waited for.
#[derive(Debug, Default)]
pub struct Waits {
    /// Name of the VM.
    pub vm: String,
    /// Process id of its VMM.
    pub pid: u32,
    fetches: AtomicU64,
    bytes: AtomicU64,
    stall_ns: AtomicU64,
    plan: Plan,
    causes: Mutex<ByCause>,
}

/// Fetches and their bytes, by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct ByCause {
    fetches: WaitCauses,
    bytes: WaitCauses,
}

/// One of the causes.
type Cause = fn(&mut WaitCauses) -> &mut u64;

/// A snapshot of [`Waits`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitFigures {
    /// Why it waited.
    pub causes: WaitCauses,
    /// Bytes that it waited for, by the same causes.
    pub cause_bytes: WaitCauses,
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
    /// Why bytes had to be waited for; `evicted` says whether they were here and were given
    /// back.
    fn cause_of(
        &self,
        image: &SharedImage,
        extent: Extent,
        evicted: impl FnOnce() -> bool,
    ) -> Cause {
        let is_in = |pages: &PagesByImage| any_of(pages.get(&image.image), extent);
        if !is_in(&self.plan.all) {
            |causes| &mut causes.unforeseen
        } else if is_in(&self.plan.missing) {
            |causes| &mut causes.late
        } else if evicted() {
            |causes| &mut causes.evicted
        } else {
            |causes| &mut causes.reclaimed
        }
    }

    fn note_cause(&self, cause: Cause, bytes: u64) {
        let mut causes = self.causes.lock();
        *cause(&mut causes.fetches) += 1;
        *cause(&mut causes.bytes) += bytes;
    }

    /// Whether its launch had a plan for this image.
    pub fn foresaw(&self, image: &Digest) -> bool {
        self.plan.all.contains_key(image)
    }

    /// The figures now.
    pub fn figures(&self) -> WaitFigures {
        let ByCause { fetches, bytes } = *self.causes.lock();
        WaitFigures {
            causes: fetches,
            cause_bytes: bytes,
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
    table: RwLock<Table>,
    /// What was given back and has not returned, of images that VMs can reach.
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
    /// Counts for the VMM `pid` from now on, whose VM `vm` was expected to touch `plan`.
    pub fn add(&self, pid: u32, vm: &str, plan: Plan) -> Arc<Waits> {
        let waits = Arc::new(Waits {
            vm: vm.to_owned(),
            pid,
            plan,
            ..Waits::default()
        });
        let mut table = self.table.write();
        table
            .threads
            .retain(|_, process| *process != 0 && *process != pid);
        table.vms.insert(pid, Arc::clone(&waits));
        waits
    }

    /// What the VMM `pid` waited for until now.
    pub fn figures(&self, pid: u32) -> Option<WaitFigures> {
        let table = self.table.read();
        table.vms.get(&pid).map(|waits| waits.figures())
    }

    /// Forgets the VMM `pid`.
    pub fn remove(&self, pid: u32) {
        let mut table = self.table.write();
        table.vms.remove(&pid);
        table.threads.retain(|_, process| *process != pid);
    }

    /// Bytes were given back.
    pub fn evicted(&self, image: &SharedImage, extents: &[Extent]) {
        let mut evicted = self.evicted.lock();
        let pages = evicted.entry(image.clone()).or_default();
        pages.extend(extents.iter().copied());
    }

    /// Bytes are in shared memory.
    pub fn returned(&self, image: &SharedImage, extent: Extent) {
        let mut evicted = self.evicted.lock();
        if let Some(pages) = evicted.get_mut(image) {
            pages.remove(PageRun::covering(extent));
            if pages.is_empty() {
                evicted.remove(image);
            }
        }
    }

    /// Forgets what was evicted of images that no VM can reach: the VM that is given one later
    /// finds these bytes missing when its launch is asked for.
    pub fn keep_evicted(&self, is_mapped: impl Fn(&SharedImage) -> bool) {
        self.evicted.lock().retain(|image, _| is_mapped(image));
    }

    /// The figures of the VM that a thread belongs to, which waits for an answer and
    /// therefore lives.
    pub fn vm_of(&self, thread: u32) -> Option<Arc<Waits>> {
        let table = self.table.read();
        if let Some(process) = table.threads.get(&thread) {
            return table.vms.get(process).cloned();
        }
        drop(table);
        let process = HostStats::default().process_of(thread);
        let mut table = self.table.write();
        let process = process.filter(|pid| table.vms.contains_key(pid));
        table.threads.insert(thread, process.unwrap_or(0));
        table.vms.get(&process?).cloned()
    }

    /// A fault for these bytes was answered after `stall`; `vm` is as [`Self::vm_of`] said.
    pub fn answered(
        &self,
        vm: Option<&Waits>,
        image: &SharedImage,
        extent: Extent,
        stall: Duration,
    ) {
        self.total.add(extent.len, stall);
        if let Some(waits) = vm {
            waits.add(extent.len, stall);
            let cause = waits.cause_of(image, extent, || {
                any_of(self.evicted.lock().get(image), extent)
            });
            waits.note_cause(cause, extent.len);
            self.total.note_cause(cause, extent.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_of_a_thread_count_for_its_process_and_strangers_for_nobody() {
        let attribution = Attribution::default();
        let own = std::process::id();
        let waits = attribution.add(own, "web", Plan::default());
        let image = SharedImage::new("d".into(), Digest::of(b"image"));
        let answered = |thread| {
            let vm = attribution.vm_of(thread);
            let page = Extent::new(0, 4096);
            attribution.answered(vm.as_deref(), &image, page, Duration::from_micros(5));
        };
        answered(own);
        answered(1);
        let figures = waits.figures();
        assert_eq!(
            (figures.fetches, figures.bytes, figures.stall_ns),
            (1, 4096, 5_000)
        );
        assert_eq!(attribution.total.figures().fetches, 2);
        assert_eq!(attribution.figures(own), Some(figures));
        attribution.remove(own);
        assert_eq!(attribution.figures(own), None);
        answered(own);
        assert_eq!(waits.figures().fetches, 1);
        assert_eq!(attribution.total.figures().fetches, 3);
    }

    #[test]
    fn each_wait_has_one_cause_and_the_evicted_leave_with_their_image() {
        let attribution = Attribution::default();
        let image = SharedImage::new("d".into(), Digest::of(b"image"));
        let page = |number: u64| Extent::new(number * 4096, 4096);
        let of_image = |number| (image.image, page(number));
        let plan = Plan::new([0, 1, 2].map(of_image), [0].map(of_image));
        let waits = attribution.add(std::process::id(), "web", plan);
        let others = SharedImage::new("d".into(), Digest::of(b"other"));
        attribution.evicted(&others, &[page(1)]);
        attribution.evicted(&image, &[page(1), page(2), page(3)]);
        // Loaded again, and then the kernel took it.
        attribution.returned(&image, page(2));
        let fault = |number| {
            attribution.answered(Some(&*waits), &image, page(number), Duration::ZERO);
        };
        (0..4).for_each(fault);
        let mut causes = WaitCauses {
            late: 1,
            evicted: 1,
            reclaimed: 1,
            unforeseen: 1,
        };
        assert_eq!(waits.figures().causes, causes);
        attribution.returned(&image, page(1));
        fault(1);
        causes.reclaimed += 1;
        assert_eq!(waits.figures().causes, causes, "it had returned");
        let host = attribution.total.figures();
        assert_eq!(host.causes, causes);
        assert_eq!(host.cause_bytes.reclaimed, 2 * 4096);
        attribution.keep_evicted(|mapped| *mapped == image);
        let kept = |attribution: &Attribution| {
            let evicted = attribution.evicted.lock();
            evicted.keys().cloned().collect::<Vec<_>>()
        };
        assert_eq!(kept(&attribution), std::slice::from_ref(&image));
        attribution.returned(&image, page(3));
        assert_eq!(kept(&attribution), []);
    }
}
