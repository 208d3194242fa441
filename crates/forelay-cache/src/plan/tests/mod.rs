//! The planner against a stand-in for shared memory that carries out its actions.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use forelay_image::{Digest, Extent, PlannedExtent};

use super::*;
use crate::budget::MemorySample;
use crate::names::{DeviceImage, Domain};

mod cancelling;
mod random;
mod ranking;
mod room;
mod small_pool;
mod tiers;

const MIB: u64 = 1 << 20;

fn image(number: u8) -> Digest {
    Digest::of(&[number])
}

fn device(number: u8, image_bytes: u64) -> DeviceImage {
    DeviceImage {
        image: image(number),
        image_bytes,
    }
}

fn shared(number: u8) -> SharedImage {
    SharedImage::new(Domain::from("d"), image(number))
}

fn planned(number: u8, offset: u64, len: u64, probability: f64, at_ms: u32) -> PlannedExtent {
    PlannedExtent {
        image: image(number),
        extent: Extent::new(offset, len),
        probability,
        first_touch_ms: at_ms,
    }
}

/// Carries out decisions at once or later, and checks what no plan may do.
struct Host {
    planner: Planner,
    now_ms: i64,
    /// Fetches under way.
    wishes: VecDeque<Fetch>,
    /// All fetches ever started, in order.
    fetches: Vec<Fetch>,
    evictions: usize,
    launches: Vec<PreparedLaunch>,
    prefetched: u64,
    /// Whether cancelled fetches end only when the test says so.
    slow_cancels: bool,
    cancelled: Vec<Fetch>,
}

impl Host {
    fn new(config: PlanConfig) -> Self {
        let table = Arc::new(SharedTable::default());
        let budget = BudgetConfig {
            cap_bytes: config.budget_bytes,
            ..BudgetConfig::default()
        };
        Self {
            planner: Planner::new(config, budget, table),
            now_ms: 1_000_000,
            wishes: VecDeque::new(),
            fetches: Vec::new(),
            evictions: 0,
            launches: Vec::new(),
            prefetched: 0,
            slow_cancels: false,
            cancelled: Vec::new(),
        }
    }

    fn taken(&self) -> u64 {
        let table = &self.planner.table;
        table.read(|t| t.resident_bytes() + t.fetching_bytes())
    }

