//! The memory manager: carries out what the planner decides.
//!
//! Owns the planner's task. Events come in from launches, faults, observation and
//! memory samples; actions go out to the fetch scheduler (prefetch), shared memory
//! (push, pin, evict) and back come events that say what happened. Decides nothing.
//!
//! Invariant: every prefetch that the planner starts ends in exactly one `Pushed` or
//! `PushFailed`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forelay_cache::mapping_table::SharedTable;
use forelay_cache::plan::{Action, Event, PlanCounters, Planner, PressureLevel};
use forelay_cache::{Domain, SharedImage};
use forelay_image::{Digest, Extent};
use forelay_memory::pressure::Trigger;
use forelay_store::Scheduler;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

use crate::api::Shortage;
use crate::daemon::memory::domains::Domains;
use crate::daemon::memory::pushes::{OpenPushes, push};
use crate::daemon::memory::residency::{self, Look};
use crate::daemon::memory::samples::Sampler;
use crate::daemon::process::journal::Journal;

/// How often memory is sampled while it is plentiful.
const SAMPLE_EVERY: Duration = Duration::from_millis(250);
/// How often it is sampled while it is not.
const SAMPLE_SHORT_EVERY: Duration = Duration::from_millis(50);
/// How often the table is compared with the kernel.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Tasks that wait this long for memory...
const STALL: Duration = Duration::from_millis(100);
/// ...within this time make the kernel wake us.
const STALL_WINDOW: Duration = Duration::from_secs(1);
/// How often the planner and pending faults are given a chance.
const TICK_EVERY: Duration = Duration::from_secs(1);

/// How often the disk cache's own page cache is given back while memory is plentiful.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(5);
/// Shortages that are remembered.
const KEEP_SHORTAGES: usize = 64;

/// Milliseconds since the epoch.
pub fn now_ms() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// What the planner last said of itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlanStatus {
    /// Most that shared memory may take now, in bytes.
    pub budget_bytes: u64,
    /// How short of memory the host is.
    pub level: PressureLevel,
    /// Bytes of prefetches that wait or are under way.
    pub queued_bytes: u64,
    /// Prefetching waits for memory.
    pub paused: bool,
    /// What was done so far.
    pub counters: PlanCounters,
}

/// Handle on the planner's task.
pub struct Memory {
    events: UnboundedSender<Event>,
    table: Arc<SharedTable>,
    status: Arc<Mutex<PlanStatus>>,
    shortages: Arc<Mutex<VecDeque<Shortage>>>,
}

impl Memory {
    /// Starts the planner's task on the current runtime.
    pub fn start(
        planner: Planner,
        domains: Arc<Domains>,
        scheduler: Scheduler,
        sampler: Sampler,
        journal: Journal,
        channel: (UnboundedSender<Event>, UnboundedReceiver<Event>),
        reserve: UnboundedSender<Action>,
    ) -> Self {
        let (events, incoming) = channel;
        let table = Arc::clone(planner.table());
        let status = Arc::new(Mutex::new(PlanStatus::default()));
        let shortages = Arc::new(Mutex::new(VecDeque::new()));
        let worker = Worker {
            pins: keeper("forelay-pins", &domains, &events),
            evictions: keeper("forelay-evict", &domains, &events),
            planner,
            domains,
            scheduler,
            sampler,
            journal: Some(journal),
            events: events.clone(),
            status: Arc::clone(&status),
            shortages: Arc::clone(&shortages),
            freeing: None,
            gave_back: Instant::now(),
            reserve,
            stalled: watch_stalls(),
        };
        tokio::spawn(worker.run(incoming));
        Self {
            events,
            table,
            status,
            shortages,
        }
    }

    /// Tells the planner something. Never blocks.
    pub fn tell(&self, event: Event) {
        // Fails only when the daemon shuts down.
        let _ = self.events.send(event);
    }

    /// The mapping table.
    pub fn table(&self) -> &SharedTable {
        &self.table
    }

    /// What the planner last said of itself.
    pub fn status(&self) -> PlanStatus {
        *self.status.lock()
    }

