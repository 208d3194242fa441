//! No policy but the clairvoyant may see a launch before it has decided.

use forelay_sim::trace::Trace;
use forelay_sim::{Policy, Report, SimulateConfig, simulate_trace};

use crate::synthetic::{ArrivalProcess, SyntheticProfile, generate};

fn profiles() -> Vec<SyntheticProfile> {
    let periodic = |period_min| ArrivalProcess::Periodic {
        period_min,
        jitter_min: 1.0,
    };
    vec![
        SyntheticProfile::new("hourly", "a", periodic(60.0)),
        SyntheticProfile::new("poisson", "a", ArrivalProcess::Poisson { per_hour: 2.0 }),
        SyntheticProfile::new(
            "follower",
            "a",
            ArrivalProcess::Follows {
                probability: 0.8,
                lag_min: 2.0,
            },
        ),
        SyntheticProfile::new(
            "bursts",
            "b",
            ArrivalProcess::Bursts {
                pause_min: 200.0,
                gap_min: 2.0,
                size: 6.0,
            },
        ),
        SyntheticProfile::new(
            "drift",
            "b",
            ArrivalProcess::Drift {
                period_min: 30.0,
                growth: 0.01,
            },
        ),
    ]
}

fn run(trace: &Trace) -> Report {
    let mut config = SimulateConfig::new("synthetic".into());
    config.policies = [
        "none",
        "fixed:10",
        "hybrid",
        "hybrid+mean",
        "lru:2",
        "s3-fifo:3",
        "forelay:0.1,0.01,0.001",
    ]
    .iter()
    .map(|name| name.parse::<Policy>().unwrap())
    .collect();
    simulate_trace(trace, &config).unwrap()
}

/// The same first half with another second half.
fn with_other_future(trace: &Trace, other: &Trace) -> Trace {
    let middle = trace
        .start()
        .plus_ms(trace.horizon.ms_since(trace.start()) / 2);
    let mut mixed = trace.clone();
    mixed.launches.retain(|launch| launch.at < middle);
    mixed
        .launches
        .extend(other.launches.iter().filter(|launch| launch.at >= middle));
    mixed
}

#[test]
fn the_future_does_not_change_the_past() {
    let trace = generate(&profiles(), 6.0, 1);
    let mixed = with_other_future(&trace, &generate(&profiles(), 6.0, 2));
    assert_ne!(trace.launches.last(), mixed.launches.last());
    let (a, b) = (run(&trace), run(&mixed));
    for (a, b) in a.rows.iter().zip(&b.rows) {
        let name = format!("{} {:?}", a.policy, a.knob);
        assert_eq!(
            a.hit_ratio_over_time[..24],
            b.hit_ratio_over_time[..24],
            "{name}"
        );
        let (a, b) = (a.halves[0], b.halves[0]);
        assert_eq!(a.cold_total_pct, b.cold_total_pct, "{name}");
        // Spans are kept to a few milliseconds.
        let difference = (a.memory_profile_minutes - b.memory_profile_minutes).abs();
        assert!(difference < 0.5, "{name}: {difference} minutes");
    }
}

#[test]
fn the_same_trace_gives_the_same_report() {
    let trace = generate(&profiles(), 3.0, 3);
    let (a, b) = (run(&trace), run(&trace));
    let json = |report| serde_json::to_value(report).unwrap();
    assert_eq!(json(&a), json(&b));
    assert_eq!(a.to_html(), b.to_html());
}

#[test]
fn the_page_stands_alone_and_escapes_names() {
    let mut trace = generate(&profiles(), 3.0, 4);
    trace.profiles[0] = "<script>alert(1)</script>".to_owned();
    let html = run(&trace).to_html();
    assert!(html.contains("<svg") && html.contains("polyline"));
    assert!(!html.contains("<script") && !html.contains("http"));
}

#[test]
fn more_memory_never_means_more_cold_starts() {
    let trace = generate(&profiles(), 6.0, 5);
    let rows = run(&trace).rows;
    let forelay: Vec<_> = rows.iter().filter(|row| row.policy == "forelay").collect();
    assert_eq!(forelay.len(), 3);
    for pair in forelay.windows(2) {
        assert!(pair[0].memory_profile_minutes <= pair[1].memory_profile_minutes);
        assert!(pair[0].cold_total_pct >= pair[1].cold_total_pct);
    }
}

#[test]
fn a_load_that_takes_time_must_begin_that_much_earlier() {
    let trace = generate(&profiles(), 6.0, 6);
    let mut config = SimulateConfig::new("synthetic".into());
    config.policies = vec!["forelay:0.01".parse().unwrap()];
    let instant = simulate_trace(&trace, &config).unwrap().rows[0].clone();
    config.load_s = 45.0;
    let slow = simulate_trace(&trace, &config).unwrap().rows[0].clone();
    assert!(slow.cold_total_pct > instant.cold_total_pct);
    assert_eq!(slow.memory_profile_minutes, instant.memory_profile_minutes);
}
