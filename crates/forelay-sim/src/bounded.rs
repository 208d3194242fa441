//! Memories of a fixed number of profiles, one unit each: drives the eviction policies of
//! [`crate::eviction`] over a trace.
//!
//! Owns no policy. Misses include the compulsory ones. Memory is charged for every occupied slot.

use crate::eviction::EvictionKind;
use crate::tally::{Frame, Tally};
use crate::trace::Trace;
use forelay_cache::reuse::ObjectRequest;

/// Launches as requests for unit slots.
fn unit_requests(trace: &Trace) -> Vec<ObjectRequest> {
    trace
        .launches
        .iter()
        .map(|launch| ObjectRequest {
            object: launch.profile,
            owner: launch.owner,
            bytes: 1,
            load_s: 1.0,
            now_ms: launch.at.0,
        })
        .collect()
}

/// Runs a policy with that many slots over a trace.
pub(crate) fn run(kind: EvictionKind, slots: u64, trace: &Trace, frame: &Frame) -> Tally {
    let requests = unit_requests(trace);
    let mut policy = kind.build(slots, &requests);
    let mut tally = Tally::new(frame);
    let mut occupied_since = trace.start();
    for (launch, request) in trace.launches.iter().zip(&requests) {
        let elapsed_min = launch.at.seconds_since(occupied_since) / 60.0;
        tally.memory_min += policy.used_bytes() as f64 * elapsed_min;
        occupied_since = launch.at;
        let cold = u32::from(!policy.request(request));
        tally.launched(frame, launch.profile, launch.at, launch.count, cold);
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::TracedLaunch;
    use forelay_predict::time::Timestamp;

    fn misses(kind: EvictionKind, slots: u64, profiles: &[u32]) -> u32 {
        let mut trace = Trace {
            launches: profiles
                .iter()
                .zip(0..)
                .map(|(&profile, i)| TracedLaunch {
                    at: Timestamp(i * 60_000),
                    profile,
                    owner: 0,
                    count: 1,
                    composition: 0,
                })
                .collect(),
            profiles: (0..8).map(|p| p.to_string()).collect(),
            owners: vec!["o".to_owned()],
            ..Trace::default()
        };
        trace.finish();
        let tally = run(kind, slots, &trace, &Frame::new(&trace, 1, u64::MAX));
        tally.cold.iter().sum()
    }

    #[test]
    fn small_cases_by_hand() {
        assert_eq!(misses(EvictionKind::Lru, 2, &[0, 1, 2, 0, 1, 2]), 6);
        assert_eq!(misses(EvictionKind::Min, 2, &[0, 1, 2, 0, 1, 2]), 4);
        assert_eq!(misses(EvictionKind::Lfu, 2, &[0, 0, 1, 2, 0]), 3);
        assert_eq!(misses(EvictionKind::Lru, 2, &[0, 0, 1, 2, 0]), 4);
    }
}
