//! The plan: what to prefetch, pin, evict and map ahead, as a pure function of events.
//!
//! Owns admission, prefetch order and eviction. Refuses to know the clock and how
//! anything is carried out: [`Planner::step`] takes an event and the time and returns
//! actions; results come back as events.
//!
//! ```text
//!   ForecastChanged --> Reserve/Release, queue(Forecast) --+
//!   LaunchRequested --> queue(Launch, first-touch order) --+--> pump --> Prefetch
//!                                                          |     |
//!   Pushed/PushFailed/Evicted -----------------------------+     +-- no room --> Evict
//!   enough launches --> Study ... Learned --> other worths
//!   Pressure(Critical) --> PausePrefetch, Unpin, Evict ... calm --> ResumePrefetch
//! ```
//!
//! Invariants: resident and fetching bytes never exceed the budget through a prefetch;
//! bytes of prefetches under way never exceed `inflight_bytes` (but one piece may
//! always go); nothing is evicted while all of it fits and no pressure is critical;
//! under [`EvictionRule::LeastUsed`] nothing mapped is ever evicted; pinned bytes never.

mod expected;
mod guard;
mod message;
mod pressure;
mod queue;
mod ranking;
mod reuse;
mod rule;
#[cfg(test)]
mod tests;
mod victims;
mod worth;

use std::collections::BTreeMap;
use std::sync::Arc;

use forelay_image::Extent;
use forelay_image::pages::{PageRun, PageSet, Pages};
use serde::Serialize;

use crate::budget::{BudgetConfig, BudgetController};
use crate::mapping_table::{Arrival, MappingTable, Phase, SharedTable, TableError};
use crate::names::{DeviceImage, SharedImage, VmName};

use expected::attach_name;
use guard::Guard;
pub use message::{
    Action, Event, EvictionRule, PastLaunch, PlanConfig, PrefetchClass, PressureLevel, Urgency,
};
use queue::{Piece, Queue, Reason};
use ranking::Ranking;
pub use reuse::{Learned, Lesson};
pub use rule::ByWorth;
use victims::{Choice, Victims};
use worth::{Forecast, Worth};

/// Pins that the planner has asked for on behalf of one launch.
#[derive(Clone, Debug, Default)]
struct Launch {
    pinned: Vec<(SharedImage, Extent)>,
    started_ms: Option<i64>,
}

/// What the planner has done so far, for `forelay memory` and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PlanCounters {
    /// Bytes asked to be prefetched for requested launches.
    pub launch_prefetch_bytes: u64,
    /// Bytes asked to be prefetched from forecasts.
    pub forecast_prefetch_bytes: u64,
    /// Bytes asked to be evicted to stay within the budget.
    pub budget_evicted_bytes: u64,
    /// Bytes asked to be evicted under critical pressure.
    pub pressure_evicted_bytes: u64,
    /// Bytes that a demand fetch brought back within the half-life of their eviction.
    pub refetched_bytes: u64,
    /// Bytes that the kernel reclaimed without being asked.
    pub reclaimed_bytes: u64,
    /// Prefetches dropped because nothing worth less was resident.
    pub refused_bytes: u64,
    /// Events that the mapping table refused (unknown VM or image, bad extent).
    pub refused_events: u64,
}

/// Decides what happens to shared memory. See the module's header.
#[derive(Debug)]
pub struct Planner {
    config: PlanConfig,
    table: Arc<SharedTable>,
    worth: Worth,
    queue: Queue,
    budget: BudgetController,
    budget_bytes: u64,
    launches: BTreeMap<VmName, Launch>,
    pinned_by_plan_bytes: u64,
    /// Asked to be evicted, and not ended yet.
    leaving: BTreeMap<SharedImage, PageSet>,
    /// Evicted not long ago; what returns from here was evicted too early.
    ghosts: BTreeMap<SharedImage, PageSet>,
    guard: Guard,
    /// What launches asked for lately are about to touch.
    awaited: Guard,
    level: PressureLevel,
    paused: bool,
    calm_since_ms: Option<i64>,
    /// When bytes were last asked to leave.
    evicting_ms: i64,
    tidied_ms: i64,
    counters: PlanCounters,
}

impl Planner {
    /// A planner over `table`, which others may read meanwhile.
    pub fn new(config: PlanConfig, budget: BudgetConfig, table: Arc<SharedTable>) -> Self {
        let mut budget = BudgetController::new(budget);
        budget.set_cap(config.budget_bytes);
        Self {
            worth: Worth::new(&config),
            budget_bytes: config.budget_bytes,
            config,
            table,
            queue: Queue::default(),
            budget,
            launches: BTreeMap::new(),
            pinned_by_plan_bytes: 0,
            leaving: BTreeMap::new(),
            ghosts: BTreeMap::new(),
            guard: Guard::default(),
            awaited: Guard::default(),
            level: PressureLevel::Plenty,
            paused: false,
            calm_since_ms: None,
            evicting_ms: i64::MIN,
            tidied_ms: i64::MIN,
            counters: PlanCounters::default(),
        }
    }

