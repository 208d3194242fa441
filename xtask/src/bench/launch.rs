//! `bench launch`: one manifest four ways in one run, interleaved: on demand, predicted,
//! everything resident, and a plain qcow2 overlay of the same root file system.
//!
//! Every Forelay launch starts with an empty disk cache and empty shared memory behind a
//! repository throttled to 20 ms and 100 MB/s; what differs is what is loaded before or
//! beside the launch. Since emulation hides I/O, the recorded touches are also replayed
//! natively: one process maps the same files and touches the same pages in the same order.
//!
//! Boots under emulation scatter by a tenth and more. So each round takes the ways in a new
//! order, ratios are of launches of one round, and rounds go on until the median ratio of
//! predicted to resident is known to [`WIDTH`], or [`MOST_ROUNDS`] are done. CPU time of VMM
//! and daemon is reported beside wall time; it scatters less.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::disks::PlainDisk;
use super::draw::Draw;
use super::statistics::{Paired, VmSamples, median, ratio};
use crate::cpu;
use crate::demo;
use crate::host::{Host, Programs, Settings};
use crate::process::output;

const PROFILE: &str = "web";
/// Rounds with all four ways; what follows takes the two that are compared closest.
const ROUNDS: usize = 5;
const MOST_ROUNDS: usize = 15;
const LEAST_REPLAY_ROUNDS: usize = 7;
const MOST_REPLAY_ROUNDS: usize = 21;
/// How well a ratio has to be known: width of the 95 % interval of its median.
const WIDTH: f64 = 0.05;

const ON_DEMAND: usize = 0;
const PREDICTED: usize = 1;
const RESIDENT: usize = 2;
const QCOW2: usize = 3;
const WAYS: [&str; 4] = ["on_demand", "predicted", "resident", "qcow2"];

/// CPU seconds of VMM and daemon; nobody tells what the VMM of a plain disk used.
fn cpu_s(samples: &VmSamples) -> Vec<f64> {
    let told = |field| samples.all(field, f64::NAN).into_iter();
    let both = told("/vmm_cpu_s").zip(told("/daemon_cpu_s"));
    both.map(|(vmm, daemon)| vmm + daemon).collect()
}

fn ready_s(samples: &VmSamples) -> Vec<f64> {
    samples.all("/ready_s", f64::NAN)
}

fn figures(samples: &VmSamples) -> Value {
    let zero_median = |field| median(&samples.all(field, 0.0));
    json!({
        "ready_s": ready_s(samples),
        "ready_median_s": samples.median("/ready_s"),
        "demand_fetches_median": zero_median("/demand_fetches"),
        "stall_median_s": zero_median("/stall_s"),
        "prepared_median_s": zero_median("/prepared_s"),
        "vmm_cpu_median_s": samples.median("/vmm_cpu_s"),
        "daemon_cpu_median_s": samples.median("/daemon_cpu_s"),
    })
}

struct LaunchBench {
    programs: Programs,
    settings: Settings,
    manifest: PathBuf,
    disk: PlainDisk,
    replay: PathBuf,
}

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    let bench = prepare()?;
    let touches = bench.learn()?;
    let samples = bench.rounds()?;
    let replay = bench.replays(&touches)?;
    let [on_demand, predicted, resident, qcow2] = &samples;
    let paired = |other: &VmSamples| Paired::new(&ready_s(predicted), &ready_s(other));
    let to = |other: &VmSamples| paired(other).median();
    let to_resident = paired(resident);
    let cpu = Paired::new(&cpu_s(predicted), &cpu_s(resident));
    let ways = WAYS.iter().zip(&samples);
    let ways = ways.map(|(way, samples)| ((*way).to_owned(), figures(samples)));
    let document = json!({
        "rounds": resident.0.len(),
        "demand_fetch_ratio":
            ratio(predicted.median("/demand_fetches"), on_demand.median("/demand_fetches")),
        "stall_ratio": ratio(predicted.median("/stall_s"), on_demand.median("/stall_s")),
        "ready_ratio_to_resident": to_resident.median(),
        "ready_ratio_to_resident_interval": to_resident.interval(),
        "ready_ratio_to_resident_of_medians":
            predicted.median("/ready_s") / resident.median("/ready_s"),
        "cpu_ratio_to_resident": cpu.median(),
        "cpu_ratio_to_resident_interval": cpu.interval(),
        "ready_ratio_to_on_demand": to(on_demand),
        "ready_ratio_to_qcow2": to(qcow2),
        "replay": replay,
        "ways": ways.collect::<serde_json::Map<_, _>>(),
    });
    super::write(out, &document)
}

fn prepare() -> Result<LaunchBench> {
    let (programs, settings) = super::prepare("launch")?;
    let manifest = demo::manifest(PROFILE);
    let host = Host::new(&programs, &settings)?;
    Ok(LaunchBench {
        disk: PlainDisk::make(&host, &manifest, "launch-disk")?,
        replay: super::build_example("forelay-memory", "replay")?,
        programs,
        settings,
        manifest,
    })
}

