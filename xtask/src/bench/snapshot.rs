//! `bench snapshot`: launches that resume beside launches that boot, and beside a local qcow2
//! disk, in one run: until `examples/web.toml` is ready and until its page is served, private memory of
//! a clone, all host memory of twenty clones of the four examples, bytes on disk of their
//! snapshots (`snapshot_storage.rs`). What is measured apart from that is in `snapshot_cases.rs`.
//!
//! Everything is resident and known, as after a few launches, and the repository is on this host
//! as the disk is; rounds take the ways in a new order each.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::boot::WebBench;
use super::draw::Draw;
use super::memory::status_bytes;
use super::peers::disk::{DiskSource, Disks};
use super::peers::forelay::launch_served;
use super::peers::memory::forelay_bytes;
use super::statistics::median;
use super::write;
use super::{snapshot_cases as cases, snapshot_storage};
use crate::demo;
use crate::host::Host;
use crate::process::{output, run_quiet};

const ROUNDS: usize = 10;
pub(super) const TIERS: [&str; 3] = ["kernel", "composed", "ready"];
/// A launch of tier `ready` whose VMM stood by.
const STARTED_AHEAD: &str = "ready_started_ahead";
/// How long a VMM may take until it stands by.
const STANDBY_LIMIT: Duration = Duration::from_secs(60);
pub(super) const PROFILES: [&str; 4] = ["web", "cache", "python", "node"];
const CLONES_OF_EACH: usize = 5;
/// Idle VMs settle this long before they are measured.
const IDLE: Duration = Duration::from_secs(10);

/// What a guest has that no other may have.
const IDENTITY: &str = "cat /proc/sys/kernel/hostname /etc/machine-id \
    /proc/sys/kernel/random/uuid /sys/class/net/eth0/address; \
    head -c 16 /dev/urandom | od -An -tx1; date +%s%N";

/// One launch.
#[derive(Clone, Copy)]
struct Launched {
    ready_s: f64,
    page_s: f64,
    private_bytes: f64,
    demand_fetches: f64,
}

/// The launches of each way: `booted`, then the tiers, then the last one's started ahead; and
/// the local disk's seconds.
#[derive(Default)]
struct Rounds {
    ways: [Vec<Launched>; 5],
    qcow2_ready_s: Vec<f64>,
    qcow2_page_s: Vec<f64>,
}

impl Rounds {
    fn median(&self, way: usize, of: fn(&Launched) -> f64) -> f64 {
        median(&self.ways[way].iter().map(of).collect::<Vec<_>>())
    }

    /// Seconds of each way over `base_s`.
    fn ratios(&self, of: fn(&Launched) -> f64, base_s: f64) -> Value {
        let names = ["booted"].into_iter().chain(TIERS).chain([STARTED_AHEAD]);
        let ratios = names
            .enumerate()
            .map(|(way, name)| (name.to_owned(), json!(self.median(way, of) / base_s)));
        ratios.collect::<Map<_, _>>().into()
    }
}

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    let bench = WebBench::new("snapshot")?;
    crate::prerequisites::install_peers()?;
    let disks = Disks::make(&bench)?;
    let mut host = bench.at_hand().start()?;
    let rounds = rounds(&host, &disks)?;
    let never_ran = cases::never_ran(&host)?;
    let examples = cases::other_examples(&host)?;
    let memory = memory(&host)?;
    // Last, since it reads all of them.
    let stored = snapshot_storage::stored(&host)?;
    host.stop_daemon()?;
    let first = cases::first_over_line(&bench)?;
    let boot_s = rounds.median(0, |one| one.ready_s);
    let qcow2_s = median(&rounds.qcow2_ready_s);
    let private = |way| rounds.median(way, |one| one.private_bytes);
    let per_way = |of: fn(&Launched) -> f64| {
        let values = TIERS.iter().enumerate();
        let values =
            values.map(|(at, name)| ((*name).to_owned(), json!(rounds.median(at + 1, of))));
        Value::from(values.collect::<Map<_, _>>())
    };
    let document = json!({
        "rounds": ROUNDS,
        "qcow2_s": qcow2_s,
        "boot_s": boot_s,
        "ready_ratio_to_qcow2": rounds.ratios(|one| one.ready_s, qcow2_s),
        "ready_ratio_to_boot": rounds.ratios(|one| one.ready_s, boot_s),
        "page_ratio_to_qcow2":
            rounds.ratios(|one| one.page_s, median(&rounds.qcow2_page_s)),
        "private_ratio_to_boot": private(3) / private(0),
        "private_bytes": { "booted": private(0), "clones": per_way(|one| one.private_bytes) },
        "restore_demand_fetches": per_way(|one| one.demand_fetches),
        "first_over_throttled_line": first,
        "never_ran": never_ran,
        "examples": examples,
        "host_memory_ratio": memory["ratio"],
        "host_memory": memory,
        "stored": stored,
    });
    write(out, &document)
}

/// The manifest of an example whose launches resume at `tier` at the latest.
pub(super) fn manifest(host: &Host, profile: &str, tier: &str, any_port: bool) -> Result<PathBuf> {
    let mut text = std::fs::read_to_string(demo::manifest(profile))?;
    if any_port {
        // `forward = ["8080:80"]` becomes `[":80"]`.
        let at = text
            .find("forward = [\"")
            .context("an example forwards a port")?
            + 12;
        let colon = text[at..].find(':').context("a forward has a colon")?;
        text.replace_range(at..at + colon, "");
    }
    text.push_str(&format!(
        "\n[snapshot]\nat = \"{tier}\"\nsecrets = \"shared\"\n"
    ));
    let path = host
        .scratch()
        .join(format!("{profile}-{tier}-{any_port}.toml"));
    std::fs::write(&path, text)?;
    Ok(path)
}

