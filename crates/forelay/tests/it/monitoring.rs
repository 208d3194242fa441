//! What is in `monitoring/` against the real `/metrics`: promtool has nothing to say against it,
//! and rules and dashboard ask for nothing that is not there.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::fixture::{Host, Settings, bench, http_get, idle, reserved_port};
use crate::watching::get;

/// Runs promtool on `input`; what it said, or nothing if there is none.
fn promtool(arguments: &[&str], input: &str) -> Option<String> {
    let mut command = Command::new("promtool");
    command.args(arguments).current_dir(dir());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().ok()?;
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8(said).unwrap();
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
    Some(said)
}

fn dir() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../monitoring")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(dir().join(name)).unwrap()
}

/// Names of our metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let word = |byte: &char| !byte.is_ascii_alphanumeric() && *byte != '_';
    let words = text.split(|one: char| word(&one));
    let ours = words.filter(|word| word.starts_with("forelay_"));
    ours.map(|name| {
        let parts = ["_bucket", "_sum", "_count"];
        let of = parts.iter().find_map(|part| name.strip_suffix(part));
        of.unwrap_or(name).to_owned()
    })
    .collect()
}

/// A real Prometheus, configured as we say but for paths, scrapes the host over TCP and evaluates
/// the rules.
pub fn prometheus_scrapes(host: &Host, address: &str) {
    let port = reserved_port();
    let config = read("prometheus.yml")
        .replace(
            "/etc/prometheus/forelay.rules.yml",
            &dir().join("forelay.rules.yml").display().to_string(),
        )
        .replace(
            "/etc/prometheus/forelay-token",
            &host
                .dir()
                .join("state/api-read-token")
                .display()
                .to_string(),
        )
        .replace("127.0.0.1:8900", address)
        .replace("scrape_interval: 15s", "scrape_interval: 1s");
    let config = host.write(
        "prometheus.yml",
        &format!("global: {{ evaluation_interval: 1s }}\n{config}"),
    );
    let mut command = Command::new("prometheus");
    command.arg(format!("--config.file={}", config.display()));
    command.arg(format!(
        "--storage.tsdb.path={}",
        host.dir().join("tsdb").display()
    ));
    command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
    let log = std::fs::File::create(host.dir().join("prometheus.log")).unwrap();
    let Ok(child) = command.stdout(Stdio::null()).stderr(log).spawn() else {
        println!("SKIPPED a part: needs prometheus");
        return;
    };
    let _prometheus = Prometheus(child);
    let asked = |path: &str, what: &str| {
        let mut answer = String::new();
        host.until(&format!("Prometheus answers {what} to {path}"), |_| {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                answer = http_get(port, path);
            }
            answer.contains(what)
        });
    };
    asked(
        "/api/v1/query?query=forelay_build_info",
        "\"job\":\"forelay\"",
    );
    asked("/api/v1/targets", "\"health\":\"up\"");
    asked("/api/v1/rules", "\"name\":\"ForelayDown\"");
    asked("/api/v1/rules", "\"health\":\"ok\"");
    let rules = http_get(port, "/api/v1/rules");
    assert!(!rules.contains("\"health\":\"err\""), "{rules}");
}

/// One that runs for as long as this is there.
struct Prometheus(Child);

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn privileged_promtool_finds_nothing_and_what_is_asked_for_is_there() {
    let test = "privileged_promtool_finds_nothing_and_what_is_asked_for_is_there";
    let Some(bench) = bench(test) else { return };
    let mut host = Host::new(&bench, &Settings::default());
    // So that it lacks something: what is counted of nothing is not told.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let config = host.dir().join("forelay.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let address = taken.local_addr().unwrap();
    std::fs::write(&config, format!("{text}\n[api]\nlisten = \"{address}\"\n")).unwrap();
    host.start();
    let manifest = host.write("one.toml", &idle("one", "[]", ""));
    host.launch(&manifest, "one", &[]);
    let mut metrics = String::new();
    host.until("what is asked for is counted", |host| {
        metrics = get(host, "/metrics", "").1;
        let families = [
            "degraded{part=\"dashboard over TCP\"}",
            "repository_latency_seconds",
        ];
        families.iter().all(|one| metrics.contains(one))
    });
    let told: BTreeSet<String> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .map(str::to_owned)
        .collect();
    let board: Value = serde_json::from_str(&read("grafana.json")).unwrap();
    let panels = board["panels"].as_array().unwrap();
    let targets = panels
        .iter()
        .flat_map(|one| one["targets"].as_array().unwrap());
    let asked: String = targets
        .map(|one| format!("{}\n", one["expr"].as_str().unwrap()))
        .collect();
    for (of, text) in [("grafana", asked), ("rules", read("forelay.rules.yml"))] {
        let missing: Vec<_> = names(&text).difference(&told).cloned().collect();
        assert!(
            !names(&text).is_empty() && missing.is_empty(),
            "{of}: {missing:?}"
        );
    }
    let Some(said) = promtool(&["check", "metrics"], &metrics) else {
        println!("SKIPPED the rest of {test}: needs promtool");
        return;
    };
    assert_eq!(said, "", "of {metrics}");
    promtool(&["check", "rules", "forelay.rules.yml"], "");
    promtool(&["test", "rules", "forelay.rules.test.yml"], "");
    promtool(&["check", "config", "--syntax-only", "prometheus.yml"], "");
}
