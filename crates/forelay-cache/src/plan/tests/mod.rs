//! The planner against a stand-in for shared memory that carries out its actions.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use forelay_image::{Digest, Extent, PlannedExtent};

use super::*;
use crate::budget::MemorySample;
use crate::names::Domain;

mod random;
mod ranking;
mod room;

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

/// Carries out actions at once or later, and checks what no plan may do.
struct Host {
    planner: Planner,
    now_ms: i64,
    wishes: VecDeque<(SharedImage, Extent)>,
    log: Vec<Action>,
    paused: bool,
    prefetched: u64,
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
            log: Vec::new(),
            paused: false,
            prefetched: 0,
        }
    }

    fn tell(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            if let Event::Fetched { image, extent } = &event {
                let covers = |wish: &Extent| wish.intersection(extent) == Some(*wish);
                self.wishes
                    .retain(|(at, wish)| at != image || !covers(wish));
            }
            let before = self
                .planner
                .table
                .read(|t| t.resident_bytes() + t.fetching_bytes());
            for action in self.planner.step(event, self.now_ms) {
                match &action {
                    Action::Prefetch { image, extent, .. } => {
                        assert!(!self.paused, "prefetch while paused");
                        self.prefetched += extent.len;
                        self.wishes.push_back((image.clone(), *extent));
                    }
                    Action::CancelPrefetch { image, extent } => {
                        self.wishes.retain(|wish| *wish != (image.clone(), *extent));
                    }
                    Action::Evict { image, extents } => {
                        self.check_victims(image, extents);
                        for &extent in extents {
                            let (of, image) = (image.clone(), image.clone());
                            events.push_back(Event::Evicted { image: of, extent });
                            events.push_back(Event::EvictionEnded { image, extent });
                        }
                    }
                    Action::Pin { image, extents } => {
                        events.extend(extents.iter().map(|&extent| Event::Pinned {
                            image: image.clone(),
                            extent,
                        }));
                    }
                    Action::Unpin { image, extents } => {
                        events.extend(extents.iter().map(|&extent| Event::Unpinned {
                            image: image.clone(),
                            extent,
                        }));
                    }
                    Action::PausePrefetch => self.paused = true,
                    Action::ResumePrefetch => self.paused = false,
                    Action::Study { lesson } => {
                        let learned = Box::new(lesson.study());
                        events.push_back(Event::Learned { learned });
                    }
                    Action::Reserve { .. } | Action::Release { .. } => {}
                }
                self.log.push(action);
            }
            let taken = self
                .planner
                .table
                .read(|t| t.resident_bytes() + t.fetching_bytes());
            let budget = self.planner.budget_bytes();
            assert!(
                taken <= budget || taken <= before + 16 * MIB,
                "{taken} over {budget}"
            );
            let under_way: u64 = self.wishes.iter().map(|(_, extent)| extent.len).sum();
            assert!(under_way <= self.planner.config.inflight_bytes.max(MIB));
            self.planner.table.read(|table| table.validate()).unwrap();
        }
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
            if self.planner.config.rule == EvictionRule::LeastUsed {
                assert_eq!(
                    table.mapped_by(image),
                    0,
                    "the baseline evicted a mapped component"
                );
            }
        });
    }

    fn push_one(&mut self) -> bool {
        let Some((image, extent)) = self.wishes.pop_front() else {
            return false;
        };
        self.tell(Event::Pushed { image, extent });
        true
    }

    fn push_all(&mut self) {
        while self.push_one() {}
    }

    fn launch(&mut self, vm: &str, profile: &str, images: &[u8], set: Vec<PlannedExtent>) {
        self.tell(Event::LaunchRequested {
            vm: vm.into(),
            domain: "d".into(),
            profile: profile.into(),
            devices: images
                .iter()
                .map(|&number| device(number, 4 * MIB))
                .collect(),
            working_set: set,
        });
    }

    fn resident(&self, number: u8) -> u64 {
        self.planner
            .table
            .read(|table| table.resident_bytes_of(&shared(number)))
    }

    fn evictions(&self) -> usize {
        self.log
            .iter()
            .filter(|action| matches!(action, Action::Evict { .. }))
            .count()
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
    let order = host.log.iter().filter_map(|action| match action {
        Action::Prefetch { image, extent, .. } => Some((image.image, extent.offset)),
        _ => None,
    });
    let order: Vec<_> = order.collect();
    assert_eq!(order, [(image(1), 0), (image(2), 0), (image(1), 2 * MIB)]);
    assert_eq!(host.evictions(), 0);
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
        host.tell(Event::VmStarted {
            vm: vm.as_str().into(),
        });
        let (vm, image) = (VmName::from(vm), image(number));
        let extents = vec![Extent::new(0, 4 * MIB)];
        host.tell(Event::Touched {
            vm: vm.clone(),
            image,
            extents,
        });
        host.tell(Event::VmStopped { vm });
        host.now_ms += 1000;
    }
}

