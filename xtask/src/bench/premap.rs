//! `bench premap`: from a launch's request to the moment at which its VMM can be started,
//! mapped ahead and not, interleaved.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::statistics::VmSamples;
use crate::demo;
use crate::host::Host;
use crate::process::output;

const ROUNDS: usize = 5;
const WAYS: [&str; 2] = ["as_usual", "mapped_ahead"];

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    let (programs, settings) = super::prepare("premap")?;
    let state = settings.state.clone();
    // `first`: the daemon has just started and has launched nothing yet.
    let mut samples: [[VmSamples; 2]; 2] = Default::default();
    for round in 0..ROUNDS {
        for (way, _) in WAYS.iter().enumerate() {
            let _ = std::fs::remove_dir_all(state.join("cache"));
            let mut host = Host::new(&programs, &settings)?;
            host.start_daemon()?;
            for again in 0..2 {
                let figures = launch(&host, way == 1)?;
                println!(
                    "round {}/{ROUNDS}: {} {}: prepared after {} s, VMM after {} s",
                    round + 1,
                    ["first", "again"][again],
                    WAYS[way],
                    figures["prepared_s"],
                    figures["vmm_started_s"],
                );
                samples[again][way].0.push(figures);
            }
            host.stop_daemon()?;
        }
    }
    let side = |[usual, ahead]: &[VmSamples; 2]| {
        let pair = |name: &str| (usual.median(name), ahead.median(name));
        let (prepared, started) = (pair("/prepared_s"), pair("/vmm_started_s"));
        json!({
            "prepared_s": { WAYS[0]: prepared.0, WAYS[1]: prepared.1 },
            "prepared_ratio": prepared.1 / prepared.0,
            "vmm_started_s": { WAYS[0]: started.0, WAYS[1]: started.1 },
            "vmm_started_ratio": started.1 / started.0,
        })
    };
    super::write(
        out,
        &json!({
            "rounds": ROUNDS,
            "first_launch_of_a_daemon": side(&samples[0]),
            "further_launches": side(&samples[1]),
        }),
    )
}

fn launch(host: &Host, ahead: bool) -> Result<Value> {
    let manifest = demo::manifest("web");
    if ahead {
        output(host.forelay(["prefetch"]).arg(&manifest))?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while host.json(["memory"])?["premapped_launches"] != 1 {
            ensure!(Instant::now() < deadline, "the launch was not mapped ahead");
            std::thread::sleep(Duration::from_millis(20));
        }
        // As long as a forecast usually comes before its launch: prefetching is over.
        output(host.forelay(["prefetch", "--wait"]).arg(&manifest))?;
    }
    let vm = host.launch(&manifest, "web", &[])?;
    host.stop(&["web"])?;
    let figures = vm["launch"].clone();
    let premapped = figures["premapped"].as_bool().context("a launch tells")?;
    ensure!(premapped == ahead, "premapped: {premapped}");
    Ok(figures)
}
