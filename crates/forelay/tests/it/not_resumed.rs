//! Snapshots that are not made, and launches that cannot resume from one: they boot, and say why.

use std::net::TcpListener;
use std::path::Path;

use serde_json::Value;

use crate::fixture::{Host, Settings, bench, http_get, signal, web};

/// A VMM that refuses clones while there is a file `refuses`, and has no room for their memory
/// while there is a file `short`.
const VMM: &str = "case \"$*\" in *-incoming*)\n[ -e \"$DIR/refuses\" ] && exit 1\n\
                   [ -e \"$DIR/short\" ] && ulimit -v 300000\n;; esac\nexec $QEMU \"$@\"";

#[test]
fn privileged_what_is_in_the_way_of_a_snapshot_is_told_and_launches_boot() {
    let test = "privileged_what_is_in_the_way_of_a_snapshot_is_told_and_launches_boot";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        vmm: Some(VMM),
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let (text, port) = web();
    let manifest = host.write("web.toml", &text);

    daemon_dies_while_making(&host, &manifest);
    two_make_one(&host, &manifest);
    never_ready(&host, &text);
    ports_are_taken(&host, &manifest, port);

    // What the snapshot cannot be used for, though the VM boots, counts in the end.
    host.write("short", "");
    let booted = host.launch(&manifest, "web", &[]);
    assert!(http_get(port, "/").contains("hello from a test"));
    assert_eq!(booted["launch"]["resumed"], Value::Null);
    let told = host.ok(["ps"]);
    assert!(
        told.contains("not resumed from the snapshot at kernel"),
        "{told}"
    );
    assert_eq!(problem(&host), Value::Null);
    host.ok(["stop", "web"]);
    std::fs::remove_file(host.dir().join("short")).unwrap();

    host.write("refuses", "");
    boots_instead(&host, &manifest);
    assert_eq!(problem(&host), Value::Null);
    boots_instead(&host, &manifest);
    assert!(problem(&host).is_string(), "the third in a row");
}

/// What is wrong with the one snapshot that there is.
#[track_caller]
fn problem(host: &Host) -> Value {
    let all = host.json(["snapshot", "list"]);
    assert_eq!(all.as_array().unwrap().len(), 1, "{all}");
    all[0]["problem"].clone()
}

/// Launches a VM that boots because it cannot resume, and stops it at once.
fn boots_instead(host: &Host, manifest: &Path) {
    let mut asking = host
        .command(["run", "--detach", "--name", "web"])
        .arg(manifest)
        .spawn()
        .unwrap();
    host.until("it boots", |host| {
        let all = host.json(["ps"]);
        let boots = |vm: &Value| {
            let told = vm["launch"]["snapshot_problems"].to_string();
            told.contains("not resumed from the snapshot at kernel")
        };
        all.as_array().unwrap().iter().any(boots)
    });
    host.ok(["stop", "web"]);
    let _ = asking.wait();
}

fn daemon_dies_while_making(host: &Host, manifest: &Path) {
    let mut asking = host
        .command(["snapshot", "create", "--at", "kernel"])
        .arg(manifest)
        .spawn()
        .unwrap();
    host.until("its maker starts", |host| !host.vmms().is_empty());
    let worker = host.worker().unwrap();
    signal("KILL", worker);
    assert!(!asking.wait().unwrap().success());
    host.until("the next worker has ended the maker", |host| {
        host.worker().is_some_and(|next| next != worker) && host.vmms().is_empty()
    });
    assert_eq!(host.json(["snapshot", "list"]), serde_json::json!([]));
}

fn two_make_one(host: &Host, manifest: &Path) {
    let create = || {
        let mut command = host.command(["snapshot", "create", "--json", "--at", "kernel"]);
        command.arg(manifest).stdout(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let both = [create(), create()];
    let ids = both.map(|child| {
        let output = child.wait_with_output().unwrap();
        let made: Value = serde_json::from_slice(&output.stdout).unwrap();
        made["id"].clone()
    });
    assert!(ids[0].is_string() && ids[0] == ids[1], "{ids:?}");
    assert_eq!(problem(host), Value::Null);
}

/// A program that ends before it is ready is of no use to clones.
fn never_ready(host: &Host, text: &str) {
    let ready = text.replace(
        "\"nginx\", \"-g\", \"daemon off;\"",
        "\"sh\", \"-c\", \"exit 3\"",
    );
    let ready = format!("{ready}\n[snapshot]\nat = \"ready\"\nsecrets = \"shared\"\n");
    let ready = host.write("never.toml", &ready);
    let told = host.refused(["snapshot", "create", ready.to_str().unwrap()]);
    assert!(told.contains("before"), "{told}");
    assert_eq!(host.vmms(), Vec::<u32>::new());
    assert_eq!(problem(host), Value::Null, "the kernel's is as it was");
}

/// What fails a boot as well says nothing of the snapshot.
fn ports_are_taken(host: &Host, manifest: &Path, port: u16) {
    let taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
    for _ in 0..3 {
        let path = manifest.to_str().unwrap();
        host.refused(["run", "--detach", "--name", "web", path]);
        let vm = host.vm("web");
        let told = vm["launch"]["snapshot_problems"].to_string();
        assert!(told.contains("not resumed"), "{vm}");
    }
    assert_eq!(problem(host), Value::Null);
    drop(taken);
}
