//! Snapshots that are made before anybody asks: of what is launched again and again.
//!
//! A launch is handed here if its next one could resume from a later snapshot than it did, which
//! may be none. Once its VM is ready, its profile has been launched before, memory is plentiful,
//! the CPUs have time and no other launch is under way, what its next launch will look for is made:
//! of all that wait, first what saves most seconds for the bytes that it takes, and nothing that
//! saves too few.
//!
//! Refuses to be in anybody's way: whatever fails is logged, and tried again later and later. And
//! to start a program that nobody asked for: a snapshot at `ready` is left to its owner.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use forelay_cache::budget::PressureLevel;
use forelay_guest_protocol::snapshot::Tier;
use forelay_image::Digest;
use forelay_memory::pressure::Probe;
use tokio::sync::mpsc::Receiver;
use tokio::time::MissedTickBehavior;

use crate::api::VmState;
use crate::daemon::error::HostError;
use crate::daemon::forecast::announced::ProfileId;
use crate::daemon::forecast::learning::Learner;
use crate::daemon::forecast::models::model_key;
use crate::daemon::launch::maker::Maker;
use crate::daemon::memory::planner::{PlannerHandle, now_ms};
use crate::daemon::order::Order;
use crate::daemon::snapshot::origin::latest_tier;
use crate::daemon::vm::instance::Instance;
use crate::daemon::vm::registry::VmRegistry;

/// Launches of a profile after which another one is likely enough.
const LAUNCHES: u64 = 2;
/// Between two looks whether the host has time for a maker.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A VM that is not ready by then is not waited for.
const STARTING_LIMIT_MS: i64 = 60_000;
/// Launches that wait here, and as many again on their way: more are left to their next time.
pub const MOST_WAITING: usize = 256;
/// The least that a snapshot is to save: seconds a day for each MiB on disk.
const LEAST_SAVED: f64 = 0.02;
/// What one takes on disk, as far as nothing is known of it.
const USUAL_BYTES: u64 = 16 << 20;
/// What of a launch's time the next one saves: of a boot, and of a resume from an earlier tier.
const SAVED_OF_BOOT: f64 = 0.7;
const SAVED_OF_RESUME: f64 = 0.3;
/// Within which time launches are forecast to find out how many there will be.
const RATE_HORIZON_S: f64 = 3600.0;
const DAY_S: f64 = 86_400.0;
/// Until the same snapshot is made a second time; twice as long for each time more.
const AGAIN_AFTER: Duration = Duration::from_secs(60);
const AGAIN_AFTER_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// A launch whose next one could resume, or from later on.
pub struct Improvable {
    pub order: Order,
    pub instance: Arc<Instance>,
}

/// The latest tier that is made of an order unasked.
pub fn unasked_tier(order: &Order) -> Option<Tier> {
    latest_tier(order).map(|tier| tier.min(Tier::Composed))
}

/// See the module's header.
pub struct SnapshotsAhead {
    pub maker: Arc<Maker>,
    pub learner: Arc<Learner>,
    pub memory: Arc<PlannerHandle>,
    pub registry: Arc<VmRegistry>,
    /// Most of the time that tasks may wait for a CPU, in percent.
    pub cpu_stall: f64,
}

