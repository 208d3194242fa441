//! `bench pressure`: a hog takes memory step by step to the limit of a memory cgroup that
//! holds the daemon, its VMs and the hog, while every VM hashes files all the time.
//!
//! The digests that the VMs must find come from the host: the same image, composed from
//! the repository, mounted by the host's own EROFS.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::disks;
use super::statistics::median;
use crate::cgroup::MemoryCgroup;
use crate::demo;
use crate::host::{Host, Settings};
use crate::process::output;

const VMS: usize = 3;
const LIMIT_MIB: u64 = 2048;
const STEP_MIB: u64 = 16;
/// A step after which memory is not safe for this long was one too many.
const PATIENCE: Duration = Duration::from_secs(5);
const MIB: u64 = 1 << 20;

/// The files that the guests hash, over and over.
const FILES: &str = "find usr/lib/x86_64-linux-gnu usr/sbin -type f -size +64k -size -2000k \
                     | LC_ALL=C sort | head -n 60 | xargs";

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    let (programs, usual) = super::prepare("pressure")?;
    let settings = Settings {
        budget_bytes: LIMIT_MIB * MIB,
        ..usual
    };
    let cgroup = MemoryCgroup::new(LIMIT_MIB * MIB)?;
    let mut host = Host::new(&programs, &settings)?;
    let manifest = host.scratch().join("pressure.toml");
    std::fs::write(&manifest, MANIFEST)?;
    let truth = Arc::new(known_digests(&host, &manifest)?);
    host.start_daemon_in(&cgroup)?;
    let bench = PressureBench { host, cgroup };
    let document = bench.run(&manifest, &truth)?;
    super::write(out, &document)
}

struct PressureBench {
    // Dropped in this order: the cgroup can go only when it is empty.
    host: Host,
    cgroup: MemoryCgroup,
}

/// What the VMs found while they hashed.
#[derive(Debug, Default)]
struct Hashed {
    rounds: u64,
    wrong_bytes: u64,
    failures: Vec<String>,
}

/// One look at `forelay memory`.
struct Look {
    pressure: String,
    paused: bool,
    resident_bytes: u64,
    /// Of those, what some VM has in its page tables.
    mapped_bytes: u64,
    shortages: Value,
    totals: Value,
}

impl Look {
    fn of(&self, total: &str) -> u64 {
        self.totals[total].as_u64().unwrap_or(0)
    }
}

impl PressureBench {
    fn look(&self) -> Result<Look> {
        let report = self.host.json(["memory"])?;
        Ok(Look {
            pressure: report["pressure"].as_str().unwrap_or_default().to_owned(),
            paused: report["prefetch_paused"] == true,
            resident_bytes: report["resident_bytes"].as_u64().unwrap_or(0),
            mapped_bytes: report["charged_bytes"].as_u64().unwrap_or(0),
            shortages: report["shortages"].clone(),
            totals: report["totals"].clone(),
        })
    }

