//! A host that is watched: its events, its metrics, its errors, and many who watch at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use serde_json::Value;

use crate::fixture::{Host, PATIENCE, Settings, bench, web};

/// Clients that watch and do nothing: more than may have another request under way.
const IDLE_STREAMS: usize = 600;

/// What the API answers: headers and body.
fn get(host: &Host, path: &str, headers: &str) -> (String, String) {
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
fn samples(text: &str) -> BTreeMap<String, f64> {
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
    let settings = Settings {
        over_tcp: true,
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    empty_pages(&host);
    let told = host.dir().join("told");
    let mut follow = host.command(["events", "--follow", "--json"]);
    follow.stdout(std::fs::File::create(&told).unwrap());
    let mut follow = follow.spawn().unwrap();
    let (manifest, _) = web();
    let manifest = host.write("web.toml", &manifest);
    let vm = host.launch(&manifest, "web-1", &[]);
    pages(&host);
    over_tcp(&host);
    host.ok(["stop", "web-1"]);
    let ended = page(&host, "/ui/vms/web-1");
    assert!(
        ended.contains("<h1>web-1 <span class=\"state st-stopped\">"),
        "{ended}"
    );

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
    assert_eq!(value("forelay_launch_seconds_sum{start=\"cold\"}"), ready_s);
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

/// A page after what holds of all: landmarks, headings in order, labelled tables and pictures,
/// ids that are there once, nothing loaded from elsewhere, all elements closed.
fn page(host: &Host, path: &str) -> String {
    let (head, text) = get(host, path, "");
    assert!(head.starts_with("http/1.1 200"), "{path}: {head}{text}");
    assert!(head.contains("content-security-policy: default-src 'none'; script-src 'self'"));
    for landmark in [
        "<html lang=\"en\">",
        "· Forelay</title>",
        "<header>",
        "<nav aria-label",
        "<main id=\"page\"",
    ] {
        assert_eq!(text.matches(landmark).count(), 1, "{path}: {landmark}");
    }
    assert_eq!(text.matches("<h1>").count(), 1, "{path}");
    for outside in ["=\"http", "=\"//", " style=\"", " onclick=", "<script>"] {
        assert!(!text.contains(outside), "{path}: {outside}");
    }
    let mut ids = BTreeSet::new();
    for (at, _) in text.match_indices(" id=\"") {
        let id = text[at + 5..].split('"').next().unwrap();
        assert!(ids.insert(id), "{path}: {id} is there twice");
    }
    for (at, _) in text.match_indices("aria-labelledby=\"") {
        let id = text[at + 17..].split('"').next().unwrap();
        assert!(ids.contains(id), "{path}: nothing is called {id}");
    }
    let mut open = Vec::new();
    for (at, _) in text.match_indices('<') {
        let tag = text[at + 1..].split('>').next().unwrap();
        let name = tag
            .trim_start_matches('/')
            .split([' ', '/'])
            .next()
            .unwrap();
        let void = tag.ends_with('/') || ["!doctype", "meta", "link"].contains(&name);
        match tag.strip_prefix('/') {
            Some(_) => assert_eq!(open.pop(), Some(name), "{path}: before {}", &text[at..]),
            None if !void => open.push(name),
            None => {}
        }
        if name == "svg" && !tag.starts_with('/') {
            let named = tag.contains("aria-label=\"") && tag.contains("role=\"img\"");
            assert!(named || tag.contains("aria-hidden"), "{path}: {tag}");
        }
    }
    assert_eq!(open, Vec::<&str>::new(), "{path}");
    text
}

/// Pages of a host on which nothing has happened say what to do.
fn empty_pages(host: &Host) {
    for (path, says) in [
        ("/", "forelay run"),
        ("/ui/launches", "forelay run"),
        ("/ui/forecast", "forelay history import"),
        ("/ui/repository", "Nothing was read from it yet"),
        ("/ui/pressure", "memory was plentiful"),
    ] {
        let text = page(host, path);
        assert!(text.contains(says), "{path}: {text}");
        assert!(!text.contains("NaN") && !text.contains("inf\""), "{path}");
    }
}

/// Pages while a VM runs.
fn pages(host: &Host) {
    host.until("the table knows what the VM touched", |host| {
        samples(&get(host, "/metrics", "").1)["forelay_memory_charged_bytes"] > 0.0
    });
    let memory = page(host, "/");
    assert!(
        memory.contains("<a href=\"/ui/vms/web-1\">web-1</a>"),
        "{memory}"
    );
    assert!(memory.contains("<th scope=\"row\">nginx "), "{memory}");
    let launches = page(host, "/ui/launches");
    assert!(
        launches.contains("<span class=\"tag t-cold\">cold</span>"),
        "{launches}"
    );
    assert!(launches.contains("kernel ") && launches.contains("<rect class=\"s4\""));
    let vm = page(host, "/ui/vms/web-1");
    assert!(
        vm.contains("Mapping table") && vm.contains("Files that it touched most"),
        "{vm}"
    );
    assert!(vm.contains("was in no plan of its launch"), "{vm}");
    let forecast = page(host, "/ui/forecast");
    assert!(
        forecast.contains("One launch in the last half hour"),
        "{forecast}"
    );
    assert!(page(host, "/ui/pressure").contains("<b>web-1</b>"));
    assert!(page(host, "/ui/repository").contains("VMs that waited"));
    assert!(
        get(host, "/ui/vms/%3Cscript%3E", "")
            .0
            .starts_with("http/1.1 404")
    );
    for file in [
        "forelay.css",
        "live.js",
        "htmx.min.js",
        "htmx.LICENSE",
        "forelay.svg",
    ] {
        assert!(
            get(host, &format!("/ui/static/{file}"), "")
                .0
                .starts_with("http/1.1 200")
        );
    }
    assert!(
        get(host, "/ui/static/..%2fCargo.toml", "")
            .0
            .starts_with("http/1.1 404")
    );
}

/// Over TCP only those with the token are let in, and only under a name of loopback.
fn over_tcp(host: &Host) {
    host.until("the dashboard is served over TCP", |host| {
        host.run(["dashboard"]).code == Some(0)
    });
    let url = host.json(["dashboard"]);
    let url = url["url"]
        .as_str()
        .unwrap()
        .strip_prefix("http://")
        .unwrap();
    let (address, token) = url.split_once("/?token=").unwrap();
    let ask = |request: &str, headers: &str| {
        let mut socket = std::net::TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let text = format!("{request} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
        socket.write_all(text.as_bytes()).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        answer
    };
    let name = format!("Host: {address}\r\n");
    let bearer = format!("Authorization: Bearer {token}\r\n");
    for (headers, status) in [
        (name.clone(), 401),
        (
            format!("{name}Authorization: Bearer {}\r\n", &token[1..]),
            401,
        ),
        (format!("Host: evil.example\r\n{bearer}"), 421),
        (bearer.clone(), 421),
        (format!("{name}{bearer}"), 200),
    ] {
        let answer = ask("GET /v1/vms", &headers);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{headers}: {answer}"
        );
    }
    // A browser: the token opens a session, which reads and changes nothing.
    let opened = ask(&format!("GET /?token={token}"), &name);
    assert!(
        opened.starts_with("HTTP/1.1 303") && opened.contains("location: /\r\n"),
        "{opened}"
    );
    let cookie = opened
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: "))
        .unwrap();
    assert!(
        cookie.contains("HttpOnly; SameSite=Strict") && !cookie.contains(token),
        "{cookie}"
    );
    let session = format!("{name}Cookie: {}\r\n", cookie.split(';').next().unwrap());
    assert!(ask("GET /", &session).contains("<h1>Memory</h1>"));
    assert!(ask("DELETE /v1/vms/web-1", &session).starts_with("HTTP/1.1 401"));
    assert!(ask("GET /?token=x", &name).starts_with("HTTP/1.1 401"));
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
