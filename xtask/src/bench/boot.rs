//! `bench boot`: where the time of a launch goes. `bench peers`: launches beside what else
//! boots the same files with the same kernel and the same VMM.
//!
//! Both measure `examples/web.toml`, in rounds that take the ways in a new order each. Wall
//! time on a busy machine is noise, so CPU seconds of the VMM until `ready` stand beside it.
//! Forelay's repository is throttled as in the demo; the peer's disk is local, and `cold`
//! means that the host's page cache has none of it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::draw::Draw;
use super::statistics::median;
use super::{disks, write};
use crate::demo;
use crate::host::{Host, Programs, Settings};
use crate::process::{output, run_quiet, target_dir};

const PROFILE: &str = "web";
const ROUNDS: usize = 7;

/// Figures of one way's launches, one entry a round.
#[derive(Default)]
struct BootSamples(Vec<Value>);

impl BootSamples {
    fn median(&self, field: &str) -> f64 {
        let told = self.0.iter().filter_map(|one| one.pointer(field)?.as_f64());
        median(&told.collect::<Vec<_>>())
    }
}

struct WebBench {
    programs: Programs,
    settings: Settings,
    manifest: PathBuf,
}

impl WebBench {
    fn new(name: &str) -> Result<Self> {
        let (programs, settings) = super::prepare(name)?;
        Ok(Self {
            programs,
            settings,
            manifest: demo::manifest(PROFILE),
        })
    }

    fn host(&self) -> Result<Host> {
        Host::new(&self.programs, &self.settings)
    }

    /// A daemon that has its kernel ready, with what of its state is kept.
    fn start(&self, keep_history: bool) -> Result<Host> {
        let state = &self.settings.state;
        let gone = match keep_history {
            true => vec![state.join("cache")],
            false => vec![
                state.join("cache"),
                state.join("profiles"),
                state.join("history.db"),
                state.join("history.db-wal"),
                state.join("history.db-shm"),
            ],
        };
        for path in gone {
            let removed = match path.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| path.display().to_string());
                }
                _ => {}
            }
        }
        let mut host = self.host()?;
        host.start_daemon()?;
        host.wait_for_kernel()?;
        Ok(host)
    }

    /// A launch with the CPU seconds of its VMM.
    fn launch(&self, host: &Host) -> Result<Value> {
        let vm = host.launch(&self.manifest, PROFILE, &[])?;
        let mut figures = vm["launch"].clone();
        figures["cpu_s"] = json!(vm["pid"].as_u64().and_then(crate::cpu::of_process));
        Ok(figures)
    }
}

/// Runs `bench boot` and writes its figures to `out`.
pub fn run_boot(out: &Path) -> Result<()> {
    let bench = WebBench::new("boot")?;
    let host = bench.start(false)?;
    let mut samples = BootSamples::default();
    for round in 0..=ROUNDS {
        let figures = bench.launch(&host)?;
        host.stop_all()?;
        // The first one finds nothing in shared memory.
        if round > 0 {
            samples.0.push(figures);
        }
    }
    let first = samples.0.first().context("there were rounds")?;
    let steps = first["timings"].as_object().context("timings")?;
    let steps: Map<String, Value> = steps
        .keys()
        .map(|step| {
            (
                step.clone(),
                json!(samples.median(&format!("/timings/{step}"))),
            )
        })
        .collect();
    for (step, seconds) in &steps {
        println!("{step:<14} {:>8.3} s", seconds.as_f64().unwrap_or(f64::NAN));
    }
    let document = json!({
        "rounds": ROUNDS,
        "ready_s": samples.median("/ready_s"),
        "cpu_s": samples.median("/cpu_s"),
        "steps": steps,
    });
    write(out, &document)
}

const FORELAY: &str = "forelay";
const QCOW2: &str = "qcow2";

/// One launch: who, and from what.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Nothing known, nothing here.
    Cold,
    /// History known, nothing here.
    Predicted,
    /// All that it touches in shared memory.
    Again,
    /// A local disk, none of it in the page cache.
    DiskCold,
    /// A local disk, all of it in the page cache.
    DiskWarm,
}

const WAYS: [Way; 5] = [
    Way::Cold,
    Way::Predicted,
    Way::Again,
    Way::DiskCold,
    Way::DiskWarm,
];

