//! The dashboard against the real daemon: what its pages say of a host on which nothing has
//! happened and of a VM that runs, who is let in over TCP, and clients that are many or go away.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::Value;

use crate::fixture::{Host, PATIENCE, RepositoryOf, Settings, bench, web};
use crate::monitoring::prometheus_scrapes;
use crate::watching::{get, samples};

/// Clients over TCP that watch, or want to.
const WATCHERS: usize = 1_000;
/// So many of them may.
const MOST_WATCHERS: usize = 96;
/// A file of a component, by a name that wants to be more than a name.
const HOSTILE: &str = "<img src=x onerror=alert(1)>'\"&";

#[test]
fn privileged_pages_tell_what_happens_and_escape_what_guests_say() {
    let test = "privileged_pages_tell_what_happens_and_escape_what_guests_say";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        repository: RepositoryOf::Test,
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    empty_pages(&host);
    let files = host.dir().join("files/srv");
    std::fs::create_dir_all(&files).unwrap();
    let bytes: Vec<u8> = (0..4u32 << 20)
        .map(|at| (at >> 8) as u8 ^ at as u8)
        .collect();
    std::fs::write(files.join(HOSTILE), bytes).unwrap();
    let dir = host.dir().join("files").display().to_string();
    host.ok(["component", "build", "--dir", &dir, "--name", "hostile"]);
    let (manifest, _) = web();
    let manifest = manifest.replace("[\"nginx\"]", "[\"nginx\", \"hostile\"]");
    let manifest = host.write("web.toml", &manifest);
    host.launch(&manifest, "web-1", &[]);
    host.sh("web-1", "cat /srv/*onerror* > /dev/null");
    host.sh(
        "web-1",
        "echo '</pre><script>alert(1)</script>' > /dev/console",
    );
    pages(&host);
    host.until("console and file are shown, and escaped", |host| {
        let vm = page(host, "/ui/vms/web-1");
        for raw in ["<script>alert", "<img src=x"] {
            assert!(!vm.contains(raw), "{vm}");
        }
        vm.contains("&#60;script&#62;alert(1)") && vm.contains("&#60;img src=x onerror=alert(1)")
    });
    host.ok(["stop", "web-1"]);
    let ended = page(&host, "/ui/vms/web-1");
    assert!(
        ended.contains("<h1>web-1 <span class=\"state st-stopped\">"),
        "{ended}"
    );
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
    names_are_known(path, &text);
    elements_are_closed(path, &text);
    text
}

/// Ids are there once, and what is labelled by one names one that is there.
fn names_are_known(path: &str, text: &str) {
    let mut ids = BTreeSet::new();
    for (at, _) in text.match_indices(" id=\"") {
        let id = text[at + 5..].split('"').next().unwrap();
        assert!(ids.insert(id), "{path}: {id} is there twice");
    }
    for (at, _) in text.match_indices("aria-labelledby=\"") {
        let id = text[at + 17..].split('"').next().unwrap();
        assert!(ids.contains(id), "{path}: nothing is called {id}");
    }
}

/// Each element ends within the one that it begins in; pictures have a name or are hidden.
fn elements_are_closed(path: &str, text: &str) {
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
}

