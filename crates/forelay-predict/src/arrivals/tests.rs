//! Tests of the forecaster as a whole.

use super::*;
use crate::time::{DAY_MS, HOUR_MS, MINUTE_MS, Timestamp};
use proptest::prelude::*;

fn minutes(at: f64) -> Timestamp {
    Timestamp((at * MINUTE_MS as f64) as i64)
}

fn with_launches(
    name: &str,
    times: impl IntoIterator<Item = Timestamp>,
) -> (Forecaster, ProfileKey) {
    let mut forecaster = Forecaster::new(ArrivalsConfig::default());
    let profile = forecaster.profile(name);
    let owner = forecaster.owner("owner");
    for at in times {
        forecaster.observe_launch(profile, owner, at, 0);
    }
    (forecaster, profile)
}

#[test]
fn a_daily_launch_is_expected_at_its_time_and_explained() {
    let jitter = [0, 1, -1, 2, 0, -2, 1, 0];
    let days =
        (0..8).map(|day| Timestamp(day * DAY_MS + 9 * HOUR_MS + jitter[day as usize] * MINUTE_MS));
    let (forecaster, profile) = with_launches("nightly", days);
    let due = 8 * DAY_MS + 9 * HOUR_MS;
    let before = Timestamp(due - 5 * MINUTE_MS);
    let near = forecaster.probability(profile, before, 600.0);
    let far = forecaster.probability(profile, Timestamp(due - 6 * HOUR_MS), 600.0);
    assert!(near > 0.5, "{near}");
    assert!(far < 0.01, "{far}");
    let list = forecaster.next_launches(before, 600.0, 0.1);
    assert_eq!(list[0].profile, "nightly");
    let reason = list[0].reasons[0].to_string();
    assert!(reason.starts_with("launches every 24 h at 0"), "{reason}");
    assert!(list[0].expected_at.ms_since(Timestamp(due)).abs() < 4 * MINUTE_MS);
}

#[test]
fn a_launch_announces_the_one_that_used_to_follow() {
    let mut forecaster = Forecaster::new(ArrivalsConfig::default());
    let (build, deploy) = (forecaster.profile("build"), forecaster.profile("deploy"));
    let owner = forecaster.owner("ci");
    let irregular = [
        0.0, 95.0, 310.0, 420.0, 700.0, 1130.0, 1210.0, 1655.0, 2000.0, 2310.0,
    ];
    for start in irregular {
        forecaster.observe_launch(build, owner, minutes(start), 0);
        forecaster.observe_launch(deploy, owner, minutes(start + 2.0), 0);
    }
    let now = minutes(2700.0);
    let unannounced = forecaster.probability(deploy, now, 300.0);
    forecaster.observe_launch(build, owner, now, 0);
    let announced = forecaster.probability(deploy, now.plus_seconds(1.0), 300.0);
    assert!(
        announced > 0.6 && unannounced < 0.2,
        "{announced} {unannounced}"
    );
    let forecasts = forecaster.next_launches(now.plus_seconds(1.0), 300.0, 0.0);
    let forecast = forecasts.iter().find(|one| one.key == deploy).unwrap();
    let reason = forecast.reasons[0].to_string();
    assert!(reason.starts_with("follows `build` by"), "{reason}");
}

#[test]
fn a_new_profile_leans_on_its_owner() {
    let mut forecaster = Forecaster::new(ArrivalsConfig::default());
    let owner = forecaster.owner("owner");
    for name in 0..12 {
        let profile = forecaster.profile(&format!("p{name}"));
        for day in 0..5 {
            let at = Timestamp(day * DAY_MS + name * 37 * MINUTE_MS);
            forecaster.observe_launch(profile, owner, at, 0);
        }
    }
    let new = forecaster.profile("new");
    let first = Timestamp(5 * DAY_MS + 700 * MINUTE_MS);
    forecaster.observe_launch(new, owner, first, 0);
    let due = first.plus_ms(DAY_MS - 10 * MINUTE_MS);
    let tomorrow = forecaster.probability(new, due, 1_200.0);
    let at_odd_hours = forecaster.probability(new, first.plus_ms(17 * HOUR_MS), 1_200.0);
    assert!(tomorrow > 5.0 * at_odd_hours, "{tomorrow} {at_odd_hours}");
}

