//! `forelay component push | pull | copy`: components from one repository to another.
//!
//! What the other side has is not moved; a copy that was cut short goes on when it is asked for
//! again. Refuses to know what components need beside them, layers of images aside: `--all`
//! copies everything.

use std::sync::Arc;

use anyhow::{Result, bail};
use forelay_image::component::{Component, ComponentId, Role};
use forelay_store::publish::PublishProgress;
use forelay_store::{RepositoryUrl, Store};

use super::components::{Bar, find};
use super::output::{self, bytes};

/// What is copied.
#[derive(Debug, clap::Args)]
pub struct CopyArguments {
    /// Names, `name@version` or ids; an image's layers come along.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    components: Vec<String>,
    /// Every component.
    #[arg(long)]
    all: bool,
    #[arg(long)]
    json: bool,
}

/// Arguments of `forelay component push`.
#[derive(Debug, clap::Args)]
pub struct PushArguments {
    #[command(flatten)]
    pub what: CopyArguments,
    /// Where to: dir:/PATH, s3://BUCKET/PREFIX or oci://HOST/NAME.
    #[arg(long, value_name = "URL")]
    pub to: RepositoryUrl,
}

/// Arguments of `forelay component pull`.
#[derive(Debug, clap::Args)]
pub struct PullArguments {
    #[command(flatten)]
    pub what: CopyArguments,
    /// Where from: dir:/PATH, s3://BUCKET/PREFIX or oci://HOST/NAME.
    #[arg(long, value_name = "URL")]
    pub from: RepositoryUrl,
}

/// Arguments of `forelay component copy`.
#[derive(Debug, clap::Args)]
pub struct BetweenArguments {
    #[command(flatten)]
    pub what: CopyArguments,
    /// Where from: dir:/PATH, s3://BUCKET/PREFIX or oci://HOST/NAME.
    #[arg(long, value_name = "URL")]
    pub from: RepositoryUrl,
    /// Where to.
    #[arg(long, value_name = "URL")]
    pub to: RepositoryUrl,
}

/// What became of a component; printed with `--json`.
#[derive(Debug, serde::Serialize)]
struct Copied {
    name: String,
    version: String,
    id: ComponentId,
    /// False if it was there already.
    created: bool,
    /// Bytes of its image.
    bytes: u64,
    /// Bytes of packs that were moved, compressed.
    moved_bytes: u64,
    /// Bytes of the image, in packs that were not moved since the other side has all of it.
    present_bytes: u64,
}

/// Copies what is asked for and says so.
pub async fn run(arguments: &CopyArguments, from: &Store, to: &Store) -> Result<()> {
    let wanted = wanted(arguments, from).await?;
    if wanted.is_empty() {
        bail!("the repository to copy from has no components");
    }
    let bar = Bar::new();
    let mut all = Vec::new();
    for component in wanted {
        let copied = one(&component, from, to, &bar).await?;
        if !arguments.json {
            say!("{}", told(&copied));
        }
        all.push(copied);
    }
    match arguments.json {
        true => output::json(&all),
        false => Ok(()),
    }
}

/// The components, layers before their images.
async fn wanted(arguments: &CopyArguments, from: &Store) -> Result<Vec<Arc<Component>>> {
    if arguments.all {
        let mut all = from.components().await?;
        all.sort_by_key(|component| component.role != Role::Layer);
        return Ok(all);
    }
    let mut wanted: Vec<Arc<Component>> = Vec::new();
    for name in &arguments.components {
        let found = find(from, name).await?;
        for layer in found.container.iter().flat_map(|image| &image.layers) {
            wanted.push(from.component(*layer).await?);
        }
        wanted.push(found);
    }
    Ok(wanted)
}

async fn one(component: &Component, from: &Store, to: &Store, bar: &Bar) -> Result<Copied> {
    let id = component.id();
    let mut copied = Copied {
        name: component.name.clone(),
        version: component.version.clone(),
        id,
        created: false,
        bytes: component.image.bytes,
        moved_bytes: 0,
        present_bytes: component.image.bytes,
    };
    match to.component(id).await {
        Ok(_) => return Ok(copied),
        Err(forelay_store::StoreError::ComponentMissing { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let show = |progress: PublishProgress| {
        bar.bytes("copying", progress.done_bytes, Some(progress.total_bytes));
    };
    let published = to.copy_from(from, id, &show).await?;
    bar.clear();
    copied.created = published.created;
    copied.moved_bytes = published.progress.stored_bytes;
    copied.present_bytes = published.progress.reused_bytes;
    Ok(copied)
}

fn told(copied: &Copied) -> String {
    let Copied { name, version, .. } = copied;
    match copied.created {
        true => format!(
            "{name} {version} copied: {}, of which {} moved",
            bytes(copied.bytes),
            bytes(copied.moved_bytes)
        ),
        false => format!("{name} {version} was there already"),
    }
}