impl SnapshotsAhead {
    /// Makes what launches lack, one after the other.
    pub async fn run(self, mut launches: Receiver<Improvable>) {
        let (mut waiting, mut attempts) = (WaitingLaunches::default(), Attempts::default());
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                launch = launches.recv() => match launch {
                    Some(launch) => waiting.add(launch),
                    None => return,
                },
                _ = looks.tick(), if !waiting.0.is_empty() => {
                    self.look(&mut waiting, &mut attempts).await;
                }
            }
        }
    }

    /// Makes what one launch lacks, if there is time for it now.
    async fn look(&self, waiting: &mut WaitingLaunches, attempts: &mut Attempts) {
        if !self.is_quiet() {
            return;
        }
        let (now, learner) = (self.learner.clock().now(), &self.learner);
        let next = learner.next_launches(now, RATE_HORIZON_S, 0.0);
        let a_day = |launch: &Improvable| {
            let key = model_key(&launch.order.of);
            let forecast = next.iter().find(|one| one.profile == key);
            launches_a_day(forecast.map_or(0.0, |one| one.probability))
        };
        let saved = |launch: &Improvable| saved_a_day(launch, a_day(launch));
        let Some(launch) = waiting.take(now_ms(), saved) else {
            return;
        };
        let mib = USUAL_BYTES as f64 / f64::from(1 << 20);
        if saved(&launch) < LEAST_SAVED * mib || !self.will_return(&launch).await {
            return;
        }
        match self.make_next(&launch.order, attempts).await {
            Ok(true) => waiting.add(launch),
            Ok(false) => {}
            Err(error) => {
                let profile = &launch.order.of.profile;
                tracing::warn!(profile, %error, "no snapshot is made");
            }
        }
    }

    /// Makes the first snapshot that an order lacks and that may be tried; false if there is none.
    async fn make_next(&self, order: &Order, attempts: &mut Attempts) -> Result<bool, HostError> {
        // The kernel's serves whatever else is launched.
        for tier in [Some(Tier::Kernel), unasked_tier(order)] {
            let Some(tier) = tier else { continue };
            let Some(key) = self.maker.lacks(order, tier).await? else {
                continue;
            };
            if attempts.begin(key, Instant::now()) {
                let made = self.maker.make(order, tier).await;
                if let Err(HostError::Invalid(_)) = &made {
                    attempts.give_up(key);
                }
                return made.map(|_| true);
            }
        }
        Ok(false)
    }

    /// Whether a launch came to be ready, of a profile that is launched again.
    async fn will_return(&self, launch: &Improvable) -> bool {
        let was_ready = launch.instance.read(|vm| vm.launch.ready_s.is_some());
        let of = &launch.order.of;
        let entries = self.learner.entries(Some(&of.profile)).await;
        let entries = entries.unwrap_or_default();
        let mut own = entries.iter().filter(|one| one.owner == of.owner);
        was_ready && own.any(|one| one.launches >= LAUNCHES)
    }

    fn is_quiet(&self) -> bool {
        is_quiet(&self.registry, &self.memory, self.cpu_stall)
    }
}

/// Whether nothing starts, memory is plentiful and tasks wait for a CPU for no more of the time
/// than this, in percent.
pub fn is_quiet(registry: &VmRegistry, memory: &PlannerHandle, cpu_stall: f64) -> bool {
    let (live, now_ms) = (registry.live(), now_ms());
    let cpus = available_parallelism().map_or(1, usize::from);
    let stall = Probe::new().cpu_stall(cpus).unwrap_or(0.0);
    !live.iter().any(|instance| is_starting(instance, now_ms))
        && memory.status().level == PressureLevel::Plenty
        && stall <= cpu_stall
}

/// Launches of a profile a day, if one within the forecast's horizon is so likely. What is
/// launched again comes at least once, for all that is known.
fn launches_a_day(probability: f64) -> f64 {
    let in_horizon = -(1.0 - probability.clamp(0.0, 0.999)).ln();
    (in_horizon * DAY_S / RATE_HORIZON_S).max(1.0)
}

/// Seconds a day that launches like this one would save.
fn saved_a_day(launch: &Improvable, launches: f64) -> f64 {
    let (ready_s, resumed) = launch
        .instance
        .read(|vm| (vm.launch.ready_s, vm.launch.resumed));
    let share = match resumed {
        None => SAVED_OF_BOOT,
        Some(_) => SAVED_OF_RESUME,
    };
    ready_s.unwrap_or(0.0) * share * launches
}

fn is_starting(instance: &Instance, now_ms: i64) -> bool {
    let state = instance.state();
    let launched_ms = instance.read(|vm| vm.launched_ms);
    matches!(
        state,
        VmState::Launching | VmState::Booting | VmState::Mounted
    ) && now_ms - launched_ms < STARTING_LIMIT_MS
}

/// Launches of which something may be made: of each profile the last.
#[derive(Default)]
struct WaitingLaunches(BTreeMap<ProfileId, Improvable>);

impl WaitingLaunches {
    fn add(&mut self, launch: Improvable) {
        let id = ProfileId::of(&launch.order);
        if self.0.len() < MOST_WAITING || self.0.contains_key(&id) {
            self.0.insert(id, launch);
        }
    }

    /// Of those whose VM has come as far as it will, the one that saves most.
    fn take(&mut self, now_ms: i64, saved: impl Fn(&Improvable) -> f64) -> Option<Improvable> {
        let all = self.0.iter();
        let settled = all.filter(|(_, one)| !is_starting(&one.instance, now_ms));
        let best = settled.max_by(|(_, a), (_, b)| saved(a).total_cmp(&saved(b)));
        let id = best.map(|(id, _)| id.clone())?;
        self.0.remove(&id)
    }
}

/// How often each snapshot was made, failures and those that did not last, and when it may be
/// made again, if ever.
#[derive(Default)]
struct Attempts(BTreeMap<Digest, (u32, Option<Instant>)>);

