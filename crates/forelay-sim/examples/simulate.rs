//! `cargo run --release -p forelay-sim --example simulate -- TRACE.csv[.gz] MIN_LAUNCHES [LOAD_S]`:
//! the table of the usual policies, with early and late halves.

use forelay_sim::{Policy, SimulateConfig, simulate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [trace, min_launches, rest @ ..] = arguments.as_slice() else {
        return Err("usage: simulate TRACE MIN_LAUNCHES [LOAD_S] [POLICY...]".into());
    };
    let mut config = SimulateConfig::new(trace.into());
    config.min_launches = min_launches.parse()?;
    if let Some(load_s) = rest.first() {
        config.load_s = load_s.parse()?;
    }
    for policy in rest.iter().skip(1) {
        config.policies.push(policy.parse::<Policy>()?);
    }
    // For experiments: FORELAY_FORECAST='{"tick_min":0.25}' overrides settings.
    if let Ok(text) = std::env::var("FORELAY_FORECAST") {
        config.forecast = serde_json::from_str(&text)?;
    }
    let began = std::time::Instant::now();
    let report = simulate(&config)?;
    println!(
        "{} launches in {:.1} s",
        report.launches,
        began.elapsed().as_secs_f64()
    );
    for row in &report.rows {
        println!(
            "{:12} {:>9} p25 {:6.2} p50 {:6.2} p75 {:6.2} cold {:8.4} memory {:7.1} | early {:8.4} {:7.1} | late {:8.4} {:7.1}",
            row.policy,
            row.knob.map_or(String::new(), |knob| format!("{knob:.5}")),
            row.cold_p25,
            row.cold_p50,
            row.cold_p75,
            row.cold_total_pct,
            row.memory_pct_of_fixed10,
            row.halves[0].cold_total_pct,
            row.halves[0].memory_pct_of_fixed10,
            row.halves[1].cold_total_pct,
            row.halves[1].memory_pct_of_fixed10,
        );
    }
    if let Some(c) = &report.calibration {
        println!(
            "calibration: {} forecasts, ECE {:.4}, from 5 % {:.4}, Brier {:.4}; {:?} bytes a profile; fell back {:?}",
            c.forecasts,
            c.expected_calibration_error,
            c.error_from_5_pct,
            c.brier_score,
            report.bytes_per_profile,
            report.fallen_back
        );
        for bin in &c.bins {
            println!(
                "  told {:.3} observed {:.3} of {}",
                bin.mean_forecast, bin.observed, bin.forecasts
            );
        }
    }
    Ok(())
}
