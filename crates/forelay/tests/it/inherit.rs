//! A component that was built again with a change inherits what was learned of it before.

use std::path::Path;

use serde_json::Value;

use crate::fixture::{Host, RepositoryOf, Settings, bench};

/// Files of the component; of every second one all is read at a launch.
const FILES: usize = 120;

/// The component's tree: files of some pages each; `patch` changes one and adds another before
/// all others, so that no page lies where it lay.
fn tree(dir: &Path, patch: bool) {
    let data = dir.join("opt/patched");
    std::fs::create_dir_all(&data).unwrap();
    let file = |name: &str, seed: usize, pages: usize| {
        let line = |number: usize| format!("{seed:08} {number:054}\n");
        let content: String = (0..pages * 64).map(line).collect();
        std::fs::write(data.join(name), content).unwrap();
    };
    for number in 0..FILES {
        let kind = if number % 2 == 0 { "read" } else { "left" };
        let seed = if patch && number == 4 { 4_000 } else { number };
        file(&format!("{kind}-{number:03}"), seed, 5 + number % 7);
    }
    if patch {
        file("a-new-one", 5_000, 33);
    }
}

/// What a launch's forecast says of the component, and why.
fn reasons(forecast: &Value, component: &str) -> String {
    let entries = forecast.as_array().unwrap().iter();
    let mut entries = entries.filter(|one| one["component"] == component && one["vm"].is_null());
    let entry = entries.next();
    entry
        .unwrap_or_else(|| panic!("no {component} in {forecast}"))
        .to_string()
}

#[test]
fn privileged_a_rebuilt_component_is_loaded_as_its_predecessor_was_used() {
    let test = "privileged_a_rebuilt_component_is_loaded_as_its_predecessor_was_used";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        repository: RepositoryOf::Test,
        latency_ms: 5,
        ..Settings::default()
    };
    let mut host = Host::new(&bench, &settings);
    let build = |host: &Host, version: &str, patch: bool| {
        let dir = host.dir().join(version);
        tree(&dir, patch);
        let dir = dir.to_str().unwrap();
        let words = ["component", "build", "--dir", dir, "--name", "patched"];
        host.ok(words.iter().chain(&["--component-version", version]));
    };
    build(&host, "1.0", false);
    let manifest = host.write(
        "patched.toml",
        "name = \"patched\"\nowner = \"tests\"\nbase = \"debian\"\ncomponents = [\"patched\"]\n\
         entrypoint = [\"sh\", \"-c\", \"cat /opt/patched/read-* > /dev/null; \
         touch /run/all-read; exec sleep infinity\"]\n\
         ready = { path = \"/run/all-read\" }\n\n[vm]\nmemory_mib = 160\n",
    );
    // Launches every ten minutes: the next one is forecast.
    let now_ms = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis();
    let origin_ms = (now_ms - 12 * 600_000).to_string();
    let rows = (0..12).map(|number| format!("{},patched,tests\n", number * 600));
    let history = format!("time_s,profile,owner\n{}", rows.collect::<String>());
    let history = host.write("history.csv", &history);
    let history = history.to_str().unwrap();
    host.ok(["history", "import", "--origin-ms", &origin_ms, history]);
    host.start();

    let cold = host.launch(&manifest, "cold", &[]);
    let fetches = |vm: &Value| vm["launch"]["demand_fetches"].as_u64().unwrap();
    assert!(fetches(&cold) > 20, "{cold}");
    host.until("the launch is learned", |host| {
        let history = host.json(["history", "patched"]);
        history[0]["working_set_bytes"].as_u64().unwrap_or(0) > 1 << 20
    });
    // All shared memory and the disk cache are lost.
    assert_eq!(host.terminate(), Some(0));
    std::fs::remove_dir_all(host.dir().join("state/cache")).unwrap();

    build(&host, "1.1", true);
    host.start();
    let forecast = host.json(["forecast", "patched"]);
    let why = reasons(&forecast, "patched 1.1");
    assert!(why.contains("inherited from patched 1.0"), "{why}");
    let patched = host.launch(&manifest, "patched", &["--prefetch", "forecast-first"]);
    let components = patched["components"].to_string();
    assert!(components.contains("\"1.1\""), "{components}");
    assert!(
        fetches(&patched) * 10 <= fetches(&cold),
        "{} of {} demand fetches are left",
        fetches(&patched),
        fetches(&cold)
    );
}
