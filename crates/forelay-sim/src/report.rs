//! What a simulation found: rows per policy, reliability, and where it went well or badly.
//!
//! Owns the running of policies and the stable JSON and table forms. The HTML form is `html`'s.

use crate::launch_rows::BadRow;
use crate::needs::{self, NeedsOutcome};
use crate::policy::Policy;
use crate::sides::{Sides, SidesError};
use crate::sweep::{self, Sweep};
use crate::tally::{Frame, Row, Tally};
use crate::trace::{Trace, TraceError};
use crate::windows::WindowPolicy;
use crate::{SimulateConfig, bounded, html};
use forelay_predict::calibration::ReliabilityBin;
use serde::Serialize;

/// Why a simulation could not run.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// The trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The side file.
    #[error(transparent)]
    Sides(#[from] SidesError),
}

/// How forecasts of "a launch within ten minutes" fared.
#[derive(Debug, Clone, Serialize)]
pub struct Calibration {
    /// Forecasts judged.
    pub forecasts: u64,
    /// Expected calibration error over 20 bins of equal width.
    pub expected_calibration_error: f64,
    /// The same over forecasts of at least 0.05.
    pub error_from_5_pct: f64,
    /// Mean squared error.
    pub brier_score: f64,
    /// The diagram.
    pub bins: Vec<ReliabilityBin>,
}

/// A profile on which Forelay did well or badly, against the hybrid policy.
#[derive(Debug, Clone, Serialize)]
pub struct ProfileOutcome {
    /// Its name.
    pub profile: String,
    /// Its launches.
    pub launches: u64,
    /// Cold launches under Forelay.
    pub cold_forelay: u32,
    /// Cold launches under the reference policy.
    pub cold_reference: u32,
}

/// The outcome of a simulation.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The trace's name.
    pub trace: String,
    /// Launches in it.
    pub launches: u64,
    /// Profiles in it.
    pub profiles: usize,
    /// Rows left out.
    pub bad_rows: Vec<BadRow>,
    /// One row per policy and setting.
    pub rows: Vec<Row>,
    /// Reliability of Forelay's forecasts, if it ran.
    pub calibration: Option<Calibration>,
    /// Bytes of forecaster state per profile, if it ran.
    pub bytes_per_profile: Option<f64>,
    /// Profiles that had fallen back to the simple rule at the end.
    pub fallen_back: usize,
    /// How components were foretold, if the trace names any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub needs: Option<NeedsOutcome>,
    /// Every profile that counts, in the order of the trace, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_profile: Option<Vec<ProfileOutcome>>,
    /// Where Forelay saved most against the reference.
    pub best_profiles: Vec<ProfileOutcome>,
    /// Where it lost most.
    pub worst_profiles: Vec<ProfileOutcome>,
    /// Row and reference row that the two lists compare.
    pub compared: Option<(String, String)>,
}

/// Runs the policies of a configuration.
pub(crate) fn run(trace: &Trace, config: &SimulateConfig) -> Result<Report, SimulateError> {
    let mut frame = Frame::new(trace, config.min_launches, config.max_launches);
    let sides = config
        .components
        .as_ref()
        .map(|path| Sides::read(path, trace))
        .transpose()?;
    frame.keep_spans = sides.is_some();
    let load_min: Vec<f64> = (0..trace.profiles.len())
        .map(|profile| {
            (config.load_s + sides.as_ref().map_or(0.0, |sides| sides.load_s(profile))) / 60.0
        })
        .collect();
    let fixed10 = WindowPolicy::Fixed(10.0)
        .run(trace, &frame)
        .row(&frame, "fixed:10", None);
    let policies = if config.policies.is_empty() {
        Policy::usual()
    } else {
        config.policies.clone()
    };
    let mut rows: Vec<(Row, Tally)> = Vec::new();
    let mut sweep_found = None;
    for policy in &policies {
        if let Some(window) = policy.window() {
            let tally = window.run(trace, &frame);
            rows.push((tally.row(&frame, &policy.to_string(), None), tally));
        }
        match policy {
            Policy::Bounded(kind, slots) => {
                let tally = bounded::run(*kind, *slots, trace, &frame);
                let row = tally.row(&frame, kind.name(), Some(*slots as f64));
                rows.push((row, tally));
            }
            Policy::Forelay(prices) => {
                let prices = if prices.is_empty() {
                    Policy::curve()
                } else {
                    prices.clone()
                };
                let mut sweep = sweep::run(trace, &frame, &config.forecast, &prices, &load_min);
                for (tally, &price) in std::mem::take(&mut sweep.tallies).into_iter().zip(&prices) {
                    rows.push((tally.row(&frame, "forelay", Some(price)), tally));
                }
                sweep_found = Some(sweep);
            }
            _ => {}
        }
    }
    for (row, tally) in &mut rows {
        row.relate_to(&fixed10);
        if let (Some(sides), Some(spans)) = (&sides, tally.spans.take()) {
            row.shared = Some(sides.account(trace, &spans));
        }
    }
    Ok(assemble(trace, config, &frame, rows, sweep_found))
}

