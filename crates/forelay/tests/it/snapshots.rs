//! Launches that resume: from a snapshot that was made of their kernel, of their image, of their
//! program; and that boot when a snapshot is of no use.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::fixture::{Host, Settings, bench, http_get, signal, web};
use crate::frames::frames;

/// Launches, sees the page served, and says what the launch did.
fn served(host: &Host, manifest: &Path, name: &str, port: u16) -> Value {
    let vm = host.launch(manifest, name, &[]);
    let page = http_get(port, "/");
    assert!(page.contains("hello from a test"), "{page}");
    vm
}

/// Like [`served`], while somebody asks for the page again and again from before the launch on:
/// the first of them reach the guest before it has an address of its own.
fn served_to_the_impatient(host: &Host, manifest: &Path, name: &str, port: u16) -> Value {
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let ended = AtomicBool::new(false);
    let asked = AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                let made = TcpStream::connect_timeout(&address, Duration::from_millis(100));
                if let Ok(mut stream) = made {
                    asked.fetch_add(1, Ordering::Relaxed);
                    let _ = stream.set_read_timeout(Some(Duration::from_millis(100)));
                    let _ = stream.write_all(b"GET / HTTP/1.0\r\n\r\n");
                    let _ = stream.read(&mut [0; 64]);
                } else {
                    std::thread::yield_now();
                }
            }
        });
        let vm = served(host, manifest, name, port);
        ended.store(true, Ordering::Relaxed);
        assert!(asked.load(Ordering::Relaxed) > 0, "nobody asked");
        vm
    })
}

fn seconds(vm: &Value) -> f64 {
    vm["launch"]["ready_s"].as_f64().unwrap()
}

