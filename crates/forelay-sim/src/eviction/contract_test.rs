//! The contract of [`EvictionPolicy`], run on every policy.

use proptest::prelude::*;

use forelay_cache::reuse::s3_fifo::S3Fifo;
use forelay_cache::reuse::trees::FitSettings;
use forelay_cache::reuse::{ObjectRequest, ReuseMemory, ReuseSettings};

use super::lru::Lru;
use super::min::{Min, cold_bound};
use super::{EvictionKind, EvictionPolicy};

type Named = (&'static str, Box<dyn EvictionPolicy>);

fn all(capacity_bytes: u64, requests: &[ObjectRequest]) -> Vec<Named> {
    let quick = ReuseMemory::new(capacity_bytes, quick());
    let usual = EvictionKind::ALL.map(|kind| (kind.name(), kind.build(capacity_bytes, requests)));
    let mut all: Vec<Named> = vec![("quick", Box::new(quick))];
    all.extend(usual);
    all
}

/// Learns within the few requests of a test.
fn quick() -> ReuseSettings {
    let config = ReuseSettings::default();
    ReuseSettings {
        fit: FitSettings {
            trees: 6,
            depth: 3,
            ..config.fit
        },
        first_half_life_ms: 10_000.0,
        half_life_range_ms: (1_000.0, 60_000.0),
        first_fit_samples: 40,
        refit_samples: 40,
        ..config
    }
}

/// Objects 0..40 with sizes and load times that depend on the object only.
fn requests_of(objects: &[u8], unit: bool) -> Vec<ObjectRequest> {
    let request = |(at, &object): (usize, &u8)| ObjectRequest {
        object: u32::from(object),
        owner: u32::from(object) % 5,
        bytes: if unit {
            1
        } else {
            1 + u64::from(object) * 7 % 23
        },
        load_s: if unit {
            1.0
        } else {
            0.02 + f64::from(object) * 0.01
        },
        now_ms: at as i64 * 1000,
    };
    objects.iter().enumerate().map(request).collect()
}

fn run(policy: &mut dyn EvictionPolicy, requests: &[ObjectRequest]) -> (Vec<bool>, f64) {
    let mut cold_s = 0.0;
    let hit = |request: &ObjectRequest| {
        let hit = policy.request(request);
        cold_s += if hit { 0.0 } else { request.load_s };
        hit
    };
    (requests.iter().map(hit).collect(), cold_s)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn every_policy_keeps_the_contract(
        objects in prop::collection::vec(0u8..40, 1..250),
        capacity in 1u64..120,
        unit in any::<bool>(),
    ) {
        let requests = requests_of(&objects, unit);
        let bound = cold_bound(capacity, &requests);
        for ((name, mut policy), (_, mut twin)) in
            all(capacity, &requests).into_iter().zip(all(capacity, &requests))
        {
            prop_assert_eq!(policy.capacity_bytes(), capacity);
            let sizes: std::collections::BTreeMap<_, _> =
                requests.iter().map(|r| (r.object, r.bytes)).collect();
            let mut cold_s = 0.0;
            for request in &requests {
                let held = policy.contains(request.object);
                let hit = policy.request(request);
                prop_assert_eq!(hit, held, "{}: a hit is what was held", name);
                cold_s += if hit { 0.0 } else { request.load_s };
                prop_assert!(policy.used_bytes() <= capacity, "{}", name);
                if request.bytes > capacity {
                    prop_assert!(!policy.contains(request.object), "{}", name);
                } else if name != "min" {
                    prop_assert!(policy.contains(request.object), "{}", name);
                }
            }
            let held: u64 = sizes.iter().filter(|(o, _)| policy.contains(**o)).map(|(_, b)| b).sum();
            prop_assert_eq!(held, policy.used_bytes(), "{}: bytes held", name);
            prop_assert!(bound <= cold_s + 1e-9, "{} beats the bound", name);
            let again = run(twin.as_mut(), &requests).1;
            prop_assert_eq!(again.to_bits(), cold_s.to_bits(), "{} is not deterministic", name);
        }
    }

    #[test]
    fn nothing_beats_min_on_unit_slots(
        objects in prop::collection::vec(0u8..40, 1..250),
        capacity in 1u64..30,
    ) {
        let requests = requests_of(&objects, true);
        let best = run(&mut Min::new(capacity, &requests), &requests).1;
        for (name, mut policy) in all(capacity, &requests) {
            let cold_s = run(policy.as_mut(), &requests).1;
            prop_assert!(best <= cold_s, "{}", name);
        }
    }
}

#[test]
fn a_memory_that_holds_everything_misses_each_object_once() {
    let objects: Vec<u8> = (0..200u32).map(|i| (i * i % 40) as u8).collect();
    let requests = requests_of(&objects, false);
    let distinct: std::collections::BTreeSet<_> = objects.iter().collect();
    for (name, mut policy) in all(10_000, &requests) {
        let hits = run(policy.as_mut(), &requests).0;
        let misses = hits.iter().filter(|hit| !**hit).count();
        assert_eq!(misses, distinct.len(), "{name}");
    }
}

#[test]
fn names_are_those_of_the_policies() {
    for kind in EvictionKind::ALL {
        assert_eq!(EvictionKind::from_name(kind.name()), Some(kind));
    }
}

#[test]
fn a_scan_does_not_wash_frequent_objects_out_of_s3_fifo() {
    let mut objects = Vec::new();
    for round in 0..30u8 {
        objects.extend([0, 1, 2, 0, 1, 2]);
        objects.extend((0..8).map(|i| 3 + (round * 8 + i) % 37));
    }
    let requests = requests_of(&objects, true);
    let cold = |policy: &mut dyn EvictionPolicy| run(policy, &requests).1;
    assert!(cold(&mut S3Fifo::new(10)) < cold(&mut Lru::new(10)));
}
