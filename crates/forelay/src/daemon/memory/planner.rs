//! The planner's thread: the only one that takes the planner's decisions.
//!
//! Owns the thread and its inbox. Events come in from launches, faults, observation and
//! executors; memory is sampled and time passes on the thread itself; decisions go out to
//! [`Executors`]. Decides nothing, touches no file and waits for nobody but its inbox, so
//! that the age of its last step tells whether it lives.
//!
//! Invariant: events are taken in the order in which they were told.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forelay_cache::budget::PressureLevel;
use forelay_cache::mapping_table::SharedTable;
use forelay_cache::plan::{Appraisal, DiskContent, FetchCost, PlanCounters, Planner, Prospect};
use forelay_cache::{PlannerEvent, SharedImage};
use forelay_image::{Digest, Extent};
use forelay_memory::pressure::Trigger;
use forelay_store::Scheduler;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::api::{EventKind, Shortage};
use crate::daemon::events::Happening;
use crate::daemon::memory::domains::Domains;
use crate::daemon::memory::executors::Executors;
use crate::daemon::memory::journal::JournalWriter;
use crate::daemon::memory::residency::{self, Look};
use crate::daemon::memory::samples::Sampler;

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
/// How often the planner is told what the disk cache has.
const DISK_EVERY: Duration = Duration::from_secs(5);
/// How often the disk cache's own page cache is given back while memory is plentiful.
const TRIM_EVERY: Duration = Duration::from_secs(5);
/// Shortages that are remembered.
const KEPT_SHORTAGES: usize = 64;

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

enum Message {
    Event(PlannerEvent),
    /// Residency as the kernel has it.
    Residency(Look),
    /// Tasks wait for memory.
    Stalled,
    /// What prospects are worth; asked by a person.
    Appraise(Vec<Prospect>, oneshot::Sender<Vec<Appraisal>>),
    /// Tells who sends it whether anybody listens.
    Nothing,
    Stop,
}

/// Tells the planner what happens. Cheap to clone.
#[derive(Clone)]
pub struct PlannerSender(Sender<Message>);

/// Where the planner's thread finds what it was told.
pub struct PlannerInbox(Receiver<Message>);

/// A way to tell the planner things, and the other end of it.
pub fn planner_channel() -> (PlannerSender, PlannerInbox) {
    let (sender, receiver) = channel();
    (PlannerSender(sender), PlannerInbox(receiver))
}

#[cfg(test)]
impl PlannerInbox {
    /// What the planner would have been told by now.
    pub fn events(&self) -> Vec<PlannerEvent> {
        let told = self.0.try_iter().filter_map(|message| match message {
            Message::Event(event) => Some(event),
            _ => None,
        });
        told.collect()
    }
}

impl PlannerSender {
    /// Tells the planner something. Never blocks.
    pub fn tell(&self, event: PlannerEvent) {
        // Fails only when the daemon shuts down.
        let _ = self.0.send(Message::Event(event));
    }
}

/// What the planner's thread says of itself, for all who ask.
struct Shared {
    status: Mutex<PlanStatus>,
    shortages: Mutex<VecDeque<Shortage>>,
    started: Instant,
    /// When the last step ended, in milliseconds since the start.
    last_step_ms: AtomicU64,
}

impl Shared {
    fn note_step(&self) {
        let now_ms = self.started.elapsed().as_millis();
        let now_ms = u64::try_from(now_ms).unwrap_or(u64::MAX);
        self.last_step_ms.store(now_ms, Ordering::Relaxed);
    }
}

/// Handle on the planner's thread, which ends with it.
pub struct PlannerHandle {
    sender: PlannerSender,
    table: Arc<SharedTable>,
    shared: Arc<Shared>,
}

/// What the planner's thread works with.
pub struct PlannerParts {
    /// The planner.
    pub planner: Planner,
    /// The trust domains.
    pub domains: Arc<Domains>,
    /// Where bytes come from.
    pub scheduler: Scheduler,
    /// The host's memory.
    pub sampler: Sampler,
    /// Who carries decisions out.
    pub executors: Executors,
    /// Where the table's rows are written down, if they can be.
    pub journal: Option<JournalWriter>,
}

