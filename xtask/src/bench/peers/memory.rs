//! All host memory of idle VMs of `examples/web.toml`, each way.
//!
//! Counted: each process's proportional share of what it maps (guest RAM, VMM, servers; pages
//! that KSM merged are shared among their users), shared memory and page cache of images, each
//! page once.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::disk::{Disks, tempdir};
use super::virtiofs::SharedTree;
use crate::bench::boot::WebBench;
use crate::bench::disks;
use crate::bench::memory::{cached_bytes, proportional_bytes, status_bytes};
use crate::host::Host;
use crate::process::output;

const COUNTS: [usize; 2] = [4, 12];
const MEMORY_MIB: u64 = 256;

/// Idle VMs settle this long before they are measured.
const IDLE: Duration = Duration::from_secs(15);

/// Rows of all ways.
pub fn rows(bench: &WebBench, disks: &Disks, tree: &SharedTree) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    for vms in COUNTS {
        let [bytes, merged] = of_forelay(bench, vms)?;
        rows.extend([
            row("forelay", vms, bytes),
            row("forelay with KSM", vms, merged),
        ]);
        let [bytes, merged] = of_disks(disks, vms)?;
        rows.extend([row("qcow2", vms, bytes), row("qcow2 with KSM", vms, merged)]);
        rows.push(row("virtiofsd", vms, of_tree(tree, vms)?));
    }
    Ok(rows)
}

fn row(way: &str, vms: usize, bytes: u64) -> Value {
    println!(
        "{vms:>2} VMs, {way:<18} {:8.1} MiB",
        bytes as f64 / 1048576.0
    );
    json!({ "way": way, "vms": vms, "bytes": bytes })
}

fn share_bytes(pids: &[u64]) -> Result<u64> {
    pids.iter()
        .map(|pid| status_bytes(&format!("/proc/{pid}/smaps_rollup"), "Pss:"))
        .sum()
}

/// Measured once idle, and again once KSM has been through all of it.
fn idle_and_merged(of: impl Fn() -> Result<u64>) -> Result<[u64; 2]> {
    std::thread::sleep(IDLE);
    let idle = of()?;
    let merging = Merging::start()?;
    merging.wait()?;
    Ok([idle, of()?])
}

fn of_forelay(bench: &WebBench, vms: usize) -> Result<[u64; 2]> {
    let mut host = bench.start()?;
    // Nobody's pages are merged unless the configuration says whose.
    host.stop_daemon()?;
    host.configure("memory", "ksm = \"demo\"")?;
    host.start_daemon()?;
    host.wait_for_kernel()?;
    let text = std::fs::read_to_string(bench.manifest())?.replace("\"8080:80\"", "\":80\"");
    let manifest = host.scratch().join("idle.toml");
    std::fs::write(&manifest, text)?;
    let mut pids = Vec::new();
    for number in 0..vms {
        let name = format!("idle-{number}");
        let vm = host.launch(&manifest, &name, &[])?;
        pids.push(vm["pid"].as_u64().context("a running VM has a pid")?);
    }
    let bytes = idle_and_merged(|| forelay_bytes(&host, &pids))?;
    host.stop_all()?;
    host.stop_daemon()?;
    Ok(bytes)
}

/// All that VMs and their daemon take: each process's share of what it maps, without its share
/// of shared memory, of which each page counts once.
pub fn forelay_bytes(host: &Host, vmms: &[u64]) -> Result<u64> {
    let mount = host.scratch().join("run/memory");
    let mut bytes = 0;
    for pid in vmms.iter().copied().chain(host.pids()) {
        bytes += share_bytes(&[pid])?.saturating_sub(proportional_bytes(pid, &mount)?);
    }
    let report = host.json(["memory"])?;
    // Map images are mapped by their VMMs, and so in their shares.
    Ok(bytes
        + report["resident_bytes"]
            .as_u64()
            .context("resident_bytes")?)
}

fn of_disks(disks: &Disks, vms: usize) -> Result<[u64; 2]> {
    let mut running = Vec::new();
    let mut pids = Vec::new();
    let backing = disks.path("root.qcow2");
    super::disk::drop_from_page_cache(&backing)?;
    let mut files = vec![backing.clone()];
    for number in 0..vms {
        let overlay = disks.path(&format!("idle-{number}.qcow2"));
        disks::make_overlay(&backing, &overlay)?;
        let mut vm = disks.start(&overlay, None, MEMORY_MIB)?;
        pids.push(
            vm.ready()?["pid"]
                .as_u64()
                .context("a running VM has a pid")?,
        );
        running.push(vm);
        files.push(overlay);
    }
    let bytes = idle_and_merged(|| Ok(share_bytes(&pids)? + cached_bytes(&files)?))?;
    for vm in running {
        vm.end()?;
    }
    Ok(bytes)
}

fn of_tree(tree: &SharedTree, vms: usize) -> Result<u64> {
    let scratch = tempdir()?;
    let mut running = Vec::new();
    for number in 0..vms {
        let dir = scratch.join(number.to_string());
        std::fs::create_dir_all(&dir)?;
        let port = 18_100 + number as u16;
        let asked = Instant::now();
        let vm = tree.start(&dir, Some(port), MEMORY_MIB)?;
        super::page::wait(port, asked, || None)?;
        running.push(vm);
    }
    std::thread::sleep(IDLE);
    let pids: Vec<u64> = running.iter().flat_map(|vm| vm.pids()).collect();
    let bytes = share_bytes(&pids)? + cached_below(tree.path())?;
    for vm in running {
        vm.end()?;
    }
    let _ = std::fs::remove_dir_all(&scratch);
    Ok(bytes)
}

/// Page cache of all files below a directory.
fn cached_below(dir: &Path) -> Result<u64> {
    let script = r#"find "$1" -xdev -type f -size +0 -print0 | xargs -0 fincore --bytes --noheadings --output RES"#;
    let text = output(Command::new("sh").args(["-c", script, "sh"]).arg(dir))?;
    let text = String::from_utf8(text)?;
    Ok(text
        .lines()
        .filter_map(|line| line.trim().parse::<u64>().ok())
        .sum())
}

/// KSM, running while this lives; what it merged is taken apart afterwards.
struct Merging;

const KSM: &str = "/sys/kernel/mm/ksm";

fn ksm(name: &str) -> Result<u64> {
    let path = PathBuf::from(KSM).join(name);
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.trim().parse()?)
}

fn set_ksm(name: &str, value: &str) -> Result<()> {
    let path = PathBuf::from(KSM).join(name);
    std::fs::write(&path, value).with_context(|| path.display().to_string())
}

impl Merging {
    fn start() -> Result<Self> {
        set_ksm("pages_to_scan", "20000")?;
        set_ksm("sleep_millisecs", "20")?;
        set_ksm("run", "1")?;
        Ok(Self)
    }

    /// Waits for three whole scans: a page is merged when two scans found it unchanged.
    fn wait(&self) -> Result<()> {
        let (from, started) = (ksm("full_scans")?, Instant::now());
        while ksm("full_scans")? < from + 3 && started.elapsed() < Duration::from_secs(180) {
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        let _ = set_ksm("run", "2").and_then(|()| set_ksm("run", "0"));
    }
}