    fn run(&self, manifest: &Path, truth: &Arc<BTreeMap<String, (String, u64)>>) -> Result<Value> {
        let names: Vec<String> = (0..VMS).map(|number| format!("p{number}")).collect();
        for name in &names {
            self.host.launch(manifest, name, &["--prefetch", "none"])?;
        }
        // Something to give back: all of the components that other profiles would use.
        let others = ["python", "node", "cache"].map(demo::manifest);
        for manifest in others.iter().map(PathBuf::as_path).chain([manifest]) {
            let mut command = self
                .host
                .forelay(["prefetch", "--wait", "--mode", "everything"]);
            output(command.arg(manifest))?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        let hashed = Arc::new(Mutex::new(Hashed::default()));
        let figures = std::thread::scope(|scope| {
            for name in &names {
                let (stop, hashed, truth) = (&stop, &hashed, &truth);
                scope.spawn(move || {
                    while !stop.load(Relaxed) {
                        hash_once(&self.host, name, truth, hashed);
                    }
                });
            }
            let figures = self.squeeze(manifest, &hashed);
            stop.store(true, Relaxed);
            figures
        });
        let mut figures = figures?;
        let hashed = hashed
            .lock()
            .map_err(|_| anyhow::anyhow!("a hashing thread panicked"))?;
        let vms = self.host.json(["ps"])?;
        let running = |name: &&String| {
            let mut vms = vms.as_array().into_iter().flatten();
            vms.any(|vm| vm["name"] == **name && vm["state"] == "ready")
        };
        let died = names.iter().filter(|name| !running(name)).count() as u64;
        let oom_kills = self.cgroup.oom_kills()?;
        let fields = json!({
            "oom_kills": oom_kills,
            // A VMM that died of no OOM kill died of a signal; guests' own show as failures.
            "sigbus": died.saturating_sub(oom_kills) + hashed.failures.len() as u64,
            "wrong_bytes": hashed.wrong_bytes,
            "hash_rounds": hashed.rounds,
            "failures": hashed.failures,
            "vms": VMS,
            "vms_died": died,
            "files_hashed": truth.len(),
        });
        merge(&mut figures, fields);
        ensure!(hashed.rounds > 0, "no VM has hashed anything: {figures}");
        Ok(figures)
    }

    /// Lets the hog take memory until the pool has little left but what the VMs use, then
    /// lets it go.
    fn squeeze(&self, manifest: &Path, hashed: &Mutex<Hashed>) -> Result<Value> {
        wait_for("the VMs' first hashes", || {
            Ok(hashed.lock().map_or(0, |hashed| hashed.rounds) >= VMS as u64)
        })?;
        let start = self.look()?;
        ensure!(
            start.pressure == "plenty",
            "memory is short before the hog came"
        );
        println!(
            "pool {} MiB, usage {} MiB of {LIMIT_MIB}",
            start.resident_bytes / MIB,
            self.cgroup.usage_bytes()? / MIB
        );
        let mut hog = Hog::start(&self.cgroup)?;
        let (step_to_safe_ms, safe) = self.step_up(&mut hog, start.mapped_bytes)?;
        // Asked for at the limit: has to wait until the hog is gone.
        let mut command = self.host.forelay(["prefetch", "--mode", "everything"]);
        output(command.arg(manifest))?;
        let rounds = hashed.lock().map_or(0, |hashed| hashed.rounds);
        wait_for("hashes under pressure", || {
            Ok(hashed.lock().map_or(0, |hashed| hashed.rounds) >= rounds + VMS as u64)
        })?;
        let squeezed = self.look()?;
        hog.leave()?;
        let left = Instant::now();
        wait_for("prefetch to resume", || {
            let now = self.look()?;
            Ok(!now.paused && now.of("pushed_bytes") > squeezed.of("pushed_bytes"))
        })?;
        let resumed_s = left.elapsed().as_secs_f64();
        let after = self.look()?;
        let none = Vec::new();
        let shortages = squeezed.shortages.as_array().unwrap_or(&none);
        let freed_ms: Vec<f64> = shortages
            .iter()
            .filter_map(|shortage| Some(shortage["took_s"].as_f64()? * 1e3))
            .collect();
        let evicted = squeezed.of("budget_evicted_bytes") + squeezed.of("pressure_evicted_bytes");
        Ok(json!({
            "evictions_before_critical": squeezed.of("budget_evicted_bytes"),
            "freed_ms_p50": median(&freed_ms),
            "freed_ms_max": freed_ms.iter().copied().fold(0.0, f64::max),
            "freed_ms": freed_ms,
            "step_to_safe_ms": step_to_safe_ms,
            "safe_after_each_step": safe,
            "mapped_by_vms_bytes": start.mapped_bytes,
            "shortages": shortages,
            "refaulted_share":
                squeezed.of("refetched_bytes") as f64 / evicted.max(1) as f64,
            "evicted_bytes": evicted,
            "refaulted_bytes": squeezed.of("refetched_bytes"),
            "reclaimed_by_kernel_bytes": squeezed.of("reclaimed_bytes"),
            "pool_before_bytes": start.resident_bytes,
            "pool_squeezed_bytes": squeezed.resident_bytes,
            "pool_after_bytes": after.resident_bytes,
            "prefetch_paused": squeezed.paused,
            "prefetch_resumed_s": resumed_s,
            "prefetch_resumed_bytes": after.of("pushed_bytes") - squeezed.of("pushed_bytes"),
            "limit_bytes": LIMIT_MIB * MIB,
            "step_bytes": STEP_MIB * MIB,
        }))
    }

    /// The hog's steps, each followed by a wait until memory is safe again, until the pool
    /// holds little more than `in_use_bytes`: what a further step took, it would take from
    /// the VMs. The time that each step took which met the critical level, and whether
    /// memory was safe after every one.
    fn step_up(&self, hog: &mut Hog, in_use_bytes: u64) -> Result<(Vec<f64>, bool)> {
        let mut step_to_safe_ms = Vec::new();
        loop {
            let before = self.look()?;
            let step = Instant::now();
            let held = hog.take(STEP_MIB)?;
            let mut now = self.look()?;
            while now.pressure == "critical" && step.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(5));
                now = self.look()?;
            }
            println!(
                "hog {} MiB: {}, usage {} MiB, pool {} MiB, evicted {} MiB, reclaimed {} MiB, \
                 refaulted {} MiB",
                held / MIB,
                now.pressure,
                self.cgroup.usage_bytes()? / MIB,
                now.resident_bytes / MIB,
                now.of("pressure_evicted_bytes") / MIB,
                now.of("reclaimed_bytes") / MIB,
                now.of("refetched_bytes") / MIB,
            );
            if now.pressure == "critical" {
                return Ok((step_to_safe_ms, false));
            }
            if now.of("pressure_evicted_bytes") > before.of("pressure_evicted_bytes") {
                step_to_safe_ms.push(step.elapsed().as_secs_f64() * 1e3);
            }
            if now.resident_bytes <= in_use_bytes + STEP_MIB * MIB {
                return Ok((step_to_safe_ms, true));
            }
            ensure!(held < LIMIT_MIB * MIB, "the pool gives nothing back");
        }
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(180);
    while !done()? {
        ensure!(Instant::now() < deadline, "waited 180 s for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Has one VM hash its files and compares what it says.
fn hash_once(
    host: &Host,
    vm: &str,
    truth: &BTreeMap<String, (String, u64)>,
    hashed: &Mutex<Hashed>,
) {
    let script = format!("cd / && {FILES} sha256sum");
    let answer = host
        .forelay(["exec", vm, "--", "sh", "-c", &script])
        .output();
    let Ok(mut hashed) = hashed.lock() else {
        return;
    };
    match answer {
        Ok(answer) if answer.status.success() => {
            let text = String::from_utf8_lossy(&answer.stdout);
            let said: BTreeMap<&str, &str> = text.lines().filter_map(split).collect();
            for (path, (digest, bytes)) in truth {
                if said.get(path.as_str()) != Some(&digest.as_str()) {
                    hashed.wrong_bytes += bytes;
                }
            }
            hashed.rounds += 1;
        }
        Ok(answer) => {
            let why = String::from_utf8_lossy(&answer.stderr).trim().to_owned();
            hashed
                .failures
                .push(format!("{vm}: {}: {why}", answer.status));
            std::thread::sleep(Duration::from_millis(500));
        }
        Err(error) => hashed.failures.push(error.to_string()),
    }
}

/// Path and digest of one line of sha256sum.
fn split(line: &str) -> Option<(&str, &str)> {
    let (digest, path) = line.split_once("  ")?;
    Some((path, digest))
}

/// Digest and size of each file that the guests hash, by the host's own EROFS.
fn known_digests(host: &Host, manifest: &Path) -> Result<BTreeMap<String, (String, u64)>> {
    let layout = host.scratch().join("composed");
    disks::compose(host, manifest, &layout)?;
    let script = format!("cd \"$1/tree\"\n{FILES} sha256sum\n{FILES} stat -c '%s  %n'\n");
    let text = output(&mut disks::in_tree(&layout, &script))?;
    let text = String::from_utf8(text)?;
    let lines: Vec<(&str, &str)> = text.lines().filter_map(split).collect();
    let (digests, sizes) = lines.split_at(lines.len() / 2);
    let mut known = BTreeMap::new();
    for ((path, digest), (same, bytes)) in digests.iter().zip(sizes) {
        ensure!(path == same, "the list of files changed between two looks");
        known.insert((*path).to_owned(), ((*digest).to_owned(), bytes.parse()?));
    }
    ensure!(known.len() > 10, "the image has too few files to hash");
    std::fs::remove_dir_all(&layout)?;
    Ok(known)
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

struct Hog {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl Hog {
    fn start(cgroup: &MemoryCgroup) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("hog");
        let mut child = cgroup
            .inside(&command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let answers = BufReader::new(child.stdout.take().context("the hog has an output")?);
        Ok(Self { child, answers })
    }

    /// Takes more; returns what it holds in bytes.
    fn take(&mut self, mib: u64) -> Result<u64> {
        let input = self.child.stdin.as_mut().context("the hog has an input")?;
        writeln!(input, "{mib}")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        line.trim().parse().context("the hog was killed")
    }

    fn leave(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const MANIFEST: &str = r#"
name = "pressure"
owner = "demo"
base = "debian"
components = ["nginx"]
entrypoint = ["sleep", "100000"]

[vm]
memory_mib = 192
"#;