    /// The last shortages that are over, oldest first.
    pub fn shortages(&self) -> Vec<Shortage> {
        self.shortages.lock().iter().copied().collect()
    }
}

struct Worker {
    planner: Planner,
    domains: Arc<Domains>,
    scheduler: Scheduler,
    sampler: Sampler,
    /// Until it cannot be written any more.
    journal: Option<Journal>,
    events: UnboundedSender<Event>,
    status: Arc<Mutex<PlanStatus>>,
    shortages: Arc<Mutex<VecDeque<Shortage>>>,
    /// Since when bytes are leaving under pressure, and how many were asked to.
    freeing: Option<(Instant, u64)>,
    gave_back: Instant,
    reserve: UnboundedSender<Action>,
    /// Pins in the order in which they were asked for.
    pins: Keeper,
    /// Evictions; on a thread of their own, for pins may be slow.
    evictions: Keeper,
    stalled: Arc<Notify>,
}

/// Carries out pins and evictions in order.
type Keeper = std::sync::mpsc::Sender<Action>;

fn keeper(name: &str, domains: &Arc<Domains>, events: &UnboundedSender<Event>) -> Keeper {
    let (keeper, actions) = std::sync::mpsc::channel();
    let (domains, events) = (Arc::clone(domains), events.clone());
    let work = move || {
        for action in actions {
            keep(&domains, action, &|event| drop(events.send(event)));
        }
    };
    // Without threads there is no daemon.
    if let Err(error) = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
    {
        tracing::error!(%error, name, "cannot start a thread");
    }
    keeper
}

/// Wakes the planner as soon as the kernel says that tasks wait for memory.
fn watch_stalls() -> Arc<Notify> {
    let stalled = Arc::new(Notify::new());
    let trigger = match Trigger::arm(STALL, STALL_WINDOW) {
        Ok(trigger) => trigger,
        Err(error) => {
            tracing::info!(
                error = crate::daemon::chain(&error),
                "memory is sampled by time only"
            );
            return stalled;
        }
    };
    let told = Arc::downgrade(&stalled);
    let watch = move || {
        while let (Ok(happened), Some(told)) = (trigger.wait(TICK_EVERY), told.upgrade()) {
            if happened {
                told.notify_one();
            }
        }
    };
    if let Err(error) = std::thread::Builder::new()
        .name("forelay-stalls".to_owned())
        .spawn(watch)
    {
        tracing::warn!(%error, "memory is sampled by time only");
    }
    stalled
}

