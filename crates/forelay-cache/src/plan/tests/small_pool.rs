//! A pool far too small for its forecasts: what it cannot hold is left alone.

use super::*;

/// Hundred profiles of 16 MiB each, in pieces as small as files are; the pool holds one of 25.
fn rounds(host: &mut Host, rounds: u32, likely: impl Fn(u32, u8) -> f64) {
    for round in 0..rounds {
        for profile in 0..100 {
            let small = (0..64).map(|at| planned(profile, at * (256 << 10), 64 << 10, 0.9, 0));
            let large = planned(profile, 0, 16 * MIB, 0.3, 0);
            host.tell(PlannerEvent::ProfileForecast(ProfileForecast {
                domain: "d".into(),
                profile: format!("p{profile}").into(),
                devices: vec![device(profile, 16 * MIB)],
                launch_probability: likely(round, profile),
                next_launch_ms: None,
                working_set: small.chain([large]).collect(),
            }));
            host.push_all();
        }
        for _ in 0..5 {
            host.now_ms += 1_000;
            host.tell(PlannerEvent::Tick);
            host.push_all();
        }
    }
}

fn small_pool() -> Host {
    Host::new(PlanConfig {
        inflight_bytes: 16 * MIB,
        ..config(64)
    })
}

#[test]
fn it_is_filled_and_then_left_as_it_is() {
    let mut host = small_pool();
    let likely = |_, profile: u8| 0.2 + f64::from(profile) * 0.007;
    rounds(&mut host, 60, likely);
    let settled = host.prefetched;
    rounds(&mut host, 20, likely);
    assert_eq!(host.prefetched, settled, "nothing is loaded again");
}

#[test]
fn forecasts_that_waver_do_not_turn_it_over() {
    let mut host = small_pool();
    let likely = |round: u32, profile: u8| {
        let draw = (round * 100 + u32::from(profile)).wrapping_mul(7_919) % 1_000;
        0.5 + f64::from(draw) / 1_000.0 * 0.1
    };
    rounds(&mut host, 60, likely);
    let settled = host.prefetched;
    rounds(&mut host, 20, likely);
    assert_eq!(host.prefetched, settled, "nothing is loaded again");
}
