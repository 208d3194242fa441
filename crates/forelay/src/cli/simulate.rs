//! `forelay simulate`: a trace of launches against policies, on a virtual clock.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use forelay_sim::launch_rows::OnBadRow;
use forelay_sim::{Found, Policy, ProfileOutcome, Report, Row, SimulateConfig, simulate};

use super::output;

/// Arguments of `forelay simulate`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The trace: CSV with time_s, profile, owner, count or duration_s, and components and
    /// attached (names with | between them) where known (gzip accepted), or
    /// Azure Functions' invocations file.
    pub trace: PathBuf,
    /// Policies: none, fixed:MINUTES, hybrid, hybrid+mean, clairvoyant, forelay or
    /// forelay:PRICE,PRICE..., and lru, lfu, gdsf, s3-fifo, min, forecast, planner with
    /// :SLOTS. All of the usual ones if absent.
    #[arg(long = "policy", value_name = "POLICY", num_args = 1..)]
    pub policies: Vec<Policy>,
    /// Leave profiles with fewer launches out of the figures.
    #[arg(long, default_value_t = 1)]
    pub min_launches: u64,
    /// Leave profiles with more launches out of the figures.
    #[arg(long)]
    pub max_launches: Option<u64>,
    /// Also give each profile's cold launches, beside a reference policy's.
    #[arg(long)]
    pub profiles: bool,
    /// What to do with rows that cannot be read.
    #[arg(long, value_enum, default_value = "stop")]
    pub on_bad_row: BadRow,
    /// Side file: profile,component,bytes[,load_s].
    #[arg(long)]
    pub components: Option<PathBuf>,
    /// Seconds that a load takes.
    #[arg(long, default_value_t = 0.0)]
    pub load_s: f64,
    /// Write a self-contained HTML report.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Print the whole report as JSON: rows, calibration, profiles.
    #[arg(long)]
    pub json: bool,
}

/// See [`OnBadRow`].
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum BadRow {
    /// Fail, naming the line.
    Stop,
    /// Leave it out; the report counts them.
    Skip,
}

/// `forelay simulate`.
pub fn run(arguments: Arguments) -> Result<()> {
    let mut config = SimulateConfig::new(arguments.trace);
    config.policies = arguments.policies;
    config.min_launches = arguments.min_launches;
    config.max_launches = arguments.max_launches.unwrap_or(u64::MAX);
    config.per_profile = arguments.profiles;
    config.on_bad_row = match arguments.on_bad_row {
        BadRow::Stop => OnBadRow::Stop,
        BadRow::Skip => OnBadRow::Skip,
    };
    config.components = arguments.components;
    config.load_s = arguments.load_s;
    let report = simulate(&config)?;
    if let Some(path) = &arguments.report {
        std::fs::write(path, report.to_html())
            .with_context(|| format!("cannot write the report {}", path.display()))?;
        complain!("report written to {}", path.display());
    }
    for row in &report.bad_rows {
        complain!("line {}: {} (skipped)", row.line, row.reason);
    }
    if arguments.json {
        return output::json(&report);
    }
    print_report(&report);
    Ok(())
}

fn print_report(report: &Report) {
    output::table(
        &report.rows,
        &[
            ("policy", |row: &Row| row.policy.clone()),
            ("knob", |row| {
                output::optional(row.knob, |knob| knob.to_string())
            }),
            ("cold p50 %", |row| format!("{:.2}", row.cold_p50)),
            ("cold p75 %", |row| format!("{:.2}", row.cold_p75)),
            ("cold total %", |row| format!("{:.3}", row.cold_total_pct)),
            ("memory %", |row| {
                format!("{:.1}", row.memory_pct_of_fixed10)
            }),
        ],
    );
    if let Some(outcomes) = &report.per_profile {
        let (own, reference) = report.compared.clone().unwrap_or_default();
        say!("\ncold launches under {own} and under {reference}:");
        output::table(
            outcomes,
            &[
                ("profile", |of: &ProfileOutcome| of.profile.clone()),
                ("launches", |of| of.launches.to_string()),
                ("cold", |of| of.cold_forelay.to_string()),
                ("cold, reference", |of| of.cold_reference.to_string()),
            ],
        );
    }
    if let Some(needs) = &report.needs {
        let figures = [
            ("launches", needs.launches),
            ("first launches of a profile", needs.first_launches),
            ("attachments", needs.attachments),
        ];
        output::table(
            &figures,
            &[
                ("components of", |(of, _): &(&str, Found)| (*of).to_owned()),
                ("judged", |(_, found)| found.judged.to_string()),
                ("components", |(_, found)| found.components.to_string()),
                ("found %", |(_, found)| format!("{:.1}", found.found_pct)),
                ("by popularity %", |(_, found)| {
                    format!("{:.1}", found.found_by_popularity_pct)
                }),
            ],
        );
    }
    if let Some(calibration) = &report.calibration {
        say!(
            "\nreliability of \"launch within 10 minutes\": expected calibration error {:.4}, Brier \
             score {:.4} over {} forecasts",
            calibration.expected_calibration_error,
            calibration.brier_score,
            calibration.forecasts
        );
    }
}