    /// The mapping table that the planner keeps.
    pub const fn table(&self) -> &Arc<SharedTable> {
        &self.table
    }

    /// What was done so far.
    pub const fn counters(&self) -> PlanCounters {
        self.counters
    }

    /// Most that shared memory may take at this moment, in bytes.
    pub const fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// How short of memory the host is.
    pub const fn pressure(&self) -> PressureLevel {
        self.level
    }

    /// Whether prefetching is paused.
    pub const fn is_paused(&self) -> bool {
        self.paused
    }

    /// Bytes of prefetches that wait or are under way.
    pub fn queued_bytes(&self) -> u64 {
        self.queue.waiting_bytes() + self.queue.under_way_bytes()
    }

    /// Takes one event at `now_ms` and returns what to do, in order.
    pub fn step(&mut self, event: Event, now_ms: i64) -> Vec<Action> {
        // Not under the table's lock: now and then all samples are copied or scores renewed.
        let lesson = self.learn(&event, now_ms);
        let table = Arc::clone(&self.table);
        table.write(|table| {
            let mut actions = Vec::from_iter(lesson);
            self.take(table, event, now_ms, &mut actions);
            self.pump(table, now_ms, &mut actions);
            actions
        })
    }

    /// Notes launches, and what was learned of them; returns what is to be learned.
    fn learn(&mut self, event: &Event, now_ms: i64) -> Option<Action> {
        match event {
            Event::LaunchRequested {
                domain,
                profile,
                devices,
                ..
            } => self.worth.launched(domain, profile, devices, now_ms),
            Event::LaunchesRemembered { launches } => {
                for past in launches.iter().filter(|past| past.at_ms <= now_ms) {
                    self.worth
                        .launched(&past.domain, &past.profile, &past.devices, past.at_ms);
                }
            }
            Event::Learned { learned } => self.worth.adopt(learned.as_ref().clone()),
            _ => return None,
        }
        let lesson = Box::new(self.worth.lesson()?);
        Some(Action::Study { lesson })
    }

