//! `bench burst`: 100 simultaneous launches of 10 profiles, with native mappers for VMs.
//!
//! What a launch touches is recorded from real launches; the ten profiles are unions of
//! those over their components. Unique bytes are what one daemon fetches for one launch of
//! each profile, one after another; then a fresh daemon with an empty disk cache serves
//! ten launches of each at once, all on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::statistics::quantile;
use crate::host::{self, Host, Programs, Settings};
use crate::process::target_dir;
use crate::{demo, prerequisites};

const PAGE_BYTES: u64 = 4096;
const LAUNCHES: usize = 100;
/// Real launches that are recorded.
const RECORDED: [&str; 3] = ["web", "cache", "python"];
/// The profiles: which of the recorded launches' components each has.
const PROFILES: [&[usize]; 10] = [
    &[0],
    &[1],
    &[2],
    &[0, 1],
    &[0, 2],
    &[1, 2],
    &[0, 1, 2],
    &[],
    &[0],
    &[1],
];

/// Pages of one component image, by digest.
type Touches = Vec<(String, u64)>;

struct Bench {
    programs: Programs,
    settings: Settings,
    replay: PathBuf,
}

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    prerequisites::install()?;
    let programs = host::build()?;
    let repository = target_dir().join("demo/repository");
    demo::build_components(&programs, &repository)?;
    let state = target_dir().join("bench/burst-state");
    let _ = std::fs::remove_dir_all(&state);
    let bench = Bench {
        programs,
        settings: Settings {
            repository,
            state,
            latency_ms: demo::LATENCY_MS,
            bandwidth_bytes_per_s: demo::BANDWIDTH_BYTES_PER_S,
            budget_bytes: 0,
            prefetch: false,
            ahead: false,
        },
        replay: super::build_example("forelay-memory", "replay")?,
    };
    let recorded = bench.record()?;
    let one_each: Vec<usize> = (0..PROFILES.len()).collect();
    let mut unique_bytes = 0;
    bench.with_host(|host, files| {
        for &profile in &one_each {
            bench.launch(files, &recorded, &[profile])?;
        }
        unique_bytes = fetched(host)?;
        Ok(())
    })?;
    let order: Vec<usize> = (0..LAUNCHES).map(|n| n % PROFILES.len()).collect();
    let (mut times, mut bytes) = (Vec::new(), 0);
    bench.with_host(|host, files| {
        times = bench.launch(files, &recorded, &order)?;
        bytes = fetched(host)?;
        Ok(())
    })?;
    let (p50, p95) = (quantile(&times, 0.5), quantile(&times, 0.95));
    let document = json!({
        "launches": LAUNCHES,
        "profiles": PROFILES.len(),
        "unique_bytes": unique_bytes,
        "fetched_bytes": bytes,
        "fetched_ratio": bytes as f64 / unique_bytes.max(1) as f64,
        "launch_s_p50": p50,
        "launch_s_p95": p95,
        "p95_to_p50": p95 / p50,
    });
    super::write(out, &document)
}

fn fetched(host: &Host) -> Result<u64> {
    let report = host.json(["memory"])?;
    report["totals"]["repository_bytes"]
        .as_u64()
        .context("memory tells the repository's bytes")
}

impl Bench {
    /// Touches of each recorded launch, in first-touch order.
    fn record(&self) -> Result<Vec<Touches>> {
        let mut host = Host::new(&self.programs, &self.settings)?;
        host.start_daemon()?;
        let mut recorded = Vec::new();
        for profile in RECORDED {
            host.launch(&demo::manifest(profile), profile, &[])?;
            let map = host.json(["map", profile])?;
            let mut touches = Vec::new();
            for touch in map["touches"].as_array().into_iter().flatten() {
                let image = touch["image"].as_str().context("a touch has an image")?;
                let offset = touch["offset"].as_u64().context("a touch has an offset")?;
                let len = touch["len"].as_u64().context("a touch has a length")?;
                let pages = offset / PAGE_BYTES..(offset + len).div_ceil(PAGE_BYTES);
                touches.extend(pages.map(|page| (image.to_owned(), page)));
            }
            ensure!(!touches.is_empty(), "{profile} touched nothing");
            recorded.push(touches);
            host.stop(&[profile])?;
        }
        host.stop_daemon()?;
        Ok(recorded)
    }

    /// A daemon with nothing cached, and the files of all components by image.
    fn with_host(
        &self,
        work: impl FnOnce(&Host, &BTreeMap<String, PathBuf>) -> Result<()>,
    ) -> Result<()> {
        let _ = std::fs::remove_dir_all(self.settings.state.join("cache"));
        let mut host = Host::new(&self.programs, &self.settings)?;
        host.start_daemon()?;
        let mut files = BTreeMap::new();
        for profile in RECORDED {
            let manifest = demo::manifest(profile);
            let arguments = ["prefetch", "--mode", "none"].map(AsRef::as_ref);
            let answer = host.json(arguments.into_iter().chain([manifest.as_os_str()]))?;
            for device in answer["devices"].as_array().into_iter().flatten() {
                let image = device["image"].as_str().context("a device has an image")?;
                let path = device["path"].as_str().context("a device has a path")?;
                files.insert(image.to_owned(), path.into());
            }
        }
        work(&host, &files)?;
        host.stop_daemon()
    }

    /// Launches the given profiles at once; returns the seconds that each took.
    fn launch(
        &self,
        files: &BTreeMap<String, PathBuf>,
        recorded: &[Touches],
        profiles: &[usize],
    ) -> Result<Vec<f64>> {
        let mut children = Vec::new();
        for &profile in profiles {
            let mut child = Command::new(&self.replay)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let text = touch_list(files, recorded, PROFILES[profile])?;
            let mut input = child.stdin.take().context("a replay has an input")?;
            input.write_all(text.as_bytes())?;
            children.push((child, input));
        }
        // Every replay has its list and waits for the end of it: now they all start.
        let start = Instant::now();
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

/// The union of the touches of a profile's components; without any, those of the base
/// that all recorded launches share.
fn touch_list(
    files: &BTreeMap<String, PathBuf>,
    recorded: &[Touches],
    components: &[usize],
) -> Result<String> {
    let sets: Vec<BTreeSet<&(String, u64)>> =
        recorded.iter().map(|one| one.iter().collect()).collect();
    let all = |touch: &&(String, u64)| sets.iter().all(|set| set.contains(touch));
    let mut touches: Vec<&(String, u64)> = Vec::new();
    let mut seen = BTreeSet::new();
    let sources = if components.is_empty() {
        &[0][..]
    } else {
        components
    };
    for &source in sources {
        let wanted = recorded[source].iter();
        for touch in wanted.filter(|touch| !components.is_empty() || all(touch)) {
            if seen.insert(touch) {
                touches.push(touch);
            }
        }
    }
    let mut text = String::new();
    let mut numbers = BTreeMap::new();
    for (number, (image, path)) in files.iter().enumerate() {
        text.push_str(&format!(
            "file {} {}\n",
            std::fs::metadata(path)?.len(),
            path.display()
        ));
        numbers.insert(image.as_str(), number);
    }
    for (image, page) in touches {
        // The map image is each VM's own.
        if let Some(number) = numbers.get(image.as_str()) {
            text.push_str(&format!("touch {number} {page}\n"));
        }
    }
    Ok(text)
}
