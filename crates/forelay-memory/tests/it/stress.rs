//! Many things at once: mappers, pushes, pins and evictions on the same files, answers
//! that come late, out of order, or at first not at all.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use forelay_image::extent::Extent;
use forelay_memory::observe::{self, FileIdentity};
use forelay_memory::{Fault, FaultHandler, SharedMemory};
use procfs::process::{MMapPath, Process};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::frames::frames;
use crate::support::{Images, MIB, Mapper, PAGE, TestImage, TestMount, eventually, skipped};

/// Drops each third fault, and answers the others from another thread.
struct Unreliable {
    seen: Mutex<u64>,
    late: Mutex<std::sync::mpsc::Sender<Fault>>,
}

impl Unreliable {
    fn new(images: &[TestImage]) -> Arc<Self> {
        let (sender, faults) = std::sync::mpsc::channel::<Fault>();
        let answers = Images::new(images);
        std::thread::spawn(move || faults.into_iter().for_each(|fault| answers.fault(fault)));
        Arc::new(Self {
            seen: Mutex::new(0),
            late: Mutex::new(sender),
        })
    }
}

impl FaultHandler for Unreliable {
    fn fault(&self, fault: Fault) {
        let mut seen = self.seen.lock().unwrap();
        *seen += 1;
        if seen.is_multiple_of(3) {
            return; // a transient failure: the READ stays pending
        }
        self.late.lock().unwrap().send(fault).unwrap();
    }
}

fn churn(memory: &SharedMemory, images: &[TestImage], seed: u64, stop: &AtomicBool) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    while !stop.load(Ordering::Relaxed) {
        let image = images[rng.random_range(0..images.len())];
        let key = image.key();
        let start = rng.random_range(0..image.bytes / PAGE) * PAGE;
        let len = (rng.random_range(1..=80) * PAGE).min(image.bytes - start);
        let extent = Extent::new(start, len);
        match rng.random_range(0..10) {
            0..5 => memory
                .push(&key, start, &image.content(start, len as usize))
                .unwrap(),
            5 => drop(memory.pin(&key, &[extent]).unwrap()),
            6 => drop(memory.unpin(&key, &[extent]).unwrap()),
            7 => drop(memory.resident(&key).unwrap()),
            _ => drop(memory.evict(&key, &[extent]).unwrap()),
        }
    }
}

