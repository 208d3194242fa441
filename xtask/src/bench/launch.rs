//! `bench launch`: one manifest four ways in one run, interleaved: on demand, predicted,
//! everything resident, and a plain qcow2 overlay of the same root file system.
//!
//! Every Forelay launch starts with an empty disk cache and empty shared memory behind a
//! repository throttled to 20 ms and 100 MB/s; what differs is what is loaded before or
//! beside the launch. Since emulation hides I/O, the recorded touches are also replayed
//! natively: one process maps the same files and touches the same pages in the same order.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::disks;
use super::statistics::{median, ratio};
use crate::demo;
use crate::host::{Host, Programs, Settings};
use crate::process::{output, target_dir};

const PROFILE: &str = "web";
const ROUNDS: usize = 5;
const REPLAY_ROUNDS: usize = 7;

/// The ways of launching, in the order in which each round takes them.
const WAYS: [&str; 4] = ["on_demand", "predicted", "resident", "qcow2"];

#[derive(Default)]
struct Samples {
    ready_s: Vec<f64>,
    demand_fetches: Vec<f64>,
    stall_s: Vec<f64>,
}

struct Bench {
    programs: Programs,
    settings: Settings,
    manifest: PathBuf,
    disk: PathBuf,
    boot_disk: PathBuf,
    replay: PathBuf,
}

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    let bench = prepare()?;
    let touches = bench.learn()?;
    let mut samples: [Samples; 4] = Default::default();
    for round in 0..ROUNDS {
        for (way, samples) in WAYS.iter().zip(&mut samples) {
            let figures = bench.launch(way)?;
            let ready_s = figures["ready_s"]
                .as_f64()
                .context("a ready VM has a time")?;
            println!(
                "round {}/{ROUNDS}: {way:<10} ready {ready_s:.2} s, {} demand fetches, stall {:.3} s",
                round + 1,
                figures["demand_fetches"],
                figures["stall_s"].as_f64().unwrap_or(0.0),
            );
            samples.ready_s.push(ready_s);
            samples
                .demand_fetches
                .push(figures["demand_fetches"].as_f64().unwrap_or(0.0));
            samples
                .stall_s
                .push(figures["stall_s"].as_f64().unwrap_or(0.0));
        }
    }
    let replay = bench.replays(&touches)?;
    let [on_demand, predicted, resident, qcow2] = &samples;
    let ready = |samples: &Samples| median(&samples.ready_s);
    let ways = WAYS.iter().zip(&samples).map(|(way, samples)| {
        let figures = json!({
            "ready_s": samples.ready_s,
            "ready_median_s": ready(samples),
            "demand_fetches_median": median(&samples.demand_fetches),
            "stall_median_s": median(&samples.stall_s),
        });
        ((*way).to_owned(), figures)
    });
    let document = json!({
        "rounds": ROUNDS,
        "demand_fetch_ratio":
            ratio(median(&predicted.demand_fetches), median(&on_demand.demand_fetches)),
        "stall_ratio": ratio(median(&predicted.stall_s), median(&on_demand.stall_s)),
        "ready_ratio_to_resident": ready(predicted) / ready(resident),
        "ready_ratio_to_on_demand": ready(predicted) / ready(on_demand),
        "ready_ratio_to_qcow2": ready(predicted) / ready(qcow2),
        "replay": replay,
        "ways": ways.collect::<serde_json::Map<_, _>>(),
    });
    super::write(out, &document)
}

fn prepare() -> Result<Bench> {
    let (programs, settings) = super::prepare("launch")?;
    let mut bench = Bench {
        programs,
        settings,
        manifest: demo::manifest(PROFILE),
        disk: target_dir().join("bench/launch-disk"),
        boot_disk: super::build_example("forelay-vm", "boot_disk")?,
        replay: super::build_example("forelay-memory", "replay")?,
    };
    bench.disk = bench.make_disk()?;
    Ok(bench)
}

impl Bench {
    fn host(&self) -> Result<Host> {
        Host::new(&self.programs, &self.settings)
    }

