//! Byte-weighted cold time of eviction policies on real launches with the sizes of really built
//! components, at five memory sizes.
//!
//! `bench_policy OUT.json --repository DIR [--days N]`; `cargo xtask bench policy` builds the
//! components first.
//!
//! Launches are those of the Google trace (`FORELAY_TRACES`, else `../shared/traces`). The trace
//! does not say what a profile consists of, so every profile gets, by a fixed seed: a base, one to
//! five shared components (Zipf popularity), and an application component of its own, sized like
//! a random component. A missing component costs 20 ms plus its bytes at 100 MB/s (the throttled
//! repository of `bench launch`); the cold time is the sum over all launches, first ones included.

mod fleet;

use std::collections::BTreeSet;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;

use forelay_cache::reuse::ObjectRequest;
use forelay_sim::eviction::min::cold_bound;
use forelay_sim::eviction::{EvictionKind, EvictionPolicy};
use forelay_sim::launch_rows::OnBadRow;
use forelay_sim::trace::Trace;
use serde_json::{Value, json};

/// Memory sizes in GiB; the third is "the middle one".
const MEMORY_GIB: [u64; 5] = [4, 8, 16, 32, 64];

const POLICIES: [EvictionKind; 7] = [
    EvictionKind::LeastUsed,
    EvictionKind::Lru,
    EvictionKind::S3Fifo,
    EvictionKind::Gdsf,
    EvictionKind::Forecast,
    EvictionKind::ForecastPrefetch,
    EvictionKind::Planner,
];

const DAY_MS: i64 = 86_400_000;

/// What a policy did.
#[derive(Clone)]
struct Tally {
    kind: EvictionKind,
    cold_s: f64,
    cold_later_half_s: f64,
    miss_ratio: f64,
    prefetched_bytes: u64,
    took_s: f64,
}

fn tally(kind: EvictionKind, memory_bytes: u64, requests: &[ObjectRequest]) -> Tally {
    let begun = Instant::now();
    let mut policy: Box<dyn EvictionPolicy> = kind.build(memory_bytes, requests);
    let half_ms = requests.last().map_or(0, |last| last.now_ms / 2);
    let (mut cold_s, mut cold_later_half_s, mut misses) = (0.0, 0.0, 0u64);
    for request in requests {
        if !policy.request(request) {
            misses += 1;
            cold_s += request.load_s;
            if request.now_ms > half_ms {
                cold_later_half_s += request.load_s;
            }
        }
    }
    Tally {
        kind,
        cold_s,
        cold_later_half_s,
        miss_ratio: misses as f64 / requests.len() as f64,
        prefetched_bytes: policy.prefetched_bytes(),
        took_s: begun.elapsed().as_secs_f64(),
    }
}

/// All policies at all sizes, on every processor; `[size][policy]`.
fn tallies(requests: &[ObjectRequest]) -> Vec<Vec<Tally>> {
    let jobs: Vec<(u64, EvictionKind)> = MEMORY_GIB
        .iter()
        .flat_map(|&gib| POLICIES.map(|kind| (gib << 30, kind)))
        .collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(&(memory_bytes, kind)) = jobs.get(at) else {
                return done;
            };
            let tally = tally(kind, memory_bytes, requests);
            eprintln!(
                "{:>3} GiB {kind:18} cold {:9.0} s ({:.0} s)",
                memory_bytes >> 30,
                tally.cold_s,
                tally.took_s
            );
            done.push((at, tally));
        }
    };
    let mut all: Vec<(usize, Tally)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .flat_map(|done| done.expect("a worker does not panic"))
            .collect()
    });
    all.sort_by_key(|(at, _)| *at);
    let all: Vec<Tally> = all.into_iter().map(|(_, tally)| tally).collect();
    all.chunks(POLICIES.len()).map(<[Tally]>::to_vec).collect()
}

fn report_size(memory_bytes: u64, tallies: &[Tally], bound_s: f64, compulsory_s: f64) -> Value {
    println!(
        "{} GiB: offline bound {bound_s:.0} s, compulsory {compulsory_s:.0} s",
        memory_bytes >> 30
    );
    let mut policies = serde_json::Map::new();
    for tally in tallies {
        println!(
            "  {:18} cold {:9.0} s  later half {:9.0} s  miss ratio {:.4}  prefetched {:7.1} GB",
            tally.kind.name(),
            tally.cold_s,
            tally.cold_later_half_s,
            tally.miss_ratio,
            tally.prefetched_bytes as f64 / 1e9,
        );
        let fields = json!({
            "cold_s": tally.cold_s,
            "cold_later_half_s": tally.cold_later_half_s,
            "miss_ratio": tally.miss_ratio,
            "prefetched_bytes": tally.prefetched_bytes,
        });
        policies.insert(tally.kind.name().to_owned(), fields);
    }
    json!({
        "memory_bytes": memory_bytes,
        "offline_bound_cold_s": bound_s,
        "compulsory_cold_s": compulsory_s,
        "policies": policies,
    })
}

