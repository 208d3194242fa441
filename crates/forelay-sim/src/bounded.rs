//! Caches of a fixed number of profiles, one unit each: the bounded baselines.
//!
//! Owns the classic replacement rules on unit-sized entries and Belady's MIN as the bound. Misses
//! include the compulsory ones. Invariant: never more than `slots` profiles are loaded.
//!
//! Sources: LFU with aging-free counts; GDSF (Cherkasova 1998), which for unit size and cost is LFU
//! with dynamic aging; S3-FIFO (Yang et al., SOSP 2023): small queue of a tenth, main queue, ghost
//! queue as long as main; MIN (Belady 1966).

use crate::tally::{Frame, Tally};
use crate::trace::Trace;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// A replacement rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eviction {
    /// Least recently used.
    Lru,
    /// Least frequently used while loaded, ties by age.
    Lfu,
    /// Greedy-dual size-frequency.
    Gdsf,
    /// Three static FIFO queues.
    S3Fifo,
    /// Belady's, which knows the future.
    Min,
}

impl Eviction {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::Gdsf => "gdsf",
            Self::S3Fifo => "s3-fifo",
            Self::Min => "min",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::Lru, Self::Lfu, Self::Gdsf, Self::S3Fifo, Self::Min]
            .into_iter()
            .find(|eviction| eviction.name() == name)
    }

    /// Runs the cache over a trace. Memory is charged for every occupied slot.
    pub(crate) fn run(self, trace: &Trace, frame: &Frame, slots: usize) -> Tally {
        let mut tally = Tally::new(frame);
        let mut cache: Box<dyn Cache> = match self {
            Self::Lru => Box::new(Ranked::new(slots, |_, now, _| now as f64)),
            Self::Lfu => Box::new(Ranked::new(slots, |uses, _, _| uses as f64)),
            Self::Gdsf => Box::new(Ranked::new(slots, |uses, _, floor| floor + uses as f64)),
            Self::S3Fifo => Box::new(S3Fifo::new(slots)),
            Self::Min => Box::new(Min::new(slots, trace)),
        };
        let mut occupied_since = trace.start();
        for (index, launch) in trace.launches.iter().enumerate() {
            let elapsed = launch.at.seconds_since(occupied_since) / 60.0;
            tally.memory_min += cache.len() as f64 * elapsed;
            occupied_since = launch.at;
            let hit = cache.launch(launch.profile, index);
            tally.launched(
                frame,
                launch.profile,
                launch.at,
                launch.count,
                u32::from(!hit),
            );
        }
        tally
    }
}

trait Cache {
    /// A launch; returns whether the profile was loaded. It is afterwards.
    fn launch(&mut self, profile: u32, index: usize) -> bool;
    fn len(&self) -> usize;
}

#[derive(Clone, Copy, PartialEq)]
struct Rank(f64, u64, u32);

impl Eq for Rank {}
impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Rank {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0
            .total_cmp(&other.0)
            .then(self.1.cmp(&other.1))
            .then(self.2.cmp(&other.2))
    }
}

/// Evicts the lowest rank; the rank is a function of (uses, now, rank of the last victim).
struct Ranked {
    slots: usize,
    rank: fn(u64, u64, f64) -> f64,
    loaded: HashMap<u32, (Rank, u64)>,
    order: BTreeSet<Rank>,
    floor: f64,
}

impl Ranked {
    fn new(slots: usize, rank: fn(u64, u64, f64) -> f64) -> Self {
        Self {
            slots,
            rank,
            loaded: HashMap::new(),
            order: BTreeSet::new(),
            floor: 0.0,
        }
    }
}

impl Cache for Ranked {
    fn launch(&mut self, profile: u32, index: usize) -> bool {
        let now = index as u64;
        let previous = self.loaded.remove(&profile);
        let uses = match previous {
            Some((rank, uses)) => {
                self.order.remove(&rank);
                uses + 1
            }
            None => {
                if self.loaded.len() >= self.slots
                    && let Some(victim) = self.order.pop_first()
                {
                    self.floor = victim.0;
                    self.loaded.remove(&victim.2);
                }
                1
            }
        };
        let rank = Rank((self.rank)(uses, now, self.floor), now, profile);
        self.order.insert(rank);
        self.loaded.insert(profile, (rank, uses));
        previous.is_some()
    }

    fn len(&self) -> usize {
        self.loaded.len()
    }
}

/// S3-FIFO with two-bit counters.
struct S3Fifo {
    slots: usize,
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    ghosts: VecDeque<u32>,
    ghost_set: HashMap<u32, u32>,
    uses: HashMap<u32, u8>,
}

impl S3Fifo {
    fn new(slots: usize) -> Self {
        Self {
            slots,
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: VecDeque::new(),
            ghost_set: HashMap::new(),
            uses: HashMap::new(),
        }
    }

    fn evict(&mut self) {
        if self.small.len() >= (self.slots / 10).max(1) || self.main.is_empty() {
            self.evict_small();
        } else {
            self.evict_main();
        }
    }

