//! The report as one self-contained HTML page with hand-made SVG.
//!
//! Owns the page: cold starts against memory as curves, the reliability diagram, hit ratio over
//! time, best and worst profiles. Invariants: no script, no outside reference, names are escaped.

use crate::report::{ProfileOutcome, Report};
use crate::tally::Row;
use std::fmt::Write as _;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 60.0;
const BOTTOM: f64 = 45.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 15.0;
const COLOURS: [&str; 7] = [
    "#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#b45309", "#be123c", "#525252",
];

/// One axis: data range, logarithmic or not, mapped onto pixels.
struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
    from_px: f64,
    to_px: f64,
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        let f = |x: f64| {
            if self.logarithmic {
                x.max(1.0e-12).log10()
            } else {
                x
            }
        };
        let part = (f(value) - f(self.low)) / (f(self.high) - f(self.low)).max(1.0e-12);
        self.from_px + part.clamp(0.0, 1.0) * (self.to_px - self.from_px)
    }

    fn ticks(&self) -> Vec<f64> {
        if !self.logarithmic {
            return (0..=5)
                .map(|i| self.low + (self.high - self.low) * f64::from(i) / 5.0)
                .collect();
        }
        let mut ticks = Vec::new();
        let mut decade = 10f64.powf(self.low.log10().floor());
        while decade <= self.high * 1.0001 {
            for factor in [1.0, 2.0, 5.0] {
                let tick = decade * factor;
                if tick >= self.low * 0.9999 && tick <= self.high * 1.0001 {
                    ticks.push(tick);
                }
            }
            decade *= 10.0;
        }
        ticks
    }
}

fn horizontal(low: f64, high: f64, logarithmic: bool) -> Axis {
    Axis {
        low,
        high,
        logarithmic,
        from_px: LEFT,
        to_px: WIDTH - RIGHT,
    }
}

fn vertical(low: f64, high: f64, logarithmic: bool) -> Axis {
    Axis {
        low,
        high,
        logarithmic,
        from_px: HEIGHT - BOTTOM,
        to_px: TOP,
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 1.0 => 1,
        v if v >= 0.1 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Opens a chart with its axes.
fn frame(x: &Axis, y: &Axis, x_title: &str, y_title: &str) -> String {
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{y_title} against {x_title}\">"
    );
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for tick in x.ticks() {
        let px = x.place(tick);
        let _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{px:.1} {TOP}V{bottom}\"/>\
             <text x=\"{px:.1}\" y=\"{:.1}\" class=\"tick\" text-anchor=\"middle\">{}</text>",
            bottom + 16.0,
            number(tick)
        );
    }
    for tick in y.ticks() {
        let px = y.place(tick);
        let _ = write!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {px:.1}H{right}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" class=\"tick\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            px + 4.0,
            number(tick)
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{x_title}</text>\
         <text transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">{y_title}</text>",
        (LEFT + right) / 2.0,
        HEIGHT - 8.0,
        (TOP + bottom) / 2.0
    );
    svg
}

fn line(svg: &mut String, points: &[(f64, f64)], colour: &str) {
    let path: Vec<String> = points
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let _ = write!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
        path.join(" ")
    );
}

fn dot(svg: &mut String, x: f64, y: f64, radius: f64, colour: &str, title: &str) {
    let _ = write!(
        svg,
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius:.1}\" fill=\"{colour}\"><title>{}</title></circle>",
        escape(title)
    );
}

fn label(svg: &mut String, x: f64, y: f64, text: &str) {
    let _ = write!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" class=\"label\">{}</text>",
        escape(text)
    );
}

fn describe(row: &Row) -> String {
    let knob = row
        .knob
        .map_or(String::new(), |knob| format!(" at {}", number(knob)));
    format!(
        "{}{knob}: {:.3} % cold, {:.0} % memory",
        row.policy, row.cold_total_pct, row.memory_pct_of_fixed10
    )
}

