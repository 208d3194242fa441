//! What is foreseen is there before it is asked for, and a restart forgets none of it.

use serde_json::Value;

use crate::fixture::{Host, Settings, bench, idle};

/// The forecast that a running VM is given the tool.
fn tool(forecast: &Value, vm: &str) -> Option<Value> {
    let entries = forecast.as_array().unwrap().iter();
    let mut entries = entries.filter(|entry| {
        let component = entry["component"].as_str().unwrap();
        entry["vm"] == vm && component.starts_with("forelay-tool ")
    });
    entries.next().cloned()
}

#[test]
fn privileged_what_one_vm_was_given_is_loaded_for_the_next_before_it_is_attached() {
    let test = "privileged_what_one_vm_was_given_is_loaded_for_the_next_before_it_is_attached";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        ahead: true,
        ..Settings::default()
    };
    let mut host = Host::started(&bench, &settings);
    let manifest = host.write("dev.toml", &idle("dev", "[]", ""));
    host.launch(&manifest, "first", &[]);
    assert!(
        tool(&host.json(["forecast"]), "first").is_none(),
        "nothing is known yet"
    );
    let learned = |host: &Host| -> u64 {
        let history = host.json(["history", "dev"]);
        history[0]["working_set_bytes"].as_u64().unwrap_or(0)
    };
    host.until("the launch is learned", |host| learned(host) > 0);
    let of_launch = learned(&host);
    host.ok(["attach", "first", "forelay-tool"]);
    assert_eq!(host.sh("first", "forelay-tool"), "hello from the tool\n");
    host.until("what it touches of the tool is learned", |host| {
        learned(host) > of_launch
    });
    host.ok(["stop", "first"]);

    // All shared memory is lost with the daemon; what was learned is not.
    assert_eq!(host.terminate(), Some(0));
    host.start();
    host.launch(&manifest, "second", &[]);
    let entry = tool(&host.json(["forecast", "dev"]), "second").expect("the tool is foreseen");
    assert_eq!(entry["attached"], true);
    let probability = entry["probability"].as_f64().unwrap();
    assert!((0.1..1.0).contains(&probability), "{entry}");
    let reasons = entry["reasons"].to_string();
    assert!(
        reasons.contains("attached to VMs like it 1 times"),
        "{reasons}"
    );
    assert!(reasons.contains("touched in 1 of 1 launches"), "{reasons}");

    let resident = |host: &Host| -> u64 {
        let memory = host.json(["memory"]);
        let domains = memory["domains"].as_array().unwrap().iter();
        let mut components = domains.flat_map(|domain| domain["components"].as_array().unwrap());
        let tool = components.find(|one| one["image"] == entry["image"]);
        tool.map_or(0, |one| one["resident_bytes"].as_u64().unwrap())
    };
    let (mut before, mut same) = (0, 0);
    host.until("the tool is in memory, and no more of it comes", |host| {
        let now = resident(host);
        same = if now > 0 && now == before {
            same + 1
        } else {
            0
        };
        before = now;
        same == 10
    });
    let loaded = resident(&host);
    let vm = host.vm("second");
    let components = vm["components"].as_array().unwrap().iter();
    assert!(components.clone().all(|one| one["name"] != "forelay-tool"));

    host.ok(["attach", "second", "forelay-tool"]);
    assert_eq!(host.sh("second", "forelay-tool"), "hello from the tool\n");
    // (The kernel may have reclaimed some of it meanwhile; nothing came on top.)
    assert!(
        resident(&host) <= loaded,
        "all that was needed had been loaded"
    );
    assert!(
        tool(&host.json(["forecast"]), "second").is_none(),
        "it has it now"
    );
}
