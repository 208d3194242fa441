//! The planner against a stand-in for shared memory that carries out its actions.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use forelay_image::{Digest, Extent};
use proptest::prelude::*;

use super::*;
use crate::budget::MemorySample;
use crate::names::Domain;

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

#[test]
fn nothing_is_evicted_while_it_all_fits() {
    let mut host = Host::new(config(64));
    for number in 0..16 {
        let vm = format!("vm{number}");
        host.launch(
            &vm,
            "p",
            &[number],
            vec![planned(number, 0, 4 * MIB, 1.0, 0)],
        );
        host.push_all();
        host.tell(Event::VmStarted {
            vm: vm.as_str().into(),
        });
        host.tell(Event::VmStopped {
            vm: vm.as_str().into(),
        });
    }
    assert_eq!(host.evictions(), 0);
    assert_eq!(
        host.planner.table.read(MappingTable::resident_bytes),
        64 * MIB
    );
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

#[test]
fn the_literal_rule_evicts_the_least_used_component_whole_until_it_fits() {
    let mut host = Host::new(PlanConfig {
        rule: EvictionRule::LeastUsed,
        ..config(12)
    });
    fill(&mut host, 1, 3);
    fill(&mut host, 2, 1);
    fill(&mut host, 3, 2);
    assert_eq!(host.evictions(), 0);
    host.launch("new", "n", &[4], vec![planned(4, 0, 4 * MIB, 1.0, 0)]);
    host.push_all();
    let residents = [1, 2, 3, 4].map(|number| host.resident(number) / MIB);
    assert_eq!(residents, [4, 0, 4, 4]);
}

#[test]
fn the_literal_rule_never_evicts_for_a_component_larger_than_the_budget() {
    let mut host = Host::new(PlanConfig {
        rule: EvictionRule::LeastUsed,
        ..config(8)
    });
    fill(&mut host, 1, 1);
    fill(&mut host, 2, 1);
    host.tell(Event::LaunchRequested {
        vm: "big".into(),
        domain: "d".into(),
        profile: "big".into(),
        devices: vec![device(9, 16 * MIB)],
        working_set: vec![planned(9, 0, 16 * MIB, 1.0, 0)],
    });
    host.push_all();
    assert_eq!(host.evictions(), 0);
    assert_eq!(host.resident(9), 0);
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
fn a_forecast_displaces_only_what_is_worth_clearly_less() {
    let mut host = Host::new(config(8));
    for (number, probability) in [(1, 0.45), (2, 0.45), (3, 0.2), (4, 0.2)] {
        host.tell(forecast(&format!("p{number}"), number, probability));
        host.push_all();
    }
    host.tell(forecast("a little likelier", 5, 0.22));
    host.push_all();
    assert_eq!(
        [1, 2, 3, 4, 5].map(|number| host.resident(number) / MIB),
        [2, 2, 2, 2, 0]
    );
    host.tell(forecast("clearly likelier", 6, 0.3));
    host.push_all();
    let residents = [1, 2, 6].map(|number| host.resident(number) / MIB);
    assert_eq!(residents, [2, 2, 2]);
    assert_eq!(host.resident(3) + host.resident(4), 2 * MIB);
    let before = host.evictions();
    host.now_ms += 24 * 3_600_000;
    host.tell(forecast("later", 7, 0.12));
    host.push_all();
    assert_eq!(host.resident(7), 2 * MIB, "worth ages");
    assert!(host.evictions() > before);
}

#[test]
fn critical_pressure_pauses_evicts_just_enough_and_resumes_only_after_calm() {
    let mut host = Host::new(config(32));
    fill(&mut host, 1, 2);
    host.launch(
        "run",
        "r",
        &[2, 3],
        vec![
            planned(2, 0, 4 * MIB, 1.0, 0),
            planned(3, 0, 4 * MIB, 1.0, 9),
        ],
    );
    host.tell(Event::VmStarted { vm: "run".into() });
    host.push_one();
    host.tell(Event::Pressure {
        level: PressureLevel::Low,
        deficit_bytes: 0,
    });
    assert_eq!(
        host.evictions(),
        0,
        "nothing leaves before the critical level"
    );
    host.tell(Event::Pressure {
        level: PressureLevel::Critical,
        deficit_bytes: 3 * MIB,
    });
    assert!(host.paused && host.wishes.is_empty());
    assert_eq!(
        host.resident(1),
        MIB,
        "3 of 4 MiB of the unmapped component"
    );
    assert!(
        host.resident(2) > 0,
        "what a VM can reach stays while others suffice"
    );
    let mapped = host.resident(2);
    host.tell(Event::Pressure {
        level: PressureLevel::Critical,
        deficit_bytes: 2 * MIB,
    });
    assert_eq!(host.resident(1), 0);
    assert_eq!(host.resident(2), mapped - MIB, "then under a running VM");
    host.tell(Event::Pressure {
        level: PressureLevel::Plenty,
        deficit_bytes: 0,
    });
    host.now_ms += 4000;
    host.tell(Event::Tick);
    assert!(host.paused, "not calm for long enough");
    host.now_ms += 2000;
    host.tell(Event::Tick);
    assert!(!host.paused && !host.wishes.is_empty());
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
fn pressure_takes_what_no_vm_touched_first_and_leaves_what_is_in_use() {
    let mut host = Host::new(config(32));
    let set = vec![planned(1, 0, 4 * MIB, 1.0, 0), planned(2, 0, MIB, 1.0, 1)];
    host.launch("run", "r", &[1, 2], set);
    host.push_all();
    host.tell(Event::VmStarted { vm: "run".into() });
    let touched = |host: &mut Host, offset| {
        host.tell(Event::Touched {
            vm: "run".into(),
            image: image(1),
            extents: vec![Extent::new(offset, MIB)],
        });
    };
    touched(&mut host, 0);
    host.now_ms += 120_000;
    for _ in 0..2 {
        host.tell(Event::Tick);
        host.now_ms += 60_000;
    }
    touched(&mut host, MIB);
    let squeeze = |host: &mut Host, bytes| {
        host.tell(Event::Pressure {
            level: PressureLevel::Critical,
            deficit_bytes: bytes,
        });
        let here = |offset| host.planner.table.read(|t| t.state(&shared(1), offset));
        let resident = |offset| here(offset) == crate::mapping_table::PageState::Resident;
        (
            resident(0),
            resident(MIB),
            resident(2 * MIB) || resident(3 * MIB),
        )
    };
    assert_eq!(squeeze(&mut host, 3 * MIB), (true, true, false));
    assert_eq!(host.resident(2), 0, "no VM touched it either");
    assert_eq!(squeeze(&mut host, 8 * MIB), (false, true, false));
    assert_eq!(host.resident(1), MIB, "what is in use stays");
    host.tell(Event::BudgetChanged {
        budget_bytes: MIB / 2,
    });
    assert_eq!(
        host.resident(1),
        MIB / 2,
        "but not beyond the pool's own cap"
    );
}

#[test]
fn demand_beyond_the_cap_does_not_take_what_a_launch_is_about_to_touch() {
    let mut host = Host::new(config(4));
    // An earlier VM left its working set resident; another has read something long ago.
    let set = vec![planned(1, 0, 3 * MIB, 1.0, 100)];
    host.launch("first", "web", &[1], set.clone());
    host.push_all();
    host.tell(Event::VmStopped { vm: "first".into() });
    host.launch("reader", "scan", &[2], Vec::new());
    host.tell(Event::VmStarted {
        vm: "reader".into(),
    });
    let read = |host: &mut Host, offset| {
        host.tell(Event::Fetched {
            image: shared(2),
            extent: Extent::new(offset, MIB),
        });
    };
    read(&mut host, 0);
    for _ in 0..3 {
        host.now_ms += 60_000;
        host.tell(Event::Tick);
    }
    assert_eq!(host.evictions(), 0);
    host.launch("again", "web", &[1], set);
    read(&mut host, MIB);
    assert_eq!(
        host.resident(1),
        3 * MIB,
        "the launch has all it will touch"
    );
    assert_eq!(host.resident(2), MIB, "what was read long ago went");
}

#[test]
fn a_launch_takes_the_room_of_what_is_mapped_ahead_and_worth_less() {
    let mut host = Host::new(config(2));
    host.tell(forecast("later", 1, 0.9));
    host.push_all();
    assert_eq!(host.resident(1), 2 * MIB);
    // Less likely now, and still mapped ahead of its launch.
    host.tell(forecast("later", 1, 0.45));
    let mapped = |host: &Host, number| host.planner.table.read(|t| t.mapped_by(&shared(number)));
    assert_eq!(mapped(&host, 1), 1);
    host.launch("now", "web", &[2], vec![planned(2, 0, MIB, 1.0, 0)]);
    host.push_all();
    assert_eq!(host.resident(2), MIB);
    assert_eq!(host.planner.counters().refused_bytes, 0);
}

#[test]
fn a_launch_takes_the_room_of_what_a_running_vm_touched_long_ago_and_a_forecast_does_not() {
    let mut host = Host::new(config(2));
    host.launch("old", "batch", &[1], vec![planned(1, 0, 2 * MIB, 1.0, 0)]);
    host.push_all();
    host.tell(Event::VmStarted { vm: "old".into() });
    host.tell(Event::Touched {
        vm: "old".into(),
        image: image(1),
        extents: vec![Extent::new(0, 2 * MIB)],
    });
    // Twice the time that a use is held, in steps, as the daemon ticks.
    for _ in 0..6 {
        host.now_ms += host.planner.config.use_hold_ms / 2;
        host.tell(Event::Tick);
    }
    host.tell(forecast("soon", 3, 0.9));
    host.push_all();
    assert_eq!((host.resident(1), host.resident(3)), (2 * MIB, 0));
    host.launch("now", "web", &[2], vec![planned(2, 0, MIB, 1.0, 0)]);
    host.push_all();
    assert_eq!(host.resident(2), MIB);
    assert!(host.resident(1) < 2 * MIB);
}

#[test]
fn a_planner_that_finds_more_than_its_cap_shrinks_it_without_waiting_for_demand() {
    let mut host = Host::new(config(4));
    host.launch("old", "batch", &[1], vec![planned(1, 0, 4 * MIB, 1.0, 0)]);
    host.push_all();
    host.tell(Event::VmStarted { vm: "old".into() });
    assert_eq!(host.resident(1), 4 * MIB);
    let table = Arc::clone(host.planner.table());
    let budget = BudgetConfig {
        cap_bytes: 3 * MIB,
        ..BudgetConfig::default()
    };
    host.planner = Planner::new(config(3), budget, table);
    host.tell(Event::Tick);
    assert_eq!(host.resident(1), 3 * MIB);
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
fn everything_pinned_under_pressure_frees_nothing_and_says_so() {
    let mut host = Host::new(config(8));
    fill(&mut host, 1, 1);
    host.tell(Event::Pinned {
        image: shared(1),
        extent: Extent::new(0, 4 * MIB),
    });
    host.tell(Event::Pressure {
        level: PressureLevel::Critical,
        deficit_bytes: 4 * MIB,
    });
    assert_eq!((host.evictions(), host.resident(1)), (0, 4 * MIB));
    assert_eq!(host.planner.counters().pressure_evicted_bytes, 0);
}

#[derive(Clone, Debug)]
enum Step {
    Launch(u8, Vec<(u8, u64, u64, f64)>),
    Forecast(u8, f64),
    Started(u8),
    Stopped(u8),
    Demand(u8, u64),
    Touched(u8, u8, u64),
    Push,
    Fail,
    Level(u8, u64),
    Sample(u64),
    Budget(u64),
    Tick(i64),
}

fn step() -> impl Strategy<Value = Step> {
    let extent = (0u8..6, 0u64..1024, 1u64..300, 0.0f64..1.0);
    prop_oneof![
        3 => (0u8..4, prop::collection::vec(extent, 0..6)).prop_map(|(v, e)| Step::Launch(v, e)),
        3 => (0u8..6, 0.0f64..1.2).prop_map(|(p, l)| Step::Forecast(p, l)),
        2 => (0u8..4).prop_map(Step::Started),
        2 => (0u8..4).prop_map(Step::Stopped),
        3 => (0u8..6, 0u64..1000).prop_map(|(i, p)| Step::Demand(i, p)),
        2 => (0u8..4, 0u8..6, 0u64..1000).prop_map(|(v, i, p)| Step::Touched(v, i, p)),
        8 => Just(Step::Push),
        1 => Just(Step::Fail),
        1 => (0u8..3, 0u64..8).prop_map(|(l, d)| Step::Level(l, d)),
        1 => (0u64..64).prop_map(Step::Sample),
        1 => (1u64..24).prop_map(Step::Budget),
        2 => (0i64..20_000).prop_map(Step::Tick),
    ]
}

fn event_of(step: Step, host: &mut Host) -> Option<Event> {
    let name = |vm: u8| VmName::from(format!("vm{vm}"));
    Some(match step {
        Step::Launch(vm, extents) => Event::LaunchRequested {
            vm: name(vm),
            domain: "d".into(),
            profile: format!("p{vm}").into(),
            devices: (0..6).map(|number| device(number, 4 * MIB)).collect(),
            working_set: extents
                .into_iter()
                .map(|(i, from, len, p)| planned(i, from * 4096, len * 4096, p, from as u32))
                .collect(),
        },
        Step::Forecast(number, probability) => forecast(&format!("p{number}"), number, probability),
        Step::Started(vm) => Event::VmStarted { vm: name(vm) },
        Step::Stopped(vm) => Event::VmStopped { vm: name(vm) },
        Step::Demand(number, page) => Event::Fetched {
            image: shared(number),
            extent: Extent::new(page * 4096, 16 * 4096),
        },
        Step::Touched(vm, number, page) => Event::Touched {
            vm: name(vm),
            image: image(number),
            extents: vec![Extent::new(page * 4096, 8 * 4096)],
        },
        Step::Push => {
            host.push_one();
            return None;
        }
        Step::Fail => {
            let (image, extent) = host.wishes.pop_front()?;
            Event::PushFailed { image, extent }
        }
        Step::Level(level, deficit) => Event::Pressure {
            level: [
                PressureLevel::Plenty,
                PressureLevel::Low,
                PressureLevel::Critical,
            ][usize::from(level)],
            deficit_bytes: deficit * MIB,
        },
        Step::Sample(free) => {
            let pool_bytes = host.planner.table.read(MappingTable::resident_bytes);
            Event::MemorySampled(MemorySample {
                total_bytes: 256 * MIB,
                available_bytes: free * MIB + pool_bytes,
                pool_bytes,
                ..MemorySample::default()
            })
        }
        Step::Budget(mib) => Event::BudgetChanged {
            budget_bytes: mib * MIB,
        },
        Step::Tick(ms) => {
            host.now_ms += ms;
            Event::Tick
        }
    })
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_sequence_of_events_breaks_an_invariant(
        steps in prop::collection::vec(step(), 1..80),
        worth in any::<bool>(),
    ) {
        let rule = if worth { EvictionRule::Worth } else { EvictionRule::LeastUsed };
        let mut host = Host::new(PlanConfig { rule, ..config(12) });
        for step in steps {
            if let Some(event) = event_of(step, &mut host) {
                host.tell(event);
            }
        }
        let kept: BTreeMap<_, _> = host.planner.leaving.iter().filter(|(_, set)| !set.is_empty()).collect();
        prop_assert!(kept.is_empty(), "evictions carried out but not forgotten");
    }
}