    fn tell(&mut self, event: PlannerEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let before = self.taken();
            let decisions = self.planner.step(event, self.now_ms);
            self.carry_out(decisions, &mut events);
            let (taken, budget) = (self.taken(), self.planner.budget_bytes());
            assert!(
                taken <= budget || taken <= before + 16 * MIB,
                "{taken} over {budget}"
            );
            let under_way = self.wishes.iter().chain(&self.cancelled);
            let under_way: u64 = under_way.map(|fetch| fetch.extent.len).sum();
            assert!(under_way <= self.planner.config.inflight_bytes.max(MIB));
            self.planner.table.read(|table| table.validate()).unwrap();
        }
    }

    fn carry_out(&mut self, decisions: Decisions, events: &mut VecDeque<PlannerEvent>) {
        for id in decisions.cancels {
            let at = self.wishes.iter().position(|fetch| fetch.id == id);
            let fetch = at.and_then(|at| self.wishes.remove(at));
            let fetch = fetch.expect("only what is under way is cancelled");
            if self.slow_cancels {
                self.cancelled.push(fetch);
            } else {
                let here = Vec::new();
                events.push_back(PlannerEvent::FetchEnded(FetchEnded { id, here }));
            }
        }
        for fetch in decisions.fetches {
            assert!(!self.planner.is_paused(), "prefetch while paused");
            self.prefetched += fetch.extent.len;
            self.fetches.push(fetch.clone());
            self.wishes.push_back(fetch);
        }
        for Eviction { image, extents } in decisions.evictions {
            self.evictions += 1;
            self.check_victims(&image, &extents);
            for extent in extents {
                let evicted = SharedExtent::new(image.clone(), extent);
                events.push_back(PlannerEvent::Evicted(evicted.clone()));
                events.push_back(PlannerEvent::EvictionEnded(evicted));
            }
        }
        for change in decisions.pins {
            events.extend(change.extents.into_iter().map(|extent| {
                let extent = SharedExtent::new(change.image.clone(), extent);
                match change.pinned {
                    true => PlannerEvent::Pinned(extent),
                    false => PlannerEvent::Unpinned(extent),
                }
            }));
        }
        self.launches.extend(decisions.launches);
        if let Some(samples) = decisions.fit {
            events.push_back(PlannerEvent::ReuseFitted(Box::new(samples.fit())));
        }
    }

    /// A fetch that has brought these parts ends.
    fn end(&mut self, fetch: Fetch, here: Vec<Extent>) {
        let id = fetch.id;
        self.tell(PlannerEvent::FetchEnded(FetchEnded { id, here }));
    }

    fn check_victims(&self, image: &SharedImage, extents: &[Extent]) {
        self.planner.table.read(|table| {
            for &extent in extents {
                assert_eq!(
                    table.evictable(image, extent),
                    [extent],
                    "pinned or absent victim"
                );
            }
        });
    }

    fn push_one(&mut self) -> bool {
        let Some(fetch) = self.wishes.pop_front() else {
            return false;
        };
        let here = vec![fetch.extent];
        self.end(fetch, here);
        true
    }

    fn push_all(&mut self) {
        while self.push_one() {}
    }

    fn launch(&mut self, vm: &str, profile: &str, images: &[u8], set: Vec<PlannedExtent>) {
        self.tell(PlannerEvent::LaunchRequested(LaunchRequested {
            vm: vm.into(),
            domain: "d".into(),
            profile: profile.into(),
            devices: images
                .iter()
                .map(|&number| device(number, 4 * MIB))
                .collect(),
            working_set: set,
        }));
    }

    fn resident(&self, number: u8) -> u64 {
        self.planner
            .table
            .read(|table| table.resident(&shared(number)).map(|run| run.len).sum())
    }
}

fn config(budget_mib: u64) -> PlanConfig {
    PlanConfig {
        budget_bytes: budget_mib * MIB,
        inflight_bytes: 2 * MIB,
        ..PlanConfig::default()
    }
}

#[test]
fn a_launch_is_prefetched_in_first_touch_order_and_within_the_flight_limit() {
    let mut host = Host::new(config(64));
    let set = vec![
        planned(1, 2 * MIB, MIB, 0.9, 300),
        planned(1, 0, MIB, 0.9, 10),
        planned(2, 0, MIB, 0.9, 20),
        planned(2, 2 * MIB, MIB, 0.01, 1),
    ];
    host.launch("a", "web", &[1, 2], set);
    assert_eq!(host.wishes.len(), 2, "2 MiB may be under way");
    host.push_all();
    let order = host.fetches.iter();
    let order = order.map(|fetch| (fetch.image.image, fetch.extent.offset));
    let order: Vec<_> = order.collect();
    assert_eq!(order, [(image(1), 0), (image(2), 0), (image(1), 2 * MIB)]);
    assert_eq!(host.evictions, 0);
}

fn fill(host: &mut Host, number: u8, launches: u32) {
    for launch in 0..launches {
        let vm = format!("f{number}-{launch}");
        host.launch(
            &vm,
            "f",
            &[number],
            vec![planned(number, 0, 4 * MIB, 1.0, 0)],
        );
        host.push_all();
        host.tell(PlannerEvent::VmStarted(vm.as_str().into()));
        let vm = VmName::from(vm);
        host.tell(touched(vm.as_str(), number, 0, 4 * MIB));
        host.tell(PlannerEvent::VmStopped(vm));
        host.now_ms += 1000;
    }
}

fn touched(vm: &str, number: u8, offset: u64, len: u64) -> PlannerEvent {
    PlannerEvent::Touched(TouchReport {
        vm: vm.into(),
        image: image(number),
        extents: vec![Extent::new(offset, len)],
    })
}