impl Worker {
    async fn run(mut self, mut incoming: UnboundedReceiver<Event>) {
        let mut tick = tokio::time::interval(TICK_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (looks, mut looked) = tokio::sync::mpsc::channel(1);
        tokio::spawn(keep_looking(
            Arc::clone(self.planner.table()),
            Arc::clone(&self.domains),
            looks,
        ));
        let mut before = Look::default();
        let stalled = Arc::clone(&self.stalled);
        let mut sample_at = tokio::time::Instant::now();
        loop {
            tokio::select! {
                // A flood of events must not keep memory from being looked at.
                biased;
                () = tokio::time::sleep_until(sample_at) => sample_at = self.sample(),
                () = stalled.notified() => sample_at = self.sample(),
                _ = tick.tick() => self.tick(),
                Some(look) = looked.recv() => {
                    for event in residency::corrections(self.planner.table(), &before, &look) {
                        self.step(event);
                    }
                    before = look;
                }
                event = incoming.recv() => match event {
                    Some(event) => self.step(event),
                    None => return,
                },
            }
        }
    }

    /// Samples memory; returns when to do so again.
    fn sample(&mut self) -> tokio::time::Instant {
        let (pool, pinned) = self.pool_bytes();
        let sample = self.sampler.sample(pool, pinned);
        let before = self.planner.pressure();
        let (began, evicted) = (
            Instant::now(),
            self.planner.counters().pressure_evicted_bytes,
        );
        self.step(Event::MemorySampled(sample));
        self.note_shortage(began, evicted);
        let level = self.planner.pressure();
        if level != before {
            tracing::info!(?before, ?level, ?sample, "memory");
            self.give_back();
        }
        let every = match level {
            PressureLevel::Plenty => SAMPLE_EVERY,
            _ => SAMPLE_SHORT_EVERY,
        };
        tokio::time::Instant::now() + every
    }

    /// Notes when a sample makes the planner evict, and when all of that has left.
    fn note_shortage(&mut self, began: Instant, evicted_before: u64) {
        let evicted_bytes = self.planner.counters().pressure_evicted_bytes - evicted_before;
        if evicted_bytes > 0 {
            let (_, bytes) = self.freeing.get_or_insert((began, 0));
            *bytes += evicted_bytes;
        }
    }

    fn note_freed(&mut self) {
        if self.planner.leaving_bytes() > 0 {
            return;
        }
        if let Some((since, evicted_bytes)) = self.freeing.take() {
            let mut shortages = self.shortages.lock();
            if shortages.len() == KEEP_SHORTAGES {
                shortages.pop_front();
            }
            shortages.push_back(Shortage {
                took_s: since.elapsed().as_secs_f64(),
                evicted_bytes,
            });
        }
    }

    /// Of two copies of the same bytes the disk cache's page cache goes first.
    fn give_back(&mut self) {
        self.gave_back = Instant::now();
        let scheduler = self.scheduler.clone();
        tokio::task::spawn_blocking(move || scheduler.give_back_pages());
    }

    fn tick(&mut self) {
        let short = self.planner.pressure() != PressureLevel::Plenty;
        if short || self.gave_back.elapsed() >= GIVE_BACK_EVERY {
            self.give_back();
        }
        let counters = self.scheduler.counters();
        if let (Some(latency_ns), Some(bandwidth)) =
            (counters.latency_ns, counters.bandwidth_bytes_per_s)
        {
            self.step(Event::FetchCostMeasured {
                latency_ms: latency_ns as f64 / 1e6,
                bandwidth_bytes_per_s: bandwidth as f64,
            });
        }
        self.step(Event::Tick);
        self.planner.table().read(|table| {
            let is_mapped = |image: &SharedImage| table.mapped_by(image) > 0;
            self.domains.attribution().keep_evicted(is_mapped);
        });
        let domains = Arc::clone(&self.domains);
        tokio::task::spawn_blocking(move || {
            domains.retry_pending();
            domains.keep_pinned();
        });
    }

    fn pool_bytes(&self) -> (u64, u64) {
        self.planner.table().read(|table| {
            let pinned = table
                .known_images()
                .map(|image| table.pinned_bytes_of(image))
                .sum();
            (table.resident_bytes(), pinned)
        })
    }

    fn step(&mut self, event: Event) {
        let mut pending = vec![event];
        while let Some(event) = pending.pop() {
            if let Event::Pushed { image, extent } | Event::Fetched { image, extent } = &event {
                self.domains.attribution().returned(image, *extent);
            }
            let actions = self.planner.step(event, now_ms());
            self.carry_out(actions, &mut pending);
        }
        self.note_freed();
        self.write_journal();
        *self.status.lock() = PlanStatus {
            budget_bytes: self.planner.budget_bytes(),
            level: self.planner.pressure(),
            queued_bytes: self.planner.queued_bytes(),
            paused: self.planner.is_paused(),
            counters: self.planner.counters(),
        };
    }

    fn write_journal(&mut self) {
        let Some(journal) = &mut self.journal else {
            return;
        };
        if let Err(error) = journal.write(self.planner.table()) {
            tracing::error!(%error, "no journal of the mapping table from now on");
            self.journal = None;
        }
    }

    fn carry_out(&mut self, actions: Vec<Action>, pending: &mut Vec<Event>) {
        let mut batches: HashMap<Domain, Vec<(Digest, Extent)>> = HashMap::new();
        for action in actions {
            match action {
                Action::Prefetch { image, extent, .. } => {
                    batches
                        .entry(image.domain)
                        .or_default()
                        .push((image.image, extent));
                }
                // What is under way is about to arrive; its answer is harmless.
                Action::CancelPrefetch { .. } => {}
                action @ (Action::Pin { .. } | Action::Unpin { .. }) => {
                    let _ = self.pins.send(action);
                }
                action @ Action::Evict { .. } => {
                    let _ = self.evictions.send(action);
                }
                Action::PausePrefetch => {
                    self.scheduler.pause_prefetch(true);
                    let _ = self.reserve.send(action);
                }
                Action::ResumePrefetch => self.scheduler.pause_prefetch(false),
                action @ (Action::Reserve { .. } | Action::Release { .. }) => {
                    let _ = self.reserve.send(action);
                }
                Action::Study { lesson } => {
                    let events = self.events.clone();
                    tokio::task::spawn_blocking(move || {
                        let learned = Box::new(lesson.study());
                        let _ = events.send(Event::Learned { learned });
                    });
                }
            }
        }
        for (domain, plan) in batches {
            match self.domains.get(&domain) {
                Some(_) => self.prefetch(domain, plan),
                None => pending.extend(plan.into_iter().map(|(image, extent)| {
                    let image = SharedImage::new(domain.clone(), image);
                    Event::PushFailed { image, extent }
                })),
            }
        }
    }

    /// Fetches a batch in order and pushes its pieces as they arrive.
    fn prefetch(&self, domain: Domain, plan: Vec<(Digest, Extent)>) {
        let domains = Arc::clone(&self.domains);
        let events = self.events.clone();
        let mut stream = self.scheduler.prefetch(plan.clone());
        tokio::spawn(async move {
            let mut open = OpenPushes::new(domain.clone(), plan);
            while let Some(item) = stream.next().await {
                let Some(memory) = domains.get(&domain) else {
                    break;
                };
                let pushed = tokio::task::spawn_blocking(move || push(&memory.shared, item)).await;
                for event in pushed.map_or_else(|_| Vec::new(), |done| open.take(done)) {
                    let _ = events.send(event);
                }
            }
            for event in open.fail_rest() {
                let _ = events.send(event);
            }
        });
    }
}

/// Compares the table with the kernel for as long as somebody wants to know.
async fn keep_looking(
    table: Arc<SharedTable>,
    domains: Arc<Domains>,
    looks: tokio::sync::mpsc::Sender<Look>,
) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let (table, domains) = (Arc::clone(&table), Arc::clone(&domains));
        let look = tokio::task::spawn_blocking(move || residency::look(&table, &domains)).await;
        let Ok(look) = look else { return };
        if looks.send(look).await.is_err() {
            return;
        }
    }
}