fn forecast(profile: &str, number: u8, probability: f64) -> Event {
    Event::ForecastChanged {
        domain: "d".into(),
        profile: profile.into(),
        devices: vec![device(number, 4 * MIB)],
        launch_probability: probability,
        next_launch_ms: None,
        working_set: vec![planned(number, 0, 2 * MIB, 1.0, 0)],
    }
}

#[test]
fn what_a_running_vm_will_be_given_is_prefetched_maps_nothing_and_ends_with_the_vm() {
    let mut host = Host::new(config(16));
    host.launch("v1", "dev", &[1], vec![]);
    let attach = |probability| Event::AttachForecast {
        vm: "v1".into(),
        domain: "d".into(),
        devices: vec![device(2, 4 * MIB)],
        probability,
        expected_ms: None,
        working_set: vec![planned(2, 0, 2 * MIB, 1.0, 0)],
    };
    host.tell(attach(0.9));
    assert!(host.push_one());
    let vms = |host: &Host| host.planner.table.read(|t| t.known_vms().count());
    assert_eq!(vms(&host), 1, "nothing is mapped ahead");
    assert!(
        !host
            .log
            .iter()
            .any(|action| matches!(action, Action::Reserve { .. }))
    );
    host.tell(Event::VmStopped { vm: "v1".into() });
    assert!(
        !host.push_one(),
        "what was under way is not wanted any more"
    );
    let forecasts = &host.planner.worth.forecasts;
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
    assert!(matches!(host.log[0], Action::Reserve { .. }));
    host.tell(forecast("nightly", 1, 0.1));
    assert_eq!(
        state(&host, 3 * MIB),
        crate::mapping_table::PageState::Absent
    );
    assert!(matches!(host.log.last(), Some(Action::Release { .. })));
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
        host.tell(Event::VmFound {
            vm: "old".into(),
            domain: "d".into(),
            profile: "p".into(),
            devices: vec![device(1, 4 * MIB)],
        });
    }
    let table = host.planner.table();
    assert_eq!(table.read(|table| table.mapped_by(&shared(1))), 1);
    let running = table.read(|t| t.known_vms().all(|(_, phase)| phase == Phase::Running));
    assert!(running);
    assert_eq!(host.planner.counters().refused_events, 0);
    host.tell(Event::VmStopped { vm: "old".into() });
    let table = host.planner.table();
    assert_eq!(table.read(|table| table.mapped_by(&shared(1))), 0);
}

#[test]
fn what_is_here_already_is_held_for_a_launch_like_what_is_loaded_for_it() {
    let mut host = Host::new(config(32));
    let set = vec![planned(1, 0, MIB, 1.0, 0), planned(1, MIB, MIB, 0.2, 0)];
    host.launch("first", "web", &[1], set.clone());
    host.push_all();
    host.tell(Event::VmStopped { vm: "first".into() });
    let pinned = |host: &Host| host.planner.table.read(|t| t.pinned_bytes_of(&shared(1)));
    assert_eq!(pinned(&host), 0);
    host.launch("second", "web", &[1], set);
    assert_eq!(pinned(&host), MIB, "what it will hardly touch is not held");
    host.tell(Event::VmStarted {
        vm: "second".into(),
    });
    host.now_ms += host.planner.config.pin_hold_ms;
    host.tell(Event::Tick);
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
    let event = Event::LaunchesRemembered { launches };
    let actions = host.planner.step(event, host.now_ms);
    let [Action::Study { lesson }] = &actions[..] else {
        panic!("one lesson, not {actions:?}");
    };
    let needs = |host: &Host| host.planner.worth.needs(&image, host.now_ms).is_learned();
    assert!(!needs(&host), "nobody has studied");
    let learned = Box::new(lesson.study());
    host.tell(Event::Learned { learned });
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
    host.tell(Event::LaunchesRemembered { launches });
    assert!(host.log.is_empty(), "{:?}", host.log);
    let uses = |number| host.planner.worth.component_uses(&shared(number));
    assert_eq!(uses(1), (2, now_ms - 5));
    assert_eq!(uses(2).0, 0);
    assert_eq!(
        host.planner
            .table()
            .read(|table| table.known_images().count()),
        0
    );
}