impl Attempts {
    /// Whether the snapshot with this key may be made now, which is noted.
    fn begin(&mut self, key: Digest, now: Instant) -> bool {
        // What is over for so long does not count any more.
        let counts =
            |next: &Option<Instant>| next.is_none_or(|next| now < next + AGAIN_AFTER_LIMIT);
        self.0.retain(|_, (_, next)| counts(next));
        let (count, next) = self.0.entry(key).or_insert((0, Some(now)));
        if next.is_none_or(|next| now < next) {
            return false;
        }
        let wait = AGAIN_AFTER * 2_u32.pow((*count).min(16));
        *next = Some(now + wait.min(AGAIN_AFTER_LIMIT));
        *count += 1;
        true
    }

    fn give_up(&mut self, key: Digest) {
        self.0.insert(key, (0, None));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::order::tests::order;
    use crate::daemon::vm::instance::tests::data;

    #[test]
    fn what_does_not_last_is_made_less_and_less_often_and_what_makes_no_sense_never() {
        let (mut attempts, start) = (Attempts::default(), Instant::now());
        let key = Digest::of(b"web");
        let mut begun = |minute: u32| attempts.begin(key, start + AGAIN_AFTER * minute);
        let made: Vec<u32> = (0..40).filter(|minute| begun(*minute)).collect();
        assert_eq!(made, [0, 1, 3, 7, 15, 31]);
        assert!(attempts.begin(Digest::of(b"other"), start));
        // After a day without, it is as new.
        let later = start + AGAIN_AFTER_LIMIT * 2;
        assert!(attempts.begin(key, later) && attempts.begin(key, later + AGAIN_AFTER));
        attempts.give_up(key);
        assert!(!attempts.begin(key, later + AGAIN_AFTER_LIMIT * 9));
    }

    #[test]
    fn a_vm_that_never_gets_ready_is_in_nobodys_way_and_each_profile_waits_once() {
        let dir = tempfile::tempdir().unwrap();
        let launch = |name: &str, profile: &str, launched_ms| {
            let mut data = data(name, dir.path());
            data.launched_ms = launched_ms;
            Improvable {
                order: order(profile, "", "base"),
                instance: Arc::new(Instance::launching(name, data)),
            }
        };
        let mut waiting = WaitingLaunches::default();
        waiting.add(launch("hangs", "a", 0));
        waiting.add(launch("web", "b", 50_000));
        waiting.add(launch("web-2", "b", 55_000));
        assert!(
            waiting.take(59_999, |_| 1.0).is_none(),
            "both may get ready"
        );
        let name = |launch: Option<Improvable>| launch.unwrap().instance.name().to_owned();
        assert_eq!(name(waiting.take(60_000, |_| 1.0)), "hangs");
        assert!(waiting.take(60_000, |_| 1.0).is_none());
        assert_eq!(name(waiting.take(115_000, |_| 1.0)), "web-2");
        assert!(waiting.take(i64::MAX, |_| 1.0).is_none());
        for number in 0..=MOST_WAITING {
            waiting.add(launch("web", &format!("p{number}"), 0));
        }
        assert_eq!(waiting.0.len(), MOST_WAITING);
    }

    #[test]
    fn what_saves_most_is_made_first() {
        let dir = tempfile::tempdir().unwrap();
        let launch = |profile: &str, ready_s, resumed| {
            let mut data = data(profile, dir.path());
            (data.launch.ready_s, data.launch.resumed) = (Some(ready_s), resumed);
            Improvable {
                order: order(profile, "", "base"),
                instance: Arc::new(Instance::launching(profile, data)),
            }
        };
        let mut waiting = WaitingLaunches::default();
        waiting.add(launch("booted", 2.0, None));
        waiting.add(launch("resumed", 2.0, Some(Tier::Kernel)));
        waiting.add(launch("slow", 9.0, None));
        waiting.add(launch("frequent", 2.0, None));
        let saved = |one: &Improvable| {
            let often = one.instance.name() == "frequent";
            saved_a_day(one, launches_a_day(if often { 0.9 } else { 0.0 }))
        };
        let names = std::iter::from_fn(|| waiting.take(i64::MAX, saved));
        let names: Vec<String> = names.map(|one| one.instance.name().to_owned()).collect();
        assert_eq!(names, ["frequent", "slow", "booted", "resumed"]);
        assert!(launches_a_day(1.0).is_finite());
    }

    #[test]
    fn nobodys_program_is_started_unasked() {
        let tier = |at: &str| {
            let snapshot = format!("[snapshot]\nat = {at:?}");
            unasked_tier(&order("web", &snapshot, "base"))
        };
        let all = ["ready", "composed", "kernel", "off"].map(tier);
        let composed = Some(Tier::Composed);
        assert_eq!(all, [composed, composed, Some(Tier::Kernel), None]);
    }
}
