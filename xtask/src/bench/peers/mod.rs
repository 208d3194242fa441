//! `bench peers`: `examples/web.toml` beside what else boots the same files with the same
//! kernel and the same VMM, in one run: until its page is served, and all host memory.
//!
//! Peers are what installs from Debian: a local qcow2 disk, a disk over NBD, the whole disk
//! pulled and then booted, virtiofsd over a local tree, and for memory KSM beside the local
//! disk. What Forelay and the peers over a line fetch comes over equal lines (the demo's
//! latency and bandwidth). `cold` has nothing of the image on the host (or, for a local disk
//! or tree, in the host's page cache), `warm` all of it. Rounds take the ways in a new order each. Wall
//! time on a busy machine is noise, so CPU seconds stand beside it: the VMM's, and those of the
//! processes on this host that serve it.

pub(super) mod disk;
pub(super) mod forelay;
mod line;
pub(super) mod memory;
mod page;
mod virtiofs;

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::boot::WebBench;
use super::draw::Draw;
use super::statistics::median;
use super::write;
use disk::{DiskSource, Disks};
use virtiofs::SharedTree;

const ROUNDS: usize = 7;

/// The page's port on the host, as the manifest forwards it.
const PORT: u16 = 8080;

/// What one start took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Served {
    /// Seconds from the request until the VM said that it is ready; 0 where it does not.
    pub ready_s: f64,
    /// Seconds from the request to the page.
    pub page_s: f64,
    /// CPU seconds of the VMM and of what serves it.
    cpu_s: f64,
    /// Bytes that came over the line.
    bytes: u64,
    /// Requests on the line.
    requests: u64,
}

/// A way to start the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Forelay that knows nothing of the profile.
    Forelay { warm: bool },
    /// Forelay that knows the profile: cold with nothing on the host, warm with the image's
    /// bytes in its disk cache and none in memory.
    Predicted { warm: bool },
    /// A disk.
    Disk { source: DiskSource, warm: bool },
    /// virtiofsd.
    Tree { warm: bool },
}

impl Way {
    /// Every way, cold and warm.
    fn all() -> Vec<Self> {
        let mut ways = Vec::new();
        for warm in [false, true] {
            ways.extend([Self::Forelay { warm }, Self::Predicted { warm }]);
            ways.extend(DiskSource::ALL.map(|source| Self::Disk { source, warm }));
            ways.push(Self::Tree { warm });
        }
        ways
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Forelay { .. } => "forelay",
            Self::Predicted { .. } => "forelay predicted",
            Self::Disk { source, .. } => source.name(),
            Self::Tree { .. } => "virtiofsd",
        }
    }

    const fn is_warm(self) -> bool {
        match self {
            Self::Forelay { warm }
            | Self::Predicted { warm }
            | Self::Disk { warm, .. }
            | Self::Tree { warm } => warm,
        }
    }
}

/// A figure of a start.
type Figure = fn(&Served) -> f64;

/// The samples of all ways.
struct WaySamples(Vec<(Way, Vec<Served>)>);

impl WaySamples {
    fn median(&self, name: &str, warm: bool, of: Figure) -> f64 {
        let found = self
            .0
            .iter()
            .find(|(way, _)| way.name() == name && way.is_warm() == warm);
        median(&found.map_or_else(Vec::new, |(_, all)| all.iter().map(of).collect()))
    }

    fn row(&self, name: &str) -> Value {
        json!({
            "way": name,
            "cold_s": self.median(name, false, |one| one.page_s),
            "warm_s": self.median(name, true, |one| one.page_s),
            "cold_cpu_s": self.median(name, false, |one| one.cpu_s),
            "warm_cpu_s": self.median(name, true, |one| one.cpu_s),
            "bytes": self.median(name, false, |one| one.bytes as f64),
            "requests": self.median(name, false, |one| one.requests as f64),
        })
    }

    /// The best of the peers.
    fn best_peer(&self, warm: bool, of: Figure) -> f64 {
        let peers = self
            .0
            .iter()
            .filter(|(way, _)| matches!(way, Way::Disk { .. } | Way::Tree { .. }));
        let medians = peers
            .filter(|(way, _)| way.is_warm() == warm)
            .map(|(way, _)| self.median(way.name(), warm, of));
        medians.fold(f64::INFINITY, f64::min)
    }

    fn ratio(&self, name: &str, warm: bool, peers_warm: bool, of: Figure) -> f64 {
        self.median(name, warm, of) / self.best_peer(peers_warm, of)
    }
}

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    crate::prerequisites::install_peers()?;
    let bench = WebBench::new("peers")?;
    let disks = Disks::make(&bench)?;
    let tree = SharedTree::make(&bench, &disks)?;
    let mut samples = WaySamples(
        Way::all()
            .into_iter()
            .map(|way| (way, Vec::new()))
            .collect(),
    );
    let mut draw = Draw(3);
    for round in 1..=ROUNDS {
        let mut order: Vec<usize> = (0..samples.0.len()).collect();
        draw.shuffle(&mut order);
        for at in order {
            let (way, all) = &mut samples.0[at];
            let served = match *way {
                Way::Forelay { warm } => forelay::launch(&bench, false, warm)?,
                Way::Predicted { warm } => forelay::launch(&bench, true, warm)?,
                Way::Disk { source, warm } => disks.boot(source, warm)?,
                Way::Tree { warm } => tree.boot(warm)?,
            };
            let state = if way.is_warm() { "warm" } else { "cold" };
            println!(
                "round {round}: {:<18} {state} {:6.2} s, CPU {:5.2} s, {:6.1} MiB in {} requests",
                way.name(),
                served.page_s,
                served.cpu_s,
                served.bytes as f64 / f64::from(1 << 20),
                served.requests,
            );
            all.push(served);
        }
    }
    let memory = memory::rows(&bench, &disks, &tree)?;
    let mut names: Vec<&str> = samples.0.iter().map(|(way, _)| way.name()).collect();
    names.dedup();
    names.truncate(samples.0.len() / 2);
    let (page, cpu): (Figure, Figure) = (|one| one.page_s, |one| one.cpu_s);
    let document = json!({
        "rounds": ROUNDS,
        "launch": names.iter().map(|name| samples.row(name)).collect::<Vec<_>>(),
        "memory": memory,
        "predicted_ratio_to_best_warm": samples.ratio("forelay predicted", false, true, page),
        "predicted_cpu_ratio_to_best_warm": samples.ratio("forelay predicted", false, true, cpu),
        "cold_ratio_to_best_cold": samples.ratio("forelay", false, false, page),
        "cold_cpu_ratio_to_best_cold": samples.ratio("forelay", false, false, cpu),
    });
    write(out, &document)
}
