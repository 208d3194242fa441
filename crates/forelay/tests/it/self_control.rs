//! What the daemon makes of a history that it did not see itself: a profile for which forecasting
//! does harm falls back to the simpler rule, and memory that VMs are forecast to need is left
//! free before they ask for it. No VM runs here: launches fail at their VMM.

use forelay::history::{
    Event, EventId, History as _, OpenOptions, ProfileRef, ResourceSample, SqliteHistory, What,
};
use forelay_image::{Digest, Extent, Touch};
use forelay_predict::time::{MINUTE_MS, Timestamp};
use serde_json::Value;

use crate::fixture::{Host, Settings, bench, idle};

/// When the traces begin.
const BEGINS: Timestamp = Timestamp(20_000 * 86_400_000);

/// Minutes between launches, chosen one by one so that the forecaster errs: it holds on where
/// nothing comes, and lets go before a launch within the simpler rule's ten minutes.
const AGAINST_FORECASTS: [f64; 16] = [
    3000.0, 0.3, 4.0, 6000.0, 6.0, 10_000.0, 7.0, 0.3, 0.3, 0.3, 9.8, 200.0, 2.0, 400.0, 5.0, 8.0,
];

/// Imports launches of a profile, so many minutes after the traces' begin.
fn import(host: &Host, profile: &str, minutes: impl Iterator<Item = f64>) {
    let mut trace = "time_s,profile,owner,duration_s\n".to_owned();
    for at in minutes {
        trace += &format!("{},{profile},tests,1\n", at * 60.0);
    }
    let trace = host.write(&format!("{profile}.csv"), &trace);
    let origin = BEGINS.0.to_string();
    let trace = trace.to_str().unwrap();
    host.ok(["history", "import", "--origin-ms", &origin, trace]);
}

/// Adds to the history what no trace tells.
fn append(host: &Host, events: &[Event]) {
    let path = host.dir().join("state/history.db");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let history = SqliteHistory::open(&path, OpenOptions::default()).await;
        let history = history.unwrap();
        let done = history.append(events).await.unwrap();
        assert_eq!(done.stored, events.len() as u64);
        history.close().await;
    });
}

fn event(at: Timestamp, profile: &str, nonce: u64, what: What) -> Event {
    Event {
        id: EventId { at, nonce },
        vm: 1,
        of: ProfileRef::new(profile, "tests"),
        what,
    }
}

fn resident_bytes(host: &Host, image: Digest) -> u64 {
    let memory = host.json(["memory"]);
    let domains = memory["domains"].as_array().unwrap().iter();
    let mut components = domains.flat_map(|domain| domain["components"].as_array().unwrap());
    let one = components.find(|one| one["image"] == image.to_string());
    one.map_or(0, |one| one["resident_bytes"].as_u64().unwrap())
}

/// The forecast of the base for a profile's next launch.
fn next_launch(host: &Host, profile: &str) -> Value {
    let forecast = host.json(["forecast", profile]);
    let mut entries = forecast.as_array().unwrap().iter();
    let base = entries.find(|one| one["component"].as_str().unwrap().starts_with("debian"));
    base.unwrap_or_else(|| panic!("no base in {forecast}"))
        .clone()
}

