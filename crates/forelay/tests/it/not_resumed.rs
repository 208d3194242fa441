//! Snapshots that are not made, and launches that cannot resume from one: they boot, and say why.

use std::net::TcpListener;
use std::path::Path;

use serde_json::Value;

use crate::fixture::{Host, Settings, bench, http_get, signal, web};

/// A VMM that refuses clones while there is a file `refuses`, has no room for their memory while
/// there is a file `short`, and starts none while there is a file `waits`.
const VMM: &str = "case \"$*\" in *-incoming*)\n[ -e \"$DIR/refuses\" ] && exit 1\n\
                   [ -e \"$DIR/short\" ] && ulimit -v 300000\n\
                   while [ -e \"$DIR/waits\" ]; do touch \"$DIR/waiting\"; sleep 0.1; done\n;; esac\nexec $QEMU \"$@\"";

#[test]
fn privileged_what_is_in_the_way_of_a_snapshot_is_told_and_launches_boot() {
    let test = "privileged_what_is_in_the_way_of_a_snapshot_is_told_and_launches_boot";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        vmm: Some(VMM),
        ..Settings::default()
    };
    let mut host = Host::started(&bench, &settings);
    let (text, port) = web();
    let manifest = host.write("web.toml", &text);

    daemon_dies_while_making(&host, &manifest);
    two_make_one(&host, &manifest);
    ends_before_it_is_ready(&host, &text);
    ports_are_taken(&host, &manifest, port);

    // What the snapshot cannot be used for, though the VM boots, counts in the end.
    bytes_go_away(&host, &manifest, port);
    assert_eq!(problem(&host), Value::Null);
    host.write("short", "");
    boots_instead(&host, &manifest);
    assert_eq!(problem(&host), Value::Null);
    host.write("refuses", "");
    boots_instead(&host, &manifest);
    assert!(problem(&host).is_string(), "the third in a row");
    never_ready(&mut host, &text);
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

/// Its bytes go away after a launch has found it: the VMM that waits for them is given up.
fn bytes_go_away(host: &Host, manifest: &Path, port: u16) {
    host.write("waits", "");
    host.ok(["memory", "--drop-idle"]);
    let asking = host
        .command(["run", "--detach", "--prefetch", "none", "--name", "web"])
        .arg(manifest)
        .spawn()
        .unwrap();
    host.until("its VMM is about to start", |host| {
        host.dir().join("waiting").exists()
    });
    let packs = host.dir().join("state/snapshots/tests/repository/packs");
    let away = host.dir().join("away");
    std::fs::rename(&packs, &away).unwrap();
    std::fs::remove_file(host.dir().join("waits")).unwrap();
    let asked = asking.wait_with_output().unwrap();
    std::fs::rename(&away, &packs).unwrap();
    let vm = host.vm("web");
    assert!(asked.status.success(), "{vm}\n{}", host.log());
    assert!(http_get(port, "/").contains("hello from a test"));
    assert_eq!(vm["launch"]["resumed"], Value::Null);
    let told = host.ok(["ps"]);
    assert!(
        told.contains("not resumed from the snapshot at kernel: its VM did not"),
        "{told}"
    );
    host.ok(["stop", "web"]);
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
fn ends_before_it_is_ready(host: &Host, text: &str) {
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

/// The VM of a program that never gets ready is ended after a time.
fn never_ready(host: &mut Host, text: &str) {
    assert_eq!(host.terminate(), Some(0));
    let config = host.dir().join("forelay.toml");
    let short = std::fs::read_to_string(&config).unwrap();
    let short = short.replace("[snapshots]\n", "[snapshots]\nmaker_limit_s = 2.0\n");
    std::fs::write(&config, short).unwrap();
    host.start();
    let ready = text.replace("{ tcp = 80 }", "{ path = \"/never\" }");
    let ready = format!("{ready}\n[snapshot]\nat = \"ready\"\nsecrets = \"shared\"\n");
    let ready = host.write("never.toml", &ready);
    let told = host.refused(["snapshot", "create", ready.to_str().unwrap()]);
    assert!(told.contains("held") && told.contains("2s"), "{told}");
    assert_eq!(host.vmms(), Vec::<u32>::new());
    assert_eq!(host.json(["snapshot", "list"]).as_array().unwrap().len(), 1);
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
