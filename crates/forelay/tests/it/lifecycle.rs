//! VMs that stand still and go on, sleep and wake as what they were, and become several: nothing
//! of them is lost on the way, whatever happens to the daemon.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fixture::{Host, Settings, bench, http_get, idle, signal, web};

/// A program that has a word in its memory alone, and writes it down again and again.
const KEEPS_A_WORD: &str = "word=$(cat /proc/sys/kernel/random/uuid)\n\
    echo $word > /root/word\n\
    export word\n\
    setsid sh -c 'while :; do echo $word > /run/saying; mv /run/saying /run/said; sleep 0.1; done' \
    > /dev/null 2>&1 < /dev/null &\n";

/// The word that it has now: once it was asked.
const WORD: &str = "rm -f /run/said; until [ -s /run/said ]; do sleep 0.05; done; cat /run/said";

/// What a VM is, a line each; the last is another each time.
const FACTS: &str = "echo id $(cat /etc/machine-id); cat /etc/hostname /proc/sys/kernel/hostname \
    /sys/class/net/eth0/address; head -c 16 /dev/urandom | md5sum";

const ENDS_THE_ENTRYPOINT: &str = "for one in /proc/[0-9]*; do \
    [ \"$(tr '\\0' ' ' < $one/cmdline)\" != 'sleep infinity ' ] || kill ${one#/proc/}; done";

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

#[test]
fn privileged_what_is_in_the_way_of_a_vm_that_is_saved_costs_it_nothing() {
    let test = "privileged_what_is_in_the_way_of_a_vm_that_is_saved_costs_it_nothing";
    let Some(bench) = bench(test) else { return };
    let mut host = Host::started(&bench, &Settings::default());
    let on_disk = idle("keeper", "[]", "scratch = \"64M\"\n");
    let manifest = host.write("keeper.toml", &on_disk);
    host.launch(&manifest, "keeper", &[]);
    host.sh("keeper", KEEPS_A_WORD);
    let word = host.sh("keeper", "cat /root/word");
    let packs = host.dir().join("state/snapshots/tests/repository/packs");

    // The daemon dies while the VM is being saved: it is the VM that it was, or what was saved.
    dies_within(&host, &["hibernate", "keeper"], |_| {
        std::fs::read_dir(&packs).is_ok_and(|mut packs| packs.next().is_some())
    });
    goes_on(&host, &word);
    // It dies while the guest stops its programs, of which it says nothing before they stand still.
    let asked = Instant::now();
    dies_within(&host, &["hibernate", "keeper"], |_| {
        asked.elapsed() > Duration::from_secs(1)
    });
    goes_on(&host, &word);
    // It dies while there is a fork that knows not yet who it is, or a moment later.
    dies_within(&host, &["fork", "keeper", "--name", "twin"], |host| {
        host.vmms().len() == 2
    });
    goes_on(&host, &word);
    host.until("the fork goes on or is gone", |host| {
        let state = state(host, "twin");
        (state == "ready" && host.vmms().len() == 2)
            || (state == "failed" && host.vmms().len() == 1)
    });
    if state(&host, "twin") == "ready" {
        has_its_word(&host, "twin", &word);
        host.ok(["stop", "twin"]);
    }

    has_a_disk_of_its_own(&host, &word);

    // Another daemon finds what was saved, which was damaged meanwhile.
    host.ok(["hibernate", "keeper"]);
    assert_eq!(host.terminate(), Some(0));
    assert_eq!((host.vmms(), host.mounts()), (vec![], vec![]));
    flip(&packs);
    host.start();
    for refused in [
        &["resume", "keeper"][..],
        &["run", manifest.to_str().unwrap()],
    ] {
        let said = host.refused(refused);
        assert!(
            said.contains("damaged") && said.contains("forelay stop keeper"),
            "{said}"
        );
    }
    assert_eq!(state(&host, "keeper"), "hibernated");
    assert_eq!(host.vmms(), Vec::<u32>::new());
    flip(&packs);
    // What it is to be launched from is another by now: it is what it was, and says so.
    let manifest = host.write("keeper.toml", &on_disk.replace("160", "176"));
    let woken = host.launch(&manifest, "keeper", &[]);
    let notes = woken["launch"]["notes"].to_string();
    assert!(notes.contains("has changed since"), "{notes}");
    has_its_word(&host, "keeper", &word);
    assert_eq!(host.sh("keeper", "cat /root/word"), word);

    host.ok(["stop", "keeper"]);
    for verb in ["pause", "resume", "hibernate", "fork"] {
        let said = host.refused([verb, "keeper"]);
        assert!(said.contains("Stopped"), "{verb}: {said}");
    }
    host.until("nothing is left of it", |host| {
        host.json(["snapshot", "list"]) == json!([])
    });
}