#[test]
fn privileged_no_wrong_byte_while_pushing_pinning_and_evicting() {
    if skipped("privileged_no_wrong_byte_while_pushing_pinning_and_evicting") {
        return;
    }
    let images = [TestImage::new(1, 5 * MIB - 500), TestImage::new(2, 2 * MIB)];
    let mount = TestMount::with_handler(&images, Unreliable::new(&images));
    let (stop, all_over) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let churns = [0, 1].map(|seed| {
            let (memory, stop) = (&mount.memory, &stop);
            scope.spawn(move || churn(memory, &images, seed, stop))
        });
        scope.spawn(|| {
            while !all_over.load(Ordering::Relaxed) {
                mount.memory.retry_pending();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let mappers = [0, 1, 2].map(|seed| {
            let mount = &mount;
            scope.spawn(move || touch_at_random(mount, &images, seed))
        });
        // Whatever comes of them, the READs that were dropped are answered until all is over.
        let mapped = mappers.map(|mapper| mapper.join());
        stop.store(true, Ordering::Relaxed);
        let churned = churns.map(|churn| churn.join());
        if mapped.iter().chain(&churned).all(Result::is_ok) {
            eventually("all READs are answered", || {
                mount.memory.counters().in_flight == 0
            });
        }
        all_over.store(true, Ordering::Relaxed);
        for ended in mapped.into_iter().chain(churned) {
            ended.unwrap();
        }
    });
    let counters = mount.memory.counters();
    assert_eq!(
        counters.stall_histogram.iter().sum::<u64>(),
        counters.demand_faults,
        "each READ that asked the handler was answered once"
    );
}

/// For a while, and until everything has happened that is to happen meanwhile.
fn touch_at_random(mount: &TestMount, images: &[TestImage], seed: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(100 + seed);
    let mappings: Vec<_> = images
        .iter()
        .map(|image| (image, mount.map(image)))
        .collect();
    let until = Instant::now() + Duration::from_secs(3);
    let all_happened = || {
        let counters = mount.memory.counters();
        let moved = [counters.evicted_bytes, counters.pushed_bytes];
        let waited = [
            counters.demand_faults,
            counters.padding_reads,
            counters.stall_ns,
        ];
        moved.into_iter().chain(waited).all(|count| count > 0)
    };
    let mut pages = 0;
    while Instant::now() < until || pages <= 100 || !all_happened() {
        let (image, mapping) = &mappings[rng.random_range(0..mappings.len())];
        let offset = rng.random_range(0..mapping.len() / PAGE) * PAGE;
        assert!(
            image.page_is_right(mapping, offset),
            "image {} at {offset}",
            image.seed
        );
        pages += 1;
    }
}

#[test]
fn privileged_a_push_answers_the_reads_that_wait_for_it() {
    if skipped("privileged_a_push_answers_the_reads_that_wait_for_it") {
        return;
    }
    let image = TestImage::new(5, 2 * MIB);
    // A handler that never answers.
    let mount = TestMount::with_handler(&[image], Arc::new(|_: Fault| {}));
    std::thread::scope(|scope| {
        let mapping = mount.map(&image);
        let toucher = scope.spawn(move || image.page_is_right(&mapping, 40 * PAGE));
        eventually("the READ arrives", || {
            !mount.memory.waiting_reads().is_empty()
        });
        let evicted = mount
            .memory
            .evict(&image.key(), &[Extent::new(0, 2 * MIB)])
            .unwrap();
        assert_eq!(evicted, 0, "evicting does not wait for unanswered READs");
        mount
            .memory
            .push(&image.key(), 0, &image.content(0, 2 << 20))
            .unwrap();
        assert!(toucher.join().unwrap());
    });
    eventually("nothing waits", || mount.memory.counters().in_flight == 0);
    assert!(mount.memory.counters().answered_by_push >= 1);
    let resident = mount.memory.resident(&image.key()).unwrap();
    assert_eq!(resident, [Extent::new(0, 2 * MIB)]);
}

#[test]
fn privileged_two_processes_share_frames_and_observation_is_exact() {
    if skipped("privileged_two_processes_share_frames_and_observation_is_exact") {
        return;
    }
    let image = TestImage::new(7, 8 * MIB);
    let mount = TestMount::new(&[image]);
    let path = mount.memory.path(&image.key());
    let pushed = [Extent::new(5 * PAGE, PAGE), Extent::new(MIB, 3 * PAGE)];
    for extent in pushed {
        let data = image.content(extent.offset, extent.len as usize);
        mount
            .memory
            .push(&image.key(), extent.offset, &data)
            .unwrap();
    }
    let offsets: Vec<u64> = pushed
        .iter()
        .flat_map(|extent| (extent.offset..extent.end()).step_by(PAGE as usize))
        .collect();
    let first = Mapper::touching(&path, image.spec().device_bytes, &offsets);
    let second = Mapper::touching(&path, image.spec().device_bytes, &offsets);
    assert_eq!(
        mount.memory.counters().demand_faults,
        0,
        "0 READs for either"
    );

    let identity = FileIdentity::of(&path).unwrap();
    assert_eq!(observe::touched(first.pid(), identity).unwrap(), pushed);
    assert_eq!(observe::touched(second.pid(), identity).unwrap(), pushed);
    let [one, other] =
        [first.pid(), second.pid()].map(|pid| frames(u64::from(pid), &path).unwrap());
    assert_eq!(one.len(), 4);
    assert_eq!(one, other);
    let process = Process::new(i32::try_from(first.pid()).unwrap()).unwrap();
    let mappings = process.smaps().unwrap().0.into_iter();
    let ours = mappings.filter(|one| one.pathname == MMapPath::Path(path.clone()));
    let ours: Vec<_> = ours.map(|one| one.extension.map).collect();
    let sum = |what| ours.iter().filter_map(|one| one.get(what)).sum::<u64>();
    assert_eq!((sum("Rss"), sum("Pss")), (4 * PAGE, 2 * PAGE));
}

#[test]
fn privileged_a_read_that_waits_tells_since_when_who_holds_it_and_why() {
    let name = "privileged_a_read_that_waits_tells_since_when_who_holds_it_and_why";
    if skipped(name) {
        return;
    }
    let image = TestImage::new(6, 2 * MIB);
    let stage = Arc::new((Mutex::new(Stage::Hold), Condvar::new()));
    let enter = |next: Stage| {
        *stage.0.lock().unwrap() = next;
        stage.1.notify_all();
    };
    let seen = Arc::clone(&stage);
    let handler = move |fault: Fault| {
        let held = seen.0.lock().unwrap();
        let is_held = |stage: &mut Stage| *stage == Stage::Hold;
        let now = *seen.1.wait_while(held, is_held).unwrap();
        if now == Stage::Fail {
            let why = std::io::Error::other("the line is cut");
            return fault.reply.postpone(Arc::new(why));
        }
        let bytes = image.content(fault.offset, fault.len as usize);
        fault.reply.data(&bytes).unwrap();
    };
    let mount = TestMount::with_handler(&[image], Arc::new(handler));
    let before = Instant::now();
    std::thread::scope(|scope| {
        let mapping = mount.map(&image);
        let toucher = scope.spawn(move || {
            let thread = rustix::thread::gettid().as_raw_nonzero().get();
            (thread, image.page_is_right(&mapping, 40 * PAGE))
        });
        let oldest = || mount.memory.waiting_reads().into_iter().next();
        eventually("the READ arrives", || oldest().is_some());
        let held = oldest().unwrap();
        assert!(held.since >= before && held.file == image.key());
        assert!(!held.handed_on && held.failure.is_none(), "{held:?}");
        enter(Stage::Fail);
        eventually("the handler has failed", || {
            oldest().is_some_and(|read| read.handed_on && read.failure.is_some())
        });
        let failed = oldest().unwrap();
        let why = failed.failure.as_ref().unwrap().to_string();
        assert_eq!((&*why, failed.since), ("the line is cut", held.since));
        enter(Stage::Answer);
        assert!(mount.memory.retry_pending() >= 1);
        let (thread, is_right) = toucher.join().unwrap();
        assert!(is_right);
        assert_eq!(failed.thread, thread as u32);
    });
    eventually("nothing waits", || {
        mount.memory.retry_pending();
        mount.memory.waiting_reads().is_empty()
    });
}

/// What a handler does with faults.
#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Hold,
    Fail,
    Answer,
}
