//! The daemon may die: VMs neither see a wrong byte nor end, and the next worker has them.

use crate::fixture::{Host, Settings, bench, idle, lives, signal};

/// Checks files of /usr against the digests in their packages, for ever. With a budget
/// below what it reads, its pages are evicted and fetched again all the time.
const CHECKER: &str = r#"
[files."/check"]
mode = "0755"
content = """
#!/bin/sh
cd /
while :; do
  for package in libc6:amd64 perl-base coreutils bash tar; do
    md5sum -c --quiet --ignore-missing /var/lib/dpkg/info/$package.md5sums >> /tmp/wrong 2>&1
    echo done >> /tmp/done
  done
done
"""
"#;

#[test]
fn privileged_vms_outlive_the_worker_and_end_with_the_daemon() {
    let test = "privileged_vms_outlive_the_worker_and_end_with_the_daemon";
    let Some(bench) = bench(test) else { return };
    // Small and slow, so that there are faults under way whenever the worker dies.
    let settings = Settings {
        latency_ms: 10,
        budget_bytes: 12 << 20,
        ..Settings::default()
    };
    let mut host = Host::started(&bench, &settings);
    let manifest = idle("busy", "[]", CHECKER).replace("\"sleep\", \"infinity\"", "\"/check\"");
    let manifest = host.write("busy.toml", &manifest);
    let vm = host.launch(&manifest, "busy", &["--prefetch", "none"]);
    let pid = vm["pid"].as_u64().unwrap();
    let checked = |host: &Host| -> usize {
        let lines = host.run(["exec", "busy", "--", "cat", "/tmp/done"]).stdout;
        lines.lines().count()
    };
    let progress = |host: &Host| {
        let before = checked(host);
        host.until("the guest goes on checking", |host| {
            checked(host) > before + 2
        });
    };
    progress(&host);

    for round in 0..4 {
        let worker = host.worker().unwrap();
        if round < 3 {
            signal("KILL", worker);
        } else {
            // Asked to, through the daemon's own process.
            signal("HUP", host.holder());
        }
        host.until("another worker serves the VM", |host| {
            let listed = host.run(["ps", "--json"]);
            host.worker().is_some_and(|next| next != worker)
                && listed.code == Some(0)
                && listed.stdout.contains("\"busy\"")
        });
        // Journal and kernel tell the same of the VM; its pages are the kernel's to tell.
        let memory = host.json(["memory"]);
        let takeover = &memory["takeover"];
        assert_eq!(takeover["journalled_vms"], 1, "{takeover}");
        assert_eq!(takeover["running_vms"], 1, "{takeover}");
        assert_eq!(takeover["refused_records"], 0, "{takeover}");
        assert_eq!(takeover["disagreements"], serde_json::json!([]));
        host.until("the budget holds again", |host| {
            let memory = host.json(["memory"]);
            memory["resident_bytes"].as_u64() <= memory["budget_bytes"].as_u64()
        });
        host.until("the VM is reached", |host| {
            host.vm("busy")["state"] == "ready"
        });
        assert_eq!(host.vm("busy")["pid"], pid);
        progress(&host);
    }
    assert!(lives(pid));
    assert_eq!(
        host.sh("busy", "cat /tmp/wrong"),
        "",
        "no wrong byte was read"
    );
    let totals = &host.json(["memory"])["totals"];
    assert!(totals["evicted_bytes"].as_u64().unwrap() > 0, "{totals}");
    assert!(totals["demand_fetches"].as_u64().unwrap() > 0, "{totals}");

    assert_eq!(host.terminate(), Some(0));
    assert!(!lives(pid), "SIGTERM ends the VMs");
    assert_eq!((host.mounts(), host.vmms()), (vec![], vec![]));
}

#[test]
fn privileged_a_vm_that_ended_unseen_is_told_and_a_stop_in_the_gap_stops_the_others() {
    let test = "privileged_a_vm_that_ended_unseen_is_told_and_a_stop_in_the_gap_stops_the_others";
    let Some(bench) = bench(test) else { return };
    let mut host = Host::started(&bench, &Settings::default());
    let mut pids = Vec::new();
    for name in ["stays", "goes"] {
        let manifest = host.write(&format!("{name}.toml"), &idle(name, "[]", ""));
        let vm = host.launch(&manifest, name, &[]);
        pids.push(vm["pid"].as_u64().unwrap());
    }
    let worker = host.worker().unwrap();
    signal("STOP", worker);
    signal("KILL", u32::try_from(pids[1]).unwrap());
    signal("KILL", worker);
    host.until("another worker answers", |host| {
        host.worker().is_some_and(|next| next != worker) && host.run(["ps"]).code == Some(0)
    });
    let takeover = host.json(["memory"])["takeover"].clone();
    assert_eq!(takeover["journalled_vms"], 2, "{takeover}");
    assert_eq!(takeover["running_vms"], 1, "{takeover}");
    let told = takeover["disagreements"].to_string();
    assert!(told.contains("vm_gone") && told.contains("goes"), "{told}");
    assert_eq!(host.vm("goes")["state"], "failed");
    assert_eq!(host.sh("stays", "echo here"), "here\n");

    // Workers that die as soon as they start make the holder wait between two of them.
    // SIGTERM then still means: stop the VMs first, and unmount after that.
    let mut killed = 0;
    let mut last = 0;
    host.until("the holder waits before it starts another worker", |host| {
        if let Some(worker) = host.worker().filter(|worker| *worker != last) {
            signal("KILL", worker);
            (killed, last) = (killed + 1, worker);
        }
        killed >= 6 && host.worker().is_none()
    });
    assert!(lives(pids[0]));
    assert_eq!(host.terminate(), Some(0), "{}", host.log());
    assert!(!lives(pids[0]), "stopped, not left without its memory");
    assert_eq!((host.mounts(), host.vmms()), (vec![], vec![]));
}