fn fetched(number: u8, offset: u64, len: u64) -> PlannerEvent {
    PlannerEvent::Fetched(SharedExtent::new(shared(number), Extent::new(offset, len)))
}

fn pressure(level: PressureLevel, deficit_bytes: u64) -> PlannerEvent {
    PlannerEvent::Pressure(Pressure {
        level,
        deficit_bytes,
    })
}

fn forecast(profile: &str, number: u8, probability: f64) -> PlannerEvent {
    PlannerEvent::ProfileForecast(ProfileForecast {
        domain: "d".into(),
        profile: profile.into(),
        devices: vec![device(number, 4 * MIB)],
        launch_probability: probability,
        next_launch_ms: None,
        working_set: vec![planned(number, 0, 2 * MIB, 1.0, 0)],
    })
}

#[test]
fn what_a_running_vm_will_be_given_is_prefetched_maps_nothing_and_ends_with_the_vm() {
    let mut host = Host::new(config(16));
    host.launch("v1", "dev", &[1], vec![]);
    let attach = |probability| {
        PlannerEvent::AttachForecast(AttachForecast {
            vm: "v1".into(),
            domain: "d".into(),
            attachments: vec![Attachment {
                device: device(2, 4 * MIB),
                probability,
                expected_ms: None,
                working_set: vec![planned(2, 0, 2 * MIB, 1.0, 0)],
            }],
        })
    };
    host.tell(attach(0.9));
    assert!(host.push_one());
    let vms = |host: &Host| host.planner.table.read(|t| t.known_vms().count());
    assert_eq!(vms(&host), 1, "nothing is mapped ahead");
    assert!(host.launches.is_empty(), "{:?}", host.launches);
    host.tell(PlannerEvent::VmStopped("v1".into()));
    assert!(
        !host.push_one(),
        "what was under way is not wanted any more"
    );
    let forecasts = &host.planner.benefit.forecasts;
    assert!(forecasts.is_empty(), "{forecasts:?}");
    let before = host.prefetched;
    host.tell(attach(0.01));
    assert_eq!(host.prefetched, before, "too unlikely");
}

#[test]
fn a_likely_launch_is_prefetched_and_mapped_ahead_and_released_when_it_is_not() {
    let mut host = Host::new(config(16));
    host.tell(forecast("nightly", 1, 0.9));
    host.push_all();
    assert_eq!(host.resident(1), 2 * MIB);
    let state = |host: &Host, offset| host.planner.table.read(|t| t.state(&shared(1), offset));
    assert_eq!(
        state(&host, 3 * MIB),
        crate::mapping_table::PageState::Reserved
    );
    assert!(matches!(host.launches[0], PreparedLaunch::Prepare(..)));
    host.tell(forecast("nightly", 1, 0.1));
    assert_eq!(
        state(&host, 3 * MIB),
        crate::mapping_table::PageState::Absent
    );
    let last = host.launches.last();
    assert!(matches!(last, Some(PreparedLaunch::Release(..))));
    host.tell(forecast("nightly", 1, 0.9));
    host.launch("n1", "nightly", &[1], vec![planned(1, 0, 2 * MIB, 1.0, 0)]);
    let vms: Vec<_> = host
        .planner
        .table
        .read(|t| t.known_vms().map(|v| v.0.clone()).collect());
    assert_eq!(
        vms,
        [VmName::from("n1")],
        "the launch takes over the row mapped ahead"
    );
    assert_eq!(
        host.prefetched,
        2 * MIB,
        "a launch after its forecast fetches nothing more"
    );
}

