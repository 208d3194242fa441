//! How much memory the pool may take, from samples of the host and forecasts of what
//! VMs will need.
//!
//! ```text
//!                free < headroom             free < critical
//!   Plenty ---------------------> Low -------------------------> Critical
//!     ^                            |  ^                             |
//!     +----------------------------+  +-----------------------------+
//!       free >= headroom + slack             free >= headroom
//! ```
//! `free` is what VMs could get without the pool giving anything back. The pool grows
//! into free memory by steps and is asked to shrink only at the critical level, by just
//! what brings `free` back to the headroom.
//!
//! Refuses to know how samples are taken. Invariants: the budget is never above the
//! cap; below the critical level it is never below what the pool holds; the deficit is
//! zero below the critical level.

use serde::{Deserialize, Serialize};

/// How short of memory the host is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PressureLevel {
    /// Nothing needs to be given back.
    #[default]
    Plenty,
    /// No more prefetching from forecasts, nothing is evicted yet.
    Low,
    /// Memory must be given back now.
    Critical,
}

/// One look at the host's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemorySample {
    /// Physical memory in bytes.
    pub total_bytes: u64,
    /// MemAvailable in bytes; counts the pool's unpinned pages as available.
    pub available_bytes: u64,
    /// Bytes that the pool holds.
    pub pool_bytes: u64,
    /// Bytes of the pool that are pinned, hence not part of `available_bytes`.
    pub pinned_bytes: u64,
    /// Room left below the tightest memory cgroup limit that applies, in bytes, with the
    /// pool's pages counted as used.
    pub cgroup_room_bytes: Option<u64>,
    /// Share of a stretch of time in which some task waited for memory, 0 to 100. The same
    /// figure in consecutive samples is taken for the same stretch.
    pub stall_pct: Option<f64>,
    /// Additional memory that VMs are forecast to need, at a high quantile, in bytes.
    pub forecast_demand_bytes: u64,
}

/// Settings of the budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BudgetConfig {
    /// Most that the pool may ever take, in bytes.
    pub cap_bytes: u64,
    /// Least free memory to keep, as a share of the total.
    pub headroom_share: f64,
    /// Below this share of the headroom the level is critical.
    pub critical_share: f64,
    /// Leaving the low level takes this share of the headroom on top of it.
    pub slack_share: f64,
    /// Share of time stalled from which the level is critical, in percent.
    pub stall_critical_pct: f64,
    /// Largest growth for one sample, as a share of the cap.
    pub growth_share: f64,
}

impl Default for BudgetConfig {
    fn default() -> Self {
        Self {
            cap_bytes: 1 << 30,
            headroom_share: 0.05,
            critical_share: 0.5,
            slack_share: 0.25,
            stall_critical_pct: 10.0,
            growth_share: 1.0 / 16.0,
        }
    }
}

/// What follows from a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BudgetDecision {
    /// Most that the pool may take now, in bytes.
    pub budget_bytes: u64,
    /// How short of memory the host is.
    pub level: PressureLevel,
    /// Bytes to give back now.
    pub deficit_bytes: u64,
}

/// Adapts the pool's budget. See the module's header.
#[derive(Clone, Debug)]
pub struct BudgetController {
    config: BudgetConfig,
    level: PressureLevel,
    budget_bytes: u64,
    /// The stall that was answered last.
    answered_pct: Option<f64>,
}

impl BudgetController {
    /// A controller that starts with the whole cap as budget.
    pub fn new(config: BudgetConfig) -> Self {
        Self {
            budget_bytes: config.cap_bytes,
            level: PressureLevel::Plenty,
            answered_pct: None,
            config,
        }
    }

    /// Changes the cap.
    pub fn set_cap(&mut self, cap_bytes: u64) {
        self.config.cap_bytes = cap_bytes;
        self.budget_bytes = self.budget_bytes.min(cap_bytes);
    }

    /// Memory that VMs could get without the pool giving anything back, in bytes.
    pub fn free_bytes(sample: &MemorySample) -> u64 {
        let reclaimable = sample.pool_bytes.saturating_sub(sample.pinned_bytes);
        let free = sample.available_bytes.saturating_sub(reclaimable);
        sample.cgroup_room_bytes.map_or(free, |room| free.min(room))
    }

    /// Free memory to keep, in bytes.
    pub fn headroom_bytes(&self, sample: &MemorySample) -> u64 {
        let least = (sample.total_bytes as f64 * self.config.headroom_share) as u64;
        // More than half of the host cannot be asked for: the pool would never exist.
        least
            .max(sample.forecast_demand_bytes)
            .min(sample.total_bytes / 2)
    }

    /// Takes a sample and decides.
    pub fn sample(&mut self, sample: &MemorySample) -> BudgetDecision {
        let free = Self::free_bytes(sample);
        let headroom = self.headroom_bytes(sample);
        self.level = self.next_level(sample, free, headroom);
        let pool = sample.pool_bytes;
        let mut deficit_bytes = 0;
        self.budget_bytes = match self.level {
            PressureLevel::Critical => {
                let shortage = headroom.saturating_sub(free);
                deficit_bytes = shortage.max(self.stall_relief(sample, headroom)).min(pool);
                self.budget_bytes.min(pool - deficit_bytes)
            }
            PressureLevel::Low => self.budget_bytes.min(pool),
            PressureLevel::Plenty => {
                let room = pool.saturating_add(free.saturating_sub(headroom));
                let step = (self.config.cap_bytes as f64 * self.config.growth_share) as u64;
                let grown = self.budget_bytes.max(pool).saturating_add(step);
                room.min(grown).max(pool)
            }
        }
        .min(self.config.cap_bytes);
        BudgetDecision {
            budget_bytes: self.budget_bytes,
            level: self.level,
            deficit_bytes,
        }
    }

