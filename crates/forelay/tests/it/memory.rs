//! The memory budget: held under live VMs, and given back when asked.

use crate::fixture::{Host, Settings, bench, http_get, web};

#[test]
fn privileged_a_budget_below_one_component_still_boots_and_idle_memory_is_given_back() {
    let test = "privileged_a_budget_below_one_component_still_boots_and_idle_memory_is_given_back";
    let Some(bench) = bench(test) else { return };
    let budget = 4 << 20;
    let settings = Settings {
        budget_bytes: budget,
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let (manifest, port) = web();
    let manifest = host.write("web.toml", &manifest);
    host.launch(&manifest, "web", &[]);
    let memory = host.json(["memory"]);
    assert_eq!(memory["budget_bytes"].as_u64(), Some(budget));
    let largest = memory["domains"][0]["components"]
        .as_array()
        .unwrap()
        .iter();
    let largest = largest
        .map(|one| one["image_bytes"].as_u64().unwrap())
        .max();
    assert!(largest > Some(budget), "a component larger than the budget");

    // Used again and again, its pages come and go, and it answers all the same.
    let check = "cd /; md5sum -c --quiet --ignore-missing /var/lib/dpkg/info/libc6:amd64.md5sums";
    for _ in 0..3 {
        assert_eq!(host.sh("web", check), "");
        assert!(http_get(port, "/").ends_with("hello from a test\n"));
    }
    let memory = host.json(["memory"]);
    let totals = &memory["totals"];
    assert!(totals["evicted_bytes"].as_u64().unwrap() > 0, "{totals}");
    host.until("shared memory is back within its budget", |host| {
        host.json(["memory"])["resident_bytes"].as_u64().unwrap() <= budget
    });

    // What a VM maps is not idle; what none maps is.
    assert!(resident(&host.json(["memory", "--drop-idle"])) > 0);
    assert!(http_get(port, "/").ends_with("hello from a test\n"));
    host.ok(["stop", "web"]);
    host.json(["memory", "--drop-idle"]);
    assert_eq!(resident(&host.json(["memory"])), 0);
}

/// Bytes in memory, summed over components.
fn resident(memory: &serde_json::Value) -> u64 {
    let domains = memory["domains"].as_array().unwrap().iter();
    let components = domains.flat_map(|domain| domain["components"].as_array().unwrap());
    components
        .map(|one| one["resident_bytes"].as_u64().unwrap())
        .sum()
}
