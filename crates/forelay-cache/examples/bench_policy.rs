//! Byte-weighted cold time of eviction policies on real launches with real component
//! sizes, at five memory sizes.
//!
//! `cargo run --release -p forelay-cache --example bench_policy -- OUT.json --sizes SIZES.csv
//! [--days N]`
//!
//! SIZES.csv has `name,bytes[,role]` of built components. Launches are those of the
//! Google trace (`FORELAY_TRACES`, else `/work/shared/traces`). The trace does not say
//! what a profile consists of, so every profile gets, by a fixed seed: a base, one to
//! five shared components (Zipf popularity), and an application component of its own,
//! sized like a random package. A missing component costs 20 ms plus its bytes at
//! 100 MB/s; the cold time is the sum over all launches. First launches count.

mod fleet;
mod launches;

use std::time::Instant;

use forelay_cache::policy::forecast::{Forecast, ForecastConfig};
use forelay_cache::policy::gdsf::Gdsf;
use forelay_cache::policy::least_used::LeastUsed;
use forelay_cache::policy::lru::Lru;
use forelay_cache::policy::min::cold_bound;
use forelay_cache::policy::s3_fifo::S3Fifo;
use forelay_cache::policy::{Policy, Request};
use serde_json::{Value, json};

/// Memory sizes in GiB; the third is "the middle one".
const MEMORY_GIB: [u64; 5] = [4, 8, 16, 32, 64];

/// What a policy did.
struct Tally {
    name: &'static str,
    cold_s: f64,
    cold_later_half_s: f64,
    miss_ratio: f64,
    prefetched_bytes: u64,
    prefetched_s: f64,
    took_s: f64,
}

fn tally(policy: &mut dyn Policy, requests: &[Request]) -> Tally {
    let begun = Instant::now();
    let half_ms = requests.last().map_or(0, |last| last.now_ms / 2);
    let (mut cold_s, mut cold_later_half_s, mut misses) = (0.0, 0.0, 0u64);
    for request in requests {
        if !policy.request(request) {
            misses += 1;
            cold_s += request.load_s;
            cold_later_half_s += if request.now_ms > half_ms {
                request.load_s
            } else {
                0.0
            };
        }
    }
    Tally {
        name: policy.name(),
        cold_s,
        cold_later_half_s,
        miss_ratio: misses as f64 / requests.len() as f64,
        prefetched_bytes: 0,
        prefetched_s: 0.0,
        took_s: begun.elapsed().as_secs_f64(),
    }
}

fn tally_forecast(memory_bytes: u64, prefetch: bool, requests: &[Request]) -> Tally {
    let config = ForecastConfig {
        prefetch,
        ..ForecastConfig::default()
    };
    let mut policy = Forecast::new(memory_bytes, config);
    let tally = tally(&mut policy, requests);
    Tally {
        prefetched_bytes: policy.prefetched_bytes(),
        prefetched_s: policy.prefetched_s(),
        ..tally
    }
}

fn at_size(memory_bytes: u64, requests: &[Request]) -> Vec<Tally> {
    let mut baselines: Vec<Box<dyn Policy>> = vec![
        Box::new(LeastUsed::new(memory_bytes)),
        Box::new(Lru::new(memory_bytes)),
        Box::new(S3Fifo::new(memory_bytes)),
        Box::new(Gdsf::new(memory_bytes)),
    ];
    let mut tallies: Vec<Tally> = baselines
        .iter_mut()
        .map(|policy| tally(policy.as_mut(), requests))
        .collect();
    tallies.push(tally_forecast(memory_bytes, false, requests));
    tallies.push(tally_forecast(memory_bytes, true, requests));
    tallies
}

