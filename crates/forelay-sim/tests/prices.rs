//! What any price of memory must lead to, whatever the forecasts: nothing is held where
//! memory is too dear for anything, only compulsory misses are left where it costs nothing,
//! and each launch is judged once.

use forelay_predict::time::Timestamp;
use forelay_sim::trace::{Trace, TracedLaunch};
use forelay_sim::{Policy, Row, SimulateConfig, simulate_trace};

use crate::synthetic::{ArrivalProcess, SyntheticProfile, generate};

/// Profiles that announce each other, repeat, drift and come at random.
fn host(seed: u64) -> Trace {
    let follows = |lag_min| ArrivalProcess::Follows {
        probability: 0.9,
        lag_min,
    };
    let periodic = |period_min| ArrivalProcess::Periodic {
        period_min,
        jitter_min: 1.0,
    };
    let profiles = [
        SyntheticProfile::new("leader", "a", periodic(50.0)),
        SyntheticProfile::new("soon", "a", follows(2.0)),
        SyntheticProfile::new("later", "a", follows(17.0)),
        SyntheticProfile::new("at random", "b", ArrivalProcess::Poisson { per_hour: 1.0 }),
        SyntheticProfile::new("follows that", "b", follows(5.0)),
        SyntheticProfile::new("daily", "b", periodic(1440.0)),
    ];
    generate(&profiles, 6.0, seed)
}

/// Every third launch is several at one moment.
fn with_repeats(mut trace: Trace) -> Trace {
    for (index, launch) in trace.launches.iter_mut().enumerate() {
        launch.count = if index % 3 == 0 { 4 } else { 1 };
    }
    trace
}

/// The same launches, one row each.
fn a_row_each(trace: &Trace) -> Trace {
    let mut rows = trace.clone();
    rows.launches = trace
        .launches
        .iter()
        .flat_map(|launch| {
            (0..launch.count).map(|_| TracedLaunch {
                count: 1,
                ..*launch
            })
        })
        .collect();
    rows
}

fn rows(trace: &Trace, prices: &[f64]) -> Vec<Row> {
    let mut config = SimulateConfig::new("synthetic".into());
    config.policies = vec![Policy::Forelay(prices.to_vec())];
    simulate_trace(trace, &config).unwrap().rows
}

#[test]
fn the_ends_of_the_curve_are_where_they_must_be_and_between_them_it_is_monotone() {
    for seed in 0..4 {
        let trace = with_repeats(host(seed));
        let launches: u32 = trace.launches.iter().map(|launch| launch.count).sum();
        let compulsory = 100.0 * trace.profiles.len() as f64 / f64::from(launches);
        let mut prices = Policy::curve();
        prices.insert(0, f64::INFINITY);
        prices.push(0.0);
        let rows = rows(&trace, &prices);
        let (dearest, free) = (&rows[0], &rows[rows.len() - 1]);
        assert_eq!(dearest.memory_profile_minutes, 0.0, "seed {seed}");
        assert_eq!(dearest.cold_total_pct, 100.0, "seed {seed}");
        assert!(
            (free.cold_total_pct - compulsory).abs() < 1.0e-9,
            "seed {seed}: {} percent cold where memory is free, {compulsory} are compulsory",
            free.cold_total_pct
        );
        let idle_min: f64 = trace
            .profiles
            .iter()
            .zip(0..)
            .map(|(_, profile)| {
                let first = trace
                    .launches
                    .iter()
                    .find(|launch| launch.profile == profile);
                first.map_or(0.0, |first| trace.horizon.seconds_since(first.at) / 60.0)
            })
            .sum();
        let held = free.memory_profile_minutes;
        assert!(
            (held / idle_min - 1.0).abs() < 1.0e-3,
            "{held} of {idle_min} minutes"
        );
        for pair in rows.windows(2) {
            let prices = format!("seed {seed}: {:?} and {:?}", pair[0].knob, pair[1].knob);
            assert!(
                pair[0].memory_profile_minutes <= pair[1].memory_profile_minutes + 1.0e-6,
                "{prices}"
            );
            assert!(pair[0].cold_total_pct >= pair[1].cold_total_pct, "{prices}");
        }
    }
}

#[test]
fn launches_of_one_moment_are_judged_alike_as_rows_and_as_a_count() {
    let counted = with_repeats(host(9));
    let prices = [f64::INFINITY, 0.3, 0.03, 0.003, 0.0];
    let (counted, listed) = (
        rows(&counted, &prices),
        rows(&a_row_each(&counted), &prices),
    );
    for (counted, listed) in counted.iter().zip(&listed) {
        assert_eq!(
            counted.cold_total_pct, listed.cold_total_pct,
            "{:?}",
            counted.knob
        );
        let memory = [counted, listed].map(|row| row.memory_profile_minutes);
        assert!(
            (memory[0] - memory[1]).abs() < 1.0e-6 * memory[0].max(1.0),
            "{memory:?}"
        );
    }
}

#[test]
fn seven_rows_with_one_cold_start_are_one_in_seven() {
    let at = |minute: i64| TracedLaunch {
        at: Timestamp(minute * 60_000),
        profile: 0,
        owner: 0,
        count: 1,
        composition: 0,
    };
    let trace = Trace {
        launches: vec![at(0), at(0), at(0), at(0), at(5), at(5), at(9)],
        profiles: vec!["ci".to_owned()],
        owners: vec!["a".to_owned()],
        horizon: Timestamp(600_000),
        ..Trace::default()
    };
    let row = &rows(&trace, &[0.0])[0];
    assert!(
        (row.cold_total_pct - 100.0 / 7.0).abs() < 1.0e-9,
        "{}",
        row.cold_total_pct
    );
}
