//! Guards the quality of forecasts where no recorded traces are at hand: a seeded host of all
//! kinds of workloads, and bounds that a forecaster misses which tells nothing of when.
//!
//! The bounds lie a tenth above what the forecaster reaches. One that always tells the same
//! probability holds everything always or nothing ever, and misses one of the two sides.

use forelay_sim::{Report, Row, SimulateConfig, simulate_trace};

use crate::synthetic::{ArrivalProcess, SyntheticProfile, generate};

/// 48 profiles of six owners over ten days.
fn host() -> forelay_sim::trace::Trace {
    let mut profiles = Vec::new();
    for index in 0..8 {
        let number = f64::from(index);
        let kinds = [
            ArrivalProcess::Periodic {
                period_min: 45.0 + 30.0 * number,
                jitter_min: 0.5 + 0.3 * number,
            },
            ArrivalProcess::Follows {
                probability: 0.9,
                lag_min: 3.0 + number,
            },
            ArrivalProcess::Periodic {
                period_min: 1440.0,
                jitter_min: 2.0 + number,
            },
            ArrivalProcess::Diurnal {
                peak_per_hour: 2.0 + number,
                trough_per_hour: 0.1,
            },
            ArrivalProcess::Bursts {
                pause_min: 300.0 + 60.0 * number,
                gap_min: 2.0,
                size: 6.0,
            },
            ArrivalProcess::Poisson {
                per_hour: 0.1 + 0.1 * number,
            },
        ];
        for (kind, process) in kinds.into_iter().enumerate() {
            let (name, owner) = (format!("p{kind}-{index}"), format!("owner{}", index % 6));
            profiles.push(SyntheticProfile::new(&name, &owner, process));
        }
    }
    generate(&profiles, 10.0, 20_261_130)
}

fn report(policies: &[&str]) -> Report {
    let mut config = SimulateConfig::new("synthetic".into());
    config.policies = policies.iter().map(|name| name.parse().unwrap()).collect();
    simulate_trace(&host(), &config).unwrap()
}

fn late(row: &Row) -> (f64, f64) {
    let half = row.halves[1];
    (half.cold_total_pct, half.memory_pct_of_fixed10)
}

#[test]
fn forecasts_are_as_good_on_a_synthetic_host_as_they_were() {
    let report = report(&["fixed:10", "fixed:60", "forelay:0.01,0.03"]);
    assert_eq!(report.rows.len(), 4);
    let shown: Vec<_> = report
        .rows
        .iter()
        .map(|row| (&row.policy, late(row)))
        .collect();
    let [minutes, hour, cheap, dear] = [0, 1, 2, 3].map(|row| late(&report.rows[row]));
    assert!(cheap.0 < 13.4 && cheap.1 < 222.0, "{shown:?}");
    assert!(dear.0 < 26.2 && dear.1 < 116.0, "{shown:?}");
    // Half of a fixed keep-alive's cold starts, in less memory or about as much.
    assert!(cheap.0 < hour.0 / 2.0 && cheap.1 < hour.1, "{shown:?}");
    assert!(dear.0 < minutes.0 / 2.0, "{shown:?}");
    let calibration = report.calibration.unwrap();
    assert!(calibration.forecasts > 50_000, "{calibration:?}");
    assert!(
        calibration.expected_calibration_error < 0.006,
        "{calibration:?}"
    );
    assert!(calibration.brier_score < 0.06, "{calibration:?}");
}
