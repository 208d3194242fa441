//! Cost and calibration of the forecaster: `bench_forecast OUT.json`.
//!
//! Measures processor time on one core, after warm-up: one update, a forecast for 10,000 profiles, memory per
//! profile; with the traces at hand (`FORELAY_TRACES`, default `../shared/traces`) also the expected
//! calibration error and the time to simulate.

use forelay_predict::arrivals::{ArrivalsConfig, Forecaster};
use forelay_predict::time::Timestamp;
use forelay_sim::{Policy, SimulateConfig, simulate};
use std::path::{Path, PathBuf};
use synthetic_traces::{ArrivalProcess, SyntheticProfile, generate};

#[allow(dead_code)]
#[path = "../tests/synthetic.rs"]
mod synthetic_traces;

const PROFILES: usize = 10_000;

fn profiles() -> Vec<SyntheticProfile> {
    (0..PROFILES)
        .map(|index| {
            let process = match index % 5 {
                0 => ArrivalProcess::Periodic {
                    period_min: 1440.0,
                    jitter_min: 3.0,
                },
                1 => ArrivalProcess::Periodic {
                    period_min: 180.0,
                    jitter_min: 0.5,
                },
                2 => ArrivalProcess::Poisson { per_hour: 0.2 },
                3 => ArrivalProcess::Bursts {
                    pause_min: 1000.0,
                    gap_min: 5.0,
                    size: 4.0,
                },
                _ => ArrivalProcess::Follows {
                    probability: 0.9,
                    lag_min: 1.0,
                },
            };
            let owner = format!("owner-{}", index / 10);
            SyntheticProfile::new(&format!("profile-{index}"), &owner, process)
        })
        .collect()
}

/// Processor seconds this (single-threaded) process has used: what a busy host does not distort.
fn cpu_s() -> f64 {
    let schedstat = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let ns = schedstat
        .split(' ')
        .next()
        .and_then(|field| field.parse::<u64>().ok());
    ns.unwrap_or(0) as f64 / 1.0e9
}

fn synthetic(out: &mut serde_json::Map<String, serde_json::Value>) {
    let trace = generate(&profiles(), 5.0, 1);
    let mut forecaster = Forecaster::new(ArrivalsConfig::default());
    let keys: Vec<_> = trace
        .profiles
        .iter()
        .map(|name| forecaster.profile(name))
        .collect();
    let owners: Vec<_> = trace
        .owners
        .iter()
        .map(|name| forecaster.owner(name))
        .collect();
    let half = trace.launches.len() / 2;
    // As the daemon does it: time passes in steps of ten minutes, launches come in between.
    let mut next_advance = trace.start();
    let mut update = |launches: &[forelay_sim::trace::TracedLaunch]| {
        let (mut updates_s, mut advances_s, mut advances) = (0.0, 0.0, 0);
        let mut rest = launches;
        while let Some(first) = rest.first() {
            while next_advance <= first.at {
                let began = cpu_s();
                forecaster.advance(next_advance, |_, _| {});
                advances_s += cpu_s() - began;
                advances += 1;
                next_advance = next_advance.plus_ms(600_000);
            }
            let (now, later) = rest.split_at(rest.partition_point(|l| l.at < next_advance));
            let began = cpu_s();
            for launch in now {
                let key = keys[launch.profile as usize];
                forecaster.observe_launch(key, owners[launch.owner as usize], launch.at, 0);
            }
            updates_s += cpu_s() - began;
            rest = later;
        }
        (
            updates_s * 1.0e6 / launches.len() as f64,
            advances_s * 1.0e3 / f64::from(advances.max(1)),
        )
    };
    update(&trace.launches[..half]);
    let (update_us, advance_ms) = update(&trace.launches[half..]);
    out.insert("advance_ms".into(), advance_ms.into());
    let now = trace.horizon;
    const ROUNDS: i64 = 40;
    let mut listed = 0;
    let began = cpu_s();
    for round in 0..ROUNDS {
        let at = Timestamp(now.0 + round * 1_000);
        listed = forecaster.next_launches(at, 600.0, 0.05).len();
    }
    let forecast_ms = (cpu_s() - began) * 1.0e3 / ROUNDS as f64;
    out.insert("profiles".into(), PROFILES.into());
    out.insert("launches".into(), trace.launches.len().into());
    out.insert("update_us".into(), update_us.into());
    out.insert("forecast_10k_ms".into(), forecast_ms.into());
    out.insert("forecast_listed".into(), listed.into());
    out.insert(
        "bytes_per_profile".into(),
        forecaster.bytes_per_profile().into(),
    );
}

fn trace(
    out: &mut serde_json::Map<String, serde_json::Value>,
    folder: &Path,
    (file, name, min_launches): (&str, &str, u64),
) -> Result<(), Box<dyn std::error::Error>> {
    let path = folder.join(file);
    if !path.exists() {
        eprintln!(
            "SKIPPED {name}: {} is not there (set FORELAY_TRACES)",
            path.display()
        );
        return Ok(());
    }
    let mut config = SimulateConfig::new(path);
    config.min_launches = min_launches;
    config.policies = vec![Policy::Forelay(Vec::new())];
    let began = cpu_s();
    let report = simulate(&config)?;
    let seconds = cpu_s() - began;
    out.insert(format!("{name}_simulate_cpu_s"), seconds.into());
    let per_million = seconds * 1.0e6 / report.launches as f64;
    out.insert(format!("{name}_simulate_million_cpu_s"), per_million.into());
    out.insert(
        format!("{name}_bytes_per_profile"),
        report.bytes_per_profile.into(),
    );
    if let Some(calibration) = report.calibration {
        out.insert(
            format!("{name}_ece"),
            calibration.expected_calibration_error.into(),
        );
        out.insert(
            format!("{name}_ece_from_5_pct"),
            calibration.error_from_5_pct.into(),
        );
        out.insert(format!("{name}_brier"), calibration.brier_score.into());
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let output: PathBuf = std::env::args()
        .nth(1)
        .ok_or("usage: bench_forecast OUT.json")?
        .into();
    let folder: PathBuf = std::env::var_os("FORELAY_TRACES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/traces"),
        PathBuf::from,
    );
    let mut out = serde_json::Map::new();
    synthetic(&mut out);
    trace(&mut out, &folder, ("azure2019-8h-250.csv.gz", "azure", 2))?;
    trace(
        &mut out,
        &folder,
        ("google2011-days00-14.csv.gz", "google", 10),
    )?;
    let text = serde_json::to_string_pretty(&out)?;
    std::fs::write(&output, &text)?;
    println!("{text}");
    Ok(())
}
