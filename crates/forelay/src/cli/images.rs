//! Container images as users have them: `forelay run --image`, what one says of itself, and
//! the components that go with it.
//!
//! Owns the manifest that is made for an image. Refuses to know how images are read.
//!
//! Invariant: a repository has one image of a name, version and architecture, and no layer
//! that an image which was removed alone had.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use forelay_image::component::{Component, ContainerImage, Role};
use forelay_image::manifest::{Forward, Manifest, Ready, parse_bytes};
use forelay_import::{BuildRequest, BuildSource, ImageOptions, ImageSource};
use forelay_store::Store;

use super::components;
use super::layers::RepositoryLayers;
use crate::config::Config;
use crate::daemon::create_store;
use crate::recipe::runs_here;

/// Longest name of a profile.
const PROFILE_BYTES: usize = 64;

/// What `forelay run` is given in place of a manifest.
#[derive(Debug, clap::Args)]
pub struct ImageArguments {
    /// Run a container image without a manifest: one that was built, a registry's
    /// (`nginx:1.25`), docker-archive:FILE, oci-archive:FILE or oci:DIR. What follows is its
    /// command.
    #[arg(long, value_name = "IMAGE", conflicts_with = "lock")]
    pub image: Option<String>,
    /// With --image: a host port that leads to a guest port, `8080:80` or `5353:53/udp`.
    #[arg(long, short, value_name = "HOST:GUEST", requires = "image", value_parser = port)]
    publish: Vec<Forward>,
    /// With --image: a variable of the environment; without a value the host's.
    #[arg(long, short, value_name = "NAME=VALUE", requires = "image")]
    env: Vec<String>,
    /// With --image: memory of the VM.
    #[arg(long, short, value_name = "SIZE", requires = "image", value_parser = parse_bytes, default_value = "512M")]
    memory: u64,
    /// With --image: processors of the VM.
    #[arg(long, requires = "image", default_value_t = 1)]
    cpus: u32,
    /// With --image: the registry speaks HTTP without TLS.
    #[arg(long, requires = "image")]
    plain_http: bool,
    /// With --image: certificates (PEM) of who signed the registry's, beside the host's.
    #[arg(long, requires = "image", value_name = "FILE")]
    ca: Option<PathBuf>,
}

fn port(text: &str) -> Result<Forward, String> {
    let example = "write 8080:80, 5353:53/udp, or :80 for any free port";
    Forward::parse(text).ok_or_else(|| format!("no ports: {example}"))
}

/// The manifest of a VM of an image, which is built if the repository does not have it.
pub async fn manifest(
    wanted: &str,
    arguments: &ImageArguments,
    command: Vec<String>,
    detach: bool,
    config: &Config,
) -> Result<String> {
    let store = create_store(config).await?;
    let components = store.components().await?;
    let is_kernel = |one: &&Arc<Component>| one.role == Role::Kernel && runs_here(one);
    if !components.iter().any(|one| is_kernel(&one)) {
        bail!("no kernel in the repository: make one with `forelay component build --kernel`");
    }
    let source = ImageSource::parse(wanted);
    let component = match known(&components, wanted, source.as_ref().ok()) {
        Some(component) => Component::clone(&component),
        None => {
            let options = ImageOptions {
                source: source?,
                plain_http: arguments.plain_http,
                ca: arguments.ca.clone(),
            };
            let request = BuildRequest::new(BuildSource::Image(options));
            let layers = Arc::new(RepositoryLayers::list(&store).await?);
            let builder = components::builder(config)?.known_layers(layers);
            components::make(request, builder, config, &store, true).await?
        }
    };
    let manifest = made(&component, arguments, command, detach)?;
    Ok(manifest.to_toml())
}

/// The image of that name or reference. What is in a file may have changed.
fn known(
    components: &[Arc<Component>],
    wanted: &str,
    source: Option<&ImageSource>,
) -> Option<Arc<Component>> {
    let (name, version) = match wanted.split_once('@') {
        Some((name, version)) => (name, Some(version)),
        None => (wanted, None),
    };
    let whole = source.and_then(ImageSource::reference);
    let is_wanted = |one: &Component, image: &ContainerImage| {
        let named = one.name == name && version.is_none_or(|version| one.version == version);
        named || whole.as_ref() == Some(&image.reference)
    };
    let images = components.iter().rev().filter(|one| runs_here(one));
    let mut found = images.filter(|one| {
        let image = one.container.as_ref();
        image.is_some_and(|image| is_wanted(one, image))
    });
    found.next().cloned()
}