impl PlannerHandle {
    /// Starts the planner's thread; it uses the current runtime for what may block.
    pub fn start(
        parts: PlannerParts,
        sender: PlannerSender,
        inbox: PlannerInbox,
    ) -> io::Result<Self> {
        let table = Arc::clone(parts.planner.table());
        let shared = Arc::new(Shared {
            status: Mutex::default(),
            shortages: Mutex::default(),
            started: Instant::now(),
            last_step_ms: AtomicU64::new(0),
        });
        watch_stalls(&sender, &shared)?;
        watch_residency(&table, &parts.domains, &sender)?;
        watch_disk_cache(parts.scheduler.clone(), &sender)?;
        let thread = PlannerThread {
            parts,
            shared: Arc::clone(&shared),
            runtime: Handle::current(),
            freeing: None,
            trimmed: Instant::now(),
            before: Look::default(),
            told: PlanCounters::default(),
        };
        spawn("forelay-planner", move || thread.run(&inbox))?;
        Ok(Self {
            sender,
            table,
            shared,
        })
    }

    /// Tells the planner something. Never blocks.
    pub fn tell(&self, event: PlannerEvent) {
        self.sender.tell(event);
    }

    /// What the planner thinks of prospects: what of them is here and what the rest is worth.
    /// `None` if the planner's thread is gone.
    pub async fn appraise(&self, prospects: Vec<Prospect>) -> Option<Vec<Appraisal>> {
        let (answer, answered) = oneshot::channel();
        let question = Message::Appraise(prospects, answer);
        self.sender.0.send(question).ok()?;
        answered.await.ok()
    }

    /// The mapping table.
    pub fn table(&self) -> &SharedTable {
        &self.table
    }

    /// What the planner last said of itself.
    pub fn status(&self) -> PlanStatus {
        *self.shared.status.lock()
    }

    /// The last shortages that are over, oldest first.
    pub fn shortages(&self) -> Vec<Shortage> {
        self.shared.shortages.lock().iter().copied().collect()
    }

    /// Time since the planner last ended a step: it makes one at least every quarter of a
    /// second.
    pub fn last_step_age(&self) -> Duration {
        let last = Duration::from_millis(self.shared.last_step_ms.load(Ordering::Relaxed));
        self.shared.started.elapsed().saturating_sub(last)
    }
}

impl Drop for PlannerHandle {
    fn drop(&mut self) {
        let _ = self.sender.0.send(Message::Stop);
    }
}

/// Starts a thread that lives until its work is over.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(work).map(drop)
}

/// Wakes the planner as soon as the kernel says that tasks wait for memory.
fn watch_stalls(sender: &PlannerSender, shared: &Arc<Shared>) -> io::Result<()> {
    let trigger = match Trigger::arm(STALL, STALL_WINDOW) {
        Ok(trigger) => trigger,
        Err(error) => {
            let error = forelay_host::error_chain(&error);
            tracing::info!(error, "memory is sampled by time only");
            return Ok(());
        }
    };
    let (sender, alive): (_, Weak<Shared>) = (sender.0.clone(), Arc::downgrade(shared));
    spawn("forelay-stalls", move || {
        while let Ok(happened) = trigger.wait(TICK_EVERY) {
            let listens = !happened || sender.send(Message::Stalled).is_ok();
            if !listens || alive.strong_count() == 0 {
                return;
            }
        }
    })
}

/// Compares the table with the kernel for as long as somebody wants to know.
fn watch_residency(
    table: &Arc<SharedTable>,
    domains: &Arc<Domains>,
    sender: &PlannerSender,
) -> io::Result<()> {
    let (table, domains, sender) = (Arc::clone(table), Arc::clone(domains), sender.0.clone());
    spawn("forelay-residency", move || {
        loop {
            std::thread::sleep(LOOK_EVERY);
            let look = residency::look(&table, &domains);
            if sender.send(Message::Residency(look)).is_err() {
                return;
            }
        }
    })
}

