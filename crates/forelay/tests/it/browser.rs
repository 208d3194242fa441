//! The dashboard in headless Chromium, driven by Playwright (`browser.py`): every page of a host
//! with VMs at two widths and in two colours, what axe-core says of it, the keyboard, what happens
//! while it is looked at, and pages of others in the same browser.
//!
//! Leaves screenshots in `target/screenshots`, or where `FORELAY_SCREENSHOTS` says: those in
//! `docs/dashboard` are from here.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::fixture::{Host, Settings, bench, idle, reserved_port, web};

/// Launches of a history that is taken in, and seconds between them.
const LAUNCHES: u64 = 60;
const EVERY_S: u64 = 150;

/// The Python that has Playwright, if it is installed and there is a Chromium.
fn python() -> Option<PathBuf> {
    let cache = match std::env::var_os("FORELAY_TEST_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-cache"),
    };
    let python = cache.join("browser/bin/python");
    let chromium = Command::new("chromium").arg("--version").output();
    (python.exists() && chromium.is_ok_and(|output| output.status.success())).then_some(python)
}

/// Where screenshots go.
fn pictures() -> PathBuf {
    let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/screenshots");
    let dir = std::env::var_os("FORELAY_SCREENSHOTS").map_or(usual, PathBuf::from);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// A history of launches at intervals until a while ago.
fn history(host: &Host) {
    let now_s = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let line = |at: u64| {
        let time_s = now_s - (LAUNCHES - at) * EVERY_S;
        let worker = if at.is_multiple_of(3) {
            format!("{time_s},worker,tests\n")
        } else {
            String::new()
        };
        format!("{time_s},web,tests\n{worker}")
    };
    let lines: String = (0..LAUNCHES).map(line).collect();
    let file = host.write("launches.csv", &format!("time_s,profile,owner\n{lines}"));
    host.ok([
        "history",
        "import",
        "--origin-ms",
        "0",
        file.to_str().unwrap(),
    ]);
}

#[test]
fn privileged_pages_are_seen_and_used_in_a_browser() {
    let test = "privileged_pages_are_seen_and_used_in_a_browser";
    let Some(bench) = bench(test) else { return };
    let Some(python) = python() else {
        println!(
            "SKIPPED {test}: needs chromium and Playwright (`cargo xtask test` installs them)"
        );
        return;
    };
    let mut host = Host::new(
        &bench,
        &Settings {
            latency_ms: 5,
            ..Settings::default()
        },
    );
    let config = host.dir().join("forelay.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let listen = format!("[api]\nlisten = \"127.0.0.1:{}\"\n", reserved_port());
    std::fs::write(&config, format!("{text}\n{listen}")).unwrap();
    history(&host);
    host.start();
    vms(&host);
    host.until("the dashboard is served over TCP", |host| {
        host.run(["dashboard"]).code == Some(0)
    });
    let url = host.json(["dashboard"])["url"].as_str().unwrap().to_owned();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/browser.py");
    let mut browser = Command::new(python)
        .arg(script)
        .arg(&url)
        .arg(pictures())
        .arg("web-2")
        .env("HOME", host.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut answers = browser.stdin.take().unwrap();
    let mut done = false;
    for line in BufReader::new(browser.stdout.take().unwrap()).lines() {
        match &*line.unwrap() {
            "stop" => drop(host.ok(["stop", "worker-1"])),
            "end" => assert_eq!(host.terminate(), Some(0)),
            "start" => host.start(),
            "done" => done = true,
            other => panic!("{other}"),
        }
        // It may have ended.
        let _ = answers.write_all(b"\n");
    }
    let status = browser.wait().unwrap();
    assert!(done && status.success(), "{status}: see what it said above");
}

/// Four VMs that run, and one that did.
fn vms(host: &Host) {
    let web = host.write("web.toml", &web().0);
    let worker = host.write(
        "worker.toml",
        &idle("worker", "[\"forelay-part\", \"kmod\"]", ""),
    );
    let tool = host.write("tool.toml", &idle("tool", "[\"forelay-tool\"]", ""));
    host.launch(&web, "web-1", &[]);
    host.ok(["stop", "web-1"]);
    for (manifest, name) in [
        (&web, "web-2"),
        (&worker, "worker-1"),
        (&worker, "worker-2"),
        (&tool, "tool-1"),
    ] {
        host.launch(manifest, name, &[]);
    }
    host.sh(
        "tool-1",
        "forelay-tool; ls -R /usr/share > /dev/null; ls -l /usr/bin /usr/lib > /dev/null",
    );
    host.sh("worker-1", "forelay-part; ls -R /usr/lib > /dev/null");
    host.sh("web-2", "echo 'nginx is up' > /dev/console");
}
