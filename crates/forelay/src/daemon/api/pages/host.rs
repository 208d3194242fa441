//! The pages of the repository and of memory pressure.

use askama::Template;
use forelay_store::fetch::FetchCounters;

use super::vm::CauseRow;
use super::{PageFrame, percent};
use crate::api::Totals;
use crate::daemon::Host;
use crate::daemon::events::Told;
use crate::units::{bytes, seconds, time_of_day};

/// Events that are shown, the last.
const MOST_EVENTS: usize = 60;

type Figure = (&'static str, String, String);

#[derive(Template)]
#[template(path = "repository.html")]
pub struct RepositoryPage {
    frame: PageFrame,
    /// The repository, and its mirrors.
    places: Vec<String>,
    failure: Option<String>,
    figures: Vec<Figure>,
    /// For what, reads, chunks, bytes.
    fetches: Vec<(&'static str, u64, u64, String)>,
    fetch_words: String,
    disk_share: f64,
    disk_words: String,
    disk_reads: String,
}

/// What the repository's page begins with.
fn repository_figures(counters: &FetchCounters) -> Vec<Figure> {
    let unknown = || "–".to_owned();
    let latency = counters.latency_ns.map(|ns| seconds(ns as f64 / 1e9));
    let bandwidth = counters
        .bandwidth_bytes_per_s
        .map(|rate| format!("{}/s", bytes(rate)));
    let failures = match counters.failures {
        0 => "none was given up".to_owned(),
        failures => format!("{failures} chunks were given up"),
    };
    vec![
        (
            "Read",
            bytes(counters.repository_bytes()),
            "compressed, since the worker started".to_owned(),
        ),
        (
            "Latency",
            latency.unwrap_or_else(unknown),
            "of a short read".to_owned(),
        ),
        (
            "Bandwidth",
            bandwidth.unwrap_or_else(unknown),
            "while a long read was under way".to_owned(),
        ),
        ("Repeated", counters.retries.to_string(), failures),
    ]
}

/// The repository's page now.
pub fn repository(host: &Host) -> RepositoryPage {
    let counters = host.store.scheduler().counters();
    let disk = host.store.disk_cache().counters();
    let cap_bytes = host.config.cache.cap_bytes;
    let reads = disk.hits + disk.misses;
    RepositoryPage {
        places: places(host),
        failure: counters
            .last_failure
            .clone()
            .filter(|_| counters.demands_in_trouble > 0),
        figures: repository_figures(&counters),
        fetches: vec![
            (
                "VMs that waited",
                counters.demand_requests,
                counters.demand_chunks,
                bytes(counters.demand_repository_bytes),
            ),
            (
                "prefetch",
                counters.prefetch_requests,
                counters.prefetch_chunks,
                bytes(counters.prefetch_repository_bytes),
            ),
        ],
        fetch_words: format!(
            "{} joined a fetch under way; {} prefetches became urgent because a VM wanted them.",
            counters.joined, counters.promoted
        ),
        disk_share: percent(disk.cached_bytes, cap_bytes),
        disk_words: format!(
            "{} in {} chunks, of {} that it may take",
            bytes(disk.cached_bytes),
            disk.chunks,
            bytes(cap_bytes)
        ),
        disk_reads: match reads {
            0 => "Nothing was read from it yet.".to_owned(),
            _ => format!(
                "It answered {} of {reads} reads ({:.0} %); {} chunks were dropped for room, {} because their bytes were wrong.",
                disk.hits,
                percent(disk.hits, reads),
                disk.evicted,
                disk.corrupt
            ),
        },
        frame: PageFrame::new(host, "Repository"),
    }
}

/// Where components come from, in the order in which it is asked.
fn places(host: &Host) -> Vec<String> {
    // A configuration whose addresses are wrong is refused.
    let urls = host.config.repository_urls();
    let all = urls.map(|(first, mirrors)| std::iter::once(first).chain(mirrors).collect());
    let all: Vec<_> = all.unwrap_or_default();
    all.iter().map(ToString::to_string).collect()
}

#[derive(Template)]
#[template(path = "pressure.html")]
pub struct PressurePage {
    frame: PageFrame,
    level: String,
    figures: Vec<Figure>,
    budget_share: f64,
    budget_words: String,
    left: Vec<CauseRow>,
    /// Bytes that left, and how long that took.
    shortages: Vec<(String, String)>,
    events: Vec<EventRow>,
}

struct EventRow {
    iso: String,
    time: String,
    kind: &'static str,
    vm: Option<String>,
    message: String,
    bytes: Option<String>,
}

impl EventRow {
    fn new(told: &Told) -> Self {
        let event = &told.event;
        let time = time_of_day(event.at_ms);
        Self {
            iso: format!("{time}Z"),
            time,
            kind: event.kind.name(),
            vm: event.vm.clone(),
            message: event.message.clone(),
            bytes: event.bytes.map(bytes),
        }
    }
}

/// What left shared memory, by why.
fn left(totals: &Totals) -> Vec<CauseRow> {
    let left = [
        (
            "for the budget",
            "was asked to leave so that components stay within it",
            totals.budget_evicted_bytes,
        ),
        (
            "under pressure",
            "was asked to leave because memory was critical",
            totals.pressure_evicted_bytes,
        ),
        (
            "by the kernel",
            "was reclaimed, unasked",
            totals.reclaimed_bytes,
        ),
        (
            "wanted again",
            "was evicted, and soon after a VM wanted it: a wrong choice",
            totals.refetched_bytes,
        ),
    ];
    let left = left.into_iter().filter(|(.., bytes)| *bytes > 0);
    left.map(|(name, words, count)| CauseRow {
        count: bytes(count),
        name,
        words,
    })
    .collect()
}

/// The page of pressure now.
pub fn pressure(host: &Host) -> PressurePage {
    let report = host.accounts.told_by_table();
    let totals = &report.totals;
    let shortages = report.shortages.iter().rev().take(8);
    let prefetch = match report.prefetch_paused {
        true => "waits for memory",
        false => "goes on",
    };
    PressurePage {
        level: report.pressure.clone(),
        figures: vec![
            (
                "Host has available",
                bytes(report.available_bytes),
                String::new(),
            ),
            (
                "In shared memory",
                bytes(report.resident_bytes),
                format!("{} of it no VM has touched", bytes(report.unclaimed_bytes)),
            ),
            (
                "Evicted",
                bytes(totals.evicted_bytes),
                "since the worker started".to_owned(),
            ),
            (
                "Prefetch",
                prefetch.to_owned(),
                format!(
                    "{} wait or are under way",
                    bytes(host.memory.status().queued_bytes)
                ),
            ),
        ],
        budget_share: percent(report.resident_bytes, report.budget_bytes),
        budget_words: format!(
            "{} of {}, {} pinned",
            bytes(report.resident_bytes),
            bytes(report.budget_bytes),
            bytes(report.pinned_bytes)
        ),
        left: left(&report.totals),
        shortages: shortages
            .map(|one| (bytes(one.evicted_bytes), seconds(one.took_s)))
            .collect(),
        events: host
            .events()
            .recent()
            .iter()
            .rev()
            .take(MOST_EVENTS)
            .map(|told| EventRow::new(told))
            .collect(),
        frame: PageFrame::new(host, "Pressure"),
    }
}
