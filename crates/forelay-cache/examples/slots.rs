//! Bounded cache on the Google launches, one unit a profile: miss ratios (first launches
//! count) of all policies at 500 and 1000 slots, and how much of the gap from S3-FIFO to
//! MIN the forecast policy closes without prefetch.
//!
//! `cargo run --release -p forelay-cache --example slots -- [OUT.json] [--trace FILE.csv.gz]`
//!
//! The forecast policy learns online, one setting for both sizes; the later half of the
//! trace is shown as well, because its settings were chosen on what is here.

mod launches;

use forelay_cache::policy::forecast::{Forecast, ForecastConfig};
use forelay_cache::policy::gdsf::Gdsf;
use forelay_cache::policy::lfu::Lfu;
use forelay_cache::policy::lru::Lru;
use forelay_cache::policy::min::Min;
use forelay_cache::policy::s3_fifo::S3Fifo;
use forelay_cache::policy::{Policy, Request};
use serde_json::{Value, json};

/// Miss ratios over everything and over the later half.
#[derive(Clone, Copy)]
struct Ratios {
    all: f64,
    later_half: f64,
}

fn run(policy: &mut dyn Policy, requests: &[Request]) -> Ratios {
    let half_ms = requests.last().map_or(0, |last| last.now_ms / 2);
    let (mut misses, mut later_misses, mut later) = (0u32, 0u32, 0u32);
    for request in requests {
        let miss = u32::from(!policy.request(request));
        misses += miss;
        if request.now_ms > half_ms {
            later_misses += miss;
            later += 1;
        }
    }
    Ratios {
        all: f64::from(misses) / requests.len() as f64,
        later_half: f64::from(later_misses) / f64::from(later.max(1)),
    }
}

fn at_size(slots: u64, requests: &[Request]) -> Value {
    let mut policies: Vec<Box<dyn Policy>> = vec![
        Box::new(Lru::new(slots)),
        Box::new(Lfu::new(slots)),
        Box::new(Gdsf::new(slots)),
        Box::new(S3Fifo::new(slots)),
        Box::new(Forecast::new(slots, ForecastConfig::default())),
        Box::new(Min::new(slots, requests)),
    ];
    println!("{slots} slots        all   later half");
    let mut fields = serde_json::Map::new();
    let mut ratios = std::collections::BTreeMap::new();
    for policy in &mut policies {
        let ratio = run(policy.as_mut(), requests);
        println!(
            "  {:10} {:.4}   {:.4}",
            policy.name(),
            ratio.all,
            ratio.later_half
        );
        let shown = json!({ "miss_ratio": ratio.all, "miss_ratio_later_half": ratio.later_half });
        fields.insert(policy.name().to_owned(), shown);
        ratios.insert(policy.name(), ratio);
    }
    let closed = |of: fn(&Ratios) -> f64| {
        let [s3_fifo, min, ours] = ["s3-fifo", "min", "forecast"].map(|name| of(&ratios[name]));
        (s3_fifo - ours) / (s3_fifo - min)
    };
    let (all, later) = (
        closed(|ratios| ratios.all),
        closed(|ratios| ratios.later_half),
    );
    println!(
        "  gap from S3-FIFO to MIN closed: {:.1}%, later half {:.1}%",
        all * 100.0,
        later * 100.0
    );
    json!({
        "slots": slots,
        "policies": fields,
        "gap_closed": all,
        "gap_closed_later_half": later,
    })
}

/// A launch as a request for a unit slot.
fn unit_request(launch: &launches::Launch) -> Request {
    Request {
        object: launch.profile,
        owner: launch.owner,
        bytes: 1,
        load_s: 1.0,
        now_ms: launch.now_ms,
    }
}

fn main() {
    let launches = launches::google();
    let requests: Vec<Request> = launches.iter().map(unit_request).collect();
    let sizes: Vec<Value> = [500, 1000]
        .into_iter()
        .map(|slots| at_size(slots, &requests))
        .collect();
    let report = json!({ "launches": requests.len(), "sizes": sizes });
    let out = std::env::args()
        .nth(1)
        .filter(|argument| !argument.starts_with("--"));
    if let Some(path) = out {
        let text = serde_json::to_string_pretty(&report).expect("a report always serialises");
        if let Err(cause) = std::fs::write(&path, text) {
            eprintln!("{path}: {cause}");
            std::process::exit(1);
        }
    }
}
