//! The planner under shortage: making room, shrinking to the budget, pressure levels,
//! and what the passing of time does.
//!
//! Invariants: eviction happens only for a better prefetch, for demand beyond the
//! budget, or at critical level, and then not of what running VMs use right now; it
//! stops at what was asked for; prefetching resumes
//! only after the calm time without pressure.

use forelay_image::Extent;

use crate::budget::PressureLevel;
use crate::mapping_table::MappingTable;
use crate::names::{SharedImage, VmName};

use super::decisions::{Eviction, PinChange, PreparedLaunch};
use super::message::Pressure;
use super::queue::{PrefetchRequest, Requester};
use super::ranking::Ranking;
use super::victims::{EvictionContext, VictimClass, Victims};
use super::{Planner, Step};

/// How often stale history is dropped, in milliseconds.
const TIDY_EVERY_MS: i64 = 60_000;

/// How often forecasts are weighed against what is resident, in milliseconds: it takes a look
/// at all forecasts and all that is here.
const WEIGH_FORECASTS_EVERY_MS: i64 = 5_000;

/// After this long without an answer an eviction counts as failed, in milliseconds.
const EVICTION_PATIENCE_MS: i64 = 10_000;

impl Planner {
    /// Bytes that were asked to leave and have not yet.
    pub fn evicting_bytes(&self) -> u64 {
        self.evicting.values().map(|set| set.bytes()).sum()
    }