#[test]
fn privileged_a_launch_resumes_and_shares_its_memory_and_boots_when_it_cannot() {
    let test = "privileged_a_launch_resumes_and_shares_its_memory_and_boots_when_it_cannot";
    let Some(bench) = bench(test) else { return };
    // The VMM of `half` stands still before it is one.
    let settings = Settings {
        vmm: Some("case \"$*\" in */run/vms/half/*) kill -STOP $$;; esac\nexec $QEMU \"$@\""),
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let (text, port) = web();
    let manifest = host.write("web.toml", &text);
    let booted = served(&host, &manifest, "web", port);
    assert_eq!(booted["launch"]["resumed"], Value::Null);
    host.ok(["stop", "web"]);

    let path = manifest.to_str().unwrap();
    let made = host.json(["snapshot", "create", path]);
    assert_eq!(
        (&made["tier"], &made["problem"]),
        (&"composed".into(), &Value::Null)
    );
    let again = host.json(["snapshot", "create", path]);
    assert_eq!(again["id"], made["id"], "there is one already");
    let first = served_to_the_impatient(&host, &manifest, "web", port);
    assert_eq!(
        first["launch"]["resumed"], "composed",
        "{}",
        first["launch"]
    );
    assert_eq!(host.sh("web", "cat /proc/sys/kernel/hostname"), "web\n");
    assert!(host.ok(["ps"]).contains("composed"));

    // The worker dies; the clone's memory is served by the next one, which makes clones too.
    let worker = host.worker().unwrap();
    signal("KILL", worker);
    host.until("another worker answers", |host| {
        host.worker().is_some_and(|next| next != worker) && host.run(["ps"]).code == Some(0)
    });
    assert_eq!(host.sh("web", "grep -c processor /proc/cpuinfo"), "1\n");
    let takeover = &host.json(["memory"])["takeover"];
    assert_eq!(
        takeover["disagreements"],
        serde_json::json!([]),
        "{takeover}"
    );

    host.until("the next one has verified it", |host| {
        host.json(["snapshot", "list"])[0]["verified"] == true
    });
    let other = text.replace(&format!("{port}:80"), ":80");
    let other_manifest = host.write("other.toml", &other);
    let second = host.launch(&other_manifest, "web-2", &[]);
    assert_eq!(
        second["launch"]["resumed"], "composed",
        "{}",
        second["launch"]
    );
    // What the first has touched is there; guests' allocators differ in what they use besides.
    let fetches = |vm: &Value| vm["launch"]["demand_fetches"].as_u64().unwrap();
    assert!(fetches(&second) * 2 < fetches(&first), "{first} {second}");
    assert_eq!(host.sh("web-2", "cat /proc/sys/kernel/hostname"), "web-2\n");
    let identity = "cat /etc/machine-id; head -c 16 /dev/urandom | md5sum";
    assert_ne!(host.sh("web", identity), host.sh("web-2", identity));

    // One copy of the memory image, as far as neither has written to it.
    let image = made["image"]
        .as_str()
        .unwrap()
        .strip_prefix("sha256:")
        .unwrap();
    let pages = |vm: &Value| {
        let all = frames(vm["pid"].as_u64().unwrap(), &host.dir().join("run/memory")).unwrap();
        let of_memory = all
            .into_iter()
            .filter(|((path, _), _)| path.to_str().unwrap().contains(image));
        of_memory.collect::<std::collections::BTreeMap<_, _>>()
    };
    let (one, two) = (pages(&first), pages(&second));
    let shared = one
        .iter()
        .filter(|(page, frame)| two.get(*page) == Some(*frame))
        .count();
    assert!(
        shared > 1000,
        "{shared} shared pages of {} and {}",
        one.len(),
        two.len()
    );
    let memory = host.json(["memory"]);
    assert!(
        memory["snapshot_resident_bytes"].as_u64().unwrap() > 4 << 20,
        "{memory}"
    );
    assert!(
        host.refused(["snapshot", "remove", image_id(&made)])
            .contains("stop them first")
    );

    dies_with_its_daemon(&host, &other_manifest);

    // Damaged, it is not used: the launch boots and says so.
    host.ok(["stop", "web", "web-2"]);
    host.until("the next worker has verified it", |host| {
        host.json(["snapshot", "list"])[0]["verified"] == true
    });
    damage(&host.dir().join("state/snapshots/tests/repository/packs"));
    let third = served(&host, &manifest, "web", port);
    assert_eq!(third["launch"]["resumed"], Value::Null);
    let told = third["launch"]["snapshot_problems"].to_string();
    assert!(told.contains("not verified yet"), "{told}");
    host.until("it is set aside", |host| {
        host.json(["snapshot", "list"])[0]["problem"].is_string()
    });
    assert!(host.run(["doctor"]).stdout.contains("set aside"));
    let ready = [&booted, &first].map(seconds);
    println!(
        "ready after: booted {:.2} s, resumed {:.2} s",
        ready[0], ready[1]
    );
    host.ok(["stop", "web"]);
    let made_again = host.json(["snapshot", "create", path]);
    assert_ne!(made_again["id"], made["id"]);
    let all = host.json(["snapshot", "list"]);
    assert_eq!(
        all.as_array().unwrap().len(),
        1,
        "it took the place of the other: {all}"
    );
    host.ok(["snapshot", "remove", image_id(&made_again)]);
    assert_eq!(host.json(["snapshot", "list"]), serde_json::json!([]));
}

/// A VM whose daemon dies between its VMM's start and its resume ends with the reason.
fn dies_with_its_daemon(host: &Host, manifest: &Path) {
    let before = host.vmms();
    let mut asking = host
        .command(["run", "--detach", "--name", "half"])
        .arg(manifest)
        .spawn()
        .unwrap();
    let mut stopped = None;
    host.until("its VMM starts", |host| {
        let new = host.vmms().into_iter().find(|pid| !before.contains(pid));
        stopped = new.filter(|pid| stands_still(*pid));
        stopped.is_some()
    });
    let worker = host.worker().unwrap();
    signal("KILL", worker);
    let _ = asking.wait();
    host.until("its VM has failed", |host| {
        let ended = |vm: &Value| vm["name"] == "half" && vm["state"] == "failed";
        let all = host.run(["ps", "--all", "--json"]);
        let all: Value = serde_json::from_str(&all.stdout).unwrap_or_default();
        all.as_array().is_some_and(|all| all.iter().any(ended))
    });
    let error = host.vm("half")["error"].to_string();
    assert!(error.contains("resuming from a snapshot"), "{error}");
    assert!(!host.vmms().contains(&stopped.unwrap()));
}

fn stands_still(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| status.contains("State:\tT"))
}

