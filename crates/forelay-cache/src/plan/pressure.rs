//! The planner under shortage: making room, shrinking to the budget, pressure levels,
//! and what the passing of time does.
//!
//! Invariants: eviction happens only for a better prefetch, for demand beyond the
//! budget, or at critical level, and then not of what running VMs use right now; it
//! stops at what was asked for; prefetching resumes
//! only after the calm time without pressure.

use forelay_image::Extent;

use crate::mapping_table::MappingTable;
use crate::names::VmName;

use super::queue::{Piece, Reason};
use super::ranking::Ranking;
use super::victims::Reach;
use super::{Action, Choice, EvictionRule, Planner, PressureLevel, Victims};

/// How often stale history is dropped, in milliseconds.
const TIDY_EVERY_MS: i64 = 60_000;

/// After this long without an answer an eviction counts as failed, in milliseconds.
const EVICTION_PATIENCE_MS: i64 = 10_000;

impl Planner {
    /// Bytes that were asked to leave and have not yet.
    pub fn leaving_bytes(&self) -> u64 {
        self.leaving.values().map(|set| set.bytes()).sum()
    }

    pub(super) fn choice<'a>(&'a self, table: &'a MappingTable, now_ms: i64) -> Choice<'a> {
        Choice {
            table,
            worth: &self.worth,
            leaving: &self.leaving,
            guard: &self.guard,
            awaited: &self.awaited,
            now_ms,
        }
    }

    /// Evicts what is worth less than `piece`, so that `lacking_bytes` become free.
    /// Whether it is worth waiting for that.
    pub(super) fn make_room(
        &mut self,
        table: &MappingTable,
        ranking: &mut Ranking,
        piece: &Piece,
        lacking_bytes: u64,
        now_ms: i64,
        actions: &mut Vec<Action>,
    ) -> bool {
        let Some(needed) = lacking_bytes
            .checked_sub(self.leaving_bytes())
            .filter(|&n| n > 0)
        else {
            return true;
        };
        let choice = self.choice(table, now_ms);
        let victims = match self.config.rule {
            // Never for a component larger than the budget.
            EvictionRule::LeastUsed if piece.image_bytes > self.budget_bytes => Vec::new(),
            EvictionRule::LeastUsed => choice.least_used(needed),
            EvictionRule::Worth => {
                let below = piece.seconds_per_byte / self.config.displace_factor.max(1.0);
                // A little more than needed, so that not every piece searches anew.
                let slack = (self.budget_bytes / 128).max(needed);
                // On a busy host nearly all is mapped by some VM, or ahead of a launch. What
                // VMs have touched goes for a launch alone: its demand would take it anyway.
                let reaches = match piece.reason {
                    Reason::Launch(_) => &[Reach::Unmapped, Reach::Untouched, Reach::Idle][..],
                    Reason::Forecast(..) => &[Reach::Unmapped, Reach::Untouched],
                };
                let enough =
                    |reach: &&Reach| ranking.bytes_below(&choice, **reach, below) >= needed;
                let nearest = reaches.iter().find(enough);
                nearest.map_or_else(Vec::new, |reach| {
                    ranking.take(&choice, *reach, slack, below)
                })
            }
        };
        let found = bytes_of(&victims);
        if found < needed {
            return false;
        }
        self.counters.budget_evicted_bytes += found;
        self.evict(victims, now_ms, actions);
        true
    }

    /// Gives back what is beyond the cap; mapped extents too if nothing else is left and
    /// the rule allows it. The adapted budget only bounds prefetching: after a shortage it
    /// is near what the pool holds, and evicting for each demand fetch would be thrash.
    pub(super) fn shrink_to_budget(
        &mut self,
        table: &MappingTable,
        now_ms: i64,
        actions: &mut Vec<Action>,
    ) {
        let excess = table
            .resident_bytes()
            .saturating_sub(self.config.budget_bytes);
        let needed = excess.saturating_sub(self.leaving_bytes());
        if needed > 0 {
            let evicted = self.evict_worst(table, needed, Reach::All, now_ms, actions);
            self.counters.budget_evicted_bytes += evicted;
        }
    }

    /// Evicts what is worth least, unmapped components first and nothing beyond
    /// `furthest`; returns the bytes asked for.
    fn evict_worst(
        &mut self,
        table: &MappingTable,
        needed: u64,
        furthest: Reach,
        now_ms: i64,
        actions: &mut Vec<Action>,
    ) -> u64 {
        let mut ranking = Ranking::default();
        if self.config.rule == EvictionRule::LeastUsed {
            let choice = self.choice(table, now_ms);
            let mut victims = choice.least_used(needed);
            if victims.is_empty() {
                // Not enough in all: then all there is.
                victims = ranking.take(&choice, Reach::Unmapped, needed, f64::INFINITY);
            }
            let found = bytes_of(&victims);
            self.evict(victims, now_ms, actions);
            return found;
        }
        let mut found = 0;
        let nearest_first = [
            Reach::Unmapped,
            Reach::Untouched,
            Reach::Idle,
            Reach::Unused,
            Reach::All,
        ];
        for reach in nearest_first {
            if found >= needed || reach > furthest {
                break;
            }
            let choice = self.choice(table, now_ms);
            let victims = ranking.take(&choice, reach, needed - found, f64::INFINITY);
            found += bytes_of(&victims);
            self.evict(victims, now_ms, actions);
        }
        found
    }

