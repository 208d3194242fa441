//! A fleet made of real launches and the components of a repository; what a profile consists
//! of is drawn from a fixed seed.

use std::collections::BTreeMap;
use std::path::Path;

use forelay_cache::reuse::ObjectRequest;
use forelay_image::component::{Component as Built, Role};
use forelay_sim::trace::Trace;

/// Time to the first byte of a component, in seconds.
pub const LATENCY_S: f64 = 0.02;

/// Bytes per second after that.
pub const BANDWIDTH_BYTES_PER_S: f64 = 100e6;

/// A built component's size.
pub struct Component {
    pub bytes: u64,
    base: bool,
}

/// The components of a repository directory, the latest of each name, in an order that says
/// nothing (by a hash of the name). Kernels are left out, they are not mapped.
pub fn components(repository: &Path) -> Result<Vec<Component>, Box<dyn std::error::Error>> {
    let mut by_name = BTreeMap::new();
    for entry in std::fs::read_dir(repository.join("components"))? {
        let built: Built = serde_json::from_slice(&std::fs::read(entry?.path())?)?;
        if built.role != Role::Kernel && built.image.bytes > 0 {
            by_name.insert((mix(hash(&built.name)), built.name.clone()), built);
        }
    }
    let components: Vec<Component> = by_name
        .into_values()
        .map(|built| Component {
            bytes: built.image.bytes,
            base: built.role == Role::Base,
        })
        .collect();
    let packages = components.iter().filter(|component| !component.base);
    if packages.count() < 2 {
        return Err("at least two components besides the base are needed".into());
    }
    Ok(components)
}

/// FNV-1a.
fn hash(name: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    name.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

/// splitmix64: a hash that serves as a generator.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct Draw(u64);

impl Draw {
    fn unit(&mut self) -> f64 {
        self.0 = mix(self.0);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    /// 0..n with probability proportional to 1 / (rank + 1).
    fn zipf(&mut self, n: usize) -> usize {
        let total: f64 = (1..=n).map(|rank| 1.0 / rank as f64).sum();
        let mut left = self.unit() * total;
        for rank in 1..=n {
            left -= 1.0 / rank as f64;
            if left < 0.0 {
                return rank - 1;
            }
        }
        n - 1
    }
}

/// The components of one profile: numbers and sizes.
fn consists_of(components: &[Component], profile: u32) -> Vec<(u32, u64)> {
    let mut draw = Draw(mix(u64::from(profile)));
    let of = |base: bool| -> Vec<usize> {
        (0..components.len())
            .filter(|&at| components[at].base == base)
            .collect()
    };
    let (bases, packages) = (of(true), of(false));
    let mut parts = Vec::new();
    if !bases.is_empty() {
        parts.push(bases[draw.zipf(bases.len())]);
    }
    let wanted = 1 + (draw.unit() * 5.0) as usize;
    for _ in 0..wanted {
        let package = packages[draw.zipf(packages.len())];
        if !parts.contains(&package) {
            parts.push(package);
        }
    }
    let like = components[packages[(draw.unit() * packages.len() as f64) as usize]].bytes;
    let own = ((like as f64 * (0.25 + draw.unit())) as u64)
        .next_multiple_of(4096)
        .max(4096);
    let shared = parts
        .into_iter()
        .map(|at| (at as u32, components[at].bytes));
    shared
        .chain([(components.len() as u32 + profile, own)])
        .collect()
}

/// What the launches ask for, component by component.
pub fn requests(components: &[Component], trace: &Trace) -> Vec<ObjectRequest> {
    let mut profiles: BTreeMap<u32, Vec<(u32, u64)>> = BTreeMap::new();
    let mut requests = Vec::new();
    for launch in &trace.launches {
        let parts = profiles
            .entry(launch.profile)
            .or_insert_with(|| consists_of(components, launch.profile));
        requests.extend(parts.iter().map(|&(object, bytes)| ObjectRequest {
            object,
            owner: launch.owner,
            bytes,
            load_s: LATENCY_S + bytes as f64 / BANDWIDTH_BYTES_PER_S,
            now_ms: launch.at.0,
        }));
    }
    requests
}