    /// A stall without a measured shortage still gives something back, once.
    fn stall_relief(&mut self, sample: &MemorySample, headroom: u64) -> u64 {
        let stalled = |pct: &f64| *pct >= self.config.stall_critical_pct;
        let stall = sample.stall_pct.filter(stalled);
        if stall.is_none() || stall == self.answered_pct {
            return 0;
        }
        self.answered_pct = stall;
        headroom / 8
    }

    fn next_level(&self, sample: &MemorySample, free: u64, headroom: u64) -> PressureLevel {
        let share = |share: f64| (headroom as f64 * share) as u64;
        let stalled = sample
            .stall_pct
            .is_some_and(|pct| pct >= self.config.stall_critical_pct);
        let calm = sample
            .stall_pct
            .is_none_or(|pct| pct < self.config.stall_critical_pct / 2.0);
        if free < share(self.config.critical_share)
            || (stalled && free < headroom.saturating_mul(2))
        {
            return PressureLevel::Critical;
        }
        match self.level {
            PressureLevel::Critical if free < headroom || !calm => PressureLevel::Critical,
            PressureLevel::Plenty if free >= headroom => PressureLevel::Plenty,
            _ if free >= share(1.0 + self.config.slack_share) => PressureLevel::Plenty,
            _ => PressureLevel::Low,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn sample(free: u64, pool: u64) -> MemorySample {
        MemorySample {
            total_bytes: 16 * GIB,
            available_bytes: free + pool,
            pool_bytes: pool,
            ..MemorySample::default()
        }
    }

    fn controller() -> BudgetController {
        BudgetController::new(BudgetConfig {
            cap_bytes: 8 * GIB,
            ..BudgetConfig::default()
        })
    }

    #[test]
    fn levels_have_hysteresis_and_only_critical_asks_for_bytes() {
        let mut budget = controller();
        let headroom = budget.headroom_bytes(&sample(0, 0));
        let mut level = |free: u64| {
            let decision = budget.sample(&sample(free, 4 * GIB));
            (decision.level, decision.deficit_bytes > 0)
        };
        assert_eq!(level(headroom), (PressureLevel::Plenty, false));
        assert_eq!(level(headroom - 4096), (PressureLevel::Low, false));
        assert_eq!(
            level(headroom),
            (PressureLevel::Low, false),
            "not before the slack"
        );
        assert_eq!(level(headroom / 3), (PressureLevel::Critical, true));
        assert_eq!(
            level(headroom * 3 / 4),
            (PressureLevel::Critical, true),
            "not before safe"
        );
        assert_eq!(level(headroom), (PressureLevel::Low, false));
        assert_eq!(level(headroom * 2), (PressureLevel::Plenty, false));
    }

    #[test]
    fn the_deficit_is_just_what_restores_the_headroom() {
        let mut budget = controller();
        let headroom = budget.headroom_bytes(&sample(0, 0));
        let decision = budget.sample(&sample(headroom / 4, 4 * GIB));
        assert_eq!(decision.deficit_bytes, headroom - headroom / 4);
        assert_eq!(decision.budget_bytes, 4 * GIB - decision.deficit_bytes);
    }

    #[test]
    fn forecast_demand_makes_the_pool_stop_growing_before_vms_suffer() {
        let mut budget = controller();
        let plain = budget.sample(&sample(2 * GIB, GIB)).budget_bytes;
        let mut warned = sample(2 * GIB, GIB);
        warned.forecast_demand_bytes = 2 * GIB;
        let decision = controller().sample(&warned);
        assert!(
            plain > GIB && decision.budget_bytes == GIB,
            "{plain} {decision:?}"
        );
    }

    #[test]
    fn one_stall_gives_something_back_once() {
        let mut budget = controller();
        let headroom = budget.headroom_bytes(&sample(0, 0));
        let mut stalled = sample(headroom * 3 / 2, 4 * GIB);
        stalled.stall_pct = Some(20.0);
        assert_eq!(budget.sample(&stalled).deficit_bytes, headroom / 8);
        let again = budget.sample(&stalled);
        assert_eq!(
            (again.level, again.deficit_bytes),
            (PressureLevel::Critical, 0)
        );
        stalled.stall_pct = Some(21.0);
        assert_eq!(budget.sample(&stalled).deficit_bytes, headroom / 8);
    }

    #[test]
    fn a_cgroup_limit_bites_before_the_host_does() {
        let mut limited = sample(8 * GIB, GIB);
        limited.cgroup_room_bytes = Some(GIB / 16);
        assert_eq!(controller().sample(&limited).level, PressureLevel::Critical);
    }

    proptest! {
        #[test]
        fn invariants_hold_for_any_samples(seq in prop::collection::vec(
            (0u64..16, 0u64..12, 0u64..20, prop::option::of(0.0f64..100.0)), 1..50)) {
            let mut budget = controller();
            for (free, pool, demand, stall_pct) in seq {
                let mut sample = sample(free * GIB / 4, pool * GIB);
                sample.forecast_demand_bytes = demand * GIB;
                sample.stall_pct = stall_pct;
                let decision = budget.sample(&sample);
                prop_assert!(decision.budget_bytes <= 8 * GIB);
                if decision.level != PressureLevel::Critical {
                    prop_assert_eq!(decision.deficit_bytes, 0);
                    prop_assert!(decision.budget_bytes >= sample.pool_bytes.min(8 * GIB)
                        || decision.level == PressureLevel::Low);
                }
            }
        }
    }
}