fn curves(rows: &[Row]) -> String {
    let drawn: Vec<&Row> = rows
        .iter()
        .filter(|row| row.memory_pct_of_fixed10 > 0.0 && row.cold_total_pct > 0.0)
        .collect();
    let bounds = |value: fn(&Row) -> f64| {
        let low = drawn.iter().map(|row| value(row)).fold(f64::MAX, f64::min);
        let high = drawn.iter().map(|row| value(row)).fold(0.0, f64::max);
        (low * 0.9, high * 1.1)
    };
    if drawn.is_empty() {
        return String::from("<p>No policy held anything.</p>");
    }
    let (low, high) = bounds(|row| row.memory_pct_of_fixed10);
    let x = horizontal(low, high, true);
    let (low, high) = bounds(|row| row.cold_total_pct);
    let y = vertical(low, high, true);
    let mut svg = frame(
        &x,
        &y,
        "memory, % of a fixed 10 min keep-alive",
        "cold launches, %",
    );
    let mut names: Vec<&str> = Vec::new();
    for row in &drawn {
        if !names.contains(&row.policy.as_str()) {
            names.push(&row.policy);
        }
    }
    for (index, name) in names.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let own: Vec<&&Row> = drawn.iter().filter(|row| row.policy == *name).collect();
        let place = |row: &Row| {
            (
                x.place(row.memory_pct_of_fixed10),
                y.place(row.cold_total_pct),
            )
        };
        if own.len() > 1 {
            line(
                &mut svg,
                &own.iter().map(|row| place(row)).collect::<Vec<_>>(),
                colour,
            );
        }
        for row in &own {
            let (px, py) = place(row);
            dot(
                &mut svg,
                px,
                py,
                if own.len() > 1 { 2.5 } else { 5.0 },
                colour,
                &describe(row),
            );
        }
        if let Some(row) = own.last() {
            let (px, py) = place(row);
            label(&mut svg, px + 8.0, py + 4.0, name);
        }
    }
    svg + "</svg>"
}

fn reliability(report: &Report) -> String {
    let Some(calibration) = &report.calibration else {
        return String::new();
    };
    let x = horizontal(0.0, 1.0, false);
    let y = vertical(0.0, 1.0, false);
    let mut svg = frame(&x, &y, "forecast: launch within 10 min", "observed share");
    line(
        &mut svg,
        &[(x.place(0.0), y.place(0.0)), (x.place(1.0), y.place(1.0))],
        "#bbb",
    );
    let points: Vec<(f64, f64)> = calibration
        .bins
        .iter()
        .map(|bin| (x.place(bin.mean_forecast), y.place(bin.observed)))
        .collect();
    line(&mut svg, &points, COLOURS[0]);
    for (bin, (px, py)) in calibration.bins.iter().zip(points) {
        let radius = 2.0 + (bin.forecasts as f64).log10();
        let title = format!(
            "{} forecasts of {:.3}: {:.3} came true",
            bin.forecasts, bin.mean_forecast, bin.observed
        );
        dot(&mut svg, px, py, radius, COLOURS[0], &title);
    }
    format!(
        "<h2>Do the probabilities mean what they say?</h2>{svg}</svg><p>{} forecasts, expected \
         calibration error {:.4} ({:.4} over forecasts of 5 % and more), Brier score {:.4}.</p>",
        calibration.forecasts,
        calibration.expected_calibration_error,
        calibration.error_from_5_pct,
        calibration.brier_score
    )
}

