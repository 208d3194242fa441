//! Commands on snapshots: create, list, show, remove.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use forelay_guest_protocol::snapshot::Tier;
use forelay_image::Digest;

use super::output;
use crate::api::{Snapshot, SnapshotRequest};
use crate::client::Client;

/// What to do with snapshots.
#[derive(Debug, clap::Subcommand)]
pub enum SnapshotCommand {
    /// Make the snapshot that launches of a manifest resume from, unless there is one.
    Create {
        /// The manifest (TOML).
        manifest: PathBuf,
        /// How far its VM is to come: `kernel`, `composed` or `ready`; as the manifest says if
        /// absent.
        #[arg(long, value_parser = parse_tier)]
        at: Option<Tier>,
        /// Of exactly what this lock pins.
        #[arg(long)]
        lock: Option<PathBuf>,
        #[arg(long)]
        json: bool,
    },
    /// List snapshots.
    List {
        #[arg(long)]
        json: bool,
    },
    /// Show what a snapshot was made from.
    Show {
        /// Its id, or the beginning of it.
        id: String,
        #[arg(long)]
        json: bool,
    },
    /// Remove snapshots that no VM runs on.
    Remove {
        /// Their ids, or the beginnings of them.
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

fn parse_tier(text: &str) -> Result<Tier, String> {
    Tier::named(text).ok_or_else(|| "one of kernel, composed, ready".to_owned())
}

/// Runs a `snapshot` command.
pub async fn run(command: SnapshotCommand, client: &Client) -> Result<()> {
    match command {
        SnapshotCommand::Create {
            manifest,
            at,
            lock,
            json,
        } => {
            let read = |path: &PathBuf| {
                std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))
            };
            let request = SnapshotRequest {
                manifest: read(&manifest)?,
                lock: lock.as_ref().map(read).transpose()?,
                at,
            };
            let made: Snapshot = client.post("/v1/snapshots", &request).await?;
            if json {
                return output::json(&made);
            }
            show(&made);
        }
        SnapshotCommand::List { json } => {
            let all: Vec<Snapshot> = client.get("/v1/snapshots").await?;
            if json {
                return output::json(&all);
            }
            list(&all);
        }
        SnapshotCommand::Show { id, json } => {
            let one: Snapshot = client.get(&path_of(&id)?).await?;
            if json {
                return output::json(&one);
            }
            show(&one);
        }
        SnapshotCommand::Remove { ids } => {
            for id in ids {
                let removed: Snapshot = client.delete(&path_of(&id)?).await?;
                say!("removed {}", short(&removed.id));
            }
        }
    }
    Ok(())
}

fn path_of(id: &str) -> Result<String> {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    if hex.is_empty() || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        bail!("{id:?} is no id of a snapshot: `forelay snapshot list` shows them");
    }
    Ok(format!("/v1/snapshots/{hex}"))
}

fn short(id: &Digest) -> String {
    id.short()
}

fn state(one: &Snapshot) -> String {
    let usable = if one.verified {
        "usable"
    } else {
        "not verified yet"
    };
    one.problem.clone().unwrap_or_else(|| usable.to_owned())
}

fn list(all: &[Snapshot]) {
    output::table(
        all,
        &[
            ("id", |one: &Snapshot| short(&one.id)),
            ("tier", |one| one.tier.name().to_owned()),
            ("of", |one| one.made_of.clone()),
            ("domain", |one| one.domain.clone()),
            ("memory", |one| output::bytes(one.image_bytes)),
            ("uses", |one| one.uses.to_string()),
            ("state", state),
        ],
    );
    let mut domains: Vec<(&str, u64)> = all
        .iter()
        .map(|one| (one.domain.as_str(), one.domain_stored_bytes))
        .collect();
    domains.dedup();
    for (domain, bytes) in domains {
        say!("{domain}: {} on disk", output::bytes(bytes));
    }
}

fn show(one: &Snapshot) {
    let origin = &one.origin;
    let rows = [
        ("id", one.id.to_string()),
        ("tier", one.tier.name().to_owned()),
        ("of", one.made_of.clone()),
        ("domain", one.domain.clone()),
        ("memory image", one.image.to_string()),
        ("size", output::bytes(one.image_bytes)),
        ("device state", output::bytes(one.state_bytes)),
        ("kernel", origin.kernel.to_string()),
        (
            "components",
            output::optional(origin.components, |one| one.to_string()),
        ),
        (
            "manifest",
            output::optional(origin.manifest, |one| one.to_string()),
        ),
        (
            "machine",
            format!(
                "{} CPU(s), {} MiB, {}",
                origin.cpus, origin.memory_mib, origin.machine
            ),
        ),
        (
            "VMM",
            format!("{} under {}", origin.vmm, origin.accelerator),
        ),
        ("VMs on it", one.vms.join(", ")),
        ("state", state(one)),
    ];
    output::table(
        &rows,
        &[
            ("", |row: &(&str, String)| row.0.to_owned()),
            ("", |row| row.1.clone()),
        ],
    );
}
