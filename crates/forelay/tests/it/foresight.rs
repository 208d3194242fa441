//! What is forecast is there before it is asked for, and a restart forgets none of it.

use serde_json::Value;

use crate::fixture::{Host, Settings, bench, idle, signal};

/// A file that no boot touches.
const OF_THE_BASE: &str = "/usr/bin/perl";

/// That file as a VM's map lists it.
fn of_the_base(host: &Host, vm: &str) -> Value {
    let map = host.json(["map", vm]);
    let mut files = map["files"].as_array().unwrap().iter();
    let file = files.find(|one| one["path"] == OF_THE_BASE);
    file.unwrap_or_else(|| panic!("no {OF_THE_BASE} in {map}"))
        .clone()
}

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
    host.ok(["attach", "first", "forelay-tool"]);
    // The daemon is stopped before any window has passed. It learns all the same what was
    // touched of the tool, and what was touched of the base meanwhile.
    let script = format!("forelay-tool; md5sum {OF_THE_BASE} > /dev/null");
    assert_eq!(host.sh("first", &script), "hello from the tool\n");
    assert_eq!(host.terminate(), Some(0));

    // All shared memory is lost with the daemon; what was learned is not.
    host.start();
    host.launch(&manifest, "second", &[]);
    let entry = tool(&host.json(["forecast", "dev"]), "second").expect("the tool is forecast");
    assert_eq!(entry["attached"], true);
    let probability = entry["probability"].as_f64().unwrap();
    assert!((0.1..1.0).contains(&probability), "{entry}");
    let reasons = entry["reasons"].to_string();
    assert!(
        reasons.contains("attached to VMs like it 1 times"),
        "{reasons}"
    );
    assert!(reasons.contains("touched in 1 of 1 launches"), "{reasons}");
    host.until("what the tool's user read of the base is loaded", |host| {
        let file = of_the_base(host, "second");
        let bytes = |field: &str| file[field].as_u64().unwrap();
        // (The kernel maps a few pages around one that a neighbour is on.)
        assert!(bytes("touched_bytes") < bytes("bytes") / 4, "{file}");
        bytes("resident_bytes") > bytes("bytes") / 4 * 3
    });

    let resident = |host: &Host| -> u64 {
        let memory = host.json(["memory"]);
        let domains = memory["domains"].as_array().unwrap().iter();
        let mut components = domains.flat_map(|domain| domain["components"].as_array().unwrap());
        let tool = components.find(|one| one["image"] == entry["image"]);
        tool.map_or(0, |one| one["resident_bytes"].as_u64().unwrap())
    };
    host.until("all of the tool that is forecast is in memory", |host| {
        let forecast = tool(&host.json(["forecast"]), "second").unwrap();
        forecast["resident_bytes"] == forecast["bytes"]
    });
    let loaded = resident(&host);
    assert!(loaded > 0);
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

    // A daemon that is only replaced learns it as well.
    let worker = host.worker();
    signal("HUP", host.holder());
    host.until("another worker serves", |host| {
        let next = host.worker();
        next.is_some() && next != worker && host.run(["ps"]).code == Some(0)
    });
    let forecast = host.json(["forecast", "dev"]);
    let mut entries = forecast.as_array().unwrap().iter();
    let coming = entries.find(|one| one["vm"].is_null() && one["image"] == entry["image"]);
    let reasons = coming.map(|one| one["reasons"].to_string());
    assert!(
        reasons.is_some_and(|one| one.contains("touched in 2 of 2 launches")),
        "{forecast}"
    );
}
