//! What is in `monitoring/` against the real `/metrics`: promtool has nothing to say against it,
//! and rules and dashboard ask for nothing that is not there.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::fixture::{Host, Settings, bench, idle};
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
