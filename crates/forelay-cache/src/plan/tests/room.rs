//! Who makes room for whom: under the budget, and under pressure.

use super::*;

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
        host.tell(PlannerEvent::VmStarted(vm.as_str().into()));
        host.tell(PlannerEvent::VmStopped(vm.as_str().into()));
    }
    assert_eq!(host.evictions, 0);
    assert_eq!(
        host.planner.table.read(MappingTable::resident_bytes),
        64 * MIB
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
    host.now_ms += 5_000;
    host.tell(forecast("clearly likelier", 6, 0.3));
    host.push_all();
    let residents = [1, 2, 6].map(|number| host.resident(number) / MIB);
    assert_eq!(residents, [2, 2, 2]);
    assert_eq!(host.resident(3) + host.resident(4), 2 * MIB);
    let before = host.evictions;
    host.now_ms += 24 * 3_600_000;
    host.tell(forecast("later", 7, 0.12));
    host.push_all();
    assert_eq!(host.resident(7), 2 * MIB, "worth ages");
    assert!(host.evictions > before);
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
    host.tell(PlannerEvent::VmStarted("run".into()));
    host.push_one();
    host.tell(pressure(PressureLevel::Low, 0));
    assert_eq!(
        host.evictions, 0,
        "nothing leaves before the critical level"
    );
    host.tell(pressure(PressureLevel::Critical, 3 * MIB));
    assert!(host.planner.is_paused() && host.wishes.is_empty());
    assert_eq!(
        host.resident(1),
        MIB,
        "3 of 4 MiB of the unmapped component"
    );
    assert!(
        host.resident(2) > 0,
        "what a VM can class stays while others suffice"
    );
    let mapped = host.resident(2);
    host.tell(pressure(PressureLevel::Critical, 2 * MIB));
    assert_eq!(host.resident(1), 0);
    assert_eq!(host.resident(2), mapped - MIB, "then under a running VM");
    host.tell(pressure(PressureLevel::Plenty, 0));
    host.now_ms += 4000;
    host.tell(PlannerEvent::Tick);
    assert!(host.planner.is_paused(), "not calm for long enough");
    host.now_ms += 2000;
    host.tell(PlannerEvent::Tick);
    assert!(!host.planner.is_paused() && !host.wishes.is_empty());
}

#[test]
fn pressure_takes_what_no_vm_touched_first_and_leaves_what_is_in_use() {
    let mut host = Host::new(config(32));
    let set = vec![planned(1, 0, 4 * MIB, 1.0, 0), planned(2, 0, MIB, 1.0, 1)];
    host.launch("run", "r", &[1, 2], set);
    host.push_all();
    host.tell(PlannerEvent::VmStarted("run".into()));
    let touched = |host: &mut Host, offset| {
        host.tell(super::touched("run", 1, offset, MIB));
    };
    touched(&mut host, 0);
    host.now_ms += 120_000;
    for _ in 0..2 {
        host.tell(PlannerEvent::Tick);
        host.now_ms += 60_000;
    }
    touched(&mut host, MIB);
    let squeeze = |host: &mut Host, bytes| {
        host.tell(pressure(PressureLevel::Critical, bytes));
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
    host.tell(PlannerEvent::BudgetChanged(MIB / 2));
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
    host.tell(PlannerEvent::VmStopped("first".into()));
    host.launch("reader", "scan", &[2], Vec::new());
    host.tell(PlannerEvent::VmStarted("reader".into()));
    let read = |host: &mut Host, offset| {
        host.tell(fetched(2, offset, MIB));
    };
    read(&mut host, 0);
    for _ in 0..3 {
        host.now_ms += 60_000;
        host.tell(PlannerEvent::Tick);
    }
    assert_eq!(host.evictions, 0);
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
    host.tell(PlannerEvent::VmStarted("old".into()));
    host.tell(super::touched("old", 1, 0, 2 * MIB));
    // Twice the time that a use is held, in steps, as the daemon ticks.
    for _ in 0..6 {
        host.now_ms += host.planner.config.use_hold_ms / 2;
        host.tell(PlannerEvent::Tick);
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
    host.tell(PlannerEvent::VmStarted("old".into()));
    assert_eq!(host.resident(1), 4 * MIB);
    let table = Arc::clone(host.planner.table());
    let budget = BudgetConfig {
        cap_bytes: 3 * MIB,
        ..BudgetConfig::default()
    };
    host.planner = Planner::new(config(3), budget, table);
    host.tell(PlannerEvent::Tick);
    assert_eq!(host.resident(1), 3 * MIB);
}

#[test]
fn everything_pinned_under_pressure_frees_nothing_and_says_so() {
    let mut host = Host::new(config(8));
    fill(&mut host, 1, 1);
    let all = SharedExtent::new(shared(1), Extent::new(0, 4 * MIB));
    host.tell(PlannerEvent::Pinned(all));
    host.tell(pressure(PressureLevel::Critical, 4 * MIB));
    assert_eq!((host.evictions, host.resident(1)), (0, 4 * MIB));
    assert_eq!(host.planner.counters().pressure_evicted_bytes, 0);
}

#[test]
fn an_image_that_is_gone_for_good_takes_no_room_and_did_not_have_to_go() {
    let mut host = Host::new(config(16));
    fill(&mut host, 1, 2);
    fill(&mut host, 2, 1);
    let gone = shared(1);
    assert!(host.resident(1) > 0);
    let (resident, evictions) = (host.resident(2), host.evictions);
    host.tell(PlannerEvent::Removed(gone.clone()));
    assert_eq!((host.resident(1), host.resident(2)), (0, resident));
    let counters = host.planner.counters();
    assert_eq!(counters.reclaimed_bytes, 0, "nobody took it");
    assert_eq!(host.evictions, evictions);
    // One of the same name, later, is not one that had to be fetched again.
    let extent = Extent::new(0, MIB);
    host.tell(PlannerEvent::Fetched(SharedExtent::new(gone, extent)));
    assert_eq!(host.planner.counters().refetched_bytes, 0);
    host.tell(PlannerEvent::Removed(shared(99)));
}
