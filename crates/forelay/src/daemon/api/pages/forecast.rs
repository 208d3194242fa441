//! The page of forecasts: what was told of launches, what happened, how well that fits.

use std::fmt::Write as _;

use askama::Template;

use super::trail::{Moment, Trail};
use super::{PageFrame, cut, px};
use crate::api::Vm;
use crate::daemon::Host;
use crate::daemon::memory::planner::now_ms;
use crate::units::{seconds, time_of_day};

/// How much of the past a lane shows, and how much of the future.
const PAST_MS: i64 = 1_800_000;
const FUTURE_MS: i64 = 600_000;
/// Where "now" is on a lane of 1,000.
const NOW_X: f64 = 750.0;
/// Height of a lane.
const HIGH: f64 = 60.0;
/// Lanes and expected launches that are shown, the likeliest.
const MOST_ROWS: usize = 12;

#[derive(Template)]
#[template(path = "forecast.html")]
pub struct ForecastPage {
    frame: PageFrame,
    horizon: String,
    from: String,
    until: String,
    lanes: Vec<Lane>,
    points: Vec<Point>,
    calibration_words: String,
    next: Vec<Next>,
}

/// A profile's line of time.
struct Lane {
    profile: String,
    owner: String,
    area: String,
    curve: String,
    launches: Vec<f64>,
    expected: Option<f64>,
    words: String,
}

/// How often what was told with a probability came true.
struct Point {
    x: f64,
    y: f64,
    r: f64,
    words: String,
}

struct Next {
    profile: String,
    probability: String,
    when: String,
    why: String,
}

/// The page now.
pub fn page(host: &Host, trail: &Trail) -> ForecastPage {
    let clock = host.forecasts.learner.clock();
    let (now, now_ms) = (clock.now(), now_ms());
    let likely = host.forecasts.next_launches(now, 0.0);
    let told = trail.told();
    let vms = host.vms.list();
    let lanes = likely.iter().take(MOST_ROWS).map(|one| {
        let moments = told.get(&one.profile).map_or(&[][..], Vec::as_slice);
        let expected_ms = clock.wall_ms(one.expected_at);
        lane(
            &one.profile,
            moments,
            &vms,
            (now_ms, expected_ms),
            one.probability,
        )
    });
    let next = likely
        .iter()
        .filter(|one| one.probability >= 0.05)
        .take(MOST_ROWS)
        .map(|one| {
            let (_, profile) = names(&one.profile);
            let in_s = (clock.wall_ms(one.expected_at) - now_ms).max(0) as f64 / 1e3;
            let spread = seconds(one.spread_s.max(0.0));
            let why: Vec<String> = one
                .reasons
                .iter()
                .take(3)
                .map(ToString::to_string)
                .collect();
            let acted = if one.fallen_back {
                " · told, not acted upon"
            } else {
                ""
            };
            Next {
                profile: cut(profile, 60),
                probability: format!("{:.0} %", one.probability * 100.0),
                when: format!("in about {}, give or take {spread}{acted}", seconds(in_s)),
                // Names are marked for terminals.
                why: cut(&why.join("; ").replace('`', ""), 300),
            }
        });
    let (points, calibration_words) = calibration(host);
    ForecastPage {
        lanes: lanes.collect(),
        next: next.collect(),
        points,
        calibration_words,
        horizon: seconds(host.forecasts.horizon.as_secs_f64()),
        from: format!("{} UTC", &time_of_day(now_ms - PAST_MS)[..5]),
        until: format!("{} UTC", &time_of_day(now_ms + FUTURE_MS)[..5]),
        frame: PageFrame::new(host, "Forecast"),
    }
}

/// Owner and profile.
fn names(key: &str) -> (&str, &str) {
    key.split_once('/').unwrap_or(("", key))
}

/// Where a time is on a lane, if it is.
fn place(at_ms: i64, now_ms: i64) -> Option<f64> {
    let since_ms = at_ms - now_ms;
    let x = match since_ms < 0 {
        true => NOW_X + since_ms as f64 * NOW_X / PAST_MS as f64,
        false => NOW_X + since_ms as f64 * (1000.0 - NOW_X) / FUTURE_MS as f64,
    };
    (0.0..=1000.0).contains(&x).then(|| px(x))
}

fn lane(
    key: &str,
    told: &[Moment],
    vms: &[Vm],
    (now_ms, expected_ms): (i64, i64),
    probability: f64,
) -> Lane {
    let (owner, profile) = names(key);
    let launches = vms
        .iter()
        .filter(|vm| vm.profile == profile && vm.owner == owner);
    let launches: Vec<f64> = launches
        .filter_map(|vm| place(vm.launched_ms, now_ms))
        .collect();
    let (mut curve, mut first) = (String::new(), None);
    let mut last = 0.0;
    for moment in told {
        if let Some(x) = place(moment.at_ms, now_ms) {
            let y = px(HIGH - 4.0 - moment.probability.clamp(0.0, 1.0) * (HIGH - 8.0));
            let step = if first.is_none() { 'M' } else { 'L' };
            // Writing to a string cannot fail.
            let _ = write!(curve, "{step}{x} {y}");
            first.get_or_insert(x);
            last = x;
        }
    }
    let area = first.map(|first| format!("{curve}L{last} {HIGH}L{first} {HIGH}Z"));
    let lately = match launches.len() {
        0 => "No launch".to_owned(),
        1 => "One launch".to_owned(),
        count => format!("{count} launches"),
    };
    let words = format!(
        "{lately} in the last half hour; told now: {:.0} %",
        probability * 100.0
    );
    Lane {
        profile: cut(profile, 60),
        owner: cut(owner, 60),
        area: area.unwrap_or_default(),
        curve,
        launches,
        expected: place(expected_ms, now_ms).filter(|_| probability >= 0.05),
        words,
    }
}

/// All profiles' forecasts that were judged, by what they told.
fn calibration(host: &Host) -> (Vec<Point>, String) {
    let mut bins = [(0.0, 0.0, 0u64); 5];
    let (mut squares, mut judged) = (0.0, 0u64);
    for (_, control) in host.forecasts.learner.self_controls() {
        squares += control.brier_score * control.judged as f64;
        judged += control.judged;
        for (told, happened, count) in control.reliability {
            let bin = &mut bins[((told * 5.0) as usize).min(4)];
            bin.0 += told * count as f64;
            bin.1 += happened * count as f64;
            bin.2 += count;
        }
    }
    let points = bins.into_iter().filter(|(.., count)| *count > 0);
    let points = points.map(|(told, happened, count)| {
        let (told, happened) = (told / count as f64, happened / count as f64);
        Point {
            x: px(30.0 + told * 220.0),
            y: px(230.0 - happened * 220.0),
            r: px(4.0 + 14.0 * (count as f64 / judged.max(1) as f64).sqrt()),
            words: format!(
                "told {:.0} %, came true {:.0} % of {count} times",
                told * 100.0,
                happened * 100.0
            ),
        }
    });
    let words = format!(
        "{judged} forecasts of a launch within ten minutes were judged; their mean squared error is {:.3}. On the line, what was told with 40 % happened 40 times in a hundred.",
        squares / judged.max(1) as f64
    );
    (points.collect(), words)
}
