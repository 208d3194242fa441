//! The planner's invariants under any sequence of events.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
pub(super) enum Step {
    Launch(u8, Vec<(u8, u64, u64, f64)>),
    Forecast(u8, f64),
    Started(u8),
    Stopped(u8),
    Demand(u8, u64),
    Touched(u8, u8, u64),
    Push,
    Fail,
    CancelEnds(bool),
    Level(u8, u64),
    Sample(u64),
    Budget(u64),
    Tick(i64),
}

pub(super) fn step() -> impl Strategy<Value = Step> {
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
        2 => any::<bool>().prop_map(Step::CancelEnds),
        1 => (0u8..3, 0u64..8).prop_map(|(l, d)| Step::Level(l, d)),
        1 => (0u64..64).prop_map(Step::Sample),
        1 => (1u64..24).prop_map(Step::Budget),
        2 => (0i64..20_000).prop_map(Step::Tick),
    ]
}

pub(super) fn event_of(step: Step, host: &mut Host) -> Option<PlannerEvent> {
    let name = |vm: u8| VmName::from(format!("vm{vm}"));
    Some(match step {
        Step::Launch(vm, extents) => PlannerEvent::LaunchRequested(LaunchRequested {
            vm: name(vm),
            domain: "d".into(),
            profile: format!("p{vm}").into(),
            devices: (0..6).map(|number| device(number, 4 * MIB)).collect(),
            working_set: extents
                .into_iter()
                .map(|(i, from, len, p)| planned(i, from * 4096, len * 4096, p, from as u32))
                .collect(),
        }),
        Step::Forecast(number, probability) => forecast(&format!("p{number}"), number, probability),
        Step::Started(vm) => PlannerEvent::VmStarted(name(vm)),
        Step::Stopped(vm) => PlannerEvent::VmStopped(name(vm)),
        Step::Demand(number, page) => fetched(number, page * 4096, 16 * 4096),
        Step::Touched(vm, number, page) => {
            touched(name(vm).as_str(), number, page * 4096, 8 * 4096)
        }
        Step::Push => {
            host.push_one();
            return None;
        }
        Step::Fail => {
            let (id, here) = (host.wishes.pop_front()?.id, Vec::new());
            PlannerEvent::FetchEnded(FetchEnded { id, here })
        }
        Step::Level(level, deficit) => pressure(
            [
                PressureLevel::Plenty,
                PressureLevel::Low,
                PressureLevel::Critical,
            ][usize::from(level)],
            deficit * MIB,
        ),
        Step::CancelEnds(stored) => {
            let fetch = host.cancelled.pop()?;
            let here = stored.then_some(fetch.extent).into_iter().collect();
            host.end(fetch, here);
            return None;
        }
        Step::Sample(free) => {
            let pool_bytes = host.planner.table.read(MappingTable::resident_bytes);
            PlannerEvent::MemorySampled(MemorySample {
                total_bytes: 256 * MIB,
                available_bytes: free * MIB + pool_bytes,
                pool_bytes,
                ..MemorySample::default()
            })
        }
        Step::Budget(mib) => PlannerEvent::BudgetChanged(mib * MIB),
        Step::Tick(ms) => {
            host.now_ms += ms;
            PlannerEvent::Tick
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_sequence_of_events_breaks_an_invariant(
        steps in prop::collection::vec(step(), 1..80),
        slow_cancels in any::<bool>(),
    ) {
        let mut host = Host::new(config(12));
        host.slow_cancels = slow_cancels;
        for step in steps {
            if let Some(event) = event_of(step, &mut host) {
                host.tell(event);
            }
        }
        let kept: BTreeMap<_, _> = host.planner.evicting.iter().filter(|(_, set)| !set.is_empty()).collect();
        prop_assert!(kept.is_empty(), "evictions carried out but not forgotten");
    }
}