/// Pins, unpins or evicts, and tells what happens. The end of what failed is not told: the
/// planner asks again if it still wants it.
fn keep(domains: &Domains, action: Action, tell: &dyn Fn(Event)) {
    let told =
        |image: &SharedImage, extents: &[Extent], event: fn(SharedImage, Extent) -> Event| {
            for &extent in extents {
                tell(event(image.clone(), extent));
            }
        };
    let (Action::Pin { image, extents }
    | Action::Unpin { image, extents }
    | Action::Evict { image, extents }) = &action
    else {
        return;
    };
    let Some(memory) = domains.get(&image.domain) else {
        return;
    };
    let done = match &action {
        Action::Pin { .. } => memory.set_pinned(&image.image, extents, true),
        Action::Unpin { .. } => memory.set_pinned(&image.image, extents, false),
        _ => {
            // First: a VM that uses them may have them back before the last of them is gone.
            domains.attribution().evicted(image, extents);
            told(image, extents, |image, extent| Event::Evicted {
                image,
                extent,
            });
            memory.shared.evict(&image.image, extents).map(drop)
        }
    };
    if let Err(error) = done {
        tracing::warn!(image = %image.image, error = crate::daemon::chain(&error), "not done: {action:?}");
        return;
    }
    let ended: fn(SharedImage, Extent) -> Event = match &action {
        Action::Pin { .. } => |image, extent| Event::Pinned { image, extent },
        Action::Unpin { .. } => |image, extent| Event::Unpinned { image, extent },
        _ => |image, extent| Event::EvictionEnded { image, extent },
    };
    told(image, extents, ended);
}
