//! Hosts whose components come from a bucket and from a container registry: through faults, from
//! a mirror, and from what the host has kept when nobody answers.

use std::path::PathBuf;

use serde_json::Value;
use tokio::runtime::Runtime;

use crate::fixture::{Bench, Host, RepositoryOf, Settings, bench, idle};
use crate::proxy::{Fault, Proxy};
use crate::servers::Server;

/// What the tests' VMs need, and what one is given later.
const COMPONENTS: [&str; 3] = ["debian", "linux-cloud", "forelay-tool"];

/// Requests for bytes that each meet one of these, in turn, are asked again.
fn faults() -> Vec<Fault> {
    let busy = Fault::Answer("503 Busy\r\n");
    let wait = Fault::Answer("429 Slow down\r\nretry-after: 1\r\n");
    let all = [
        busy,
        Fault::Lost,
        Fault::CutAfter(1000),
        Fault::None,
        Fault::Flip(500),
        Fault::Stall,
        wait,
    ];
    all.to_vec()
}

fn moved(copied: &Value) -> u64 {
    let all = copied.as_array().unwrap().iter();
    all.map(|one| one["moved_bytes"].as_u64().unwrap()).sum()
}

/// Copies the components to a repository; bytes that were moved.
fn push(bench: &Bench, url: &str) -> u64 {
    let source = Host::new(bench, &Settings::default());
    let words = ["component", "push", "--to", url];
    let pushed = source.json(words.iter().chain(&COMPONENTS));
    // What is there is not moved again.
    let again = source.json(words.iter().chain(&COMPONENTS));
    assert_eq!(moved(&again), 0, "{again}");
    moved(&pushed)
}

fn far(host: &Host) -> PathBuf {
    host.write("far.toml", &idle("far", "[]", ""))
}

fn from_repository(vm: &Value) -> u64 {
    vm["launch"]["repository_bytes"].as_u64().unwrap()
}

#[test]
fn privileged_a_vm_lives_off_a_bucket_and_then_off_its_mirror() {
    let test = "privileged_a_vm_lives_off_a_bucket_and_then_off_its_mirror";
    let Some(bench) = bench(test) else { return };
    let (Some(bucket), Some(registry)) = (Server::s3(), Server::registry()) else {
        return println!("SKIPPED {test}: needs moto and docker-registry");
    };
    let url = bucket.s3_url(bucket.address);
    let mirror = registry.oci_url(registry.address);
    let pushed = push(&bench, &url);
    assert!(pushed > 10 << 20, "{pushed}");
    let source = Host::new(&bench, &Settings::default());
    let copy = [
        "component",
        "copy",
        "--all",
        "--from",
        &url,
        "--to",
        &mirror,
    ];
    assert_eq!(moved(&source.json(copy)), pushed);
    let refused = source.refused(["component", "push", "--to", &url, "no-such"]);
    assert!(refused.contains("no component"), "{refused}");

    let settings = Settings {
        repository: RepositoryOf::Url {
            url,
            mirrors: vec![mirror],
        },
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let vm = host.launch(&far(&host), "far", &[]);
    assert!(from_repository(&vm) > 0, "{vm}");

    // The bucket goes, and the VM is given what nobody has read yet.
    drop(bucket);
    host.ok(["attach", "far", "forelay-tool"]);
    let said = host.ok(["exec", "far", "--", "forelay-tool"]);
    assert_eq!(said, "hello from the tool\n");
    host.until("the bucket is named", |host| {
        let health = host.get("/v1/health").unwrap_or_default();
        health["degraded"]
            .to_string()
            .contains("s3://vms/team/a is set aside")
    });
}

#[test]
fn privileged_a_vm_boots_from_a_registry_through_faults_and_again_without_it() {
    let test = "privileged_a_vm_boots_from_a_registry_through_faults_and_again_without_it";
    let Some(bench) = bench(test) else { return };
    let Some(registry) = Server::registry() else {
        return println!("SKIPPED {test}: needs docker-registry");
    };
    push(&bench, &registry.oci_url(registry.address));
    let runtime = Runtime::new().unwrap();
    let proxy = runtime.block_on(Proxy::to(registry.address));
    let settings = Settings {
        repository: RepositoryOf::Url {
            url: registry.oci_url(proxy.address),
            mirrors: Vec::new(),
        },
        // What stalls is given up after this.
        timeout_s: Some(3.0),
        ..Settings::default()
    };
    let mut host = Host::started(&bench, &settings);
    host.until("the kernel is there", |host| {
        host.run(["doctor", "--json"])
            .stdout
            .contains("\"accelerator\"")
    });
    let faults = faults();
    let met = faults.len();
    proxy.meet("blobs/sha", faults);
    let manifest = far(&host);
    let vm = host.launch(&manifest, "far", &["--prefetch", "none"]);
    assert!(from_repository(&vm) > 0, "{vm}");
    assert!(proxy.count("blobs/sha") > met, "all of them were met");
    let check = "cd /; md5sum -c --quiet --ignore-missing \
                 /var/lib/dpkg/info/dash.md5sums && echo fine";
    assert_eq!(host.sh("far", check), "fine\n");

    // The registry goes: what the cache has suffices, also after a restart.
    host.ok(["stop", "far"]);
    let load = ["prefetch", "--wait", "--mode", "everything"];
    host.ok(load.iter().chain(&[manifest.to_str().unwrap()]));
    drop(registry);
    let again = host.launch(&manifest, "again", &["--prefetch", "none"]);
    assert_eq!(from_repository(&again), 0, "{again}");
    assert_eq!(host.sh("again", check), "fine\n");
    host.ok(["stop", "again"]);
    assert_eq!(host.terminate(), Some(0));
    host.start();
    let restarted = host.launch(&manifest, "restarted", &["--prefetch", "none"]);
    assert_eq!(from_repository(&restarted), 0, "{restarted}");
    // What it never had is told to be away, at once.
    let manifest = host.write("web.toml", &idle("web", "[\"nginx\"]", ""));
    let refused = host.refused(["run", "--detach", manifest.to_str().unwrap()]);
    assert!(refused.contains("nginx"), "{refused}");
    let health = host.get("/v1/health").unwrap();
    assert!(
        health["degraded"].to_string().contains("repository"),
        "{health}"
    );
}
