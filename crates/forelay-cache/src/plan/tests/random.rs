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
        1 => (0u8..3, 0u64..8).prop_map(|(l, d)| Step::Level(l, d)),
        1 => (0u64..64).prop_map(Step::Sample),
        1 => (1u64..24).prop_map(Step::Budget),
        2 => (0i64..20_000).prop_map(Step::Tick),
    ]
}

pub(super) fn event_of(step: Step, host: &mut Host) -> Option<Event> {
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
