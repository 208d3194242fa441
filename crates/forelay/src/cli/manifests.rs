//! Commands on manifests: lock and compose. They need no daemon.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use forelay_image::NameOf;
use forelay_image::erofs::merge::{Composed, MapLayout};
use forelay_image::extent::PMEM_ALIGN_BYTES;
use forelay_image::lock::Lock;
use forelay_image::manifest::Manifest;
use forelay_image::solve::{relock, solve};
use forelay_store::Store;
use serde_json::json;

use super::output;
use crate::config::Config;
use crate::daemon::open_store;
use crate::recipe::Recipe;

/// Arguments of `forelay lock`.
#[derive(Debug, clap::Args)]
pub struct LockArguments {
    /// The manifest (TOML).
    pub manifest: PathBuf,
    /// Where the lock goes; beside the manifest, with the ending `.lock`, if absent.
    #[arg(long, short)]
    pub output: Option<PathBuf>,
    /// Take the newest of everything, whatever an earlier lock says.
    #[arg(long)]
    pub upgrade: bool,
    /// Print the lock as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What `forelay compose` prints or writes.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Emit {
    /// The command line of QEMU.
    Qemu,
    /// Map image, component images, kernel and initramfs as files in --out.
    Files,
    /// One flat disk image in --out, for guests without pmem.
    Flat,
}

/// Arguments of `forelay compose`.
#[derive(Debug, clap::Args)]
pub struct ComposeArguments {
    /// The manifest (TOML).
    pub manifest: PathBuf,
    /// Compose what this lock pins.
    #[arg(long)]
    pub lock: Option<PathBuf>,
    /// What to make.
    #[arg(long, value_enum, default_value = "qemu")]
    pub emit: Emit,
    /// Directory for files; made if missing.
    #[arg(long)]
    pub out: PathBuf,
    /// Host name inside; the profile's name if absent.
    #[arg(long)]
    pub hostname: Option<String>,
    /// Print what was made as JSON.
    #[arg(long)]
    pub json: bool,
}

fn read_manifest(path: &Path) -> Result<Manifest> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the manifest {}", path.display()))?;
    Manifest::parse(&text).with_context(|| format!("{}", path.display()))
}

fn read_lock(path: &Path) -> Result<Lock> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the lock {}", path.display()))?;
    Lock::parse(&text).with_context(|| format!("{}", path.display()))
}

async fn resolve(store: &Store, manifest: &Manifest, previous: Option<&Lock>) -> Result<Lock> {
    let components = store.components().await?;
    let components: Vec<_> = components.iter().map(|one| (**one).clone()).collect();
    Ok(match previous {
        Some(previous) => relock(manifest, &components, previous)?,
        None => solve(manifest, &components)?,
    })
}

/// `forelay lock`.
pub async fn lock(arguments: LockArguments, config: &Config) -> Result<()> {
    let manifest = read_manifest(&arguments.manifest)?;
    let output = arguments
        .output
        .unwrap_or_else(|| arguments.manifest.with_extension("lock"));
    let previous = match arguments.upgrade || !output.exists() {
        true => None,
        false => Some(read_lock(&output)?),
    };
    let store = open_store(config).await?;
    let lock = resolve(&store, &manifest, previous.as_ref()).await?;
    forelay_host::atomic_write(&output, lock.to_toml().as_bytes())
        .with_context(|| format!("cannot write the lock {}", output.display()))?;
    if arguments.json {
        return output::json(&lock);
    }
    for component in lock.all() {
        say!("{} {}  {}", component.name, component.version, component.id);
    }
    say!("written to {}", output.display());
    Ok(())
}