fn cold(tallies: &[Tally], kind: EvictionKind) -> f64 {
    let tally = tallies.iter().find(|tally| tally.kind == kind);
    tally.map_or(f64::NAN, |tally| tally.cold_s)
}

/// Whether `ours` has the least cold time of all but the other forecast variant.
fn best(tallies: &[Tally], ours: EvictionKind) -> bool {
    let own = [
        EvictionKind::Forecast,
        EvictionKind::ForecastPrefetch,
        EvictionKind::Planner,
    ];
    let mut others = tallies.iter().filter(|tally| !own.contains(&tally.kind));
    others.all(|tally| cold(tallies, ours) < tally.cold_s)
}

fn report(trace: &Trace, components: &[fleet::Component]) -> Value {
    let requests = fleet::requests(components, trace);
    let mut seen = BTreeSet::new();
    let first = |request: &&ObjectRequest| seen.insert(request.object);
    let compulsory: Vec<ObjectRequest> = requests.iter().filter(first).copied().collect();
    let compulsory_s: f64 = compulsory.iter().map(|request| request.load_s).sum();
    let distinct_bytes: u64 = compulsory.iter().map(|request| request.bytes).sum();
    let mean_bytes =
        components.iter().map(|c| c.bytes).sum::<u64>() / components.len().max(1) as u64;
    println!(
        "{} launches, {} requests; {} built components, {:.1} MB each; {} in the fleet, {:.1} GB",
        trace.launches.len(),
        requests.len(),
        components.len(),
        mean_bytes as f64 / 1e6,
        compulsory.len(),
        distinct_bytes as f64 / 1e9
    );
    let tallies = tallies(&requests);
    let sizes: Vec<Value> = MEMORY_GIB
        .iter()
        .zip(&tallies)
        .map(|(gib, tallies)| {
            let bound_s = cold_bound(gib << 30, &requests);
            report_size(gib << 30, tallies, bound_s, compulsory_s)
        })
        .collect();
    let best_at_all = |ours| tallies.iter().all(|tallies| best(tallies, ours));
    let middle = &tallies[MEMORY_GIB.len() / 2];
    let saved = |ours| 1.0 - cold(middle, ours) / cold(middle, EvictionKind::Gdsf);
    json!({
        "launches": trace.launches.len(),
        "requests": requests.len(),
        "built_components": components.len(),
        "built_components_mean_bytes": mean_bytes,
        "fleet_components": compulsory.len(),
        "distinct_bytes": distinct_bytes,
        "load_latency_s": fleet::LATENCY_S,
        "load_bandwidth_bytes_per_s": fleet::BANDWIDTH_BYTES_PER_S,
        "sizes": sizes,
        "best_at_all_sizes": best_at_all(EvictionKind::ForecastPrefetch),
        "best_at_all_sizes_without_prefetch": best_at_all(EvictionKind::Forecast),
        "cold_time_saved_vs_gdsf_mid": saved(EvictionKind::ForecastPrefetch),
        "cold_time_saved_vs_gdsf_mid_without_prefetch": saved(EvictionKind::Forecast),
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value_of = |flag: &str| {
        let at = arguments.iter().position(|argument| argument == flag)?;
        arguments.get(at + 1)
    };
    let (Some(out), Some(repository)) = (arguments.first(), value_of("--repository")) else {
        return Err("usage: bench_policy OUT.json --repository DIR [--days N]".into());
    };
    let days: i64 = value_of("--days").map_or(Ok(i64::MAX), |days| days.parse())?;
    let folder: PathBuf = std::env::var_os("FORELAY_TRACES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/traces"),
        PathBuf::from,
    );
    let google = folder.join("google2011-days00-14.csv.gz");
    let mut trace = Trace::read(&google, OnBadRow::Stop)?;
    trace.launches.retain(|launch| launch.at.0 / DAY_MS < days);
    let report = report(&trace, &fleet::components(Path::new(repository))?);
    for figure in ["best_at_all_sizes", "cold_time_saved_vs_gdsf_mid"] {
        let without = format!("{figure}_without_prefetch");
        println!(
            "{figure}: {} (without prefetch: {})",
            report[figure], report[&without]
        );
    }
    std::fs::write(out, serde_json::to_string_pretty(&report)?)?;
    Ok(())
}