    fn evict_small(&mut self) {
        while let Some(profile) = self.small.pop_front() {
            if self.uses.get(&profile).copied().unwrap_or(0) > 1 {
                self.main.push_back(profile);
                self.uses.insert(profile, 0);
                if self.main.len() > self.slots - (self.slots / 10).max(1) {
                    self.evict_main();
                    return;
                }
            } else {
                self.uses.remove(&profile);
                self.remember(profile);
                return;
            }
        }
        self.evict_main();
    }

    fn evict_main(&mut self) {
        while let Some(profile) = self.main.pop_front() {
            let uses = self.uses.get(&profile).copied().unwrap_or(0);
            if uses == 0 {
                self.uses.remove(&profile);
                return;
            }
            self.uses.insert(profile, uses - 1);
            self.main.push_back(profile);
        }
    }

    fn remember(&mut self, profile: u32) {
        self.ghosts.push_back(profile);
        *self.ghost_set.entry(profile).or_default() += 1;
        while self.ghosts.len() > self.slots {
            if let Some(old) = self.ghosts.pop_front()
                && let Some(count) = self.ghost_set.get_mut(&old)
            {
                *count -= 1;
                if *count == 0 {
                    self.ghost_set.remove(&old);
                }
            }
        }
    }
}

impl Cache for S3Fifo {
    fn launch(&mut self, profile: u32, _index: usize) -> bool {
        if let Some(uses) = self.uses.get_mut(&profile) {
            *uses = (*uses + 1).min(3);
            return true;
        }
        while self.uses.len() >= self.slots {
            self.evict();
        }
        self.uses.insert(profile, 0);
        if self.ghost_set.contains_key(&profile) {
            self.main.push_back(profile);
        } else {
            self.small.push_back(profile);
        }
        false
    }

    fn len(&self) -> usize {
        self.uses.len()
    }
}

/// Belady's rule: evict what is needed last.
struct Min {
    slots: usize,
    next: Vec<usize>,
    loaded: HashMap<u32, usize>,
    order: BTreeMap<usize, u32>,
}

impl Min {
    fn new(slots: usize, trace: &Trace) -> Self {
        let never = trace.launches.len();
        let mut upcoming = vec![never; trace.profiles.len()];
        let mut next = vec![never; never];
        for (index, launch) in trace.launches.iter().enumerate().rev() {
            // Distinct ends keep the order total for profiles that never return.
            let profile = launch.profile as usize;
            next[index] = if upcoming[profile] == never {
                never + profile + 1
            } else {
                upcoming[profile]
            };
            upcoming[profile] = index;
        }
        Self {
            slots,
            next,
            loaded: HashMap::new(),
            order: BTreeMap::new(),
        }
    }
}

impl Cache for Min {
    fn launch(&mut self, profile: u32, index: usize) -> bool {
        let hit = match self.loaded.remove(&profile) {
            Some(due) => {
                self.order.remove(&due);
                true
            }
            None => {
                if self.loaded.len() >= self.slots
                    && let Some((_, victim)) = self.order.pop_last()
                {
                    self.loaded.remove(&victim);
                }
                false
            }
        };
        let due = self.next[index];
        self.loaded.insert(profile, due);
        self.order.insert(due, profile);
        hit
    }

    fn len(&self) -> usize {
        self.loaded.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Launch;
    use forelay_predict::time::Timestamp;

    fn trace(profiles: &[u32]) -> Trace {
        let count = profiles.iter().max().unwrap() + 1;
        let mut trace = Trace {
            launches: profiles
                .iter()
                .zip(0..)
                .map(|(&profile, i)| Launch {
                    at: Timestamp(i * 60_000),
                    profile,
                    owner: 0,
                    count: 1,
                })
                .collect(),
            profiles: (0..count).map(|p| p.to_string()).collect(),
            owners: vec!["o".to_owned()],
            ..Trace::default()
        };
        trace.finish();
        trace
    }

    fn misses(eviction: Eviction, slots: usize, profiles: &[u32]) -> u32 {
        let trace = trace(profiles);
        let frame = Frame::new(&trace, 1);
        eviction.run(&trace, &frame, slots).cold.iter().sum()
    }

    #[test]
    fn small_cases_by_hand() {
        assert_eq!(misses(Eviction::Lru, 2, &[0, 1, 2, 0, 1, 2]), 6);
        assert_eq!(misses(Eviction::Min, 2, &[0, 1, 2, 0, 1, 2]), 4);
        assert_eq!(misses(Eviction::Lfu, 2, &[0, 0, 1, 2, 0]), 3);
        assert_eq!(misses(Eviction::Lru, 2, &[0, 0, 1, 2, 0]), 4);
    }

    #[test]
    fn no_rule_beats_min_and_all_agree_when_everything_fits() {
        let mut state = 9u64;
        let profiles: Vec<u32> = (0..4_000)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                let draw = (state >> 40) as f64 / (1u64 << 24) as f64;
                (draw * draw * draw * 200.0) as u32
            })
            .collect();
        let min = misses(Eviction::Min, 20, &profiles);
        for eviction in [
            Eviction::Lru,
            Eviction::Lfu,
            Eviction::Gdsf,
            Eviction::S3Fifo,
        ] {
            assert!(
                misses(eviction, 20, &profiles) >= min,
                "{}",
                eviction.name()
            );
            assert_eq!(
                misses(eviction, 200, &profiles),
                misses(Eviction::Min, 200, &profiles)
            );
        }
    }
}
