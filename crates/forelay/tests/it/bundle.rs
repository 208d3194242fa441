//! More components than the VMM has slots: the smallest share a device, and nobody in the
//! guest or after a takeover can tell.

use serde_json::Value;

use crate::fixture::{Host, Settings, bench, idle, signal};

/// Checks nginx's files against the digests in its package; silent if all is right.
const CHECK: &str =
    "cd /; cat /var/lib/dpkg/info/nginx*.md5sums | md5sum -c --quiet --ignore-missing";

fn labels(map: &Value) -> Vec<String> {
    let devices = map["devices"].as_array().unwrap().iter();
    devices
        .map(|one| one["component"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn privileged_components_beyond_the_slots_share_a_device() {
    let Some(bench) = bench("privileged_components_beyond_the_slots_share_a_device") else {
        return;
    };
    // The map image, the base, and one for all others.
    let settings = Settings {
        pmem_slots: Some(3),
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let manifest = idle("many", "[\"nginx\", \"forelay-tool\"]", "");
    let manifest = host.write("many.toml", &manifest);
    host.launch(&manifest, "many", &[]);
    let mapped = host.json(["map", "many"]);
    let labels_of = labels(&mapped);
    assert_eq!(labels_of.len(), 3, "{labels_of:?}");
    assert!(labels_of[1].starts_with("debian "), "{labels_of:?}");
    assert_eq!(labels_of[2], "bundle of 2");
    assert_eq!(host.sh("many", "forelay-tool"), "hello from the tool\n");

    // A guest file's place is told within the bundle, and the bytes there are the file's.
    let files = mapped["files"].as_array().unwrap();
    let program = files
        .iter()
        .find(|file| file["path"] == "/usr/sbin/nginx")
        .unwrap_or_else(|| panic!("{files:?}"));
    assert_eq!(program["slot"], mapped["devices"][2]["slot"], "{program}");

    // Another worker serves the same bundle: what was not read before is read now.
    let worker = host.worker().unwrap();
    signal("KILL", worker);
    host.until("another worker answers", |host| {
        host.worker().is_some_and(|next| next != worker) && host.run(["ps"]).code == Some(0)
    });
    assert_eq!(host.sh("many", CHECK), "");

    // A bundle is the same for all VMs that have it, and room is left for what is attached.
    host.launch(&manifest, "again", &[]);
    let again = host.json(["map", "again"]);
    assert_eq!(labels(&again), labels_of);
    assert_eq!(
        again["devices"][2]["path"], mapped["devices"][2]["path"],
        "one file for both"
    );
    host.ok(["attach", "again", "forelay-part"]);
    assert_eq!(host.sh("again", "forelay-part"), "hello from the part\n");
    assert_eq!(host.sh("again", CHECK), "");
}
