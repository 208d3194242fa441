//! The page of launches: how they started, and where their seconds went.

use askama::Template;

use super::{PageFrame, px};
use crate::api::{LaunchFigures, LaunchTimings, Vm};
use crate::daemon::Host;
use crate::daemon::vm::launch_figures::start_of;
use crate::units::seconds;

/// Launches that are shown, the last.
const MOST_ROWS: usize = 40;
/// The kinds of work that stages are drawn as.
pub const LEGEND: [(usize, &str); 7] = [
    (0, "plan and map"),
    (1, "compose"),
    (2, "VMM"),
    (3, "restore"),
    (4, "kernel"),
    (5, "guest's start"),
    (6, "program"),
];

#[derive(Template)]
#[template(path = "launches.html")]
pub struct LaunchesPage {
    frame: PageFrame,
    legend: [(usize, &'static str); 7],
    kinds: Vec<StartKind>,
    scale: String,
    rows: Vec<LaunchRow>,
}

/// Launches of a kind.
struct StartKind {
    name: &'static str,
    median: String,
    note: String,
}

struct LaunchRow {
    name: String,
    start: &'static str,
    ready: String,
    bar: StageBar,
    note: String,
}

/// A launch's stages side by side.
pub struct StageBar {
    pub words: String,
    pub parts: Vec<StagePart>,
}

pub struct StagePart {
    pub colour: usize,
    pub x: f64,
    pub width: f64,
    pub words: String,
}

/// Which kind of work a stage is.
fn colour(stage: &str) -> usize {
    match stage {
        "solve" | "request" | "find" | "map" | "plan" => 0,
        "compose" => 1,
        "VMM" => 2,
        "restore" => 3,
        "firmware" | "kernel" | "devices" => 4,
        "ready" => 6,
        _ => 5,
    }
}

/// The stages, to a scale on which `longest_s` is the whole width.
pub fn stage_bar(timings: &LaunchTimings, longest_s: f64) -> StageBar {
    let mut sums = [0.0; LEGEND.len()];
    for (stage, took_s) in timings.steps() {
        sums[colour(stage)] += took_s.max(0.0);
    }
    let scale = 1000.0 / longest_s.max(1e-3);
    let mut at = 0.0;
    let mut parts = Vec::new();
    for ((colour, name), sum) in LEGEND.into_iter().zip(sums).filter(|(_, sum)| *sum > 0.0) {
        let words = format!("{name} {}", seconds(sum));
        let width = (sum * scale).min(1000.0 - at);
        parts.push(StagePart {
            colour,
            x: px(at),
            width: px(width),
            words,
        });
        at += width;
    }
    let words: Vec<&str> = parts.iter().map(|part| part.words.as_str()).collect();
    StageBar {
        words: words.join(", "),
        parts,
    }
}

/// What there is to say of a launch beside its stages.
pub fn words_of(launch: &LaunchFigures) -> String {
    let mut words = Vec::new();
    if let Some(tier) = launch.resumed {
        words.push(format!("from its snapshot at {}", tier.name()));
    }
    if launch.prepared {
        words.push("set up ahead".to_owned());
    }
    words.push(match launch.demand_fetches {
        0 => "waited for no byte".to_owned(),
        1 => format!("waited {} for one fetch", seconds(launch.stall_s)),
        fetches => format!("waited {} for {fetches} fetches", seconds(launch.stall_s)),
    });
    words.join(" · ")
}

/// The page now.
pub fn page(host: &Host) -> LaunchesPage {
    let all = host.vms.list();
    let ready_s = |vm: &Vm| vm.launch.ready_s;
    let shown = all.iter().rev().take(MOST_ROWS);
    let longest_s = shown.clone().filter_map(ready_s).fold(0.0, f64::max);
    let rows = shown.map(|vm| LaunchRow {
        name: vm.name.clone(),
        start: start_of(&vm.launch),
        ready: ready_s(vm).map_or_else(|| vm.state.name().to_owned(), seconds),
        bar: stage_bar(&vm.launch.timings, longest_s),
        note: words_of(&vm.launch),
    });
    let kinds = ["cold", "predicted", "warm", "resumed"].into_iter();
    LaunchesPage {
        rows: rows.collect(),
        legend: LEGEND,
        kinds: kinds.map(|name| kind(name, &all)).collect(),
        scale: seconds(longest_s),
        frame: PageFrame::new(host, "Launches"),
    }
}

fn kind(name: &'static str, all: &[Vm]) -> StartKind {
    let of_kind = all.iter().filter(|vm| start_of(&vm.launch) == name);
    let mut ready_s: Vec<f64> = of_kind.filter_map(|vm| vm.launch.ready_s).collect();
    ready_s.sort_by(f64::total_cmp);
    StartKind {
        name: match name {
            "cold" => "Cold",
            "predicted" => "Predicted",
            "warm" => "Warm",
            _ => "Resumed",
        },
        median: ready_s
            .get(ready_s.len() / 2)
            .map_or_else(|| "–".to_owned(), |s| seconds(*s)),
        note: match ready_s.len() {
            0 => "none lately".to_owned(),
            1 => "until ready, one launch".to_owned(),
            count => format!("until ready, median of {count} launches"),
        },
    }
}
