//! What snapshots take on disk, of `bench snapshot`: the four examples at all three tiers in the
//! repository of their trust domain, beside a zstd file for each.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::snapshot::{PROFILES, TIERS, create, manifest};
use crate::host::Host;
use crate::process::run_quiet;

/// zstd's own default, and the store's.
const LEVEL: i32 = 3;

/// Bytes of all profiles' snapshots in the repository, each chunk once with all that describes
/// them, beside each one's memory and state as a zstd file of its own. A kernel's snapshot that
/// serves several profiles is one in the repository, and a file of each.
pub fn stored(host: &Host) -> Result<Value> {
    let mut alone = BTreeMap::new();
    let mut files = Vec::new();
    for profile in PROFILES {
        for tier in TIERS {
            let path = manifest(host, profile, tier, true)?;
            let made = create(host, &path, tier)?;
            let id = made["id"].as_str().context("a snapshot has an id")?;
            if !alone.contains_key(id) {
                // What is about to be resumed from is reachable.
                run_quiet(host.forelay(["prefetch"]).arg(&path))?;
                let bytes = compressed_bytes(&image_of(host, &made)?)?;
                alone.insert(id.to_owned(), bytes);
            }
            println!("{profile} at {tier}: {} bytes as a zstd file", alone[id]);
            files.push(alone[id]);
        }
    }
    let listed = host.json(["snapshot", "list"])?;
    let listed = listed.as_array().context("a list")?;
    let others = listed
        .iter()
        .filter(|one| !one["id"].as_str().is_some_and(|id| alone.contains_key(id)));
    ensure!(others.count() == 0, "there are other snapshots: {listed:?}");
    let one_domain = listed
        .windows(2)
        .all(|two| two[0]["domain"] == two[1]["domain"]);
    ensure!(one_domain, "they are in one trust domain: {listed:?}");
    let first = listed.first().context("a snapshot")?;
    let together = first["domain_stored_bytes"].as_u64();
    let together = together.context("what snapshots take")?;
    let (apart, distinct): (u64, u64) = (files.iter().sum(), alone.values().sum());
    Ok(json!({
        "snapshots": alone.len(),
        "bytes": together,
        "zstd_files": files.len(),
        "zstd_files_bytes": apart,
        "ratio_to_zstd_files": together as f64 / apart as f64,
        "distinct_zstd_files_bytes": distinct,
        "ratio_to_distinct_zstd_files": together as f64 / distinct as f64,
    }))
}

/// The image of a snapshot, which is its memory and its state, in its domain's mount.
fn image_of(host: &Host, snapshot: &Value) -> Result<PathBuf> {
    let field = |name: &str| snapshot[name].as_str().context("a snapshot has it");
    let image = field("image")?.trim_start_matches("sha256:").to_owned();
    let mount = host.scratch().join("run/memory").join(field("domain")?);
    let path = mount.join(format!("{image}.img"));
    let bytes = path.metadata().context("the image is not mapped")?.len();
    ensure!(
        Some(bytes) == snapshot["image_bytes"].as_u64(),
        "the file has {bytes} bytes: {snapshot}"
    );
    Ok(path)
}

/// What is left of a file.
fn compressed_bytes(path: &Path) -> Result<u64> {
    let mut file = std::fs::File::open(path)?;
    let mut counted = Counted(0);
    zstd::stream::copy_encode(&mut file, &mut counted, LEVEL)?;
    Ok(counted.0)
}

/// Counts what is written.
struct Counted(u64);

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
