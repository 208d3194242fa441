//! `bench boot`: where the time of a launch of `examples/web.toml` goes.
//!
//! Wall time on a busy machine is noise, so CPU seconds of the VMM until `ready` stand beside
//! it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::statistics::median;
use super::write;
use crate::demo;
use crate::host::{Host, Programs, Settings};

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

/// `examples/web.toml` and a host to launch it on.
pub(super) struct WebBench {
    programs: Programs,
    settings: Settings,
    manifest: PathBuf,
}

impl WebBench {
    /// A host with state of its own below `bench/NAME-state`.
    pub fn new(name: &str) -> Result<Self> {
        let (programs, settings) = super::prepare(name)?;
        Ok(Self {
            programs,
            settings,
            manifest: demo::manifest(PROFILE),
        })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Path {
        &self.manifest
    }

    /// This bench with its repository on this host, as a local disk is, not behind a line.
    pub fn at_hand(&self) -> Self {
        Self {
            programs: self.programs.clone(),
            settings: Settings {
                latency_ms: 0,
                bandwidth_bytes_per_s: 0,
                ..self.settings.clone()
            },
            manifest: self.manifest.clone(),
        }
    }

    /// A host without a daemon.
    pub fn host(&self) -> Result<Host> {
        Host::new(&self.programs, &self.settings)
    }

    /// A daemon that has its kernel ready and nothing else.
    pub fn start(&self) -> Result<Host> {
        let gone = [
            "cache",
            "profiles",
            "history.db",
            "history.db-wal",
            "history.db-shm",
        ];
        self.start_without(&gone)
    }

    /// A daemon that has its kernel ready and the history of the one before; its disk cache
    /// too, if that is kept.
    pub fn restart(&self, keep_cache: bool) -> Result<Host> {
        self.start_without(if keep_cache { &[] } else { &["cache"] })
    }

    fn start_without(&self, gone: &[&str]) -> Result<Host> {
        for name in gone {
            let path = self.settings.state.join(name);
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
    let host = bench.start()?;
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