/// Runs `bench peers` and writes its figures to `out`.
pub fn run_peers(out: &Path) -> Result<()> {
    let bench = WebBench::new("peers")?;
    let disk = Disk::make(&bench)?;
    let mut samples: [BootSamples; 5] = Default::default();
    let mut draw = Draw(3);
    for round in 1..=ROUNDS {
        let mut order = [0, 1, 2, 3, 4];
        draw.shuffle(&mut order);
        for way in order {
            let figures = match WAYS[way] {
                Way::DiskCold => disk.boot(true)?,
                Way::DiskWarm => disk.boot(false)?,
                forelay => bench.launch_way(forelay)?,
            };
            println!(
                "round {round}: {:<10} ready {:.2} s, CPU {:.2} s",
                ["cold", "predicted", "again", "disk cold", "disk warm"][way],
                figures["ready_s"].as_f64().unwrap_or(f64::NAN),
                figures["cpu_s"].as_f64().unwrap_or(f64::NAN),
            );
            samples[way].0.push(figures);
        }
    }
    let [cold, predicted, again, disk_cold, disk_warm] = &samples;
    let best = |samples: &BootSamples, field: &str| samples.median(field);
    let document = json!({
        "rounds": ROUNDS,
        "launch": [
            row(FORELAY, cold, again),
            row("forelay predicted", predicted, again),
            row(QCOW2, disk_cold, disk_warm),
        ],
        "predicted_ratio_to_best_warm": best(predicted, "/ready_s") / best(disk_warm, "/ready_s"),
        "predicted_cpu_ratio_to_best_warm": best(predicted, "/cpu_s") / best(disk_warm, "/cpu_s"),
        "cold_ratio_to_best_cold": best(cold, "/ready_s") / best(disk_cold, "/ready_s"),
        "cold_cpu_ratio_to_best_cold": best(cold, "/cpu_s") / best(disk_cold, "/cpu_s"),
    });
    write(out, &document)
}

fn row(way: &str, cold: &BootSamples, warm: &BootSamples) -> Value {
    json!({
        "way": way,
        "cold_s": cold.median("/ready_s"),
        "warm_s": warm.median("/ready_s"),
        "cold_cpu_s": cold.median("/cpu_s"),
        "warm_cpu_s": warm.median("/cpu_s"),
        "bytes": cold.median("/repository_bytes"),
        "demand_fetches": cold.median("/demand_fetches"),
        "stall_s": cold.median("/stall_s"),
    })
}

impl WebBench {
    fn launch_way(&self, way: Way) -> Result<Value> {
        let host = self.start(false)?;
        let mut figures = self.launch(&host)?;
        if way == Way::Cold {
            return stopped(host, figures);
        }
        demo::wait_for_working_set(&host, PROFILE)?;
        host.stop_all()?;
        if way == Way::Again {
            figures = self.launch(&host)?;
            return stopped(host, figures);
        }
        stopped(host, Value::Null)?;
        let host = self.start(true)?;
        figures = self.launch(&host)?;
        stopped(host, figures)
    }
}

fn stopped(mut host: Host, figures: Value) -> Result<Value> {
    host.stop_all()?;
    host.stop_daemon()?;
    Ok(figures)
}

/// The same root file system as a qcow2 image with an overlay for each boot.
struct Disk {
    dir: PathBuf,
    boot_disk: PathBuf,
}

impl Disk {
    fn make(bench: &WebBench) -> Result<Self> {
        let dir = target_dir().join("bench/peers-disk");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        let layout = dir.join("composed");
        disks::compose(&bench.host()?, &bench.manifest, &layout)?;
        disks::make_qcow2(&layout, &dir.join("root.qcow2"))?;
        let boot_disk = super::build_example("forelay-vm", "boot_disk")?;
        let disk = Self { dir, boot_disk };
        // Its kernel is unpacked and KVM probed before anything is measured.
        disk.boot(false)?;
        Ok(disk)
    }

    fn boot(&self, cold: bool) -> Result<Value> {
        let (backing, overlay) = (self.dir.join("root.qcow2"), self.dir.join("overlay.qcow2"));
        disks::make_overlay(&backing, &overlay)?;
        let mut evict = Command::new("dd");
        let input = format!("if={}", backing.display());
        evict.arg(input).args(match cold {
            true => ["of=/dev/null", "iflag=nocache", "count=0", "status=none"],
            false => ["of=/dev/null", "bs=1M", "conv=noerror", "status=none"],
        });
        run_quiet(&mut evict)?;
        let composed = self.dir.join("composed");
        let text = output(
            Command::new(&self.boot_disk)
                .arg(composed.join("vmlinuz"))
                .arg(composed.join("initrd"))
                .arg(&overlay)
                .stderr(Stdio::inherit()),
        )?;
        serde_json::from_slice(&text).context("boot_disk printed no JSON")
    }
}