/// Kills the worker in the middle of what was asked for, and waits for the next.
fn dies_within(host: &Host, asked: &[&str], in_the_middle: impl Fn(&Host) -> bool) {
    let mut asking: Child = host.command(asked).spawn().unwrap();
    host.until("it is being done", in_the_middle);
    another_worker(host);
    let _ = asking.wait();
}

/// The VM is there, ready or saved, and lost nothing; nothing else is left that was saved of it.
fn goes_on(host: &Host, word: &str) {
    if state(host, "keeper") == "hibernated" {
        host.ok(["resume", "keeper"]);
    }
    has_its_word(host, "keeper", word);
    assert_eq!(state(host, "keeper"), "ready");
    host.until("no more is kept than what VMs are made of", |host| {
        let all = host.json(["snapshot", "list"]);
        let mut all = all.as_array().unwrap().iter();
        all.all(|one| one["vms"] != json!([]))
    });
}

/// The VM's program still has the word in its memory, as soon as nobody holds it.
fn has_its_word(host: &Host, vm: &str, word: &str) {
    host.until("its program goes on", |host| {
        let said = host.run(["exec", "--timeout", "60", vm, "--", "sh", "-c", WORD]);
        said.stdout == word
    });
}

/// A fork's disk has what the VM's had, and what either writes from then on is its own.
fn has_a_disk_of_its_own(host: &Host, word: &str) {
    host.json(["fork", "keeper", "--name", "twin"]);
    assert_eq!(host.sh("twin", "cat /root/word"), word);
    for vm in ["twin", "keeper"] {
        host.sh(vm, &format!("echo {vm} > /root/whose; sync"));
    }
    for vm in ["twin", "keeper"] {
        assert_eq!(host.sh(vm, "cat /root/whose"), format!("{vm}\n"));
        has_its_word(host, vm, word);
    }
    assert!(host.sh("twin", "mount").contains("upperdir"));
    host.ok(["stop", "twin"]);
}

/// Flips a byte in the middle of each pack; a second time puts it back.
fn flip(packs: &Path) {
    for entry in std::fs::read_dir(packs).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|ending| ending == "pack") {
            let mut bytes = std::fs::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        }
    }
}

#[test]
fn privileged_a_clone_sleeps_and_forks_whatever_it_resumed_from() {
    let test = "privileged_a_clone_sleeps_and_forks_whatever_it_resumed_from";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    // The first has its disk plugged in with all its devices.
    for (tier, further) in [("kernel", "scratch = \"64M\"\n"), ("composed", "")] {
        let manifest = host.write("keeper.toml", &idle("keeper", "[]", further));
        let path = manifest.to_str().unwrap();
        host.ok(["snapshot", "create", "--at", tier, path]);
        let clone = host.launch(&manifest, "keeper", &[]);
        assert_eq!(clone["launch"]["resumed"], tier, "{clone}");
        host.sh("keeper", KEEPS_A_WORD);
        let word = host.sh("keeper", "cat /root/word");
        host.ok(["hibernate", "keeper"]);
        assert_eq!(host.vmms(), Vec::<u32>::new());
        host.ok(["resume", "keeper"]);
        has_its_word(&host, "keeper", &word);
        // It goes on without its entrypoint, and so does what is made of it.
        host.sh("keeper", ENDS_THE_ENTRYPOINT);
        host.until("its entrypoint has ended", |host| {
            host.vm("keeper")["exit_status"] == 128 + 15
        });
        host.ok(["fork", "keeper", "--name", "twin"]);
        assert_eq!(state(&host, "twin"), "ready");
        has_its_word(&host, "twin", &word);
        assert_eq!(
            host.sh("twin", "cat /root/word /etc/hostname"),
            format!("{word}twin\n")
        );
        host.ok(["stop", "keeper", "twin"]);
    }
    host.until(
        "what launches resume from is left, and nothing else",
        |host| host.json(["snapshot", "list"]).as_array().unwrap().len() == 2,
    );
}