/// One row per policy for the chart over time; of Forelay's the one with the least memory that is
/// at least as good as the best other realisable policy.
fn over_time(rows: &[Row]) -> String {
    let mut shown: Vec<&Row> = Vec::new();
    for row in rows {
        if row.policy != "forelay" && shown.len() < 6 && row.policy != "none" {
            shown.push(row);
        }
    }
    let nearest = rows
        .iter()
        .filter(|row| row.policy == "forelay")
        .min_by(|a, b| {
            let far = |row: &Row| (row.memory_pct_of_fixed10 - 100.0).abs();
            far(a).total_cmp(&far(b))
        });
    shown.extend(nearest);
    let x = horizontal(0.0, 100.0, false);
    let y = vertical(0.0, 1.0, false);
    let mut svg = frame(&x, &y, "time, % of the trace", "share of warm launches");
    for (index, row) in shown.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let count = row.hit_ratio_over_time.len().max(1) as f64;
        let points: Vec<(f64, f64)> = row
            .hit_ratio_over_time
            .iter()
            .enumerate()
            .map(|(slice, &ratio)| {
                (
                    x.place((slice as f64 + 0.5) / count * 100.0),
                    y.place(ratio),
                )
            })
            .collect();
        line(&mut svg, &points, colour);
        let at = TOP + 14.0 + 18.0 * index as f64;
        dot(
            &mut svg,
            WIDTH - RIGHT + 12.0,
            at - 4.0,
            4.0,
            colour,
            &describe(row),
        );
        label(&mut svg, WIDTH - RIGHT + 22.0, at, &row.policy);
    }
    svg + "</svg>"
}

fn outcomes(title: &str, outcomes: &[ProfileOutcome], reference: &str) -> String {
    if outcomes.is_empty() {
        return format!("<h3>{title}</h3><p>None.</p>");
    }
    let cold = format!("cold, {reference}");
    let rows = outcomes.iter().map(|one| {
        let counts = [
            one.launches,
            one.cold_forelay.into(),
            one.cold_reference.into(),
        ];
        [one.profile.clone()]
            .into_iter()
            .chain(counts.map(|n| n.to_string()))
            .collect()
    });
    let headings = ["profile", "launches", "cold, Forelay", &cold];
    format!("<h3>{title}</h3>{}", table(&headings, rows))
}

fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let row = |tag: &str, cells: &mut dyn Iterator<Item = &str>| {
        let cells: String = cells
            .map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)))
            .collect();
        format!("<tr>{cells}</tr>")
    };
    let mut html = row("th", &mut headings.iter().copied());
    for cells in rows {
        html.push_str(&row("td", &mut cells.iter().map(String::as_str)));
    }
    format!("<table>{html}</table>")
}

/// The page.
pub(crate) fn page(report: &Report) -> String {
    let mut html = String::from(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>Forelay simulation</title>\
         <style>body{font:15px/1.5 system-ui,sans-serif;max-width:780px;margin:2em auto;\
         padding:0 1em;color:#222}svg{width:100%;height:auto}svg text{font-size:12px;fill:#444}\
         .tick{font-size:11px}.grid{stroke:#eee}table{border-collapse:collapse;width:100%;\
         font-variant-numeric:tabular-nums}td,th{padding:.15em .5em;border-bottom:1px solid #ddd;\
         text-align:right}td:first-child,th:first-child{text-align:left}</style></head><body>",
    );
    let _ = write!(
        html,
        "<h1>{}</h1><p>{} launches of {} profiles; profiles with at least {} launches count. A \
         launch is warm if its profile is loaded when it arrives; memory is loaded-but-idle \
         profile-minutes.</p>",
        escape(&report.trace),
        report.launches,
        report.profiles,
        report.rows.first().map_or(0, |row| row.min_launches)
    );
    if !report.bad_rows.is_empty() {
        let _ = write!(
            html,
            "<p>{} unreadable rows were left out.</p>",
            report.bad_rows.len()
        );
    }
    html.push_str("<h2>Cold starts against memory</h2>");
    html.push_str(&curves(&report.rows));
    html.push_str(&reliability(report));
    html.push_str("<h2>Hit ratio over time</h2>");
    html.push_str(&over_time(&report.rows));
    if let Some((own, reference)) = &report.compared {
        let _ = write!(
            html,
            "<h2>Best and worst profiles</h2><p>{} against {}.</p>",
            escape(own),
            escape(reference)
        );
        html.push_str(&outcomes("Saved most", &report.best_profiles, reference));
        html.push_str(&outcomes("Lost most", &report.worst_profiles, reference));
    }
    html.push_str("<h2>All settings</h2>");
    let (headings, rows) = report.table();
    html.push_str(&table(&headings, rows));
    html.push_str("</body></html>\n");
    html
}