#[test]
fn privileged_a_profile_that_forecasting_harms_is_loaded_when_its_launch_is_asked_for() {
    let test = "privileged_a_profile_that_forecasting_harms_is_loaded_when_its_launch_is_asked_for";
    let Some(bench) = bench(test) else { return };
    let harmed_minutes = AGAINST_FORECASTS.iter().scan(0.0, |at, gap| {
        *at += gap;
        Some(*at)
    });
    let harmed_minutes: Vec<f64> = [0.0].into_iter().chain(harmed_minutes).collect();
    let end_min = harmed_minutes[AGAINST_FORECASTS.len()];
    let settings = Settings {
        ahead: true,
        clock_starts_ms: Some(BEGINS.plus_seconds(end_min * 60.0 + 20.0).0),
        no_vmm: true,
        ..Settings::default()
    };
    let mut host = Host::started(&bench, &settings);
    // Of different bases: what is loaded for one is not there for the other.
    let harmed = host.write(
        "harmed.toml",
        &idle("harmed", "[]", "").replace("\"debian\"", "\"debian-systemd\""),
    );
    let steady = host.write("steady.toml", &idle("steady", "[]", ""));
    let launch = |host: &Host, manifest: &std::path::Path| {
        let manifest = manifest.to_str().unwrap();
        host.refused(["run", "--detach", "--prefetch", "forecast-first", manifest]);
    };
    launch(&host, &harmed);
    launch(&host, &steady);
    assert_eq!(host.terminate(), Some(0));
    let list = host.json(["component", "list"]);
    let image = |name: &str| -> Digest {
        let mut all = list.as_array().unwrap().iter();
        let one = all.find(|one| one["name"] == name).unwrap();
        one["image"]["digest"].as_str().unwrap().parse().unwrap()
    };
    let images = [
        ("harmed", image("debian-systemd")),
        ("steady", image("debian")),
    ];
    import(&host, "harmed", harmed_minutes.into_iter());
    import(
        &host,
        "steady",
        (0..30).map(|n| end_min - f64::from(n) * 2.0),
    );
    for (profile, image) in images {
        let touch = Touch {
            image,
            extent: Extent::new(4 << 20, 1 << 20),
            first_touch_ms: 5,
        };
        let touched = What::Touched {
            images: vec![image],
            touches: vec![touch],
        };
        // Events of one moment need numbers of their own.
        let numbers = match profile {
            "steady" => 0..4,
            _ => 4..8,
        };
        let events = numbers.map(|number| event(BEGINS, profile, number, touched.clone()));
        append(&host, &events.collect::<Vec<_>>());
    }

    host.restart_clock();
    host.start();
    let (entry, other) = (next_launch(&host, "harmed"), next_launch(&host, "steady"));
    assert_eq!(entry["control"]["fallen_back"], true, "{entry}");
    assert_eq!(other["control"]["fallen_back"], false, "{other}");
    let excess = entry["control"]["regret_cold_starts"].as_f64().unwrap();
    assert!(excess > 3.0, "{entry}");
    let reasons = entry["reasons"].to_string();
    assert!(reasons.contains("forecasting cost"), "{reasons}");
    let words = host.ok(["forecast", "harmed"]);
    assert!(
        words.contains("harmed: forecasting did harm: fell back"),
        "{words}"
    );
    // Likely enough to be loaded ahead, were it not for that.
    let probability = entry["probability"].as_f64().unwrap();
    assert!(probability > 0.3, "{entry}");
    host.until("the other profile's working set is loaded ahead", |host| {
        resident_bytes(host, images[1].1) >= 1 << 20
    });
    assert_eq!(resident_bytes(&host, images[0].1), 0, "{entry}");
    launch(&host, &harmed);
    assert!(resident_bytes(&host, images[0].1) >= 1 << 20);
}

#[test]
fn privileged_memory_that_vms_are_forecast_to_need_is_left_free_before_they_ask() {
    let test = "privileged_memory_that_vms_are_forecast_to_need_is_left_free_before_they_ask";
    let Some(bench) = bench(test) else { return };
    let now = BEGINS.plus_ms(200 * MINUTE_MS);
    let settings = Settings {
        clock_starts_ms: Some(now.0),
        no_vmm: true,
        ..Settings::default()
    };
    let mut host = Host::new(&bench, &settings);
    let budget = |host: &Host| host.json(["memory"])["budget_bytes"].as_u64().unwrap();
    // A launch every two minutes; nobody knows what they use.
    import(&host, "hungry", (0..100).map(|n| f64::from(n) * 2.0));
    host.start();
    let without = budget(&host);
    assert_eq!(host.terminate(), Some(0));

    // The half of all memory is the most that VMs are left room for, and the pool's cap as well.
    let used = What::Sample(ResourceSample {
        since_launch_ms: 60_000,
        memory_bytes: 1 << 40,
        ..ResourceSample::default()
    });
    let samples = (0..50_u32).map(|n| {
        let at = BEGINS.plus_ms(i64::from(n) * 2 * MINUTE_MS);
        event(at, "hungry", u64::from(n), used.clone())
    });
    append(&host, &samples.collect::<Vec<_>>());
    host.start();
    host.until("the budget makes room", |host| budget(host) < without);
    assert!(host.vmms().is_empty(), "before any of it is used");
}
