//! The plan: what to prefetch, pin, evict and map ahead, as a pure function of events.
//!
//! Owns admission, the queue of prefetches and eviction. Refuses to know the clock and how
//! anything is carried out: [`Planner::step`] takes an event and the time and returns
//! decisions, a list for each executor; results come back as events.
//!
//! ```text
//!   ProfileForecast, AttachForecast --> launches, queue (forecast) --+
//!   LaunchRequested --> queue (launch, in first-touch order) --------+--> dispatch --> fetches
//!                                                                    |      |
//!   FetchEnded, Evicted ---------------------------------------------+      +-- no room --> evictions
//!   enough launches --> fit ... ReuseFitted --> other worths
//!   Pressure: critical --> cancels, pins off, evictions ... calm --> dispatch
//! ```
//!
//! Invariants: resident and fetching bytes never exceed the budget through a prefetch, and a
//! cancelled fetch counts until it has ended; bytes of prefetches under way never exceed
//! `inflight_bytes` (but one request may always go); nothing is evicted while all of it fits
//! and no pressure is critical; pinned bytes never.

mod appraisal;
mod benefit;
mod config;
mod decisions;
mod dispatch;
mod message;
mod pressure;
mod queue;
mod ranking;
mod recent_use;
mod requests;
mod reuse;
mod rule;
#[cfg(test)]
mod tests;
mod victims;

use std::collections::BTreeMap;
use std::sync::Arc;

use forelay_image::Extent;
use forelay_image::pages::{PageRun, PageSet, Pages};
use serde::Serialize;

use crate::budget::{BudgetConfig, BudgetController, PressureLevel};
use crate::mapping_table::{Arrival, MappingTable, Phase, SharedTable, TableError};
use crate::names::{SharedImage, VmName};