/// Tells what the disk cache lacks of each image whenever that has changed.
fn watch_disk_cache(scheduler: Scheduler, sender: &PlannerSender) -> io::Result<()> {
    let sender = sender.0.clone();
    let mut told: HashMap<Digest, Arc<[Extent]>> = HashMap::new();
    let mut seen = None;
    spawn("forelay-disk-cache", move || {
        while sender.send(Message::Nothing).is_ok() {
            let images = scheduler.open_images();
            // Nothing is looked at while nothing comes or goes.
            let now = Some((scheduler.disk_generation(), images.len()));
            let changed = if std::mem::replace(&mut seen, now) == now {
                Vec::new()
            } else {
                images
            };
            for image in changed {
                let Some(absent) = scheduler.absent_on_disk(image) else {
                    continue;
                };
                if told.get(&image) != Some(&absent) {
                    let content = DiskContent {
                        image,
                        absent: absent.to_vec(),
                    };
                    told.insert(image, absent);
                    let event = PlannerEvent::DiskCacheChanged(content);
                    let _ = sender.send(Message::Event(event));
                }
            }
            std::thread::sleep(DISK_EVERY);
        }
    })
}

struct PlannerThread {
    parts: PlannerParts,
    shared: Arc<Shared>,
    runtime: Handle,
    /// Since when bytes are leaving under pressure, and how many were asked to.
    freeing: Option<(Instant, u64)>,
    trimmed: Instant,
    /// What the last look at residency found.
    before: Look,
    /// What was done when that was last told.
    told: PlanCounters,
}

impl PlannerThread {
    fn run(mut self, inbox: &PlannerInbox) {
        let mut sample_at = Instant::now();
        let mut tick_at = sample_at;
        loop {
            // A flood of events must not keep memory from being looked at.
            let now = Instant::now();
            if now >= sample_at {
                sample_at = now + self.sample();
            }
            if now >= tick_at {
                tick_at = now + TICK_EVERY;
                self.tick();
            }
            let next = sample_at.min(tick_at);
            match inbox
                .0
                .recv_timeout(next.saturating_duration_since(Instant::now()))
            {
                Ok(Message::Event(event)) => self.step(event),
                Ok(Message::Residency(look)) => self.compare(look),
                Ok(Message::Stalled) => sample_at = Instant::now(),
                Ok(Message::Appraise(prospects, answer)) => {
                    let (planner, now_ms) = (&self.parts.planner, now_ms());
                    let prospects = prospects.iter();
                    let worth = prospects.map(|one| planner.appraise(one, now_ms));
                    // Nobody listens any more if the client is gone.
                    let _ = answer.send(worth.collect());
                }
                Ok(Message::Nothing) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            }
            self.shared.note_step();
        }
    }

    /// Samples memory; returns how long until the next sample.
    fn sample(&mut self) -> Duration {
        let (pool, pinned) = self.pool_bytes();
        let sample = self.parts.sampler.sample(pool, pinned);
        let planner = &self.parts.planner;
        let (began, before) = (Instant::now(), planner.pressure());
        let evicted_before = planner.counters().pressure_evicted_bytes;
        self.step(PlannerEvent::MemorySampled(sample));
        self.note_shortage(began, evicted_before);
        let level = self.parts.planner.pressure();
        if level != before {
            tracing::info!(?before, ?level, ?sample, "memory");
            let was = format!("{before:?}").to_lowercase();
            let message = format!(
                "memory is {}, was {was}",
                format!("{level:?}").to_lowercase()
            );
            let available = Happening::new(EventKind::Pressure, message);
            self.parts.domains.events().tell(available);
            self.trim_disk_cache();
        }
        match level {
            PressureLevel::Plenty => SAMPLE_EVERY,
            _ => SAMPLE_SHORT_EVERY,
        }
    }

    /// Notes when a sample makes the planner evict, and when all of that has left.
    fn note_shortage(&mut self, began: Instant, evicted_before: u64) {
        let counters = self.parts.planner.counters();
        let evicted_bytes = counters.pressure_evicted_bytes - evicted_before;
        if evicted_bytes > 0 {
            let (_, bytes) = self.freeing.get_or_insert((began, 0));
            *bytes += evicted_bytes;
        }
    }

