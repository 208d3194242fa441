//! What scripts build on: JSON that parses, exit codes, completions, `doctor`.

use std::process::{Command, Stdio};

use crate::fixture::{FORELAY, Host, Settings, bench, idle};

fn forelay(arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(FORELAY);
    command.args(arguments).env_remove("FORELAY_CONFIG");
    command.output().unwrap()
}

#[test]
fn completions_know_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = forelay(&["completions", shell]);
        assert!(output.status.success());
        let script = String::from_utf8(output.stdout).unwrap();
        for command in ["attach", "component", "doctor", "run"] {
            assert!(script.contains(command), "{shell} misses {command}");
        }
    }
}

#[test]
fn wrong_usage_and_wrong_configurations_are_told() {
    let output = forelay(&["run"]);
    assert_eq!(output.status.code(), Some(2));
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("forelay.toml");
    std::fs::write(&config, "[memory]\nbuget_bytes = 1\n").unwrap();
    let output = forelay(&["--config", config.to_str().unwrap(), "ps"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("buget_bytes") && said.contains("line 2"),
        "{said}"
    );
    let socket = dir.path().join("absent.sock");
    let output = forelay(&["--socket", socket.to_str().unwrap(), "ps"]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("start one with `forelay daemon`"), "{said}");
}

#[test]
fn doctor_says_what_it_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("forelay.toml");
    std::fs::write(&config, "[vmm]\nqemu = \"/absent/qemu\"\n").unwrap();
    let output = forelay(&["--config", config.to_str().unwrap(), "doctor", "--json"]);
    assert_eq!(
        output.status.code(),
        Some(1),
        "a host without QEMU is not well"
    );
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = findings.as_array().unwrap();
    let missing: Vec<_> = findings
        .iter()
        .filter(|one| one["grade"] == "missing")
        .collect();
    let qemu = missing
        .iter()
        .find(|one| one["seen"].to_string().contains("/absent/qemu"));
    assert!(
        qemu.is_some_and(|one| one["fix"].is_string()),
        "{findings:?}"
    );
}

#[test]
fn privileged_every_reading_command_prints_json_and_passes_exit_codes_on() {
    let test = "privileged_every_reading_command_prints_json_and_passes_exit_codes_on";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let manifest = host.write("plain.toml", &idle("plain", "[]", ""));
    let prefetched = host.json(["prefetch", manifest.to_str().unwrap()]);
    assert_eq!(prefetched["devices"].as_array().unwrap().len(), 1);
    let vm = host.launch(&manifest, "plain", &[]);
    assert_eq!(vm["profile"], "plain");
    assert_eq!(host.json(["ps"])[0]["name"], "plain");
    assert!(host.json(["memory"])["resident_bytes"].as_u64().unwrap() > 0);
    assert_eq!(host.json(["map", "plain"])["vm"], "plain");
    assert!(host.json(["history"]).is_array());
    assert!(
        host.json(["history", "nobody"])
            .as_array()
            .unwrap()
            .is_empty()
    );
    assert!(host.json(["forecast"]).is_array());
    assert!(host.json(["component", "list"]).as_array().unwrap().len() > 5);
    let shown = host.json(["component", "show", "forelay-rival"]);
    assert_eq!(shown["conflicts"][0]["name"], "forelay-tool");
    for table in ["ps", "memory", "history", "forecast"] {
        assert!(!host.ok([table]).contains('{'), "{table} is for people");
    }
    let script = "echo out; echo err >&2; exit 3";
    let said = host.ok(["exec", "--json", "plain", "--", "sh", "-c", script]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let expected = serde_json::json!({ "status": 3, "stdout": "out\n", "stderr": "err\n" });
    assert_eq!(said, expected);
    let ran = host.run(["exec", "plain", "--", "sh", "-c", "exit 7"]);
    assert_eq!(ran.code, Some(7));
    host.sh("plain", "echo from the guest > /dev/console");
    host.until("the log has the console's line", |host| {
        host.ok(["logs", "plain"]).contains("from the guest")
    });

    // A reader that has seen enough is no failure.
    let mut listing = host.command(["component", "list", "--json"]);
    let mut listing = listing
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(listing.stdout.take());
    let output = listing.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );

    let stopped = host.json(["stop", "plain"]);
    assert_eq!(stopped[0]["state"], "stopped");
    assert_eq!(host.json(["ps"]), serde_json::json!([]));
    let refused = host.refused(["stop", "nobody"]);
    assert!(refused.contains("no VM is called \"nobody\""), "{refused}");
}