/// `forelay compose`.
pub async fn compose(arguments: ComposeArguments, config: &Config) -> Result<()> {
    let manifest = read_manifest(&arguments.manifest)?;
    if let Some(hostname) = &arguments.hostname {
        NameOf::Host.check(hostname).context("--hostname")?;
    }
    let store = open_store(config).await?;
    let lock = match &arguments.lock {
        Some(path) => read_lock(path)?,
        None => resolve(&store, &manifest, None).await?,
    };
    if lock.manifest_digest != manifest.digest() {
        bail!("the lock is of another manifest: run `forelay lock` again");
    }
    let out = arguments.out;
    std::fs::create_dir_all(&out)
        .with_context(|| format!("cannot make the directory {}", out.display()))?;
    let recipe = Recipe::load(&store, &lock, manifest.init.is_some()).await?;
    let hostname = arguments.hostname.or_else(|| manifest.hostname.clone());
    let hostname = hostname.unwrap_or_else(|| manifest.profile_name().to_owned());
    let layout = match arguments.emit {
        Emit::Flat => MapLayout::Flat,
        Emit::Qemu | Emit::Files => MapLayout::Devices,
    };
    let started = std::time::Instant::now();
    let composed = recipe.compose(&manifest, &hostname, layout, None)?;
    let compose_s = started.elapsed().as_secs_f64();
    for note in recipe.notes(&composed) {
        complain!("note: {note}");
    }
    let made = write_files(&store, &lock, &composed, &out, arguments.emit).await?;
    if arguments.json {
        return output::json(&json!({
            "files": made,
            "digest": composed.digest,
            "compose_s": compose_s,
            "conflicts": composed.conflicts.len(),
            "inodes": composed.inodes,
        }));
    }
    say!(
        "composed {} inodes in {}",
        composed.inodes,
        output::seconds(compose_s)
    );
    if matches!(arguments.emit, Emit::Qemu) {
        say!("{}", qemu_command(&manifest, &composed, &made));
    } else {
        for path in made {
            say!("{}", path.display());
        }
    }
    Ok(())
}

/// Writes map image, components, kernel and initramfs, or one flat disk.
async fn write_files(
    store: &Store,
    lock: &Lock,
    composed: &Composed,
    out: &Path,
    emit: Emit,
) -> Result<Vec<PathBuf>> {
    let mut made = Vec::new();
    let map = out.join(if matches!(emit, Emit::Flat) {
        "disk.img"
    } else {
        "map.img"
    });
    std::fs::write(&map, &composed.map_image)
        .with_context(|| format!("cannot write {}", map.display()))?;
    pad(&map)?;
    made.push(map.clone());
    let opening = lock.components.iter().map(|one| store.hold_locked(one));
    let _held = futures_util::future::try_join_all(opening).await?;
    for (index, device) in composed.devices.iter().enumerate() {
        let path = out.join(format!("{}.img", index + 1));
        store.materialise(device.image, &path).await?;
        if matches!(emit, Emit::Flat) {
            append_at(
                &map,
                &path,
                u64::from(device.mapped_block) * forelay_image::PAGE_BYTES,
            )?;
            std::fs::remove_file(&path)?;
        } else {
            pad(&path)?;
            made.push(path);
        }
    }
    let kernel = crate::recipe::kernel_files(store, &lock.kernel, out).await?;
    made.extend([kernel.kernel, kernel.initrd]);
    Ok(made)
}

/// Pads a file to what a pmem device needs.
fn pad(path: &Path) -> Result<()> {
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    let bytes = file.metadata()?.len().next_multiple_of(PMEM_ALIGN_BYTES);
    Ok(file.set_len(bytes)?)
}

fn append_at(disk: &Path, part: &Path, offset: u64) -> Result<()> {
    use std::io::{Seek as _, SeekFrom};
    let mut disk = std::fs::OpenOptions::new().write(true).open(disk)?;
    disk.seek(SeekFrom::Start(offset))?;
    std::io::copy(&mut std::fs::File::open(part)?, &mut disk)?;
    Ok(())
}

/// A command line that boots the files with a stock QEMU.
fn qemu_command(manifest: &Manifest, composed: &Composed, made: &[PathBuf]) -> String {
    let uuid = composed.digest.image_uuid();
    let memory = manifest.vm.memory_mib;
    let (pmem, kernel) = made.split_at(made.len().saturating_sub(2));
    let total: u64 = pmem
        .iter()
        .filter_map(|path| path.metadata().ok())
        .map(|m| m.len())
        .sum();
    let mut words = vec![format!(
        "qemu-system-x86_64 -M pc -cpu max -m {memory}M,slots={},maxmem={}M -nographic",
        pmem.len(),
        memory + (total >> 20) + 1024
    )];
    for (index, path) in pmem.iter().enumerate() {
        let bytes = path.metadata().map_or(0, |metadata| metadata.len());
        words.push(format!(
            "-object memory-backend-file,id=m{index},mem-path={},share=on,readonly=on,size={bytes} \
             -device virtio-pmem-pci,memdev=m{index}",
            path.display()
        ));
    }
    if let [kernel, initrd] = kernel {
        words.push(format!(
            "-kernel {} -initrd {}",
            kernel.display(),
            initrd.display()
        ));
    }
    words.push(format!("-append 'console=ttyS0 forelay.map={uuid}'"));
    words.join(" \\\n  ")
}
