//! Cancelled fetches: what is still on its way counts, and stays only where there is room.

use super::*;

/// A launch is under way and its VM goes away; the cancel takes its time.
fn cancelled_launch(host: &mut Host) -> Fetch {
    host.slow_cancels = true;
    host.launch("gone", "web", &[1], vec![planned(1, 0, MIB, 1.0, 0)]);
    host.tell(PlannerEvent::VmStopped("gone".into()));
    assert!(host.wishes.is_empty(), "nothing is under way any more");
    host.cancelled.pop().expect("cancelled")
}

#[test]
fn bytes_of_a_cancelled_fetch_count_until_it_has_ended() {
    let mut host = Host::new(config(1));
    let fetch = cancelled_launch(&mut host);
    assert_eq!(host.taken(), MIB, "they may still arrive");
    host.launch("next", "db", &[2], vec![planned(2, 0, MIB, 1.0, 0)]);
    assert!(host.wishes.is_empty(), "there is no room for others yet");
    host.end(fetch, Vec::new());
    assert_eq!(host.taken(), 0);
    host.launch("third", "db", &[2], vec![planned(2, 0, MIB, 1.0, 0)]);
    assert!(host.push_one());
    assert_eq!((host.resident(1), host.resident(2)), (0, MIB));
}

#[test]
fn a_fetch_that_ends_under_pressure_does_not_stay_beyond_the_budget() {
    let mut host = Host::new(config(4));
    host.slow_cancels = true;
    host.launch("run", "web", &[1], vec![planned(1, 0, 2 * MIB, 1.0, 0)]);
    assert_eq!(host.wishes.len(), 2);
    host.tell(pressure(PressureLevel::Critical, 0));
    assert_eq!(host.cancelled.len(), 2, "all of it is given up");
    host.tell(PlannerEvent::BudgetChanged(MIB));
    for fetch in std::mem::take(&mut host.cancelled) {
        // It was being stored when the cancel came.
        let here = vec![fetch.extent];
        host.end(fetch, here);
        assert!(host.taken() <= 2 * MIB);
    }
    assert_eq!(host.taken(), MIB, "the budget");
}

#[test]
fn what_a_cancelled_fetch_was_to_bring_is_fetched_again_for_who_wants_it() {
    let mut host = Host::new(config(8));
    let fetch = cancelled_launch(&mut host);
    host.launch("next", "web", &[1], vec![planned(1, 0, MIB, 1.0, 0)]);
    assert!(host.wishes.is_empty(), "two fetches of the same bytes");
    host.end(fetch, vec![Extent::new(0, MIB / 2)]);
    let extents: Vec<Extent> = host.wishes.iter().map(|fetch| fetch.extent).collect();
    assert_eq!(extents, [Extent::new(MIB / 2, MIB / 2)], "what is missing");
    host.push_all();
    assert_eq!(host.resident(1), MIB);
}

#[test]
fn who_counts_on_a_fetch_of_somebody_else_gets_the_bytes_when_that_is_given_up() {
    let mut host = Host::new(config(8));
    host.launch("first", "web", &[1], vec![planned(1, 0, MIB, 1.0, 0)]);
    host.launch("second", "web", &[1], vec![planned(1, 0, MIB, 1.0, 0)]);
    assert_eq!(host.wishes.len(), 1);
    host.tell(PlannerEvent::VmStopped("first".into()));
    assert!(host.push_one(), "fetched again for the second");
    assert_eq!(host.resident(1), MIB);
}

#[test]
fn a_demand_cancels_the_prefetch_that_it_overtook() {
    let mut host = Host::new(config(8));
    host.slow_cancels = true;
    host.launch("run", "web", &[1], vec![planned(1, 0, MIB, 1.0, 0)]);
    host.tell(fetched(1, 0, MIB));
    let fetch = host.cancelled.pop().expect("its bytes are here");
    assert_eq!(host.resident(1), MIB);
    host.end(fetch, Vec::new());
    assert_eq!(host.resident(1), MIB, "what the demand brought stays");
}
