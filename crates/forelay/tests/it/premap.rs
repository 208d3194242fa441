//! Launches set up before they are asked for: used if they fit, never if they are stale,
//! gone with the daemon that prepared them.

use std::path::Path;

use crate::fixture::{Host, Settings, bench, idle, signal};

const PREMAPPED: &str = "/launch/premapped";

/// Says that the next launch of a manifest is certain, and waits until it is prepared.
fn prepare(host: &Host, manifest: &Path) {
    host.ok(["prefetch", manifest.to_str().unwrap()]);
    host.until("the launch is mapped ahead", |host| {
        host.json(["memory"])["premapped_launches"] == 1
    });
}

fn prepared_files(host: &Host) -> usize {
    let entries = std::fs::read_dir(host.dir().join("run/premapped"));
    entries.map_or(0, Iterator::count)
}

#[test]
fn privileged_a_reserved_launch_only_starts_its_vmm_and_a_stale_one_is_composed_anew() {
    let test = "privileged_a_reserved_launch_only_starts_its_vmm_and_a_stale_one_is_composed_anew";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let words = |words: &str| format!("[files.\"/words\"]\ncontent = \"{words}\"\n");
    let manifest = idle("quick", "[]", &words("as prepared"));
    let manifest = host.write("quick.toml", &manifest);

    prepare(&host, &manifest);
    assert_eq!(prepared_files(&host), 1);
    let vm = host.launch(&manifest, "quick", &[]);
    assert_eq!(vm.pointer(PREMAPPED), Some(&true.into()), "{vm}");
    assert_eq!(prepared_files(&host), 0, "the VM has it");
    let inside = "cat /words /etc/hostname; hostname";
    assert_eq!(host.sh("quick", inside), "as preparedquick\nquick\n");

    // Prepared for the name `quick`: another VM has its own name and composes for itself.
    prepare(&host, &manifest);
    let vm = host.launch(&manifest, "other", &[]);
    assert_eq!(vm.pointer(PREMAPPED), Some(&false.into()), "{vm}");
    assert_eq!(host.sh("other", inside), "as preparedother\nother\n");
    host.ok(["stop", "quick", "other"]);

    // The manifest changed between: what was prepared is not used, and not kept.
    prepare(&host, &manifest);
    let changed = idle("quick", "[]", &words("changed"));
    let changed = host.write("changed.toml", &changed);
    let vm = host.launch(&changed, "quick", &[]);
    assert_eq!(vm.pointer(PREMAPPED), Some(&false.into()), "{vm}");
    assert_eq!(host.sh("quick", inside), "changedquick\nquick\n");
    assert_eq!(prepared_files(&host), 0);
    host.ok(["stop", "quick"]);

    // The worker dies between: nothing is left, and the next one launches all the same.
    prepare(&host, &manifest);
    let worker = host.worker().unwrap();
    signal("KILL", worker);
    host.until("another worker answers", |host| {
        host.worker().is_some_and(|next| next != worker) && host.run(["ps"]).code == Some(0)
    });
    assert_eq!(prepared_files(&host), 0);
    let vm = host.launch(&manifest, "quick", &[]);
    assert_eq!(vm.pointer(PREMAPPED), Some(&false.into()), "{vm}");
    prepare(&host, &changed);
    host.ok(["stop", "quick"]);
    let vm = host.launch(&changed, "quick", &[]);
    assert_eq!(vm.pointer(PREMAPPED), Some(&true.into()), "{vm}");
}
