//! Launches of Forelay's own.

use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{PORT, Served, page};
use crate::bench::boot::WebBench;
use crate::demo;
use crate::host::Host;

const PROFILE: &str = "web";

/// One launch by a daemon that was started for it. `known`: the profile was launched before.
/// `warm`: and its bytes are still in shared memory.
pub fn launch(bench: &WebBench, known: bool, warm: bool) -> Result<Served> {
    let host = bench.start()?;
    if !known && !warm {
        let served = launch_once(bench, &host)?;
        return ended(host, served);
    }
    launch_once(bench, &host)?;
    demo::wait_for_working_set(&host, PROFILE)?;
    host.stop_all()?;
    if warm && !known {
        let served = launch_once(bench, &host)?;
        return ended(host, served);
    }
    ended(host, Served::default())?;
    let host = bench.restart(warm)?;
    let served = launch_once(bench, &host)?;
    ended(host, served)
}

/// Launches and waits for the page; returns what `run` said and the seconds until the page.
pub fn launch_served(host: &Host, manifest: &Path) -> Result<(Value, f64)> {
    let asked = Instant::now();
    let mut child = host
        .forelay(["run", "--detach", "--json", "--name", PROFILE])
        .arg(manifest)
        .stdout(Stdio::piped())
        .spawn()?;
    let page_s = page::wait(PORT, asked, || {
        let status = child.try_wait().ok().flatten()?;
        (!status.success()).then(|| status.to_string())
    })?;
    let answer = child.wait_with_output()?;
    let vm = serde_json::from_slice(&answer.stdout).context("run printed no JSON")?;
    Ok((vm, page_s))
}

fn launch_once(bench: &WebBench, host: &Host) -> Result<Served> {
    let daemon_before_s = host.cpu_s();
    let (vm, page_s) = launch_served(host, bench.manifest())?;
    let cpu_s = vm["pid"].as_u64().and_then(crate::cpu::of_process);
    let figure = |name: &str| vm["launch"][name].as_u64().unwrap_or(0);
    Ok(Served {
        ready_s: vm["launch"]["ready_s"].as_f64().unwrap_or(f64::NAN),
        page_s,
        cpu_s: cpu_s.unwrap_or(f64::NAN) + host.cpu_s() - daemon_before_s,
        bytes: figure("repository_bytes"),
        requests: figure("demand_fetches"),
    })
}

fn ended(mut host: Host, served: Served) -> Result<Served> {
    host.stop_all()?;
    host.stop_daemon()?;
    Ok(served)
}
