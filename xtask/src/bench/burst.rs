//! `bench burst`: 100 simultaneous launches of 10 profiles, with native mappers for VMs.
//!
//! What a launch touches is recorded from one real launch of each profile. Unique bytes
//! are what one daemon fetches on demand for one launch of each profile, one after
//! another; then a fresh daemon with an empty disk cache serves ten launches of each at
//! once: as it does by itself, which is with the forecast of each profile prefetched from
//! the moment of the launches on, and on demand alone.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::images;
use super::launch::touch_list;
use super::statistics::{median, quantile};
use crate::host::{Host, Programs, Settings};

const LAUNCHES: usize = 100;
const PROFILES: usize = 10;
const MEMORY_MIB: u64 = 192;

/// What a launch touched, as `forelay map` tells it.
type Touches = Vec<Value>;

struct BurstBench {
    programs: Programs,
    settings: Settings,
    replay: PathBuf,
    manifests: Vec<PathBuf>,
}

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    let (programs, settings) = super::prepare("burst")?;
    std::fs::create_dir_all(&settings.state)?;
    let mut bench = BurstBench {
        programs,
        settings,
        replay: super::build_example("forelay-memory", "replay")?,
        manifests: Vec::new(),
    };
    for number in 0..PROFILES {
        let path = bench.settings.state.join(format!("image{number}.toml"));
        std::fs::write(&path, images::manifest(number, MEMORY_MIB))?;
        bench.manifests.push(path);
    }
    let recorded = bench.record()?;
    let mut unique_bytes = 0;
    let mut alone_s = Vec::new();
    bench.with_host(|host, devices| {
        for touches in &recorded {
            alone_s.extend(bench.launch(devices, &[touches], None)?);
        }
        unique_bytes = fetched(host)?;
        Ok(())
    })?;
    let all: Vec<&Touches> = (0..LAUNCHES).map(|n| &recorded[n % PROFILES]).collect();
    let burst = |forecast: bool| -> Result<Value> {
        let (mut times, mut bytes) = (Vec::new(), 0);
        bench.with_host(|host, devices| {
            times = bench.launch(devices, &all, forecast.then_some(host))?;
            bytes = fetched(host)?;
            Ok(())
        })?;
        let (p50, p95) = (quantile(&times, 0.5), quantile(&times, 0.95));
        let of_profile = |number: usize| {
            let own: Vec<f64> = times
                .iter()
                .skip(number)
                .step_by(PROFILES)
                .copied()
                .collect();
            median(&own)
        };
        Ok(json!({
            "fetched_bytes": bytes,
            "fetched_ratio": bytes as f64 / unique_bytes.max(1) as f64,
            "launch_s_p50": p50,
            "launch_s_p95": p95,
            "p95_to_p50": p95 / p50,
            "launch_s_by_profile": (0..PROFILES).map(of_profile).collect::<Vec<f64>>(),
        }))
    };
    let mut document = burst(true)?;
    let on_demand = burst(false)?;
    let touched = recorded
        .iter()
        .map(|touches| touches.iter().filter_map(|one| one["len"].as_u64()).sum());
    let fields = json!({
        "launches": LAUNCHES,
        "profiles": PROFILES,
        "unique_bytes": unique_bytes,
        "touched_bytes_by_profile": touched.collect::<Vec<u64>>(),
        "one_after_another_s": alone_s,
        "on_demand": on_demand,
    });
    if let (Value::Object(document), Value::Object(fields)) = (&mut document, fields) {
        document.extend(fields);
    }
    super::write(out, &document)
}

fn fetched(host: &Host) -> Result<u64> {
    let report = host.json(["memory"])?;
    report["totals"]["repository_bytes"]
        .as_u64()
        .context("memory tells the repository's bytes")
}

impl BurstBench {
    /// Touches of one real launch of each profile, in first-touch order.
    fn record(&self) -> Result<Vec<Touches>> {
        let mut host = Host::new(&self.programs, &self.settings)?;
        host.start_daemon()?;
        let mut recorded = Vec::new();
        for (number, manifest) in self.manifests.iter().enumerate() {
            let name = format!("image{number}");
            host.launch(manifest, &name, &[])?;
            let map = host.json(["map", name.as_str()])?;
            let touches = map["touches"].as_array().cloned().unwrap_or_default();
            ensure!(!touches.is_empty(), "{name} touched nothing");
            recorded.push(touches);
            host.stop(&[name.as_str()])?;
        }
        host.stop_daemon()?;
        Ok(recorded)
    }

    /// A daemon with nothing cached, and the devices of all components.
    fn with_host(&self, work: impl FnOnce(&Host, &[Value]) -> Result<()>) -> Result<()> {
        let _ = std::fs::remove_dir_all(self.settings.state.join("cache"));
        let mut host = Host::new(&self.programs, &self.settings)?;
        host.start_daemon()?;
        // The first image has all of the runtimes.
        let arguments = ["prefetch", "--mode", "none"].map(AsRef::as_ref);
        let answer = host.json(arguments.into_iter().chain([self.manifests[0].as_os_str()]))?;
        let devices = answer["devices"].as_array();
        work(&host, devices.context("a prefetch names its devices")?)?;
        host.stop_daemon()
    }

    /// Launches all at once, with a host also telling it of each profile as the launch
    /// itself would; returns the seconds that each took.
    fn launch(
        &self,
        devices: &[Value],
        launches: &[&Touches],
        forecast: Option<&Host>,
    ) -> Result<Vec<f64>> {
        let mut children = Vec::new();
        for touches in launches {
            let mut child = Command::new(&self.replay)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let text = touch_list(touches, devices)?;
            let mut input = child.stdin.take().context("a replay has an input")?;
            input.write_all(text.as_bytes())?;
            children.push((child, input));
        }
        // Every replay has its list and waits for the end of it: now they all start.
        let start = Instant::now();
        if let Some(host) = forecast {
            let mut told = Vec::new();
            for manifest in &self.manifests {
                let mut command = host.forelay(["prefetch"]);
                told.push(command.arg(manifest).stdout(Stdio::null()).spawn()?);
            }
            // Launches are asked for before their VMs run.
            for mut child in told {
                ensure!(child.wait()?.success(), "a prefetch was refused");
            }
        }
        let children: Vec<Child> = children.into_iter().map(|(child, _)| child).collect();
        let waits: Vec<_> = children
            .into_iter()
            .map(|child| std::thread::spawn(move || finish(child, start)))
            .collect();
        let mut times = Vec::new();
        for wait in waits {
            times.push(
                wait.join()
                    .map_err(|_| anyhow::anyhow!("a wait panicked"))??,
            );
        }
        Ok(times)
    }
}

/// Seconds from `start` until a replay has touched everything.
fn finish(mut child: Child, start: Instant) -> Result<f64> {
    let mut text = String::new();
    let output = child.stdout.as_mut().context("a replay has an output")?;
    output.read_to_string(&mut text)?;
    let seconds = start.elapsed().as_secs_f64();
    ensure!(child.wait()?.success(), "a replay failed: {text}");
    Ok(seconds)
}