#[test]
fn late_repeated_and_jumping_events_are_told_and_harmless() {
    let (mut forecaster, profile) =
        with_launches("p", (0..20).map(|i| Timestamp(i * 10 * MINUTE_MS)));
    let owner = forecaster.owner("owner");
    let last = Timestamp(190 * MINUTE_MS);
    let before = forecaster.probability(profile, last.plus_seconds(300.0), 600.0);
    let mut observe = |at| forecaster.observe_launch(profile, owner, at, 0);
    assert_eq!(observe(last), Observed::Repeated);
    assert_eq!(observe(last.plus_ms(-MINUTE_MS)), Observed::Late);
    let after = forecaster.probability(profile, last.plus_seconds(300.0), 600.0);
    assert!((before - after).abs() < 0.05, "{before} {after}");
    let mut observe = |at| forecaster.observe_launch(profile, owner, at, 0);
    assert_eq!(observe(Timestamp(-400 * DAY_MS)), Observed::Restarted);
    assert_eq!(observe(Timestamp(i64::MAX)), Observed::Restarted);
    assert_eq!(observe(Timestamp(i64::MIN)), Observed::Restarted);
    let p = forecaster.probability(profile, Timestamp(0), 600.0);
    assert!((0.0..=1.0).contains(&p));
}

#[test]
fn the_kill_switch_is_told() {
    let config = ArrivalsConfig {
        forecasting: false,
        ..ArrivalsConfig::default()
    };
    let mut forecaster = Forecaster::new(config);
    let (profile, owner) = (forecaster.profile("p"), forecaster.owner("owner"));
    for hour in 0..20 {
        forecaster.observe_launch(profile, owner, Timestamp(hour * HOUR_MS), 0);
    }
    let due = Timestamp(20 * HOUR_MS - MINUTE_MS);
    let forecast = &forecaster.next_launches(due, 600.0, 0.0)[0];
    assert!(forecast.fallen_back);
    assert_eq!(forecast.reasons[0], Reason::SwitchedOff);
}

fn segment(start_min: f64, length_min: f64, hazard_per_min: f64, launched: bool) -> Segment {
    Segment {
        start_min,
        length_min,
        hazard_per_min,
        repeats_per_min: 0.0,
        launched,
        fallen_back: false,
    }
}

#[test]
fn regret_sets_harmful_forecasts_aside_and_takes_good_ones_back() {
    let rule = Rule {
        price_per_min: 0.01,
        keep_alive_min: 10.0,
    };
    let mut regret = Regret::default();
    // Told to be unlikely, launches after five minutes every time: the simple rule is warm.
    for _ in 0..12 {
        regret.note(&segment(0.0, 5.0, 1.0e-4, true), &rule);
    }
    assert!(regret.harmful() && regret.excess() > 3.0);
    // Then told well: a launch after an hour, forecast to the minute.
    for _ in 0..60 {
        regret.note(&segment(0.0, 59.0, 1.0e-4, false), &rule);
        regret.note(&segment(59.0, 1.0, 1.0, true), &rule);
    }
    assert!(!regret.harmful(), "{}", regret.excess());
}

#[test]
fn state_per_profile_stays_under_two_kib() {
    let mut forecaster = Forecaster::new(ArrivalsConfig::default());
    let keys: Vec<ProfileKey> = (0..40)
        .map(|i| forecaster.profile(&format!("p{i}")))
        .collect();
    let owners: Vec<OwnerKey> = (0..4).map(|i| forecaster.owner(&format!("o{i}"))).collect();
    let mut state = 5u64;
    let mut at = 0;
    for _ in 0..4_000 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let pick = (state >> 33) as usize % keys.len();
        at += (state >> 50) as i64 % 40_000;
        forecaster.observe_launch(keys[pick], owners[pick % 4], Timestamp(at), 0);
    }
    let bytes = forecaster.bytes_per_profile();
    assert!(bytes > 500.0 && bytes <= 2048.0, "{bytes}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_order_of_events_gives_probabilities(
        events in prop::collection::vec((0u32..5, 0u32..2, -2_000_000i64..20_000_000, 0u32..9), 1..120),
    ) {
        let mut forecaster = Forecaster::new(ArrivalsConfig::default());
        let keys: Vec<ProfileKey> = (0..5).map(|i| forecaster.profile(&format!("p{i}"))).collect();
        let owners: Vec<OwnerKey> = (0..2).map(|i| forecaster.owner(&format!("o{i}"))).collect();
        let mut latest = 0;
        for &(profile, owner, at, repeats) in &events {
            let (key, owner) = (keys[profile as usize], owners[owner as usize]);
            forecaster.observe_launch(key, owner, Timestamp(at), repeats);
            latest = latest.max(at);
            forecaster.advance(Timestamp(at), |_, segment| {
                assert!(segment.hazard_per_min >= 0.0 && segment.length_min >= 0.0);
            });
        }
        for &key in &keys {
            let mut previous = 0.0;
            for horizon_s in [1.0, 60.0, 600.0, 86_400.0] {
                let p = forecaster.probability(key, Timestamp(latest), horizon_s);
                prop_assert!((0.0..=1.0).contains(&p), "{}", p);
                if horizon_s > 600.0 {
                    prop_assert!(p >= previous - 0.3);
                }
                previous = p;
            }
        }
    }
}