    fn note_freed(&mut self) {
        if self.parts.planner.evicting_bytes() > 0 {
            return;
        }
        if let Some((since, evicted_bytes)) = self.freeing.take() {
            let mut shortages = self.shared.shortages.lock();
            if shortages.len() == KEPT_SHORTAGES {
                shortages.pop_front();
            }
            shortages.push_back(Shortage {
                took_s: since.elapsed().as_secs_f64(),
                evicted_bytes,
            });
        }
    }

    /// Of two copies of the same bytes the disk cache's page cache goes first.
    fn trim_disk_cache(&mut self) {
        self.trimmed = Instant::now();
        let scheduler = self.parts.scheduler.clone();
        self.runtime
            .spawn_blocking(move || scheduler.give_back_pages());
    }

    /// Tells what left shared memory since the last tick, and why.
    fn tell_evictions(&mut self) {
        let now = self.parts.planner.counters();
        let before = std::mem::replace(&mut self.told, now);
        let left = [
            (
                now.budget_evicted_bytes - before.budget_evicted_bytes,
                "evicted to stay within the budget",
            ),
            (
                now.pressure_evicted_bytes - before.pressure_evicted_bytes,
                "evicted: memory is critical",
            ),
            (
                now.reclaimed_bytes - before.reclaimed_bytes,
                "reclaimed by the kernel, unasked",
            ),
        ];
        for (bytes, why) in left.into_iter().filter(|(bytes, _)| *bytes > 0) {
            let evicting = Happening::new(EventKind::Evicting, why).bytes(bytes);
            self.parts.domains.events().tell(evicting);
        }
    }

    fn tick(&mut self) {
        self.tell_evictions();
        let short = self.parts.planner.pressure() != PressureLevel::Plenty;
        if short || self.trimmed.elapsed() >= TRIM_EVERY {
            self.trim_disk_cache();
        }
        let counters = self.parts.scheduler.counters();
        if let (Some(latency_ns), Some(bandwidth)) =
            (counters.latency_ns, counters.bandwidth_bytes_per_s)
        {
            self.step(PlannerEvent::FetchCostMeasured(FetchCost {
                latency_ms: latency_ns as f64 / 1e6,
                bandwidth_bytes_per_s: bandwidth as f64,
            }));
        }
        self.step(PlannerEvent::Tick);
        let attribution = self.parts.domains.attribution();
        self.parts.planner.table().read(|table| {
            let is_mapped = |image: &SharedImage| table.mapped_by(image) > 0;
            attribution.keep_evicted(is_mapped);
        });
        let domains = Arc::clone(&self.parts.domains);
        self.runtime.spawn_blocking(move || {
            domains.retry_pending();
            domains.keep_pinned();
        });
    }

    fn pool_bytes(&self) -> (u64, u64) {
        self.parts.planner.table().read(|table| {
            let images = table.known_images();
            let pinned = images.map(|image| table.pinned_bytes_of(image)).sum();
            (table.resident_bytes(), pinned)
        })
    }

    /// Brings the table in line with what the kernel has.
    fn compare(&mut self, look: Look) {
        let table = self.parts.planner.table();
        for event in residency::corrections(table, &self.before, &look) {
            self.step(event);
        }
        self.before = look;
    }

    fn step(&mut self, event: PlannerEvent) {
        let attribution = self.parts.domains.attribution();
        if let PlannerEvent::Fetched(here) = &event {
            attribution.returned(&here.image, here.extent);
        }
        let decisions = self.parts.planner.step(event, now_ms());
        self.parts.executors.carry_out(decisions);
        self.note_freed();
        if let Some(journal) = &self.parts.journal {
            journal.wake();
        }
        let planner = &self.parts.planner;
        *self.shared.status.lock() = PlanStatus {
            budget_bytes: planner.budget_bytes(),
            level: planner.pressure(),
            queued_bytes: planner.queued_bytes(),
            paused: planner.is_paused(),
            counters: planner.counters(),
        };
        // One message may bring very many events.
        self.shared.note_step();
    }
}