    fn take(
        &mut self,
        table: &mut MappingTable,
        event: Event,
        now_ms: i64,
        actions: &mut Vec<Action>,
    ) {
        let result = match event {
            // Noted before the table was taken.
            Event::LaunchesRemembered { .. } | Event::Learned { .. } => Ok(()),
            Event::LaunchRequested {
                vm,
                domain,
                profile,
                devices,
                working_set,
            } => {
                self.launch_requested(table, vm, &domain, &profile, &devices, &working_set, now_ms)
            }
            Event::ForecastChanged {
                domain,
                profile,
                devices,
                launch_probability,
                next_launch_ms,
                working_set,
            } => {
                let mut forecast = Forecast {
                    devices,
                    launch_probability,
                    next_launch_ms,
                    working_set,
                    updated_ms: now_ms,
                    reserved: false,
                };
                let (key, launch) =
                    self.forecast_changed(table, domain, profile, &mut forecast, now_ms, actions);
                let result = self.reserve(table, &key, &mut forecast, launch, actions);
                self.worth.forecasts.insert(key, forecast);
                result
            }
            Event::AttachForecast {
                vm,
                domain,
                devices,
                probability,
                expected_ms,
                working_set,
            } => {
                let mut forecast = Forecast {
                    devices,
                    launch_probability: probability,
                    next_launch_ms: expected_ms,
                    working_set,
                    updated_ms: now_ms,
                    reserved: false,
                };
                let name = attach_name(&vm);
                let (key, _) =
                    self.forecast_changed(table, domain, name, &mut forecast, now_ms, actions);
                self.worth.forecasts.insert(key, forecast);
                Ok(())
            }
            Event::VmFound {
                vm,
                domain,
                profile,
                devices,
            } => {
                let launch = Launch {
                    started_ms: Some(now_ms),
                    ..Launch::default()
                };
                self.launches.insert(vm.clone(), launch);
                match table.vm_identity(vm.as_str()) {
                    Some(_) => table.start(&vm),
                    None => table.map(&vm, &domain, &profile, &devices, Phase::Running),
                }
            }
            Event::VmStarted { vm } => {
                self.launches.entry(vm.clone()).or_default().started_ms = Some(now_ms);
                table.start(&vm)
            }
            Event::VmStopped { vm } => {
                let reason = Reason::Launch(vm.clone());
                self.queue.drop_reason(&reason);
                self.cancel_unwanted(table, &reason, &PageSetByImage::new(), actions);
                self.unpin_launch(&vm, actions);
                self.forget_attachments(table, &vm, actions);
                table.unmap(&vm)
            }
            Event::Attached { vm, device } => table.attach(&vm, &device),
            Event::Detached { vm, image } => table.detach(&vm, &image),
            Event::Touched { vm, image, extents } => {
                self.touched(table, &vm, image, &extents, now_ms)
            }
            Event::Fetched { image, extent } => {
                self.fetched(table, &image, extent, now_ms, actions)
            }
            Event::Pushed { image, extent } => self.pushed(table, &image, extent, actions),
            Event::PushFailed { image, extent } => {
                self.queue.ended(&image, extent);
                table.abort_fetch(&image, extent).map(drop)
            }
            Event::Evicted { image, extent } => self.evicted(table, &image, extent),
            Event::EvictionEnded { image, extent } => {
                self.eviction_ended(&image, extent);
                Ok(())
            }
            Event::Pinned { image, extent } => table.pin(&image, extent),
            Event::Unpinned { image, extent } => table.unpin(&image, extent).map(drop),
            Event::Pressure {
                level,
                deficit_bytes,
            } => {
                self.pressure_is(table, level, deficit_bytes, now_ms, actions);
                Ok(())
            }
            Event::BudgetChanged { budget_bytes } => {
                self.budget.set_cap(budget_bytes);
                self.config.budget_bytes = budget_bytes;
                self.budget_bytes = budget_bytes;
                self.shrink_to_budget(table, now_ms, actions);
                Ok(())
            }
            Event::MemorySampled(sample) => {
                let decision = self.budget.sample(&sample);
                self.budget_bytes = decision.budget_bytes;
                self.pressure_is(
                    table,
                    decision.level,
                    decision.deficit_bytes,
                    now_ms,
                    actions,
                );
                Ok(())
            }
            Event::FetchCostMeasured {
                latency_ms,
                bandwidth_bytes_per_s,
            } => {
                self.worth.set_fetch_cost(latency_ms, bandwidth_bytes_per_s);
                Ok(())
            }
            Event::Tick => {
                self.tick(now_ms, actions);
                // A predecessor may have left more than the cap, or have died with evictions
                // under way; and what could not go then may go now.
                self.shrink_to_budget(table, now_ms, actions);
                Ok(())
            }
        };
        self.counters.refused_events += u64::from(result.is_err());
    }

    fn touched(
        &mut self,
        table: &mut MappingTable,
        vm: &VmName,
        image: forelay_image::Digest,
        extents: &[Extent],
        now_ms: i64,
    ) -> Result<(), TableError> {
        let domain = table
            .vm_identity(vm.as_str())
            .map(|(domain, _)| domain.clone());
        for &extent in extents {
            let touch = table.touch(vm, &image, extent)?;
            if let (true, Some(domain)) = (touch.first_touch_bytes > 0, &domain) {
                let (key, run) = (
                    SharedImage::new(domain.clone(), image),
                    PageRun::covering(extent),
                );
                self.worth.used(&key, run, false, now_ms);
                self.guard.used(&key, run);
            }
        }
        Ok(())
    }

    fn fetched(
        &mut self,
        table: &mut MappingTable,
        image: &SharedImage,
        extent: Extent,
        now_ms: i64,
        actions: &mut Vec<Action>,
    ) -> Result<(), TableError> {
        table.complete_fetch(image, extent, Arrival::Demand)?;
        self.queue.ended(image, extent);
        let run = PageRun::covering(extent);
        self.worth.used(image, run, false, now_ms);
        self.guard.used(image, run);
        if let Some(ghost) = self.ghosts.get_mut(image) {
            self.counters.refetched_bytes += ghost.remove(run).bytes();
        }
        // Demand is never refused; what it takes beyond the budget others give back.
        self.shrink_to_budget(table, now_ms, actions);
        Ok(())
    }

    fn pushed(
        &mut self,
        table: &mut MappingTable,
        image: &SharedImage,
        extent: Extent,
        actions: &mut Vec<Action>,
    ) -> Result<(), TableError> {
        table.complete_fetch(image, extent, Arrival::Prefetch)?;
        if let Some(ghost) = self.ghosts.get_mut(image) {
            ghost.remove(PageRun::covering(extent));
        }
        for piece in self.queue.ended(image, extent) {
            self.hold(&piece, actions);
        }
        Ok(())
    }

