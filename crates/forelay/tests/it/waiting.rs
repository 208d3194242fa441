//! A VM that waits for bytes is seen waiting, and goes on when they can be had again.

use std::process::Stdio;

use serde_json::Value;

use crate::fixture::{Host, RepositoryOf, Settings, bench, idle};

#[test]
fn privileged_a_vm_that_waits_for_the_repository_is_seen_waiting() {
    let test = "privileged_a_vm_that_waits_for_the_repository_is_seen_waiting";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        repository: RepositoryOf::Test,
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let manifest = host.write("good.toml", &idle("good", "[]", ""));
    let vm = host.launch(&manifest, "good", &["--prefetch", "none"]);
    assert_eq!(vm["waiting"], Value::Null);
    assert_eq!(
        host.get("/v1/health").unwrap()["waiting"],
        Value::Array(vec![])
    );

    let (repository, away) = (host.repository(), host.dir().join("away"));
    std::fs::rename(&repository, &away).unwrap();
    let check = "cd /; md5sum -c --quiet --ignore-missing \
                 /var/lib/dpkg/info/perl-base.md5sums && echo fine";
    let now_ms = || std::time::UNIX_EPOCH.elapsed().unwrap().as_millis() as i64;
    let begun_ms = now_ms();
    let mut reader = host.command(["exec", "good", "--", "sh", "-c", check]);
    let reader = reader.stdout(Stdio::piped()).spawn().unwrap();
    let waiting = |host: &Host| host.vm("good")["waiting"].clone();
    host.until("the wait is seen", |host| waiting(host).is_object());
    // Longer than the daemon tries again.
    host.until("it has lasted", |host| {
        waiting(host)["waited_s"].as_f64() > Some(3.0)
    });
    let wait = waiting(&host);
    assert_eq!(wait["culprit"], "repository", "{wait}");
    assert!(wait["error"].is_string(), "{wait}");
    let component = wait["component"].as_str().unwrap();
    assert!(component.starts_with("debian"), "{wait}");
    let since_ms = wait["since_ms"].as_i64().unwrap();
    assert!((begun_ms..=now_ms() - 3_000).contains(&since_ms), "{wait}");
    assert_eq!(host.vm("good")["state"], "ready");
    let listed = host.ok(["ps"]);
    assert!(
        listed.contains("waiting") && listed.contains("the repository"),
        "{listed}"
    );
    let health = host.get("/v1/health").unwrap();
    assert_eq!(health["waiting"][0]["vm"], "good", "{health}");
    let doctor = host.run(["doctor", "--json"]).stdout;
    assert!(doctor.contains("waiting VM"), "{doctor}");
    let told = host.log().matches("a VM waits for bytes").count();
    assert_eq!(told, 1, "{}", host.log());

    std::fs::rename(&away, &repository).unwrap();
    let read = reader.wait_with_output().unwrap();
    assert_eq!(read.stdout, b"fine\n", "{}", host.log());
    host.until("nobody waits", |host| waiting(host).is_null());
    host.until("the end is told", |host| {
        host.log().contains("a VM waits no longer")
    });
}
