//! A VM lives for its entrypoint: `run` ends with its status, and at once if there is
//! nothing to wait for.

use crate::fixture::{Host, Settings, bench};

fn manifest(host: &Host, name: &str, entrypoint: &str, ready: &str) -> String {
    let text = format!(
        "name = \"{name}\"\nbase = \"debian\"\nentrypoint = {entrypoint}\n{ready}\n\
         [vm]\nmemory_mib = 160\n"
    );
    let path = host.write(&format!("{name}.toml"), &text);
    path.to_str().unwrap().to_owned()
}

#[test]
fn privileged_run_ends_as_the_entrypoint_does() {
    let Some(bench) = bench("privileged_run_ends_as_the_entrypoint_does") else {
        return;
    };
    let host = Host::started(&bench, &Settings::default());
    let script = r#"["sh", "-c", "echo the last words; exit 3"]"#;
    let ends = manifest(&host, "ends", script, "");
    let ran = host.run(["run", &ends]);
    assert_eq!(ran.code, Some(3), "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains("the last words"), "{}", ran.stdout);
    assert_eq!(host.vm("ends")["state"], "stopped");
    assert_eq!(host.vm("ends")["exit_status"], 3);

    // What will never be ready is not waited for, and leaves no VM behind.
    let missing = r#"["/opt/app/missing", "--serve"]"#;
    let dies = r#"["sh", "-c", "echo it is broken; exit 4"]"#;
    let port = "ready = { tcp = 80 }";
    for (name, entrypoint, ready, status, why, last) in [
        (
            "missing",
            missing,
            "",
            127,
            "/opt/app/missing",
            "No such file",
        ),
        (
            "waits",
            missing,
            port,
            127,
            "/opt/app/missing",
            "No such file",
        ),
        (
            "plain",
            r#"["/etc/passwd"]"#,
            "",
            126,
            "/etc/passwd",
            "Permission denied",
        ),
        (
            "dies",
            dies,
            port,
            4,
            "ended with status 4 before",
            "it is broken",
        ),
    ] {
        let path = manifest(&host, name, entrypoint, ready);
        let ran = host.run(["run", &path]);
        assert_eq!(ran.code, Some(status), "{}{}", ran.stdout, ran.stderr);
        for words in ["error: ", why, last] {
            assert!(ran.stderr.contains(words), "{name}: {}", ran.stderr);
        }
        assert_eq!(host.vm(name)["state"], "failed");
        assert_eq!(host.vm(name)["exit_status"], status);
    }
    let detached = manifest(&host, "detached", missing, port);
    let refused = host.refused(["run", "--detach", &detached]);
    assert!(refused.contains("/opt/app/missing"), "{refused}");
    assert!(host.vmms().is_empty());
}