    /// Pins what is here for a launch that will touch it soon: until then nothing tells the
    /// kernel that these pages are wanted.
    fn hold(&mut self, piece: &Piece, actions: &mut Vec<Action>) {
        let Reason::Launch(vm) = &piece.reason else {
            return;
        };
        let most = (self.budget_bytes as f64 * self.config.pin_share.clamp(0.0, 1.0)) as u64;
        let room = self.pinned_by_plan_bytes.saturating_add(piece.extent.len) <= most;
        let calm = self.level == PressureLevel::Plenty;
        let Some(launch) = self.launches.get_mut(vm) else {
            return;
        };
        if piece.pin && room && calm {
            self.pinned_by_plan_bytes += piece.extent.len;
            launch.pinned.push((piece.image.clone(), piece.extent));
            actions.push(Action::Pin {
                image: piece.image.clone(),
                extents: vec![piece.extent],
            });
        }
    }

    fn evicted(
        &mut self,
        table: &mut MappingTable,
        image: &SharedImage,
        extent: Extent,
    ) -> Result<(), TableError> {
        let run = PageRun::covering(extent);
        let leaving = self.leaving.get(image);
        let asked = leaving.map_or(Pages::NONE, |leaving| leaving.count_within(run));
        table.evict(image, extent)?;
        self.counters.reclaimed_bytes += (run.pages() - asked).bytes();
        self.ghosts.entry(image.clone()).or_default().insert(run);
        Ok(())
    }

    fn eviction_ended(&mut self, image: &SharedImage, extent: Extent) {
        if let Some(leaving) = self.leaving.get_mut(image) {
            leaving.remove(PageRun::covering(extent));
            if leaving.is_empty() {
                self.leaving.remove(image);
            }
        }
    }

    /// Starts waiting prefetches as far as budget and in-flight bytes allow.
    fn pump(&mut self, table: &mut MappingTable, now_ms: i64, actions: &mut Vec<Action>) {
        // Nothing below arrives or leaves before its event is told.
        let mut ranking = Ranking::default();
        while !self.paused {
            let only_launches = self.level != PressureLevel::Plenty;
            match self.queue.first_class() {
                None => return,
                Some(PrefetchClass::Forecast) if only_launches => return,
                Some(_) => {}
            }
            let Some(piece) = self.queue.pop() else {
                return;
            };
            let absent = table.absent(&piece.image, piece.extent);
            if absent.is_empty() {
                // Here already.
                self.hold(&piece, actions);
                continue;
            }
            let missing = absent.iter().filter(|part| !part.fetching);
            let missing: Vec<Extent> = missing.map(|part| part.extent).collect();
            let bytes: u64 = missing.iter().map(|extent| extent.len).sum();
            if bytes == 0 {
                // On its way for somebody else.
                continue;
            }
            let under_way = self.queue.under_way_bytes();
            if under_way > 0 && under_way + bytes > self.config.inflight_bytes {
                self.queue.unpop(piece);
                return;
            }
            let taken = table.resident_bytes() + table.fetching_bytes();
            let lacking = (taken + bytes).saturating_sub(self.budget_bytes);
            if lacking > 0 {
                if self.make_room(table, &mut ranking, &piece, lacking, now_ms, actions) {
                    self.queue.unpop(piece);
                    return;
                }
                // Pieces of a forecast come in falling worth: none of the rest fits either.
                self.counters.refused_bytes += bytes;
                if piece.urgency.class == PrefetchClass::Forecast {
                    self.queue.drop_class(PrefetchClass::Forecast);
                } else {
                    self.queue.drop_reason(&piece.reason);
                }
                continue;
            }
            self.start(table, &piece, &missing, actions);
        }
    }

    fn start(
        &mut self,
        table: &mut MappingTable,
        piece: &Piece,
        missing: &[Extent],
        actions: &mut Vec<Action>,
    ) {
        let device = DeviceImage {
            image: piece.image.image,
            image_bytes: piece.image_bytes,
        };
        if table.add_image(&piece.image.domain, &device).is_err() {
            self.counters.refused_events += 1;
            return;
        }
        for &extent in missing {
            if table.begin_fetch(&piece.image, extent).is_err() {
                self.counters.refused_events += 1;
                continue;
            }
            match piece.urgency.class {
                PrefetchClass::Launch => self.counters.launch_prefetch_bytes += extent.len,
                PrefetchClass::Forecast => self.counters.forecast_prefetch_bytes += extent.len,
            }
            self.queue.started(Piece {
                extent,
                ..piece.clone()
            });
            actions.push(Action::Prefetch {
                image: piece.image.clone(),
                extent,
                priority: piece.urgency,
            });
        }
    }
}

type PageSetByImage = BTreeMap<SharedImage, PageSet>;
