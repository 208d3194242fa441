//! `bench attach`: from `forelay attach` to `ls` of the new files in the guest, and where
//! that time goes.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::statistics::median;
use crate::host::{Host, Settings};
use crate::process::output;

const ROUNDS: usize = 7;

/// Parts that are Forelay's own code: solving, mapping, the guest's agent, bookkeeping.
const OWN: [&str; 4] = ["plan_s", "map_s", "agent_s", "note_s"];
/// The VMM's, the guest kernel's (probing the device; mounting) and the virtual serial line's.
const OTHERS: [&str; 4] = ["plug_s", "probe_s", "graft_s", "channel_s"];

const MANIFEST: &str = r#"
name = "plain"
owner = "demo"
base = "debian"
components = []
entrypoint = ["sleep", "100000"]

[vm]
memory_mib = 192
"#;

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    let (programs, usual) = super::prepare("attach")?;
    let settings = Settings {
        latency_ms: 0,
        bandwidth_bytes_per_s: 0,
        ..usual
    };
    let mut host = Host::new(&programs, &settings)?;
    host.start_daemon()?;
    let manifest = host.scratch().join("plain.toml");
    std::fs::write(&manifest, MANIFEST)?;
    let mut rounds = Vec::new();
    for round in 0..ROUNDS {
        host.launch(&manifest, "plain", &[])?;
        let figures = attach(&host)?;
        println!("round {}/{ROUNDS}: {figures}", round + 1);
        rounds.push(figures);
        host.stop(&["plain"])?;
    }
    // The first one reads the component for the first time.
    let all = |name: &str| -> Vec<f64> {
        let rounds = rounds.iter().skip(1);
        rounds
            .filter_map(|figures| figures[name].as_f64())
            .collect()
    };
    let sum = |names: &[&str]| names.iter().map(|name| median(&all(name))).sum::<f64>();
    let (own, others) = (sum(&OWN), sum(&OTHERS));
    let parts = OWN.iter().chain(&OTHERS);
    let parts = parts.map(|name| ((*name).to_owned(), median(&all(name)).into()));
    super::write(
        out,
        &json!({
            "rounds": ROUNDS,
            "attach_to_ls_s": median(&all("to_ls_s")),
            "attach_to_ls_s_min": all("to_ls_s").iter().copied().fold(f64::INFINITY, f64::min),
            "attach_s": median(&all("attach_s")),
            "own_s": own,
            "others_s": others,
            // As if all that the agent has the guest's kernel do were its own.
            "outside_share_without_graft": (others - median(&all("graft_s"))) / (own + others),
            "outside_share": others / (own + others),
            "parts_median": parts.collect::<serde_json::Map<String, Value>>(),
            "first": rounds.first(),
        }),
    )
}

fn attach(host: &Host) -> Result<Value> {
    let started = Instant::now();
    let vm = host.json(["attach", "plain", "redis"])?;
    let attach_s = started.elapsed().as_secs_f64();
    let listed = output(&mut host.forelay(["exec", "plain", "--", "ls", "/usr/bin/redis-server"]))?;
    let to_ls_s = started.elapsed().as_secs_f64();
    ensure!(
        listed == b"/usr/bin/redis-server\n",
        "the files are not there"
    );
    let components = vm["components"].as_array().context("a VM has components")?;
    let attached: Vec<&Value> = components
        .iter()
        .map(|one| &one["attach"])
        .filter(|figures| figures.is_object())
        .collect();
    ensure!(attached.len() == 1, "one component was to be attached");
    let mut figures = attached[0].clone();
    figures["attach_s"] = attach_s.into();
    figures["to_ls_s"] = to_ls_s.into();
    Ok(figures)
}