fn made(
    component: &Component,
    arguments: &ImageArguments,
    command: Vec<String>,
    detach: bool,
) -> Result<Manifest> {
    let Component { name, version, .. } = component;
    let image = component.container.as_ref();
    let image = image.with_context(|| format!("{name} is no container image"))?;
    let runs = [&component.entrypoint, &image.command, &command];
    if runs.iter().all(|words| words.is_empty()) {
        bail!(
            "{} names no program to run: give one behind it",
            image.reference
        );
    }
    let profile = name.replace('+', "-");
    let profile: String = profile.chars().take(PROFILE_BYTES).collect();
    let text = format!("name = \"{profile}\"\nbase = \"{name}@= {version}\"");
    let mut manifest = Manifest::parse(&text).context("the image's name")?;
    manifest.command = command;
    manifest.env = variables(&arguments.env)?;
    manifest.vm.memory_mib = arguments.memory >> 20;
    manifest.vm.cpus = arguments.cpus;
    manifest.vm.forward.clone_from(&arguments.publish);
    // A port that is published is worth waiting for.
    let mut tcp = arguments.publish.iter().filter(|port| !port.udp);
    if let Some(port) = tcp.next().filter(|_| detach && image.health.is_empty()) {
        manifest.ready = Some(Ready::Tcp(port.guest));
    }
    Ok(manifest)
}

fn variables(given: &[String]) -> Result<BTreeMap<String, String>> {
    let pair = |text: &String| match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        Some(_) => bail!("--env {text}: a variable without a name"),
        None => {
            let value = std::env::var(text);
            Ok((
                text.clone(),
                value.with_context(|| format!("--env {text}"))?,
            ))
        }
    };
    given.iter().map(pair).collect()
}

/// The turn to change which images this host's repository has, held while this is: an image
/// whose layers are there already must not lose them to the removal of another one.
pub async fn turn(config: &Config) -> Result<std::fs::File> {
    let path = config.state_dir.join("images.lock");
    let taken = tokio::task::spawn_blocking(move || {
        let shown = path.display().to_string();
        let dir = path.parent().map_or(Ok(()), std::fs::create_dir_all);
        let file = dir.and_then(|()| std::fs::File::create(path));
        let locked = file.and_then(|file| file.lock().map(|()| file));
        locked.with_context(|| format!("cannot lock {shown}"))
    });
    taken.await?
}

/// Refuses an image whose name and version in the repository are those of one from
/// elsewhere: nobody's image is replaced by another that is called the same.
pub async fn check_free(store: &Store, image: &Component) -> Result<()> {
    for other in store.components().await?.iter() {
        let (Some(mine), Some(there)) = (&image.container, &other.container) else {
            continue;
        };
        if is_called(image, other) && mine.reference != there.reference {
            bail!(
                "{} {} in the repository is {}: give {} another name with `forelay component \
                 build --oci IMAGE --name NAME`, or remove the other",
                other.name,
                other.version,
                there.reference,
                mine.reference
            );
        }
    }
    Ok(())
}

/// Removes what an image was before its tag moved on.
pub async fn replace(store: &Store, image: &Component) -> Result<()> {
    let reference = |one: &Component| one.container.as_ref().map(|own| own.reference.clone());
    for other in store.components().await?.iter() {
        let moved = is_called(image, other) && reference(image) == reference(other);
        if moved && other.id() != image.id() {
            remove(store, other).await?;
        }
    }
    Ok(())
}

/// True for components of one name and version for the same machines.
pub fn is_called(one: &Component, other: &Component) -> bool {
    let names = |one: &Component| (one.name.clone(), one.version.clone());
    names(one) == names(other) && one.architecture == other.architecture
}

/// Removes a component; of an image also the layers that no other image has.
pub async fn remove(store: &Store, component: &Component) -> Result<()> {
    store.remove_component(component.id()).await?;
    let Some(image) = &component.container else {
        return Ok(());
    };
    let left = store.components().await?;
    let images = left.iter().filter_map(|one| one.container.as_ref());
    let used: HashSet<_> = images.flat_map(|image| &image.layers).collect();
    let present: HashSet<_> = left.iter().map(|one| one.id()).collect();
    let unused = |id: &&_| !used.contains(*id) && present.contains(*id);
    for layer in image.layers.iter().filter(unused) {
        store.remove_component(*layer).await?;
    }
    Ok(())
}

/// What an image says of how it runs.
pub fn show(image: &ContainerImage) {
    say!(
        "  image of {} layers from {}",
        image.layers.len(),
        image.reference
    );
    let said = [("user", &image.user), ("in", &image.workdir)];
    for (word, value) in said.iter().filter(|(_, value)| !value.is_empty()) {
        say!("  {word} {value}");
    }
    if image.stop_signal > 0 {
        say!("  ends at signal {}", image.stop_signal);
    }
    for (word, values) in [("listens on", &image.ports), ("data in", &image.volumes)] {
        if !values.is_empty() {
            say!("  {word} {}", values.join(", "));
        }
    }
    for (name, value) in &image.env {
        say!("  env {name}={value}");
    }
}