/// Pages of a host on which nothing has happened say what to do.
fn empty_pages(host: &Host) {
    for (path, says) in [
        ("/", "forelay run"),
        ("/ui/launches", "forelay run"),
        ("/ui/forecast", "forelay history import"),
        ("/ui/repository", "that it may take"),
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
    for says in [
        "Mapping table",
        "Files that it touched most",
        "was in no plan of its launch",
    ] {
        assert!(vm.contains(says), "{says}: {vm}");
    }
    let forecast = page(host, "/ui/forecast");
    assert!(
        forecast.contains("One launch in the last half hour"),
        "{forecast}"
    );
    assert!(page(host, "/ui/pressure").contains("<b>web-1</b>"));
    let repository = page(host, "/ui/repository");
    assert!(repository.contains("VMs that waited") && repository.contains("dir:/"));
    let status = |path: &str| get(host, path, "").0[..12].to_owned();
    for file in [
        "forelay.css",
        "live.js",
        "htmx.min.js",
        "htmx.LICENSE",
        "forelay.svg",
    ] {
        assert_eq!(status(&format!("/ui/static/{file}")), "http/1.1 200");
    }
    for absent in ["/ui/static/..%2fCargo.toml", "/ui/vms/%3Cscript%3E"] {
        assert_eq!(status(absent), "http/1.1 404", "{absent}");
    }
}

/// Where the dashboard is served over TCP, by address and by name, and its token.
fn served(host: &Host) -> (String, String, String) {
    host.until("the dashboard is served over TCP", |host| {
        host.run(["dashboard"]).code == Some(0)
    });
    let url = host.json(["dashboard"])["url"].as_str().unwrap().to_owned();
    let rest = url.strip_prefix("http://").unwrap();
    let (named, token) = rest.split_once("/?token=").unwrap();
    let (name, port) = named.split_once(':').unwrap();
    assert!(name.starts_with("forelay-") && name.ends_with(".localhost"));
    let told = host.get("/v1/health").unwrap();
    assert!(
        !told.to_string().contains(name),
        "the name is as secret as what it is for: {told}"
    );
    (
        format!("127.0.0.1:{port}"),
        named.to_owned(),
        token.to_owned(),
    )
}

/// Sends a request over TCP; the connection.
fn send(address: &str, request: &str, headers: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let text = format!("{request} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
    socket.write_all(text.as_bytes()).unwrap();
    socket
}

/// What is answered to a request over TCP.
fn ask(address: &str, request: &str, headers: &str) -> String {
    let mut answer = String::new();
    let mut socket = send(address, request, headers);
    socket.read_to_string(&mut answer).unwrap();
    answer
}

/// Over TCP only those with the token are let in, and only under a name of loopback.
#[test]
fn privileged_over_tcp_only_the_token_lets_in() {
    let test = "privileged_over_tcp_only_the_token_lets_in";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        over_tcp: true,
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let (address, named, token) = served(&host);
    let name = format!("Host: {address}\r\n");
    let bearer = format!("Authorization: Bearer {token}\r\n");
    let wrong = format!("Authorization: Bearer {}\r\n", &token[1..]);
    for (headers, status) in [
        (name.clone(), 401),
        (format!("{name}{wrong}"), 401),
        (format!("{name}Authorization: Bearer \r\n"), 401),
        (format!("{name}Cookie: forelay-session={token}\r\n"), 401),
        (format!("Host: evil.example\r\n{bearer}"), 421),
        (bearer.clone(), 421),
        (format!("{name}{bearer}"), 200),
        (format!("Host: {named}\r\n{bearer}"), 200),
        (format!("{name}{bearer}Origin: http://{address}\r\n"), 200),
        (
            format!("{name}{bearer}Origin: http://evil.example\r\n"),
            403,
        ),
        (format!("{name}{bearer}Origin: null\r\n"), 403),
    ] {
        for path in ["/v1/vms", "/", "/metrics"] {
            let answer = ask(&address, &format!("GET {path}"), &headers);
            let status = format!("HTTP/1.1 {status}");
            assert!(answer.starts_with(&status), "{path} {headers}: {answer}");
            for policy in ["content-security-policy: default-src 'none'", "nosniff"] {
                assert!(answer.contains(policy), "{path} {headers}: {answer}");
            }
        }
    }
    browser(&address, &format!("Host: {named}\r\n"), &token);
    let reading = std::fs::read_to_string(host.dir().join("state/api-read-token")).unwrap();
    let reading = format!("{name}Authorization: Bearer {reading}\r\n");
    assert!(ask(&address, "GET /metrics", &reading).starts_with("HTTP/1.1 200"));
    assert!(ask(&address, "DELETE /v1/vms/x", &reading).starts_with("HTTP/1.1 401"));
    // Who has the token acts for all owners, as an operator; it is written down.
    let gone = ask(
        &address,
        "DELETE /v1/vms/nobody",
        &format!("{name}{bearer}"),
    );
    assert!(gone.starts_with("HTTP/1.1 404"), "{gone}");
    let log = std::fs::read_to_string(host.dir().join("state/audit.log")).unwrap();
    let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert_eq!(last["user"], Value::Null, "{log}");
    assert_eq!(last["path"], "/v1/vms/nobody", "{log}");
    prometheus_scrapes(&host, &address);
    many(&host, &address, &format!("{name}{bearer}"));
    port_is_taken(&bench, &address);
}

/// A browser: the token opens a session, which reads and changes nothing.
fn browser(address: &str, name: &str, token: &str) {
    let opened = ask(address, &format!("GET /?token={token}"), name);
    assert!(
        opened.starts_with("HTTP/1.1 303") && opened.contains("location: /\r\n"),
        "{opened}"
    );
    let elsewhere = ask(address, &format!("GET //evil.example/?token={token}"), name);
    assert!(!elsewhere.contains("evil"), "{elsewhere}");
    let cookie = opened
        .lines()
        .find_map(|line| line.strip_prefix("set-cookie: "))
        .unwrap();
    assert!(
        cookie.contains("HttpOnly; SameSite=Strict") && !cookie.contains(token),
        "{cookie}"
    );
    let cookie = format!("Cookie: {}\r\n", cookie.split(';').next().unwrap());
    let session = format!("{name}{cookie}");
    assert!(ask(address, "GET /", &session).contains("<h1>Memory</h1>"));
    for change in ["DELETE /v1/vms/web-1", "POST /v1/memory/drop"] {
        assert!(ask(address, change, &session).starts_with("HTTP/1.1 401"));
    }
    assert!(ask(address, "GET /?token=x", name).starts_with("HTTP/1.1 401"));
    // Other names of loopback are also those of every port of the host: no session is for them.
    let usual = format!("Host: {address}\r\n");
    let opened = ask(address, &format!("GET /?token={token}"), &usual);
    assert!(opened.starts_with("HTTP/1.1 401"), "{opened}");
    let with_cookie = ask(address, "GET /", &format!("{usual}{cookie}"));
    assert!(with_cookie.starts_with("HTTP/1.1 401"), "{with_cookie}");
}

/// A thousand that watch, a thousand that say nothing, and browsers that go away: pages go on, and
/// the socket's clients notice nothing.
fn many(host: &Host, address: &str, headers: &str) {
    let watching = |host: &Host| samples(&get(host, "/metrics", "").1)["forelay_event_streams"];
    let mut streams = Vec::new();
    let mut refused = 0;
    for _ in 0..WATCHERS {
        let mut stream = send(address, "GET /v1/events", headers);
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        match &status {
            b"HTTP/1.1 200" => streams.push(stream),
            b"HTTP/1.1 503" => refused += 1,
            other => panic!("{}", String::from_utf8_lossy(other)),
        }
    }
    assert_eq!(
        (streams.len(), refused),
        (MOST_WATCHERS, WATCHERS - MOST_WATCHERS)
    );
    assert_eq!(watching(host), MOST_WATCHERS as f64);
    assert!(ask(address, "GET /", headers).contains("<h1>Memory</h1>"));
    // They go away in the middle of what is told to them.
    drop(streams);
    host.until("the streams are forgotten", |host| watching(host) == 0.0);
    for _ in 0..20 {
        drop(send(address, "GET /ui/forecast", headers));
    }
    let idle = (0..WATCHERS / 2).map(|_| TcpStream::connect(address).unwrap());
    let idle: Vec<TcpStream> = idle.collect();
    assert!(
        get(host, "/", "").1.contains("<h1>Memory</h1>"),
        "over the socket"
    );
    drop(idle);
    assert!(ask(address, "GET /", headers).contains("<h1>Memory</h1>"));
}

/// A daemon whose port is taken serves on and says so.
fn port_is_taken(bench: &crate::fixture::Bench, address: &str) {
    let mut host = Host::new(bench, &Settings::default());
    let config = host.dir().join("forelay.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{text}\n[api]\nlisten = \"{address}\"\n")).unwrap();
    host.start();
    host.until("the port is told to be taken", |host| {
        let health = host.get("/v1/health").unwrap();
        let degraded = health["degraded"].as_array().unwrap();
        degraded.iter().any(|one| {
            one["what"] == "dashboard over TCP"
                && one["problem"].as_str().unwrap().contains("another port")
        })
    });
    assert!(host.refused(["dashboard"]).contains("[api]"));
    assert_eq!(host.run(["ps"]).code, Some(0));
}