fn image_id(snapshot: &Value) -> &str {
    snapshot["id"].as_str().unwrap()
}

/// Flips a byte in the middle of each pack.
fn damage(packs: &Path) {
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

/// Files of a manifest that say who its VMs are, which its clones keep, and a program that all
/// clones run and that fails.
const WHO_IT_IS: &str = "\n[files.\"/etc/machine-id\"]\n\
     content = \"0123456789abcdef0123456789abcdef\\n\"\n\
     [files.\"/etc/ssh/ssh_host_ed25519_key\"]\nmode = \"0600\"\ncontent = \"the manifest's\"\n\
     [files.\"/etc/forelay/resume.d/10-fails\"]\nmode = \"0755\"\n\
     content = \"#!/bin/sh\\nexit 3\\n\"\n";

#[track_caller]
fn is_who_it_should_be(host: &Host) {
    let found = host.sh("web", "cat /etc/machine-id /etc/ssh/ssh_host_ed25519_key");
    assert_eq!(found, "0123456789abcdef0123456789abcdef\nthe manifest's");
    let notes = host.vm("web")["launch"]["notes"].to_string();
    assert!(notes.contains("10-fails: it ended with code 3"), "{notes}");
}

#[test]
fn privileged_the_kernels_snapshot_serves_any_manifest_and_the_programs_only_where_it_may() {
    let test =
        "privileged_the_kernels_snapshot_serves_any_manifest_and_the_programs_only_where_it_may";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let (text, port) = web();
    let text = format!("{text}{WHO_IT_IS}");
    let manifest = host.write("web.toml", &text);
    let path = manifest.to_str().unwrap();
    // A page of its own is a file that the program has read.
    let refused = host.refused(["snapshot", "create", "--at", "ready", path]);
    assert!(
        refused.contains("composed") || refused.contains("shared"),
        "{refused}"
    );
    host.json(["snapshot", "create", "--at", "kernel", path]);
    let of_kernel = served(&host, &manifest, "web", port);
    assert_eq!(
        of_kernel["launch"]["resumed"], "kernel",
        "{}",
        of_kernel["launch"]
    );
    is_who_it_should_be(&host);
    host.ok(["stop", "web"]);
    let scratch = text.replace("memory_mib = 192", "memory_mib = 192\nscratch = \"64M\"");
    let scratch = host.write("scratch.toml", &scratch);
    let on_disk = served(&host, &scratch, "web", port);
    assert_eq!(
        on_disk["launch"]["resumed"], "kernel",
        "{}",
        on_disk["launch"]
    );
    assert!(host.sh("web", "mount").contains("upperdir"));
    host.ok(["stop", "web"]);

    let ready = format!("{text}\n[snapshot]\nat = \"ready\"\nsecrets = \"shared\"\n");
    let ready = host.write("ready.toml", &ready);
    host.json(["snapshot", "create", ready.to_str().unwrap()]);
    let of_program = served(&host, &ready, "web", port);
    assert_eq!(
        of_program["launch"]["resumed"], "ready",
        "{}",
        of_program["launch"]
    );
    is_who_it_should_be(&host);
    println!(
        "ready after: kernel {:.2} s, program {:.2} s",
        seconds(&of_kernel),
        seconds(&of_program)
    );
    let listed = host.json(["snapshot", "list"]);
    let listed = listed.as_array().unwrap();
    println!(
        "{} bytes on disk for both",
        listed[0]["domain_stored_bytes"]
    );
    assert_eq!(listed.len(), 2);
}

#[test]
fn privileged_what_is_launched_again_resumes_without_being_told() {
    let test = "privileged_what_is_launched_again_resumes_without_being_told";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        makes_snapshots: true,
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let (text, port) = web();
    let manifest = host.write("web.toml", &text);
    served(&host, &manifest, "web", port);
    host.ok(["stop", "web"]);
    assert_eq!(host.json(["snapshot", "list"]), serde_json::json!([]));
    let second = served(&host, &manifest, "web", port);
    assert_eq!(second["launch"]["resumed"], Value::Null);
    let made = |count: usize| {
        host.until("all snapshots are made beside the VM", |host| {
            let all = host.json(["snapshot", "list"]);
            let all = all.as_array().unwrap();
            all.len() == count && all.iter().all(|one| one["verified"] == true)
        });
    };
    made(2);
    host.ok(["stop", "web"]);
    let third = served(&host, &manifest, "web", port);
    assert_eq!(
        third["launch"]["resumed"], "composed",
        "{}",
        third["launch"]
    );
    host.ok(["stop", "web"]);

    // Another profile has the kernel's snapshot from the start, and gets its own in turn. Its
    // program is not started for nobody, though it says that it may be cloned.
    let other = text.replacen("web", "other", 1).replace("hello", "HELLO");
    let other = format!("{other}\n[snapshot]\nat = \"ready\"\nsecrets = \"shared\"\n");
    let other = host.write("other.toml", &other);
    for from in ["kernel", "kernel", "composed", "composed"] {
        let vm = host.launch(&other, "other", &[]);
        assert_eq!(vm["launch"]["resumed"], from, "{}", vm["launch"]);
        if from == "kernel" && host.json(["history", "other"])[0]["launches"] == 2 {
            made(3);
        }
        host.ok(["stop", "other"]);
    }
    let tiers = host.json(["snapshot", "list"]);
    let tiers = tiers.as_array().unwrap().iter().map(|one| &one["tier"]);
    assert_eq!(
        tiers.collect::<Vec<_>>(),
        ["kernel", "composed", "composed"]
    );
}

#[test]
fn privileged_a_vmm_stands_by_for_the_launch_that_is_likely_and_outlives_no_daemon() {
    let test = "privileged_a_vmm_stands_by_for_the_launch_that_is_likely_and_outlives_no_daemon";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let (text, port) = web();
    let manifest = host.write("web.toml", &text);
    let made = host.json(["snapshot", "create", manifest.to_str().unwrap()]);
    let stands_by = || {
        host.ok(["prefetch", manifest.to_str().unwrap()]);
        host.until("a VMM stands by", |host| {
            host.json(["memory"])["standby_vmms"] == 1
        });
    };
    stands_by();
    let [waiting] = host.vmms()[..] else {
        panic!("{:?}", host.vmms())
    };
    assert!(host.json(["memory"])["standby_private_bytes"].as_u64() > Some(1 << 20));
    let vm = served(&host, &manifest, "web", port);
    let told = |vm: &Value, figure: &str| vm["launch"][figure].clone();
    assert_eq!(told(&vm, "resumed"), "composed", "{vm}");
    assert_eq!(told(&vm, "stood_by"), true, "{vm}");
    assert_eq!(told(&vm, "premapped"), true, "it was composed once: {vm}");
    assert_eq!(vm["pid"], waiting, "{vm}");
    assert_eq!(host.sh("web", "hostname; cat /etc/hostname"), "web\nweb\n");
    let left = std::fs::read_dir(host.dir().join("run/standby")).unwrap();
    assert_eq!(left.count(), 0, "all of it is the VM's");

    // Its worker dies: the VM is taken over, and what stands by for nobody ends.
    host.ok(["stop", "web"]);
    stands_by();
    let named = served(&host, &manifest, "other", port);
    assert_eq!(told(&named, "stood_by"), true, "{named}");
    stands_by();
    let worker = host.worker().unwrap();
    signal("KILL", worker);
    host.until("another worker answers", |host| {
        host.worker().is_some_and(|next| next != worker) && host.run(["ps"]).code == Some(0)
    });
    assert_eq!(host.sh("other", "hostname"), "other\n");
    host.until("the VM's alone is left", |host| {
        host.vmms()
            .iter()
            .map(|pid| Value::from(*pid))
            .eq([named["pid"].clone()])
    });
    let takeover = &host.json(["memory"])["takeover"];
    assert_eq!(takeover["disagreements"], serde_json::json!([]));
    host.ok(["stop", "other"]);
    assert!(host.vmms().is_empty());

    // It is in nobody's way.
    host.until("the next one has verified it", |host| {
        host.json(["snapshot", "list"])[0]["verified"] == true
    });
    stands_by();
    host.ok(["snapshot", "remove", image_id(&made)]);
    assert_eq!(host.json(["memory"])["standby_vmms"], 0);
    assert!(host.vmms().is_empty());
}

#[test]
fn privileged_a_daemon_that_is_stopped_while_it_makes_a_snapshot_leaves_nothing_of_it() {
    let test = "privileged_a_daemon_that_is_stopped_while_it_makes_a_snapshot_leaves_nothing_of_it";
    let Some(bench) = bench(test) else { return };
    let mut host = Host::started(&bench, &Settings::default());
    let (text, _) = web();
    let manifest = host.write("web.toml", &text);
    let making = host
        .command(["snapshot", "create"])
        .arg(&manifest)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    host.until("the maker's VMM runs", |host| !host.vmms().is_empty());
    assert_eq!(host.terminate(), Some(0));
    let making = making.wait_with_output().unwrap();
    assert!(!making.status.success());
    assert!(host.vmms().is_empty(), "{:?}", host.vmms());
    host.start();
    assert_eq!(host.json(["snapshot", "list"]), serde_json::json!([]));
}

#[test]
fn privileged_the_memory_of_a_likely_clone_is_there_before_it_is_asked_for() {
    let test = "privileged_the_memory_of_a_likely_clone_is_there_before_it_is_asked_for";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        ahead: true,
        ..Settings::default()
    };
    let mut host = Host::new(&bench, &settings);
    // Without a VMM that stands by, which would ask for it before its launch does.
    let config = host.dir().join("forelay.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let text = text.replace("[snapshots]\n", "[snapshots]\nstandby = 0\n");
    std::fs::write(&config, text).unwrap();
    host.start();
    let (text, port) = web();
    let manifest = host.write("web.toml", &text);
    let path = manifest.to_str().unwrap();
    host.json(["snapshot", "create", path]);
    let fetches = |vm: &Value| {
        assert_eq!(vm["launch"]["resumed"], "composed", "{}", vm["launch"]);
        vm["launch"]["demand_fetches"].as_u64().unwrap()
    };
    let first = fetches(&served(&host, &manifest, "web", port));
    host.until("its launch is learned", |host| {
        host.json(["history", "web"])[0]["working_set_bytes"].as_u64() > Some(0)
    });
    host.ok(["stop", "web"]);
    assert_eq!(host.terminate(), Some(0));

    // All shared memory is lost with the daemon; nobody asks the next one for anything.
    host.start();
    let resident = |host: &Host| host.json(["memory"])["snapshot_resident_bytes"].as_u64();
    host.until("its memory is loaded", |host| {
        resident(host) > Some(4 << 20)
    });
    assert!(host.vmms().is_empty());
    host.ok(["prefetch", "--wait", path]);
    let loaded = resident(&host);
    let second = fetches(&served(&host, &manifest, "web", port));
    println!("demand fetches: {first} of the first clone, {second} of one that was forecast");
    println!("{loaded:?} bytes of its memory were there");
    assert!(second * 10 < first, "{second} of {first}");
}

#[test]
fn privileged_a_clone_has_the_hosts_time_though_that_is_before_its_makers() {
    let test = "privileged_a_clone_has_the_hosts_time_though_that_is_before_its_makers";
    let Some(bench) = bench(test) else { return };
    // VMs that boot have a clock of another time.
    let settings = Settings {
        vmm: Some(
            "case \"$*\" in *-incoming*) ;; *) set -- \"$@\" -rtc base=2045-06-07T08:09:10;; esac\n\
             exec $QEMU \"$@\"",
        ),
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let (text, port) = web();
    let manifest = host.write("web.toml", &text);
    let path = manifest.to_str().unwrap();
    let now = || std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    for tier in ["kernel", "composed"] {
        host.json(["snapshot", "create", "--at", tier, path]);
        let clone = served(&host, &manifest, "web", port);
        assert_eq!(clone["launch"]["resumed"], tier, "{}", clone["launch"]);
        assert_eq!(clone["launch"]["notes"], Value::Null, "{clone}");
        let before = now();
        let told = host.sh("web", "date +%s; stat -c %Y /sys");
        let told: Vec<u64> = told.lines().map(|line| line.parse().unwrap()).collect();
        let [clock, booted] = told[..] else {
            panic!("{told:?}")
        };
        assert!((before..=now()).contains(&clock), "{before} {clock}");
        assert!(booted > clock, "its maker was ahead: {told:?}");
        host.ok(["stop", "web"]);
    }
}