fn assemble(
    trace: &Trace,
    config: &SimulateConfig,
    frame: &Frame,
    rows: Vec<(Row, Tally)>,
    sweep: Option<Sweep>,
) -> Report {
    let comparison = Comparison::new(trace, frame, &rows);
    let extremes = comparison.as_ref().map(Comparison::extremes);
    let (best_profiles, worst_profiles) = extremes.unwrap_or_default();
    Report {
        trace: config
            .trace
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        launches: trace
            .launches
            .iter()
            .map(|launch| u64::from(launch.count))
            .sum(),
        profiles: trace.profiles.len(),
        bad_rows: trace.bad_rows.clone(),
        rows: rows.into_iter().map(|(row, _)| row).collect(),
        calibration: sweep.as_ref().map(|sweep| Calibration {
            forecasts: sweep.reliability.count(),
            expected_calibration_error: sweep.reliability.expected_calibration_error(),
            error_from_5_pct: sweep.reliability.calibration_error_from(0.05),
            brier_score: sweep.reliability.brier_score(),
            bins: sweep.reliability.bins(),
        }),
        bytes_per_profile: sweep.as_ref().map(|sweep| sweep.bytes_per_profile),
        fallen_back: sweep.map_or(0, |sweep| sweep.fallen_back),
        best_profiles,
        worst_profiles,
        needs: needs::judge(trace, frame),
        compared: comparison.as_ref().map(|comparison| comparison.of.clone()),
        per_profile: comparison
            .filter(|_| config.per_profile)
            .map(|comparison| comparison.outcomes),
    }
}

/// Forelay's outcome beside a reference policy's, profile by profile.
struct Comparison {
    /// Row and reference row.
    of: (String, String),
    /// In the order of the trace.
    outcomes: Vec<ProfileOutcome>,
}

impl Comparison {
    /// Forelay, at the price whose memory comes nearest to the reference's, beside the first
    /// hybrid or fixed policy of the report.
    fn new(trace: &Trace, frame: &Frame, rows: &[(Row, Tally)]) -> Option<Self> {
        let named = |prefix: &'static str| {
            let mut rows = rows.iter();
            rows.find(move |(row, _)| row.policy.starts_with(prefix))
        };
        let (reference_row, reference) = named("hybrid").or_else(|| named("fixed"))?;
        let distance =
            |row: &Row| (row.memory_profile_minutes - reference_row.memory_profile_minutes).abs();
        let (row, own) = rows
            .iter()
            .filter(|(row, _)| row.policy == "forelay")
            .min_by(|a, b| distance(&a.0).total_cmp(&distance(&b.0)))?;
        let outcomes = (0..frame.selected.len())
            .filter(|&profile| frame.selected[profile])
            .map(|profile| ProfileOutcome {
                profile: trace.profiles[profile].clone(),
                launches: frame.launches[profile],
                cold_forelay: own.cold[profile],
                cold_reference: reference.cold[profile],
            })
            .collect();
        let label = format!("forelay at {:.4}", row.knob.unwrap_or(0.0));
        Some(Self {
            of: (label, reference_row.policy.clone()),
            outcomes,
        })
    }

    /// The ten profiles on which Forelay saved most, and those on which it lost most.
    fn extremes(&self) -> (Vec<ProfileOutcome>, Vec<ProfileOutcome>) {
        let gain = |of: &ProfileOutcome| i64::from(of.cold_reference) - i64::from(of.cold_forelay);
        let mut order: Vec<&ProfileOutcome> = self.outcomes.iter().collect();
        order.sort_by_key(|of| std::cmp::Reverse(gain(of)));
        let best = order.iter().take(10).filter(|of| gain(of) > 0);
        let worst = order.iter().rev().take(10).filter(|of| gain(of) < 0);
        let owned = |of: &&ProfileOutcome| (*of).clone();
        (best.map(owned).collect(), worst.map(owned).collect())
    }
}

impl Report {
    /// Headings and cells for a table.
    #[must_use]
    pub fn table(&self) -> (Vec<&'static str>, Vec<Vec<String>>) {
        let headings = vec![
            "policy", "knob", "profiles", "cold p25", "cold p50", "cold p75", "cold %", "memory %",
        ];
        let cells = self
            .rows
            .iter()
            .map(|row| {
                vec![
                    row.policy.clone(),
                    row.knob.map_or(String::new(), |knob| format!("{knob:.5}")),
                    row.profiles.to_string(),
                    format!("{:.2}", row.cold_p25),
                    format!("{:.2}", row.cold_p50),
                    format!("{:.2}", row.cold_p75),
                    format!("{:.3}", row.cold_total_pct),
                    format!("{:.1}", row.memory_pct_of_fixed10),
                ]
            })
            .collect();
        (headings, cells)
    }

    /// One self-contained page.
    #[must_use]
    pub fn to_html(&self) -> String {
        html::page(self)
    }
}