#[test]
fn a_vm_found_after_a_takeover_is_mapped_once_and_runs() {
    let mut host = Host::new(config(8));
    for _ in 0..2 {
        host.tell(PlannerEvent::VmFound(RunningVm {
            vm: "old".into(),
            domain: "d".into(),
            profile: "p".into(),
            devices: vec![device(1, 4 * MIB)],
        }));
    }
    let table = host.planner.table();
    assert_eq!(table.read(|table| table.mapped_by(&shared(1))), 1);
    let running = table.read(|t| t.known_vms().all(|(_, phase)| phase == Phase::Running));
    assert!(running);
    assert_eq!(host.planner.counters().refused_events, 0);
    host.tell(PlannerEvent::VmStopped("old".into()));
    let table = host.planner.table();
    assert_eq!(table.read(|table| table.mapped_by(&shared(1))), 0);
}

#[test]
fn what_is_here_already_is_held_for_a_launch_like_what_is_loaded_for_it() {
    let mut host = Host::new(config(32));
    let set = vec![planned(1, 0, MIB, 1.0, 0), planned(1, MIB, MIB, 0.2, 0)];
    host.launch("first", "web", &[1], set.clone());
    host.push_all();
    host.tell(PlannerEvent::VmStopped("first".into()));
    let pinned = |host: &Host| host.planner.table.read(|t| t.pinned_bytes_of(&shared(1)));
    assert_eq!(pinned(&host), 0);
    host.launch("second", "web", &[1], set);
    assert_eq!(pinned(&host), MIB, "what it will hardly touch is not held");
    host.tell(PlannerEvent::VmStarted("second".into()));
    host.now_ms += host.planner.config.pin_hold_ms;
    host.tell(PlannerEvent::Tick);
    assert_eq!(pinned(&host), 0);
}

#[test]
fn what_launches_teach_is_asked_for_once_and_counts_when_it_is_told() {
    let mut host = Host::new(PlanConfig::default());
    let start_ms = host.now_ms;
    let past = |at: u32| {
        // One of 60 that return every ten minutes, and one that never does, in turn.
        let number = if at.is_multiple_of(2) {
            at / 2 % 60
        } else {
            1_000 + at
        };
        PastLaunch {
            at_ms: start_ms + i64::from(at) * 5_000,
            domain: "d".into(),
            profile: "p".into(),
            devices: vec![DeviceImage {
                image: Digest::of(&number.to_le_bytes()),
                image_bytes: 64 * MIB,
            }],
        }
    };
    let launches: Vec<PastLaunch> = (0..24_000).map(past).collect();
    let image = SharedImage::new("d".into(), launches[0].devices[0].image);
    host.now_ms += 24_000 * 5_000;
    let event = PlannerEvent::LaunchesRemembered(launches);
    let decisions = host.planner.step(event, host.now_ms);
    let samples = decisions.fit.expect("samples of the launches");
    let needs = |host: &Host| host.planner.benefit.needs(&image, host.now_ms).is_learned();
    assert!(!needs(&host), "nobody has studied");
    let fit = Box::new(samples.fit());
    host.tell(PlannerEvent::ReuseFitted(fit));
    assert!(needs(&host));
    assert_eq!(host.planner.counters().refused_events, 0);
}

#[test]
fn what_an_earlier_daemon_saw_counts_as_uses_but_the_future_does_not() {
    let mut host = Host::new(PlanConfig::default());
    let past = |at_ms: i64, number: u8| PastLaunch {
        at_ms,
        domain: "d".into(),
        profile: "p".into(),
        devices: vec![device(number, 4 * MIB)],
    };
    let now_ms = host.now_ms;
    let launches = vec![
        past(now_ms - 9, 1),
        past(now_ms - 5, 1),
        past(now_ms + 1, 2),
    ];
    host.tell(PlannerEvent::LaunchesRemembered(launches));
    assert!(host.fetches.is_empty(), "{:?}", host.fetches);
    let uses = |number| host.planner.benefit.component_uses(&shared(number), now_ms);
    assert!((uses(1) - 2.0).abs() < 1e-3, "{}", uses(1));
    assert_eq!(uses(2), 0.0);
    assert_eq!(
        host.planner
            .table()
            .read(|table| table.known_images().count()),
        0
    );
}
