//! A fleet made of real launches and real component sizes; what a profile consists of is
//! drawn from a fixed seed.

use std::collections::BTreeMap;

use forelay_cache::policy::Request;

use crate::launches::Launch;

/// Time to the first byte of a component, in seconds.
const LATENCY_S: f64 = 0.02;

/// Bytes per second after that.
const BANDWIDTH: f64 = 100e6;

/// A built component's size.
pub struct Component {
    bytes: u64,
    base: bool,
}

/// Reads `name,bytes[,role]`; kernels are left out, they are not mapped.
pub fn components(path: &str) -> Vec<Component> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|cause| {
        eprintln!("{path}: {cause}");
        std::process::exit(2);
    });
    let mut components = Vec::new();
    for line in text.lines() {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let (Some(name), Some(bytes)) = (fields.first(), fields.get(1)) else {
            continue;
        };
        let Ok(bytes) = bytes.parse::<u64>() else {
            continue;
        };
        let role = fields.get(2).copied().unwrap_or_default();
        if role == "kernel" || name.contains("kernel") || bytes == 0 {
            continue;
        }
        let base = role == "base" || name.starts_with("debian") || name.starts_with("base");
        components.push(Component { bytes, base });
    }
    if components
        .iter()
        .filter(|component| !component.base)
        .count()
        < 2
    {
        eprintln!("{path}: at least two components besides the base are needed");
        std::process::exit(2);
    }
    components
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
pub fn requests(components: &[Component], launches: &[Launch]) -> Vec<Request> {
    let mut profiles: BTreeMap<u32, Vec<(u32, u64)>> = BTreeMap::new();
    let mut requests = Vec::new();
    for launch in launches {
        let parts = profiles
            .entry(launch.profile)
            .or_insert_with(|| consists_of(components, launch.profile));
        requests.extend(parts.iter().map(|&(object, bytes)| Request {
            object,
            owner: launch.owner,
            bytes,
            load_s: LATENCY_S + bytes as f64 / BANDWIDTH,
            now_ms: launch.now_ms,
        }));
    }
    requests
}