fn rounds(host: &Host, disks: &Disks) -> Result<Rounds> {
    let mut manifests = Vec::new();
    for tier in ["off"].into_iter().chain(TIERS) {
        let path = manifest(host, "web", tier, false)?;
        if tier != "off" {
            create(host, &path, tier)?;
        }
        manifests.push((path, tier));
    }
    let mut rounds = Rounds::default();
    let mut draw = Draw(5);
    // The first round finds out what launches touch.
    for round in 0..=ROUNDS {
        let mut order = [0, 1, 2, 3, 4, 5];
        draw.shuffle(&mut order);
        for way in order {
            if way == 5 {
                let served = disks.boot(DiskSource::Local, true)?;
                println!("round {round}: qcow2    {:5.2} s", served.ready_s);
                if round > 0 {
                    rounds.qcow2_ready_s.push(served.ready_s);
                    rounds.qcow2_page_s.push(served.page_s);
                }
                continue;
            }
            let (path, tier) = &manifests[way.min(TIERS.len())];
            let ahead = way > TIERS.len();
            let launched = launch(host, path, tier, ahead)?;
            let name = if ahead { STARTED_AHEAD } else { tier };
            println!(
                "round {round}: {name:<8} {:5.2} s, {:5.1} MiB private, {} demand fetches",
                launched.ready_s,
                launched.private_bytes / 1048576.0,
                launched.demand_fetches,
            );
            if round > 0 {
                rounds.ways[way].push(launched);
            }
        }
    }
    Ok(rounds)
}

pub(super) fn create(host: &Host, manifest: &Path, tier: &str) -> Result<Value> {
    host.json([
        "snapshot".as_ref(),
        "create".as_ref(),
        "--at".as_ref(),
        tier.as_ref(),
        manifest.as_os_str(),
    ])
}

/// Has a VMM stand by for a manifest's launch.
fn stand_by(host: &Host, manifest: &Path) -> Result<()> {
    run_quiet(host.forelay(["prefetch"]).arg(manifest))?;
    let deadline = Instant::now() + STANDBY_LIMIT;
    while host.json(["memory"])?["standby_vmms"] != 1 {
        ensure!(Instant::now() < deadline, "no VMM stands by");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn launch(host: &Host, manifest: &Path, tier: &str, ahead: bool) -> Result<Launched> {
    if ahead {
        stand_by(host, manifest)?;
    }
    let (vm, page_s) = launch_served(host, manifest)?;
    let resumed = vm["launch"]["resumed"].as_str().unwrap_or("off");
    ensure!(resumed == tier, "resumed from {resumed}: {}", vm["launch"]);
    let stood_by = vm["launch"]["stood_by"] == true;
    ensure!(stood_by == ahead, "stood by: {stood_by}: {}", vm["launch"]);
    let pid = vm["pid"].as_u64().context("a running VM has a pid")?;
    let launched = Launched {
        ready_s: vm["launch"]["ready_s"]
            .as_f64()
            .context("a launch that was ready")?,
        page_s,
        private_bytes: status_bytes(&format!("/proc/{pid}/status"), "RssAnon:")? as f64,
        demand_fetches: vm["launch"]["demand_fetches"].as_f64().unwrap_or(f64::NAN),
    };
    host.stop_all()?;
    Ok(launched)
}

/// All host memory of twenty clones, and of the same twenty VMs booted; clones are machines of
/// their own.
fn memory(host: &Host) -> Result<Value> {
    let clones = twenty(host, "ready")?;
    let booted = twenty(host, "off")?;
    Ok(json!({
        "vms": PROFILES.len() * CLONES_OF_EACH,
        "clones_bytes": clones,
        "booted_bytes": booted,
        "ratio": clones as f64 / booted as f64,
    }))
}

fn twenty(host: &Host, tier: &str) -> Result<u64> {
    run_quiet(&mut host.forelay(["memory", "--drop-idle"]))?;
    let mut pids = Vec::new();
    let mut identities = Vec::new();
    for profile in PROFILES {
        let path = manifest(host, profile, tier, true)?;
        for number in 0..CLONES_OF_EACH {
            let name = format!("{profile}-{number}");
            let vm = host.launch(&path, &name, &[])?;
            let resumed = vm["launch"]["resumed"].as_str().unwrap_or("off");
            ensure!(
                resumed == tier,
                "{name} resumed from {resumed}: {}",
                vm["launch"]
            );
            pids.push(vm["pid"].as_u64().context("a running VM has a pid")?);
            let text = output(
                host.forelay(["exec", &name, "--", "sh", "-c", IDENTITY])
                    .stderr(std::process::Stdio::inherit()),
            )?;
            identities.push(String::from_utf8(text)?);
        }
    }
    if tier != "off" {
        distinct(&identities)?;
    }
    std::thread::sleep(IDLE);
    let bytes = forelay_bytes(host, &pids)?;
    println!(
        "{} VMs at {tier}: {:.1} MiB",
        pids.len(),
        bytes as f64 / 1048576.0
    );
    host.stop_all()?;
    Ok(bytes)
}

/// No line of one is a line of another.
fn distinct(identities: &[String]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for line in identities.iter().flat_map(|one| one.lines()) {
        ensure!(seen.insert(line), "two VMs have {line:?}");
    }
    Ok(())
}
