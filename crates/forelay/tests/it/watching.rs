//! A host that is watched: its events, its metrics, its errors, and many who watch at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use serde_json::Value;

use crate::fixture::{Host, PATIENCE, Settings, bench, web};

/// Clients that watch and do nothing: more than may have another request under way.
const IDLE_STREAMS: usize = 600;

/// What the API answers: headers and body.
pub fn get(host: &Host, path: &str, headers: &str) -> (String, String) {
    let mut socket = UnixStream::connect(host.dir().join("run/forelay.sock")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: forelay\r\nConnection: close\r\n{headers}\r\n");
    socket.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_lowercase(), body.to_owned())
}

/// A stream of events that has begun.
fn idle_stream(host: &Host) -> UnixStream {
    let mut socket = UnixStream::connect(host.dir().join("run/forelay.sock")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
        .write_all(b"GET /v1/events HTTP/1.1\r\nHost: forelay\r\n\r\n")
        .unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    assert!(head.starts_with(b"HTTP/1.1 200"));
    socket
}

/// The samples of an exposition by name and labels, after the format's rules and those of names.
pub fn samples(text: &str) -> BTreeMap<String, f64> {
    let (mut types, mut helped) = (BTreeMap::new(), BTreeSet::new());
    let mut samples = BTreeMap::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            assert!(helped.insert(name.to_owned()) && !help.is_empty(), "{line}");
        } else if let Some(of) = line.strip_prefix("# TYPE ") {
            let (name, kind) = of.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
            assert!(name.starts_with("forelay_"), "{line}");
            assert!(types.insert(name, kind).is_none(), "{line}");
        } else {
            let (key, value) = line.rsplit_once(' ').unwrap();
            let name = key.split('{').next().unwrap();
            let parts = ["_bucket", "_sum", "_count"];
            let of = parts.iter().find_map(|part| name.strip_suffix(part));
            let family = of.filter(|of| types.get(of) == Some(&"histogram"));
            let family = family.unwrap_or(name);
            assert!(
                types.contains_key(family) && helped.contains(family),
                "{line}"
            );
            let value: f64 = value.parse().unwrap();
            assert!(value.is_finite(), "{line}");
            assert!(types[family] == "gauge" || value >= 0.0, "{line}");
            assert!(samples.insert(key.to_owned(), value).is_none(), "{line}");
        }
    }
    samples
}

#[test]
fn privileged_what_happens_is_told_and_counted() {
    let test = "privileged_what_happens_is_told_and_counted";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let told = host.dir().join("told");
    let mut follow = host.command(["events", "--follow", "--json"]);
    follow.stdout(std::fs::File::create(&told).unwrap());
    let mut follow = follow.spawn().unwrap();
    let (manifest, _) = web();
    let manifest = host.write("web.toml", &manifest);
    let vm = host.launch(&manifest, "web-1", &[]);
    host.ok(["stop", "web-1"]);

    let events = || -> Vec<Value> {
        let told = std::fs::read_to_string(&told).unwrap();
        let whole = told
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'));
        whole
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    host.until("the stop is told", |_| {
        events().iter().any(|event| event["kind"] == "stopped")
    });
    follow.kill().unwrap();
    follow.wait().unwrap();
    let events = events();
    let ids: Vec<u64> = events
        .iter()
        .map(|one| one["id"].as_u64().unwrap())
        .collect();
    assert!(ids.windows(2).all(|two| two[1] == two[0] + 1), "{ids:?}");
    // On a busy host a fetch may take long enough to be told.
    let wait = |event: &&Value| event["kind"].as_str().unwrap().starts_with("wait");
    let of_vm = events
        .iter()
        .filter(|event| event["vm"] == "web-1" && !wait(event));
    let kinds: Vec<&str> = of_vm
        .clone()
        .map(|one| one["kind"].as_str().unwrap())
        .collect();
    let life = ["launching", "started", "mounted", "ready", "stopped"];
    assert_eq!(kinds, life, "{events:?}");
    assert!(of_vm.clone().all(|event| event["profile"] == "web"));
    let ready = of_vm
        .clone()
        .find(|event| event["kind"] == "ready")
        .unwrap();
    assert_eq!(ready["seconds"], vm["launch"]["ready_s"]);
    let kept = host.json(["events"]);
    assert_eq!(kept.as_array().unwrap()[..events.len()], events);

    let (head, text) = get(&host, "/metrics", "");
    assert!(
        head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    let metrics = samples(&text);
    let value = |key: &str| {
        *metrics
            .get(key)
            .unwrap_or_else(|| panic!("no {key} in {text}"))
    };
    assert_eq!(value("forelay_vms{state=\"stopped\"}"), 1.0);
    assert_eq!(value("forelay_launch_seconds_count{start=\"cold\"}"), 1.0);
    let ready_s = vm["launch"]["ready_s"].as_f64().unwrap();
    let counted_s = value("forelay_launch_seconds_sum{start=\"cold\"}");
    // Seconds are added up as binary fractions.
    assert!(
        (counted_s - ready_s).abs() < 1e-6,
        "{counted_s} of {ready_s}"
    );
    let stages = metrics
        .iter()
        .filter(|(key, _)| key.starts_with("forelay_launch_stage_seconds_sum"));
    let stages: f64 = stages.map(|(_, seconds)| seconds).sum();
    assert!(
        stages > 0.0 && stages < ready_s + 1e-3,
        "{stages} of {ready_s}"
    );
    let fetches = value("forelay_demand_fetches_total{cause=\"unforeseen\"}");
    assert!(fetches > 0.0, "{text}");
    assert!(value("forelay_repository_read_bytes_total{priority=\"demand\"}") > 0.0);
    assert!(value("forelay_memory_resident_bytes") > 0.0);

    problems(&host);
    let streams: Vec<UnixStream> = (0..IDLE_STREAMS).map(|_| idle_stream(&host)).collect();
    // The one of the command that was killed is forgotten once the daemon has seen it go.
    host.until("only the idle streams are counted", |host| {
        let metrics = samples(&get(host, "/metrics", "").1);
        metrics["forelay_event_streams"] == IDLE_STREAMS as f64
    });
    assert!(host.ok(["ps", "--all"]).contains("web-1"));
    drop(streams);
    host.until("the streams are forgotten", |host| {
        samples(&get(host, "/metrics", "").1)["forelay_event_streams"] == 0.0
    });
}

/// Errors are problems, wherever they come from, and each has the id of its request.
fn problems(host: &Host) {
    let (head, body) = get(host, "/v1/vms/nobody", "X-Request-Id: mine-1\r\n");
    assert!(
        head.starts_with("http/1.1 404") && head.contains("x-request-id: mine-1"),
        "{head}"
    );
    assert!(
        head.contains("content-type: application/problem+json"),
        "{head}"
    );
    let problem: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(problem["type"], "urn:forelay:problem:no-such-vm");
    assert_eq!(
        (&problem["status"], &problem["request_id"]),
        (&404.into(), &"mine-1".into())
    );
    assert!(
        problem["detail"].as_str().unwrap().contains("\"nobody\""),
        "{problem}"
    );
    for (path, status) in [
        ("/v1/none", 404),
        ("/v1/prefetch", 405),
        ("/v1/vms/x?wait_ms=y", 400),
    ] {
        let (head, body) = get(host, path, "");
        let problem: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(problem["status"], status, "{problem}");
        let id = problem["request_id"].as_str().unwrap();
        assert!(head.contains(&format!("x-request-id: {id}")), "{head}");
    }
}