    fn forget_disk_cache(&self) -> Result<()> {
        match std::fs::remove_dir_all(self.settings.state.join("cache")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// The same root file system as an ext4 image in qcow2 form.
    fn make_disk(&self) -> Result<PathBuf> {
        let dir = &self.disk;
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir)?;
        let host = self.host()?;
        let layout = dir.join("composed");
        disks::compose(&host, &self.manifest, &layout)?;
        disks::make_qcow2(&layout, &dir.join("root.qcow2"))?;
        Ok(layout)
    }

    /// Launches until the working set is known; returns what was touched.
    fn learn(&self) -> Result<Vec<Value>> {
        let mut touches = Vec::new();
        for round in 0..2 {
            self.forget_disk_cache()?;
            let mut host = self.host()?;
            host.start_daemon()?;
            host.launch(&self.manifest, PROFILE, &[])?;
            demo::wait_for_working_set(&host, PROFILE)?;
            if round == 0 {
                let map = host.json(["map", PROFILE])?;
                touches = map["touches"].as_array().cloned().unwrap_or_default();
            }
            host.stop_all()?;
            host.stop_daemon()?;
        }
        ensure!(!touches.is_empty(), "the launch touched nothing");
        Ok(touches)
    }

    fn launch(&self, way: &str) -> Result<Value> {
        self.forget_disk_cache()?;
        if way == "qcow2" {
            return self.launch_qcow2();
        }
        let mut host = self.host()?;
        host.start_daemon()?;
        let mode = match way {
            "on_demand" => "none",
            // Nothing ahead of the request: the prefetch runs beside the launch.
            "predicted" => "forecast",
            _ => {
                self.prefetch(&host, "everything")?;
                "none"
            }
        };
        let vm = host.launch(&self.manifest, PROFILE, &["--prefetch", mode])?;
        host.stop_all()?;
        host.stop_daemon()?;
        Ok(vm["launch"].clone())
    }

    fn launch_qcow2(&self) -> Result<Value> {
        let overlay = self
            .disk
            .parent()
            .context("has a parent")?
            .join("launch-overlay.qcow2");
        let backing = self
            .disk
            .parent()
            .context("has a parent")?
            .join("root.qcow2");
        disks::make_overlay(&backing, &overlay)?;
        let text = output(
            Command::new(&self.boot_disk)
                .arg(self.disk.join("vmlinuz"))
                .arg(self.disk.join("initrd"))
                .arg(&overlay)
                .stderr(Stdio::inherit()),
        )?;
        serde_json::from_slice(&text).context("boot_disk printed no JSON")
    }

    /// Maps the manifest's devices and loads ahead of a launch; returns the devices.
    fn prefetch(&self, host: &Host, mode: &str) -> Result<Vec<Value>> {
        let mut arguments = vec!["prefetch".as_ref(), "--wait".as_ref(), "--mode".as_ref()];
        arguments.extend([mode.as_ref(), self.manifest.as_os_str()]);
        let answer = host.json(arguments)?;
        answer["devices"]
            .as_array()
            .cloned()
            .context("prefetch names the devices")
    }

    /// Replays the touches natively in each of three ways.
    fn replays(&self, touches: &[Value]) -> Result<Value> {
        let mut times: [Vec<f64>; 3] = Default::default();
        for _ in 0..REPLAY_ROUNDS {
            for (mode, times) in ["none", "forecast", "everything"].iter().zip(&mut times) {
                self.forget_disk_cache()?;
                let mut host = self.host()?;
                host.start_daemon()?;
                let devices = self.prefetch(&host, mode)?;
                let list = host.scratch().join("touches");
                std::fs::write(&list, touch_list(touches, &devices)?)?;
                let input = std::fs::File::open(&list)?;
                let text = output(Command::new(&self.replay).stdin(input))?;
                let answer: Value = serde_json::from_slice(&text).context("replay printed JSON")?;
                let total_ns = answer["total_ns"]
                    .as_f64()
                    .context("replay tells its time")?;
                times.push(total_ns / 1e9);
                host.stop_daemon()?;
            }
        }
        let [on_demand, predicted, resident] = times.map(|times| median(&times));
        println!(
            "replay: on demand {on_demand:.4} s, predicted {predicted:.4} s, resident {resident:.4} s"
        );
        Ok(json!({
            "rounds": REPLAY_ROUNDS,
            "touches": touches.len(),
            "on_demand_s": on_demand,
            "predicted_s": predicted,
            "resident_s": resident,
            "speedup_over_on_demand": on_demand / predicted,
            "ratio_to_resident": predicted / resident,
        }))
    }
}

/// The replay's input: the files, then each touched page in first-touch order.
pub(super) fn touch_list(touches: &[Value], devices: &[Value]) -> Result<String> {
    const PAGE_BYTES: u64 = 4096;
    let mut text = String::new();
    for device in devices {
        let path = device["path"].as_str().context("a device has a path")?;
        text.push_str(&format!("file {} {path}\n", std::fs::metadata(path)?.len()));
    }
    for touch in touches {
        let file = devices
            .iter()
            .position(|device| device["image"] == touch["image"]);
        let file = file.context("a touched image is among the devices")?;
        let offset = touch["offset"].as_u64().context("a touch has an offset")?;
        let len = touch["len"].as_u64().context("a touch has a length")?;
        for page in offset / PAGE_BYTES..(offset + len).div_ceil(PAGE_BYTES) {
            text.push_str(&format!("touch {file} {page}\n"));
        }
    }
    Ok(text)
}