fn report_size(memory_bytes: u64, tallies: &[Tally], bound_s: f64, compulsory_s: f64) -> Value {
    println!(
        "{} GiB: offline bound {bound_s:.0} s, compulsory {compulsory_s:.0} s",
        memory_bytes >> 30
    );
    let mut policies = serde_json::Map::new();
    for tally in tallies {
        println!(
            "  {:18} cold {:9.0} s  later half {:9.0} s  miss ratio {:.4}  prefetched {:7.1} GB  ({:.1} s)",
            tally.name,
            tally.cold_s,
            tally.cold_later_half_s,
            tally.miss_ratio,
            tally.prefetched_bytes as f64 / 1e9,
            tally.took_s,
        );
        let fields = json!({
            "cold_s": tally.cold_s,
            "cold_later_half_s": tally.cold_later_half_s,
            "miss_ratio": tally.miss_ratio,
            "prefetched_bytes": tally.prefetched_bytes,
            "prefetched_s": tally.prefetched_s,
        });
        policies.insert(tally.name.to_owned(), fields);
    }
    json!({
        "memory_bytes": memory_bytes,
        "offline_bound_cold_s": bound_s,
        "compulsory_cold_s": compulsory_s,
        "policies": policies,
    })
}

fn cold(tallies: &[Tally], name: &str) -> f64 {
    let tally = tallies.iter().find(|tally| tally.name == name);
    tally.map_or(f64::NAN, |tally| tally.cold_s)
}

/// Whether `ours` has the least cold time of all but the other forecast variant.
fn best(tallies: &[Tally], ours: &str) -> bool {
    let mut others = tallies
        .iter()
        .filter(|tally| !tally.name.starts_with("forecast"));
    others.all(|tally| cold(tallies, ours) < tally.cold_s)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let value_of = |flag: &str| {
        let at = arguments.iter().position(|argument| argument == flag)?;
        arguments.get(at + 1).cloned()
    };
    let (Some(out), Some(sizes)) = (arguments.first(), value_of("--sizes")) else {
        eprintln!("usage: bench_policy OUT.json --sizes SIZES.csv [--days N]");
        std::process::exit(2);
    };
    let days: i64 = value_of("--days").map_or(i64::MAX, |days| days.parse().expect("--days N"));
    let mut launches = launches::google();
    launches.retain(|launch| launch.now_ms / 86_400_000 < days);
    let components = fleet::components(&sizes);
    let requests = fleet::requests(&components, &launches);
    let mut seen = std::collections::BTreeSet::new();
    let first = |request: &&Request| seen.insert(request.object);
    let compulsory: Vec<Request> = requests.iter().filter(first).copied().collect();
    let compulsory_s: f64 = compulsory.iter().map(|request| request.load_s).sum();
    let distinct_bytes: u64 = compulsory.iter().map(|request| request.bytes).sum();
    println!(
        "{} launches, {} requests, {} components, {:.1} GB distinct",
        launches.len(),
        requests.len(),
        compulsory.len(),
        distinct_bytes as f64 / 1e9
    );
    let mut sizes_json = Vec::new();
    let (mut best_without, mut best_with) = (true, true);
    let (mut saved_without, mut saved_with) = (0.0, 0.0);
    for (at, gib) in MEMORY_GIB.into_iter().enumerate() {
        let memory_bytes = gib << 30;
        let tallies = at_size(memory_bytes, &requests);
        let bound_s = cold_bound(memory_bytes, &requests);
        best_without &= best(&tallies, "forecast");
        best_with &= best(&tallies, "forecast+prefetch");
        if at == MEMORY_GIB.len() / 2 {
            let gdsf = cold(&tallies, "gdsf");
            saved_without = 1.0 - cold(&tallies, "forecast") / gdsf;
            saved_with = 1.0 - cold(&tallies, "forecast+prefetch") / gdsf;
        }
        sizes_json.push(report_size(memory_bytes, &tallies, bound_s, compulsory_s));
    }
    let report = json!({
        "launches": launches.len(),
        "requests": requests.len(),
        "components": compulsory.len(),
        "distinct_bytes": distinct_bytes,
        "sizes": sizes_json,
        "best_at_all_sizes": best_with,
        "best_at_all_sizes_without_prefetch": best_without,
        "cold_time_saved_vs_gdsf_mid": saved_with,
        "cold_time_saved_vs_gdsf_mid_without_prefetch": saved_without,
    });
    println!("best at all sizes: {best_with} (without prefetch: {best_without})");
    println!(
        "cold time saved against GDSF at the middle size: {saved_with:.3} (without prefetch: {saved_without:.3})"
    );
    let text = serde_json::to_string_pretty(&report).expect("a report always serialises");
    if let Err(cause) = std::fs::write(out, text) {
        eprintln!("{out}: {cause}");
        std::process::exit(1);
    }
}
