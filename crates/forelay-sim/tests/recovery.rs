//! The learner recovers what generated a synthetic trace.

use forelay_predict::arrivals::{ArrivalsConfig, Forecaster};
use forelay_sim::{Policy, Row, SimulateConfig, simulate_trace};

use crate::synthetic::{ArrivalProcess, SyntheticProfile, generate};

/// Log-loss per launch of the learner and of the generator itself, over the later half.
fn log_losses(process: ArrivalProcess, days: f64, seed: u64) -> (f64, f64) {
    let trace = generate(&[SyntheticProfile::new("p", "o", process)], days, seed);
    let middle = trace.horizon.seconds() / 2.0;
    let mut forecaster = Forecaster::new(ArrivalsConfig::default());
    let (profile, owner) = (forecaster.profile("p"), forecaster.owner("o"));
    let (mut learned, mut truth, mut launches) = (0.0, 0.0, 0.0);
    let mut last = None;
    for launch in &trace.launches {
        forecaster.settle(profile, launch.at, true, |segment| {
            let Some(origin) = last else { return };
            let start = forelay_predict::time::Timestamp::minutes(origin) + segment.start_min;
            if start * 60.0 < middle {
                return;
            }
            let hazard = process
                .hazard_per_min(start + segment.length_min / 2.0)
                .unwrap();
            learned += segment.hazard_per_min * segment.length_min;
            truth += hazard * segment.length_min;
            if segment.launched {
                learned -= segment.hazard_per_min.ln();
                truth -= hazard.ln();
                launches += 1.0;
            }
        });
        forecaster.learn_launch(profile, owner, launch.at, 0, |_, _| {});
        last = Some(launch.at);
    }
    assert!(launches > 50.0);
    (learned / launches, truth / launches)
}

#[test]
fn the_hazard_of_a_poisson_process_is_learned() {
    for (seed, per_hour) in [(1, 0.5), (2, 4.0)] {
        let (learned, truth) = log_losses(ArrivalProcess::Poisson { per_hour }, 40.0, seed);
        assert!(
            learned < truth + 0.12,
            "{per_hour} an hour: {learned} against {truth}"
        );
    }
}

#[test]
fn a_diurnal_rate_costs_little_more_than_its_truth() {
    let process = ArrivalProcess::Diurnal {
        peak_per_hour: 6.0,
        trough_per_hour: 0.2,
    };
    let (learned, truth) = log_losses(process, 40.0, 3);
    assert!(learned < truth + 0.2, "{learned} against {truth}");
}

fn later_half(profiles: &[SyntheticProfile], days: f64, policy: &str) -> Row {
    let trace = generate(profiles, days, 9);
    let mut config = SimulateConfig::new("synthetic".into());
    config.policies = vec![policy.parse::<Policy>().unwrap()];
    simulate_trace(&trace, &config).unwrap().rows.remove(0)
}

#[test]
fn schedules_are_found_and_cost_almost_nothing_to_serve() {
    for (period_min, jitter_min) in [(60.0, 0.2), (1440.0, 3.0), (47.0, 0.1)] {
        let days = period_min / 1440.0 * 60.0;
        let profile = SyntheticProfile::new(
            "p",
            "o",
            ArrivalProcess::Periodic {
                period_min,
                jitter_min,
            },
        );
        let row = later_half(&[profile], days, "forelay:0.01");
        let [_, late] = row.halves;
        assert!(
            late.cold_total_pct < 10.0,
            "every {period_min}: {}",
            late.cold_total_pct
        );
        let share = late.memory_profile_minutes / (days * 720.0);
        let needed = (20.0 * jitter_min + 3.0) / period_min;
        assert!(
            share < needed,
            "every {period_min}: loaded {share} of the time"
        );
    }
}

#[test]
fn a_drifting_period_is_followed() {
    let process = ArrivalProcess::Drift {
        period_min: 20.0,
        growth: 0.005,
    };
    let row = later_half(
        &[SyntheticProfile::new("p", "o", process)],
        5.0,
        "forelay:0.01",
    );
    assert!(
        row.halves[1].cold_total_pct < 15.0,
        "{}",
        row.halves[1].cold_total_pct
    );
    assert!(row.halves[1].memory_profile_minutes < 0.3 * 2.5 * 1440.0);
}

#[test]
fn bursts_are_held_and_pauses_are_not() {
    let process = ArrivalProcess::Bursts {
        pause_min: 600.0,
        gap_min: 2.0,
        size: 10.0,
    };
    let row = later_half(
        &[SyntheticProfile::new("p", "o", process)],
        30.0,
        "forelay:0.02",
    );
    // One in ten begins a burst and cannot be known.
    assert!(
        row.halves[1].cold_total_pct < 18.0,
        "{}",
        row.halves[1].cold_total_pct
    );
    assert!(row.halves[1].memory_profile_minutes < 0.15 * 15.0 * 1440.0);
}

#[test]
fn what_follows_is_warm_although_its_leader_is_random() {
    let profiles = [
        SyntheticProfile::new("leader", "o", ArrivalProcess::Poisson { per_hour: 0.2 }),
        SyntheticProfile::new(
            "follower",
            "o",
            ArrivalProcess::Follows {
                probability: 0.95,
                lag_min: 2.0,
            },
        ),
    ];
    let with = later_half(&profiles, 30.0, "forelay:0.02");
    let alone = later_half(&profiles[..1], 30.0, "forelay:0.02");
    // All of the leader's launches are cold; nearly none of the follower's need be.
    assert!(alone.halves[1].cold_total_pct > 90.0);
    assert!(
        with.halves[1].cold_total_pct < 65.0,
        "{}",
        with.halves[1].cold_total_pct
    );
}

#[test]
fn a_new_profile_of_a_known_owner_is_forecast_after_its_first_launch() {
    let daily = ArrivalProcess::Periodic {
        period_min: 1440.0,
        jitter_min: 1.0,
    };
    let mut profiles: Vec<SyntheticProfile> = (0..20)
        .map(|i| SyntheticProfile::new(&format!("p{i}"), "o", daily))
        .collect();
    let mut newcomer = SyntheticProfile::new("new", "o", daily);
    newcomer.from_min = 10.0 * 1440.0;
    profiles.push(newcomer);
    let trace = generate(&profiles, 14.0, 4);
    let mut config = SimulateConfig::new("synthetic".into());
    config.policies = vec![
        "fixed:10".parse().unwrap(),
        "forelay:0.002".parse().unwrap(),
    ];
    let report = simulate_trace(&trace, &config).unwrap();
    let new = report
        .best_profiles
        .iter()
        .find(|outcome| outcome.profile == "new")
        .cloned();
    let all: Vec<_> = report
        .best_profiles
        .iter()
        .chain(&report.worst_profiles)
        .collect();
    assert!(!all.is_empty());
    let row = &report.rows[1];
    assert!(
        row.halves[1].cold_total_pct < 20.0,
        "{}",
        row.halves[1].cold_total_pct
    );
    if let Some(new) = new {
        assert!(new.cold_forelay <= 2, "{new:?}");
    }
}