    fn evict(&mut self, victims: Victims, now_ms: i64, actions: &mut Vec<Action>) {
        self.evicting_ms = now_ms;
        for (image, extents) in victims {
            let leaving = self.leaving.entry(image.clone()).or_default();
            leaving.extend(extents.iter().copied());
            actions.push(Action::Evict { image, extents });
        }
    }

    /// Takes a new pressure level.
    pub(super) fn pressure_is(
        &mut self,
        table: &mut MappingTable,
        level: PressureLevel,
        deficit_bytes: u64,
        now_ms: i64,
        actions: &mut Vec<Action>,
    ) {
        self.level = level;
        match level {
            PressureLevel::Critical => {
                self.calm_since_ms = None;
                if !self.paused {
                    self.paused = true;
                    actions.push(Action::PausePrefetch);
                    for piece in self.queue.take_under_way(|_| true) {
                        // Refused only if the image is gone, and then nothing is under way.
                        let _ = table.abort_fetch(&piece.image, piece.extent);
                        let (image, extent) = (piece.image.clone(), piece.extent);
                        actions.push(Action::CancelPrefetch { image, extent });
                        self.queue.push(piece);
                    }
                }
                self.unpin_all(actions);
                let needed = deficit_bytes.saturating_sub(self.leaving_bytes());
                if needed > 0 {
                    // Not what VMs use right now: they would have it back before anybody
                    // gained from it, and the kernel can take it without us.
                    let evicted = self.evict_worst(table, needed, Reach::Unused, now_ms, actions);
                    self.counters.pressure_evicted_bytes += evicted;
                }
            }
            PressureLevel::Low => self.calm_since_ms = None,
            PressureLevel::Plenty => {
                let since_ms = *self.calm_since_ms.get_or_insert(now_ms);
                self.resume_when_calm(since_ms, now_ms, actions);
            }
        }
    }

    fn resume_when_calm(&mut self, since_ms: i64, now_ms: i64, actions: &mut Vec<Action>) {
        if self.paused && now_ms.saturating_sub(since_ms) >= self.config.calm_ms {
            self.paused = false;
            actions.push(Action::ResumePrefetch);
        }
    }

    /// Takes off the pins that the planner asked for on behalf of `vm`, and forgets it.
    pub(super) fn unpin_launch(&mut self, vm: &VmName, actions: &mut Vec<Action>) {
        let Some(launch) = self.launches.remove(vm) else {
            return;
        };
        self.unpin(launch.pinned, actions);
    }

    fn unpin_all(&mut self, actions: &mut Vec<Action>) {
        let pinned = self
            .launches
            .values_mut()
            .map(|launch| std::mem::take(&mut launch.pinned));
        let pinned: Vec<_> = pinned.flatten().collect();
        self.unpin(pinned, actions);
    }

    fn unpin(&mut self, pinned: Vec<(crate::SharedImage, Extent)>, actions: &mut Vec<Action>) {
        for (image, extent) in pinned {
            self.pinned_by_plan_bytes -= extent.len;
            let extents = vec![extent];
            actions.push(Action::Unpin { image, extents });
        }
    }

    pub(super) fn tick(&mut self, now_ms: i64, actions: &mut Vec<Action>) {
        if let (PressureLevel::Plenty, Some(since_ms)) = (self.level, self.calm_since_ms) {
            self.resume_when_calm(since_ms, now_ms, actions);
        }
        self.guard.turn(self.config.use_hold_ms, now_ms);
        self.awaited.turn(self.config.use_hold_ms, now_ms);
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
        self.unpin(over, actions);
        if now_ms.saturating_sub(self.evicting_ms) >= EVICTION_PATIENCE_MS {
            self.leaving.clear();
        }
        if now_ms.saturating_sub(self.tidied_ms) >= TIDY_EVERY_MS {
            self.tidied_ms = now_ms;
            self.worth.forget_stale(now_ms);
            if self.ghosts.values().map(|set| set.bytes()).sum::<u64>() > self.budget_bytes {
                self.ghosts.clear();
            }
        }
    }
}

fn bytes_of(victims: &Victims) -> u64 {
    let extents = victims.iter().flat_map(|(_, extents)| extents);
    extents.map(|extent| extent.len).sum()
}
