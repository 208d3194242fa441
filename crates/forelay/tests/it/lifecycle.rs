//! VMs that stand still and go on, sleep and wake as what they were, and become several: nothing
//! of them is lost on the way, whatever happens to the daemon.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::fixture::{Host, Settings, bench, http_get, signal, web};

/// A program that has a word in its memory alone, and writes it down again and again.
const KEEPS_A_WORD: &str = "word=$(cat /proc/sys/kernel/random/uuid)\n\
    echo $word > /root/word\n\
    export word\n\
    setsid sh -c 'while :; do echo $word > /run/said; sleep 0.1; done' \
    > /dev/null 2>&1 < /dev/null &\n";

/// The word that it has now: once it was asked.
const WORD: &str = "rm -f /run/said; until [ -s /run/said ]; do sleep 0.05; done; cat /run/said";

/// What a VM is, a line each; the last is another each time.
const FACTS: &str = "echo id $(cat /etc/machine-id); cat /etc/hostname /proc/sys/kernel/hostname \
    /sys/class/net/eth0/address; head -c 16 /dev/urandom | md5sum";

fn facts(host: &Host, vm: &str) -> Vec<String> {
    let facts = host.sh(vm, FACTS);
    let facts: Vec<String> = facts.lines().map(str::to_owned).collect();
    assert_eq!(facts.len(), 5, "{facts:?}");
    facts
}

/// Kills the worker; returns when the next one answers.
fn another_worker(host: &Host) {
    let worker = host.worker().unwrap();
    signal("KILL", worker);
    host.until("another worker answers", |host| {
        host.worker().is_some_and(|next| next != worker) && host.get("/v1/forecast").is_some()
    });
}

fn state(host: &Host, name: &str) -> Value {
    host.vm(name)["state"].clone()
}

#[test]
fn privileged_a_vm_stands_still_sleeps_and_forks_and_loses_nothing() {
    let test = "privileged_a_vm_stands_still_sleeps_and_forks_and_loses_nothing";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let (text, port) = web();
    let manifest = host.write("web.toml", &text);
    host.launch(&manifest, "web", &[]);
    host.sh("web", KEEPS_A_WORD);
    let word = host.sh("web", "cat /root/word");
    assert_eq!(host.sh("web", WORD), word);
    host.ok(["attach", "web", "forelay-tool"]);
    let before = facts(&host, "web");

    stands_still(&host);
    assert_eq!(host.sh("web", WORD), word);

    // It sleeps, and another daemon wakes it.
    let slept = host.json(["hibernate", "web"]);
    assert_eq!(slept[0]["state"], "hibernated", "{slept}");
    assert_eq!(host.vmms(), Vec::<u32>::new());
    let listed = host.json(["ps"]);
    assert_eq!(listed[0]["state"], "hibernated", "{listed}");
    another_worker(&host);
    assert_eq!(state(&host, "web"), "hibernated");
    for refused in [
        &["pause", "web"][..],
        &["fork", "web"],
        &["exec", "web", "--", "true"],
    ] {
        let said = host.refused(refused);
        assert!(said.contains("forelay resume web"), "{said}");
    }
    let id = host.json(["snapshot", "list"])[0]["id"].clone();
    let said = host.refused(["snapshot", "remove", id.as_str().unwrap()]);
    assert!(said.contains("web"), "{said}");
    let woken = host.launch(&manifest, "web", &[]);
    assert_eq!(woken["state"], "ready", "{woken}");
    assert_eq!(host.sh("web", WORD), word);
    assert!(http_get(port, "/").contains("hello from a test"));
    assert!(
        host.sh("web", "forelay-tool")
            .contains("hello from the tool")
    );
    let after = facts(&host, "web");
    assert_eq!(after[..4], before[..4]);
    assert_ne!(after[4], before[4]);

    forks(&host, &word, &after);

    // What was woken sleeps as well, and is deleted in its sleep.
    host.ok(["hibernate", "web"]);
    host.ok(["resume", "web"]);
    assert_eq!(host.sh("web", WORD), word);
    host.ok(["hibernate", "web"]);
    host.ok(["stop", "web"]);
    assert_eq!(state(&host, "web"), "stopped");
    assert_eq!(host.json(["snapshot", "list"]), json!([]));
}

fn stands_still(host: &Host) {
    let paused = host.json(["pause", "web"]);
    assert_eq!(paused[0]["state"], "paused", "{paused}");
    let refusals = [
        &["pause", "web"][..],
        &["fork", "web"],
        &["hibernate", "web"],
        &["attach", "web", "forelay-part"],
        &["exec", "web", "--", "true"],
    ];
    for refused in refusals {
        let said = host.refused(refused);
        assert!(said.contains("forelay resume web"), "{said}");
    }
    another_worker(host);
    assert_eq!(state(host, "web"), "paused");
    host.ok(["resume", "web"]);
    let said = host.refused(["resume", "web"]);
    assert!(said.contains("neither paused nor hibernated"), "{said}");
    assert_eq!(state(host, "web"), "ready");
}

/// Two forks of a VM that is not disturbed by it.
fn forks(host: &Host, word: &str, facts_before: &[String]) {
    let said = host.refused(["fork", "web", "--name", "web"]);
    assert!(said.contains("web is Ready already"), "{said}");
    let forked = host.json(["fork", "web", "--count", "2", "--name", "twin"]);
    println!(
        "web stood still for {} s, {} s in all",
        forked["held_s"], forked["took_s"]
    );
    let twins = ["twin-1", "twin-2"];
    let mut seen: Vec<BTreeSet<String>> = facts_before
        .iter()
        .map(|fact| [fact.clone()].into())
        .collect();
    for (twin, vm) in twins.iter().zip(forked["vms"].as_array().unwrap()) {
        assert_eq!(
            (&vm["name"], &vm["state"]),
            (&json!(twin), &json!("ready")),
            "{vm}"
        );
        assert_eq!(vm["forked_from"], "web");
        assert_eq!(host.sh(twin, WORD), word);
        assert_eq!(host.sh(twin, "cat /root/word"), word);
        let port = vm["forwards"][0]["host"].as_u64().unwrap();
        assert!(http_get(port as u16, "/").contains("hello from a test"));
        for (seen, fact) in seen.iter_mut().zip(facts(host, twin)) {
            assert!(seen.insert(fact.clone()), "{fact} of {twin}: {seen:?}");
        }
    }
    assert_eq!(host.sh("web", WORD), word);
    assert_eq!(facts(host, "web")[..4], facts_before[..4]);
    // What they were made of goes with the last of them; that of the VM itself stays.
    assert_eq!(host.json(["snapshot", "list"]).as_array().unwrap().len(), 2);
    host.ok(["stop", "twin-1", "twin-2"]);
    host.until("nothing is left of the forks", |host| {
        host.json(["snapshot", "list"]).as_array().unwrap().len() == 1
    });
}
