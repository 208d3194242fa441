//! A host whose components come from a bucket and from a container registry.

use serde_json::Value;

use crate::fixture::{Host, RepositoryOf, Settings, bench, idle};
use crate::servers::Server;

/// What the test's VM needs, and what it is given later.
const COMPONENTS: [&str; 3] = ["debian", "linux-cloud", "forelay-tool"];

fn moved(copied: &Value) -> u64 {
    let all = copied.as_array().unwrap().iter();
    all.map(|one| one["moved_bytes"].as_u64().unwrap()).sum()
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
    let source = Host::new(&bench, &Settings::default());
    let push = ["component", "push", "--to", &url];
    let pushed = source.json(push.iter().chain(&COMPONENTS));
    assert!(moved(&pushed) > 10 << 20, "{pushed}");
    let copy = [
        "component",
        "copy",
        "--all",
        "--from",
        &url,
        "--to",
        &mirror,
    ];
    assert_eq!(moved(&source.json(copy)), moved(&pushed));
    let again = source.json(copy);
    assert_eq!(moved(&again), 0, "{again}");
    assert!(
        again
            .as_array()
            .unwrap()
            .iter()
            .all(|one| one["created"] == false)
    );
    // Another's repository is told from ours, and what is no address is refused.
    let refused = source.refused(["component", "push", "--to", &url, "no-such"]);
    assert!(refused.contains("no component"), "{refused}");

    let settings = Settings {
        repository: RepositoryOf::Url { url, mirror },
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let manifest = host.write("far.toml", &idle("far", "[]", ""));
    let vm = host.launch(&manifest, "far", &[]);
    assert!(
        vm["launch"]["repository_bytes"].as_u64().unwrap() > 0,
        "{vm}"
    );

    // The bucket goes, and the VM is given what no one has read yet.
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