pub use appraisal::{Appraisal, Prospect};
use benefit::BenefitModel;
pub use config::PlanConfig;
pub use decisions::{Decisions, Eviction, Fetch, FetchId, PinChange, PreparedLaunch};
pub use message::{
    AttachForecast, Attachment, DiskContent, FetchCost, FetchEnded, LaunchRequested, PastLaunch,
    PlannerEvent, Pressure, ProfileForecast, RunningVm, SharedExtent, TouchReport,
};
use queue::{PrefetchQueue, Requester};
use recent_use::RecentUse;
pub use reuse::{ReuseFit, ReuseSamples};
pub use rule::ByWorth;

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
    benefit: BenefitModel,
    queue: PrefetchQueue,
    budget: BudgetController,
    budget_bytes: u64,
    launches: BTreeMap<VmName, Launch>,
    pinned_by_plan_bytes: u64,
    /// Asked to be evicted, and not ended yet.
    evicting: BTreeMap<SharedImage, PageSet>,
    /// Evicted not long ago; what returns from here was evicted too early.
    ghosts: BTreeMap<SharedImage, PageSet>,
    recently_used: RecentUse,
    /// What launches asked for lately are about to touch.
    soon_used: RecentUse,
    level: PressureLevel,
    paused: bool,
    calm_since_ms: Option<i64>,
    /// When forecasts were last weighed against what is resident.
    displaced_ms: i64,
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
            benefit: BenefitModel::new(&config),
            budget_bytes: config.budget_bytes,
            config,
            table,
            queue: PrefetchQueue::default(),
            budget,
            launches: BTreeMap::new(),
            pinned_by_plan_bytes: 0,
            evicting: BTreeMap::new(),
            ghosts: BTreeMap::new(),
            recently_used: RecentUse::default(),
            soon_used: RecentUse::default(),
            level: PressureLevel::Plenty,
            paused: false,
            calm_since_ms: None,
            displaced_ms: i64::MIN,
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

    /// Takes one event at `now_ms` and returns what to do.
    pub fn step(&mut self, event: PlannerEvent, now_ms: i64) -> Decisions {
        let mut out = Decisions {
            // Not under the table's lock: now and then all samples are copied or scores renewed.
            fit: self.learn(&event, now_ms),
            ..Decisions::default()
        };
        let table = Arc::clone(&self.table);
        table.write(|table| {
            let mut step = Step {
                table,
                now_ms,
                out: &mut out,
            };
            let result = self.take(&mut step, event);
            self.counters.refused_events += u64::from(result.is_err());
            self.dispatch(&mut step);
        });
        out
    }

    /// Notes launches, and the model fitted to them; returns the samples of the next fit.
    fn learn(&mut self, event: &PlannerEvent, now_ms: i64) -> Option<Box<ReuseSamples>> {
        match event {
            PlannerEvent::LaunchRequested(launch) => {
                let (domain, profile) = (&launch.domain, &launch.profile);
                self.benefit
                    .launched(domain, profile, &launch.devices, now_ms);
            }
            PlannerEvent::LaunchesRemembered(launches) => {
                for past in launches.iter().filter(|past| past.at_ms <= now_ms) {
                    self.benefit
                        .launched(&past.domain, &past.profile, &past.devices, past.at_ms);
                }
            }
            PlannerEvent::ReuseFitted(fit) => self.benefit.install(fit.as_ref().clone()),
            _ => return None,
        }
        self.benefit.samples().map(Box::new)
    }

    fn take(&mut self, step: &mut Step<'_>, event: PlannerEvent) -> Result<(), TableError> {
        use PlannerEvent as Event;
        match event {
            // Noted before the table was taken.
            Event::LaunchesRemembered(_) | Event::ReuseFitted(_) => {}
            Event::LaunchRequested(launch) => return self.launch_requested(step, launch),
            Event::ProfileForecast(forecast) => return self.profile_forecast(step, forecast),
            Event::AttachForecast(forecast) => self.attach_forecast(step, forecast),
            Event::VmFound(found) => return self.vm_found(step, found),
            Event::VmStarted(vm) => return self.vm_started(step, &vm),
            Event::VmStopped(vm) => return self.vm_stopped(step, &vm),
            Event::Attached(vm, device) => return step.table.attach(&vm, &device),
            Event::Detached(vm, image) => return step.table.detach(&vm, &image),
            Event::Touched(report) => return self.touched(step, &report),
            Event::Fetched(fetched) => return self.fetched(step, &fetched),
            Event::FetchEnded(ended) => return self.fetch_ended(step, ended),
            Event::Evicted(evicted) => return self.evicted(step, &evicted),
            Event::Removed(image) => return self.removed(step, &image),
            Event::EvictionEnded(evicted) => self.eviction_ended(&evicted),
            Event::Pinned(pinned) => return step.table.pin(&pinned.image, pinned.extent),
            Event::Unpinned(pinned) => {
                return step.table.unpin(&pinned.image, pinned.extent).map(drop);
            }
            Event::Pressure(pressure) => self.pressure_is(step, pressure),
            Event::BudgetChanged(budget_bytes) => self.budget_changed(step, budget_bytes),
            Event::MemorySampled(sample) => {
                let decision = self.budget.sample(&sample);
                self.budget_bytes = decision.budget_bytes;
                let (level, deficit_bytes) = (decision.level, decision.deficit_bytes);
                self.pressure_is(
                    step,
                    Pressure {
                        level,
                        deficit_bytes,
                    },
                );
            }
            Event::FetchCostMeasured(cost) => self.benefit.set_fetch_cost(cost),
            Event::DiskCacheChanged(content) => self.benefit.set_disk_content(content),
            Event::Tick => self.tick(step),
        }
        Ok(())
    }

    fn vm_found(&mut self, step: &mut Step<'_>, found: RunningVm) -> Result<(), TableError> {
        let launch = Launch {
            started_ms: Some(step.now_ms),
            ..Launch::default()
        };
        self.launches.insert(found.vm.clone(), launch);
        let RunningVm {
            vm,
            domain,
            profile,
            devices,
        } = found;
        match step.table.vm_identity(vm.as_str()) {
            Some(_) => step.table.start(&vm),
            None => {
                let phase = Phase::Running;
                step.table.map(&vm, &domain, &profile, &devices, phase)
            }
        }
    }

    fn vm_started(&mut self, step: &mut Step<'_>, vm: &VmName) -> Result<(), TableError> {
        let launch = self.launches.entry(vm.clone()).or_default();
        launch.started_ms = Some(step.now_ms);
        step.table.start(vm)
    }

    fn vm_stopped(&mut self, step: &mut Step<'_>, vm: &VmName) -> Result<(), TableError> {
        self.withdraw(step, &Requester::Launch(vm.clone()));
        self.unpin_launch(step, vm);
        self.forget_attachments(step, vm, |_| true);
        step.table.unmap(vm)
    }

    fn touched(&mut self, step: &mut Step<'_>, report: &TouchReport) -> Result<(), TableError> {
        let TouchReport { vm, image, extents } = report;
        let identity = step.table.vm_identity(vm.as_str());
        let domain = identity.map(|(domain, _)| domain.clone());
        for &extent in extents {
            let touch = step.table.touch(vm, image, extent)?;
            if let (true, Some(domain)) = (touch.first_touch_bytes > 0, &domain) {
                let image = SharedImage::new(domain.clone(), *image);
                let run = PageRun::covering(extent);
                self.benefit.used(&image, run, false, step.now_ms);
                self.recently_used.used(&image, run);
            }
        }
        Ok(())
    }

    fn fetched(&mut self, step: &mut Step<'_>, fetched: &SharedExtent) -> Result<(), TableError> {
        let SharedExtent { image, extent } = fetched;
        step.table.complete_fetch(image, *extent, Arrival::Demand)?;
        // A prefetch of the same bytes would only store them again.
        let needless = self.queue.cancel_within(image, *extent);
        step.out.cancels.extend(needless);
        let run = PageRun::covering(*extent);
        self.benefit.used(image, run, false, step.now_ms);
        self.recently_used.used(image, run);
        if let Some(ghost) = self.ghosts.get_mut(image) {
            self.counters.refetched_bytes += ghost.remove(run).bytes();
        }
        // Demand is never refused; what it takes beyond the budget others give back.
        self.shrink_to_budget(step);
        Ok(())
    }

    fn evicted(&mut self, step: &mut Step<'_>, evicted: &SharedExtent) -> Result<(), TableError> {
        let SharedExtent { image, extent } = evicted;
        let run = PageRun::covering(*extent);
        let evicting = self.evicting.get(image);
        let asked = evicting.map_or(Pages::NONE, |evicting| evicting.count_within(run));
        step.table.evict(image, *extent)?;
        self.counters.reclaimed_bytes += (run.pages() - asked).bytes();
        self.ghosts.entry(image.clone()).or_default().insert(run);
        Ok(())
    }

    fn removed(&mut self, step: &mut Step<'_>, image: &SharedImage) -> Result<(), TableError> {
        self.ghosts.remove(image);
        match step.table.image_bytes(image) {
            Some(bytes) => step.table.evict(image, Extent::new(0, bytes)).map(drop),
            None => Ok(()),
        }
    }

    fn eviction_ended(&mut self, evicted: &SharedExtent) {
        if let Some(evicting) = self.evicting.get_mut(&evicted.image) {
            evicting.remove(PageRun::covering(evicted.extent));
            if evicting.is_empty() {
                self.evicting.remove(&evicted.image);
            }
        }
    }
}

/// What one step of the planner works on.
struct Step<'a> {
    table: &'a mut MappingTable,
    now_ms: i64,
    out: &'a mut Decisions,
}