    pub(super) fn context<'a>(
        &'a self,
        table: &'a MappingTable,
        now_ms: i64,
    ) -> EvictionContext<'a> {
        EvictionContext {
            table,
            benefit: &self.benefit,
            evicting: &self.evicting,
            recently_used: &self.recently_used,
            soon_used: &self.soon_used,
            now_ms,
        }
    }

    /// Whether forecasts may displace others in this step.
    pub(super) fn may_displace(&mut self, ranking: &Ranking, now_ms: i64) -> bool {
        if ranking.is_used() {
            return true;
        }
        let due = now_ms.saturating_sub(self.displaced_ms) >= WEIGH_FORECASTS_EVERY_MS;
        if due {
            self.displaced_ms = now_ms;
        }
        due
    }

    /// Evicts what is worth less than `request`, so that `lacking_bytes` become free.
    /// Whether it is worth waiting for that.
    pub(super) fn make_room(
        &mut self,
        step: &mut Step<'_>,
        ranking: &mut Ranking,
        request: &PrefetchRequest,
        lacking_bytes: u64,
    ) -> bool {
        let Some(needed) = lacking_bytes
            .checked_sub(self.evicting_bytes())
            .filter(|&n| n > 0)
        else {
            return true;
        };
        let context = self.context(step.table, step.now_ms);
        let below = request.displaces_below;
        // A little more than needed, so that not every request searches again.
        let slack = match request.requester {
            Requester::Launch(_) => self.budget_bytes / 128,
            // They are weighed seldom, so that those worth as much are weighed with it.
            Requester::Forecast(_) => {
                let most = self.config.inflight_bytes.max(self.budget_bytes / 16);
                needed + self.queue.waiting_bytes_above(below, most)
            }
        };
        let slack = slack.max(needed);
        // On a busy host nearly all is mapped by some VM, or ahead of a launch. What VMs have
        // touched goes for a launch alone: its demand would take it anyway.
        let classes = match request.requester {
            Requester::Launch(_) => &[
                VictimClass::Unmapped,
                VictimClass::Untouched,
                VictimClass::Idle,
            ][..],
            Requester::Forecast(_) => &[VictimClass::Unmapped, VictimClass::Untouched],
        };
        let enough = |class: &&VictimClass| ranking.bytes_below(&context, **class, below) >= needed;
        let nearest = classes.iter().find(enough);
        let victims = nearest.map_or_else(Vec::new, |class| {
            ranking.take(&context, *class, slack, below)
        });
        let found = bytes_of(&victims);
        if found < needed {
            return false;
        }
        self.counters.budget_evicted_bytes += found;
        self.evict(step, victims);
        true
    }

    /// Gives back what is beyond the cap; mapped extents too if nothing else is left. The adapted budget only bounds prefetching: after a shortage it
    /// is near what the pool holds, and evicting for each demand fetch would be thrash.
    pub(super) fn shrink_to_budget(&mut self, step: &mut Step<'_>) {
        let excess = step
            .table
            .resident_bytes()
            .saturating_sub(self.config.budget_bytes);
        let needed = excess.saturating_sub(self.evicting_bytes());
        if needed > 0 {
            let evicted = self.evict_worst(step, needed, VictimClass::All);
            self.counters.budget_evicted_bytes += evicted;
        }
    }

    /// Evicts what is worth least, unmapped components first and nothing beyond
    /// `furthest`; returns the bytes asked for.
    fn evict_worst(&mut self, step: &mut Step<'_>, needed: u64, furthest: VictimClass) -> u64 {
        let mut ranking = Ranking::default();
        let mut found = 0;
        let nearest_first = [
            VictimClass::Unmapped,
            VictimClass::Untouched,
            VictimClass::Idle,
            VictimClass::Unused,
            VictimClass::All,
        ];
        for class in nearest_first {
            if found >= needed || class > furthest {
                break;
            }
            let context = self.context(step.table, step.now_ms);
            let victims = ranking.take(&context, class, needed - found, f64::INFINITY);
            found += bytes_of(&victims);
            self.evict(step, victims);
        }
        found
    }

    fn evict(&mut self, step: &mut Step<'_>, victims: Victims) {
        self.evicting_ms = step.now_ms;
        for (image, extents) in victims {
            let evicting = self.evicting.entry(image.clone()).or_default();
            evicting.extend(extents.iter().copied());
            step.out.evictions.push(Eviction { image, extents });
        }
    }

    /// Bytes that came of a cancelled fetch all the same stay only within the budget.
    pub(super) fn give_back_unwanted(
        &mut self,
        step: &mut Step<'_>,
        image: &SharedImage,
        here: Vec<Extent>,
    ) {
        let taken = step.table.resident_bytes() + step.table.fetching_bytes();
        if taken <= self.budget_bytes + self.evicting_bytes() || here.is_empty() {
            return;
        }
        let evictable = here
            .iter()
            .flat_map(|&here| step.table.evictable(image, here));
        let victims: Vec<Extent> = evictable.collect();
        self.counters.budget_evicted_bytes += victims.iter().map(|one| one.len).sum::<u64>();
        self.evict(step, vec![(image.clone(), victims)]);
    }

    /// Takes a new pressure level.
    pub(super) fn pressure_is(&mut self, step: &mut Step<'_>, pressure: Pressure) {
        self.level = pressure.level;
        match pressure.level {
            PressureLevel::Critical => {
                self.calm_since_ms = None;
                if !self.paused {
                    self.pause(step);
                }
                self.unpin_all(step);
                let needed = pressure.deficit_bytes.saturating_sub(self.evicting_bytes());
                if needed > 0 {
                    // Not what VMs use right now: they would have it back before anybody
                    // gained from it, and the kernel can take it without us.
                    let evicted = self.evict_worst(step, needed, VictimClass::Unused);
                    self.counters.pressure_evicted_bytes += evicted;
                }
            }
            PressureLevel::Low => self.calm_since_ms = None,
            PressureLevel::Plenty => {
                let since_ms = *self.calm_since_ms.get_or_insert(step.now_ms);
                self.resume_when_calm(since_ms, step.now_ms);
            }
        }
    }

    /// Starts nothing from now on; what is under way is cancelled and waits again.
    fn pause(&mut self, step: &mut Step<'_>) {
        self.paused = true;
        step.out.launches.push(PreparedLaunch::ReleaseAll);
        for (id, request) in self.queue.cancel(|_| true) {
            step.out.cancels.push(id);
            self.queue.push(request);
        }
    }

    fn resume_when_calm(&mut self, since_ms: i64, now_ms: i64) {
        if self.paused && now_ms.saturating_sub(since_ms) >= self.config.calm_ms {
            self.paused = false;
        }
    }

    pub(super) fn budget_changed(&mut self, step: &mut Step<'_>, budget_bytes: u64) {
        self.budget.set_cap(budget_bytes);
        self.config.budget_bytes = budget_bytes;
        self.budget_bytes = budget_bytes;
        self.shrink_to_budget(step);
    }

    /// Takes off the pins that the planner asked for on behalf of `vm`, and forgets it.
    pub(super) fn unpin_launch(&mut self, step: &mut Step<'_>, vm: &VmName) {
        if let Some(launch) = self.launches.remove(vm) {
            self.unpin(step, launch.pinned);
        }
    }

    fn unpin_all(&mut self, step: &mut Step<'_>) {
        let launches = self.launches.values_mut();
        let pinned = launches.flat_map(|launch| std::mem::take(&mut launch.pinned));
        let pinned: Vec<_> = pinned.collect();
        self.unpin(step, pinned);
    }

    fn unpin(&mut self, step: &mut Step<'_>, pinned: Vec<(SharedImage, Extent)>) {
        for (image, extent) in pinned {
            self.pinned_by_plan_bytes -= extent.len;
            step.out.pins.push(PinChange {
                image,
                extents: vec![extent],
                pinned: false,
            });
        }
    }

    pub(super) fn tick(&mut self, step: &mut Step<'_>) {
        let now_ms = step.now_ms;
        if let (PressureLevel::Plenty, Some(since_ms)) = (self.level, self.calm_since_ms) {
            self.resume_when_calm(since_ms, now_ms);
        }
        self.recently_used.turn(self.config.use_hold_ms, now_ms);
        self.soon_used.turn(self.config.use_hold_ms, now_ms);
        let hold_ms = self.config.pin_hold_ms;
        let held = |started_ms: i64| now_ms.saturating_sub(started_ms) < hold_ms;
        let mut over = Vec::new();
        for launch in self.launches.values_mut() {
            if launch
                .started_ms
                .is_some_and(|started_ms| !held(started_ms))
            {
                over.append(&mut launch.pinned);
            }
        }
        self.unpin(step, over);
        if now_ms.saturating_sub(self.evicting_ms) >= EVICTION_PATIENCE_MS {
            self.evicting.clear();
        }
        if now_ms.saturating_sub(self.tidied_ms) >= TIDY_EVERY_MS {
            self.tidied_ms = now_ms;
            self.benefit.forget_stale(now_ms);
            if self.ghosts.values().map(|set| set.bytes()).sum::<u64>() > self.budget_bytes {
                self.ghosts.clear();
            }
        }
        // A predecessor may have left more than the cap, or have died with evictions under
        // way; and what could not go then may go now.
        self.shrink_to_budget(step);
    }
}

fn bytes_of(victims: &Victims) -> u64 {
    let extents = victims.iter().flat_map(|(_, extents)| extents);
    extents.map(|extent| extent.len).sum()
}
