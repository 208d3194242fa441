//! Policies on the first day of the Google launches: known order of miss ratios.

#[path = "../examples/launches/mod.rs"]
mod launches;

use forelay_cache::policy::forecast::{Forecast, ForecastConfig};
use forelay_cache::policy::lru::Lru;
use forelay_cache::policy::min::Min;
use forelay_cache::policy::s3_fifo::S3Fifo;
use forelay_cache::policy::{Policy, Request};

fn misses(policy: &mut dyn Policy, requests: &[Request]) -> usize {
    requests
        .iter()
        .filter(|request| !policy.request(request))
        .count()
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

#[test]
fn policies_rank_as_published_on_real_launches() {
    if !launches::directory().join(launches::GOOGLE).exists() {
        println!(
            "SKIPPED policies_rank_as_published_on_real_launches: no traces; set FORELAY_TRACES"
        );
        return;
    }
    let mut launches = launches::google();
    launches.truncate(40_000);
    let requests: Vec<Request> = launches.iter().map(unit_request).collect();
    let min = misses(&mut Min::new(500, &requests), &requests);
    let s3_fifo = misses(&mut S3Fifo::new(500), &requests);
    let lru = misses(&mut Lru::new(500), &requests);
    let ours = misses(
        &mut Forecast::new(500, ForecastConfig::default()),
        &requests,
    );
    println!("min {min}, forecast {ours}, s3-fifo {s3_fifo}, lru {lru}");
    assert!(min < ours && ours < s3_fifo && s3_fifo < lru);
}