impl LaunchBench {
    fn rounds(&self) -> Result<[VmSamples; 4]> {
        let mut samples: [VmSamples; 4] = Default::default();
        let mut draw = Draw(1);
        for round in 0..MOST_ROUNDS {
            let to_resident =
                Paired::new(&ready_s(&samples[PREDICTED]), &ready_s(&samples[RESIDENT]));
            if round >= ROUNDS && to_resident.width() <= WIDTH {
                break;
            }
            let mut ways = match round < ROUNDS {
                true => vec![ON_DEMAND, PREDICTED, RESIDENT, QCOW2],
                false => vec![PREDICTED, RESIDENT],
            };
            draw.shuffle(&mut ways);
            for way in ways {
                let figures = self.launch(WAYS[way])?;
                ensure!(figures["ready_s"].is_f64(), "a ready VM has a time");
                println!(
                    "round {}: {:<10} ready {:.2} s, CPU {:.2} + {:.2} s, {} demand fetches, \
                     stall {:.3} s",
                    round + 1,
                    WAYS[way],
                    figures["ready_s"].as_f64().unwrap_or(f64::NAN),
                    figures["vmm_cpu_s"].as_f64().unwrap_or(f64::NAN),
                    figures["daemon_cpu_s"].as_f64().unwrap_or(0.0),
                    figures["demand_fetches"],
                    figures["stall_s"].as_f64().unwrap_or(0.0),
                );
                samples[way].0.push(figures);
            }
        }
        Ok(samples)
    }

    fn host(&self) -> Result<Host> {
        Host::new(&self.programs, &self.settings)
    }

    fn forget_disk_cache(&self) -> Result<()> {
        super::remove_all(&self.settings.state.join("cache"))
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
            return self.disk.boot();
        }
        let mut host = self.host()?;
        host.start_daemon()?;
        host.wait_for_kernel()?;
        let mode = match way {
            "on_demand" => "none",
            // Nothing ahead of the request: the prefetch runs beside the launch.
            "predicted" => "forecast",
            _ => {
                self.prefetch(&host, "everything")?;
                "none"
            }
        };
        let daemon_before_s = host.cpu_s();
        let vm = host.launch(&self.manifest, PROFILE, &["--prefetch", mode])?;
        let mut figures = vm["launch"].clone();
        figures["vmm_cpu_s"] = json!(vm["pid"].as_u64().and_then(cpu::of_process));
        figures["daemon_cpu_s"] = json!(host.cpu_s() - daemon_before_s);
        host.stop_all()?;
        host.stop_daemon()?;
        Ok(figures)
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

    /// Replays the touches natively in each of three ways, in rounds like the launches'.
    fn replays(&self, touches: &[Value]) -> Result<Value> {
        const MODES: [&str; 3] = ["none", "forecast", "everything"];
        let mut times: [Vec<f64>; 3] = Default::default();
        let mut draw = Draw(2);
        for round in 0..MOST_REPLAY_ROUNDS {
            if round >= LEAST_REPLAY_ROUNDS && Paired::new(&times[1], &times[2]).width() <= WIDTH {
                break;
            }
            let mut order = [0, 1, 2];
            draw.shuffle(&mut order);
            for way in order {
                times[way].push(self.replay_once(MODES[way], touches)?);
            }
        }
        let [on_demand, predicted, resident] = &times;
        let to_resident = Paired::new(predicted, resident);
        let medians = [on_demand, predicted, resident].map(|times| median(times));
        let [on_demand_s, predicted_s, resident_s] = medians;
        println!(
            "replay: on demand {on_demand_s:.4} s, predicted {predicted_s:.5} s, \
             resident {resident_s:.5} s"
        );
        Ok(json!({
            "rounds": resident.len(),
            "touches": touches.len(),
            "on_demand_s": on_demand_s,
            "predicted_s": predicted_s,
            "resident_s": resident_s,
            "speedup_over_on_demand": Paired::new(on_demand, predicted).median(),
            "ratio_to_resident": to_resident.median(),
            "ratio_to_resident_interval": to_resident.interval(),
        }))
    }

    /// A new daemon, loaded as `mode` says, and one replay in it; returns its time.
    fn replay_once(&self, mode: &str, touches: &[Value]) -> Result<f64> {
        self.forget_disk_cache()?;
        let mut host = self.host()?;
        host.start_daemon()?;
        let devices = self.prefetch(&host, mode)?;
        let list = host.scratch().join("touches");
        std::fs::write(&list, touch_list(touches, &devices)?)?;
        let input = std::fs::File::open(&list)?;
        let text = output(Command::new(&self.replay).stdin(input))?;
        let answer: Value = serde_json::from_slice(&text).context("replay printed JSON")?;
        let total_ns = answer["total_ns"].as_f64();
        host.stop_daemon()?;
        Ok(total_ns.context("replay tells its time")? / 1e9)
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
