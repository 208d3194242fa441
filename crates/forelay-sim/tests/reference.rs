//! The reference figures of `traces/README.md`, and Forelay's own on the small trace.

use forelay_sim::launch_rows::OnBadRow;
use forelay_sim::trace::Trace;
use forelay_sim::{Policy, Report, SimulateConfig, simulate, simulate_trace};
use std::path::{Path, PathBuf};

fn trace(file: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("FORELAY_TRACES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/traces"),
        PathBuf::from,
    );
    let path = folder.join(file);
    if path.exists() {
        return Some(path);
    }
    eprintln!(
        "SKIPPED: no trace at {} (set FORELAY_TRACES)",
        path.display()
    );
    None
}

fn run(file: &str, min_launches: u64, policies: &[&str]) -> Option<Report> {
    let mut config = SimulateConfig::new(trace(file)?);
    config.min_launches = min_launches;
    config.policies = policies
        .iter()
        .map(|name| name.parse::<Policy>().unwrap())
        .collect();
    Some(simulate(&config).unwrap())
}

#[test]
#[should_panic(expected = "left == right")]
fn a_report_without_rows_is_not_like_the_reference() {
    let trace = crate::synthetic::generate(&[], 1.0, 1);
    let mut report = simulate_trace(&trace, &SimulateConfig::new("none".into())).unwrap();
    report.rows.clear();
    compare(&report, 0, &[("fixed:10", 0.0, 0.0, 0.0, 100.0)]);
}

/// policy, cold p50, p75, total, memory %, as printed there.
type Reference = (&'static str, f64, f64, f64, f64);

fn compare(report: &Report, profiles: usize, reference: &[Reference]) {
    let names: Vec<&str> = report.rows.iter().map(|row| row.policy.as_str()).collect();
    let expected: Vec<&str> = reference.iter().map(|row| row.0).collect();
    assert_eq!(names, expected);
    for (row, &(policy, p50, p75, total, memory)) in report.rows.iter().zip(reference) {
        assert_eq!(row.profiles, profiles);
        let near = |own: f64, told: f64| (own - told).abs() <= 0.0051 * told.max(1.0);
        assert!(near(row.cold_p50, p50), "{policy} p50 {}", row.cold_p50);
        assert!(near(row.cold_p75, p75), "{policy} p75 {}", row.cold_p75);
        assert!(
            (row.cold_total_pct - total).abs() <= 0.0075,
            "{policy} {}",
            row.cold_total_pct
        );
        let percent = row.memory_pct_of_fixed10;
        assert!((percent - memory).abs() <= 0.6, "{policy} memory {percent}");
    }
}

const POLICIES: [&str; 6] = [
    "fixed:10",
    "fixed:60",
    "fixed:240",
    "hybrid",
    "hybrid+mean",
    "clairvoyant",
];

#[test]
fn azure_baselines_are_reproduced() {
    let Some(report) = run("azure2019-8h-250.csv.gz", 2, &POLICIES) else {
        return;
    };
    compare(
        &report,
        216,
        &[
            ("fixed:10", 2.49, 66.7, 0.218, 100.0),
            ("fixed:60", 1.05, 11.1, 0.051, 133.0),
            ("fixed:240", 1.05, 7.69, 0.039, 147.0),
            ("hybrid", 3.12, 12.5, 0.092, 72.0),
            ("hybrid+mean", 3.12, 12.5, 0.093, 72.0),
            ("clairvoyant", 1.05, 7.28, 0.038, 45.0),
        ],
    );
}

#[test]
fn google_baselines_are_reproduced() {
    let Some(report) = run("google2011-days00-14.csv.gz", 10, &POLICIES) else {
        return;
    };
    compare(
        &report,
        4401,
        &[
            ("fixed:10", 100.0, 100.0, 61.22, 100.0),
            ("fixed:60", 100.0, 100.0, 40.21, 440.0),
            ("fixed:240", 93.3, 100.0, 18.51, 1130.0),
            ("hybrid", 93.3, 100.0, 20.36, 748.0),
            ("hybrid+mean", 20.0, 45.2, 9.90, 583.0),
            ("clairvoyant", 6.67, 6.67, 1.53, 12.0),
        ],
    );
}

#[test]
fn forelay_beats_the_hybrid_policy_on_azure() {
    let Some(report) = run("azure2019-8h-250.csv.gz", 2, &["forelay"]) else {
        return;
    };
    let best = |memory: f64| {
        report
            .rows
            .iter()
            .filter(|row| row.memory_pct_of_fixed10 <= memory)
            .map(|row| row.cold_total_pct)
            .fold(f64::MAX, f64::min)
    };
    assert!(best(60.0) <= 0.092, "{}", best(60.0));
    assert!(best(72.0) <= 0.075, "{}", best(72.0));
    let calibration = report.calibration.unwrap();
    assert!(calibration.expected_calibration_error <= 0.03);
}

/// Cold launches in percent of the first `launches` of the Google trace.
fn cold_in_slots(launches: usize, policies: &[&str]) -> Option<Vec<f64>> {
    let path = trace("google2011-days00-14.csv.gz")?;
    let mut trace = Trace::read(&path, OnBadRow::Stop).unwrap();
    trace.launches.truncate(launches);
    let mut config = SimulateConfig::new(path);
    config.policies = policies.iter().map(|name| name.parse().unwrap()).collect();
    let report = simulate_trace(&trace, &config).unwrap();
    Some(report.rows.iter().map(|row| row.cold_total_pct).collect())
}

#[test]
fn eviction_policies_rank_as_published_on_real_launches() {
    let policies = ["min:500", "forecast:500", "s3-fifo:500", "lru:500"];
    let Some(cold) = cold_in_slots(40_000, &policies) else {
        return;
    };
    assert!(cold.is_sorted_by(|a, b| a < b), "{cold:?}");
}

/// Of the whole trace it closes 36 %; the first days have less to learn from.
#[test]
fn forecasts_close_a_good_part_of_the_gap_from_s3_fifo_to_min() {
    let policies = ["min:1000", "forecast:1000", "s3-fifo:1000"];
    let Some(cold) = cold_in_slots(100_000, &policies) else {
        return;
    };
    let closed = (cold[2] - cold[1]) / (cold[2] - cold[0]);
    assert!(closed > 0.25, "{closed} of {cold:?}");
}
