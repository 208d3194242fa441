//! The JSON documents of a container image: indexes, manifests, configurations, in the
//! forms of the OCI and of Docker.
//!
//! Owns what is read of them and which image of an index is taken. Refuses what is no image
//! of containers for Linux: artifacts, other systems, layers that lie elsewhere.
//!
//! Invariant: a configuration has a digest for each layer of its manifest.

use std::collections::BTreeMap;

use forelay_image::Digest;
use forelay_image::component::ContainerImage;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::draft::host_architecture;

/// Larger documents are refused, as registries do.
pub(super) const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
/// Most layers; Docker makes images of 127 at the most.
pub(super) const MAX_LAYERS: usize = 256;
/// Most bytes of what a configuration says of running the image.
const MAX_SETTINGS_BYTES: usize = 256 << 10;
const MAX_VOLUMES: usize = 256;
/// Longest path, and longest name in it, as for the kernel.
const MAX_PATH_BYTES: usize = 4095;
const MAX_NAME_BYTES: usize = 255;
/// By this an index says what its images are called.
const CALLED: [&str; 2] = [
    "io.containerd.image.name",
    "org.opencontainers.image.ref.name",
];

/// Why a document is refused, in words.
pub(super) type Refused = String;

/// An index or a manifest.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: u32,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// What a document says of another blob.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    urls: Vec<String>,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

impl Descriptor {
    /// What the index calls the image.
    pub fn called(&self) -> Option<&str> {
        let mut names = CALLED.iter().filter_map(|key| self.annotations.get(*key));
        names.next().map(String::as_str)
    }

    fn is_called(&self, name: &str) -> bool {
        CALLED
            .iter()
            .any(|key| self.annotations.get(*key).map(String::as_str) == Some(name))
    }
}

/// An index or the manifest of one image.
#[derive(Debug)]
pub(super) enum Parsed {
    Index(Vec<Descriptor>),
    Manifest {
        config: Descriptor,
        layers: Vec<Descriptor>,
    },
}

/// Reads an index or a manifest.
pub(super) fn parse(bytes: &[u8]) -> Result<Parsed, Refused> {
    let document: Document = serde_json::from_slice(bytes)
        .map_err(|error| format!("its manifest cannot be read: {error}"))?;
    match document {
        Document {
            schema_version: 1, ..
        } => Err("its manifest has the form that Docker left in 2015: push it again".to_owned()),
        Document {
            manifests: Some(manifests),
            config: None,
            layers: None,
            ..
        } => Ok(Parsed::Index(manifests)),
        Document {
            manifests: None,
            config: Some(config),
            layers: Some(layers),
            ..
        } => {
            check_layers(&config, &layers)?;
            Ok(Parsed::Manifest { config, layers })
        }
        _ => Err("neither an index nor a manifest of a container image".to_owned()),
    }
}

fn check_layers(config: &Descriptor, layers: &[Descriptor]) -> Result<(), Refused> {
    const CONFIGS: [&str; 3] = [
        "",
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    ];
    if !CONFIGS.contains(&config.media_type.as_str()) {
        let kind = &config.media_type;
        return Err(format!("no container image, but an artifact of {kind:?}"));
    }
    if layers.len() > MAX_LAYERS {
        let count = layers.len();
        return Err(format!("{count} layers; at most {MAX_LAYERS} are taken"));
    }
    for (number, layer) in (1..).zip(layers) {
        let kind = layer.media_type.as_str();
        let elsewhere = kind.contains("foreign") || kind.contains("nondistributable");
        if elsewhere || !layer.urls.is_empty() {
            return Err(format!(
                "layer {number} is foreign: it lies at its maker's, not with this image"
            ));
        }
        let known = kind.starts_with("application/vnd.oci.image.layer.v1.tar")
            || kind.starts_with("application/vnd.docker.image.rootfs.diff.tar");
        if !known || kind.ends_with("encrypted") {
            return Err(format!("layer {number} is of {kind:?}, which is not known"));
        }
    }
    Ok(())
}

/// The image of an index that this host's VMs run, or that is called `name`.
pub(super) fn choose<'a>(
    index: &'a [Descriptor],
    name: Option<&str>,
) -> Result<&'a Descriptor, Refused> {
    let called = index
        .iter()
        .filter(|one| name.is_none_or(|name| one.is_called(name)));
    let called: Vec<&Descriptor> = called.collect();
    if called.is_empty() {
        let names = index.iter().filter_map(Descriptor::called);
        return Err(format!(
            "no image {:?} in it; it has {}",
            name.unwrap_or_default(),
            listed(names)
        ));
    }
    let here = |one: &&&Descriptor| {
        let platform = one.platform.as_ref();
        platform.is_some_and(|platform| {
            platform.os == "linux" && debian_name(&platform.architecture) == host_architecture()
        })
    };
    if let Some(found) = called.iter().find(here) {
        return Ok(found);
    }
    let mut unsaid = called.iter().filter(|one| one.platform.is_none());
    match (unsaid.next(), unsaid.next()) {
        (Some(one), None) => Ok(one),
        (Some(_), Some(_)) => Err(format!(
            "several images in it: name one after a colon; it has {}",
            listed(called.iter().filter_map(|one| one.called()))
        )),
        _ => {
            let platforms = called.iter().filter_map(|one| one.platform.as_ref());
            let platforms = platforms.map(|one| format!("{}/{}", one.os, one.architecture));
            Err(format!(
                "no image for linux/{}; it has {}",
                host_architecture(),
                listed(platforms)
            ))
        }
    }
}

/// Names in a line, the first of many.
pub(super) fn listed(names: impl Iterator<Item = impl AsRef<str>>) -> String {
    const SHOWN: usize = 12;
    let mut names: Vec<String> = names.map(|name| name.as_ref().to_owned()).collect();
    names.dedup();
    let more = names.len() > SHOWN;
    names.truncate(SHOWN);
    match (names.is_empty(), more) {
        (true, _) => "none with a name".to_owned(),
        (_, true) => format!("{}, ...", names.join(", ")),
        _ => names.join(", "),
    }
}

/// Debian's name for a machine that images name as Go does.
fn debian_name(architecture: &str) -> &str {
    match architecture {
        "386" => "i386",
        "arm" => "armhf",
        "ppc64le" => "ppc64el",
        other => other,
    }
}

/// An image's configuration.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    rootfs: RootFs,
    config: Option<RunSettings>,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RunSettings {
    user: Option<String>,
    exposed_ports: Option<BTreeMap<String, IgnoredAny>>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    volumes: Option<BTreeMap<String, IgnoredAny>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    healthcheck: Option<HealthCheck>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct HealthCheck {
    test: Option<Vec<String>>,
}

/// What an image's configuration says.
#[derive(Debug)]
pub(super) struct ImageSettings {
    pub architecture: String,
    pub diff_ids: Vec<Digest>,
    pub entrypoint: Vec<String>,
    pub container: ContainerImage,
}

/// Reads the configuration of an image with so many layers.
pub(super) fn parse_config(bytes: &[u8], layers: usize) -> Result<ImageSettings, Refused> {
    let file: ConfigFile = serde_json::from_slice(bytes)
        .map_err(|error| format!("its configuration cannot be read: {error}"))?;
    if !matches!(file.os.as_str(), "" | "linux") {
        return Err(format!("for {}; VMs run Linux", file.os));
    }
    let diff_ids = file.rootfs.diff_ids;
    if diff_ids.len() != layers {
        return Err(format!(
            "{layers} layers, but its configuration has digests of {}",
            diff_ids.len()
        ));
    }
    let architecture = match debian_name(&file.architecture) {
        "" => host_architecture(),
        known => known,
    };
    let settings = file.config.unwrap_or_default();
    let entrypoint = settings.entrypoint.clone().unwrap_or_default();
    let container = container(settings);
    check_paths(&container)?;
    let said = serde_json::to_vec(&(&container, &entrypoint)).unwrap_or_default();
    if said.len() > MAX_SETTINGS_BYTES {
        return Err(format!(
            "its configuration has more than {MAX_SETTINGS_BYTES} bytes of settings"
        ));
    }
    Ok(ImageSettings {
        architecture: architecture.to_owned(),
        diff_ids,
        entrypoint,
        container,
    })
}

fn container(settings: RunSettings) -> ContainerImage {
    let env = settings.env.unwrap_or_default();
    let pairs = env.iter().filter_map(|entry| entry.split_once('='));
    let names = |set: Option<BTreeMap<String, IgnoredAny>>| set.unwrap_or_default().into_keys();
    ContainerImage {
        command: settings.cmd.unwrap_or_default(),
        env: pairs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect(),
        user: settings.user.unwrap_or_default(),
        workdir: absolute(&settings.working_dir.unwrap_or_default()).unwrap_or_default(),
        ports: names(settings.exposed_ports).collect(),
        volumes: names(settings.volumes)
            .filter_map(|path| absolute(&path))
            .collect(),
        stop_signal: signal_number(settings.stop_signal.as_deref().unwrap_or_default()),
        health: health(settings.healthcheck.unwrap_or_default()),
        ..ContainerImage::default()
    }
}

/// What a VM makes for the image must be possible there.
fn check_paths(container: &ContainerImage) -> Result<(), Refused> {
    if container.volumes.len() > MAX_VOLUMES {
        return Err(format!("more than {MAX_VOLUMES} volumes"));
    }
    for path in container.volumes.iter().chain([&container.workdir]) {
        let too_long = path.split('/').any(|name| name.len() > MAX_NAME_BYTES);
        if path.len() > MAX_PATH_BYTES || too_long || path.contains('\0') {
            let start: String = path.chars().take(40).collect();
            return Err(format!(
                "its configuration has no usable path: {start:?}..."
            ));
        }
    }
    Ok(())
}

/// The number of a signal that an image names; 0 for none.
fn signal_number(name: &str) -> i32 {
    const KNOWN: [(&str, i32); 10] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("KILL", 9),
        ("USR1", 10),
        ("USR2", 12),
        ("TERM", 15),
        ("WINCH", 28),
        ("PWR", 30),
        // What systemd takes for a shutdown.
        ("RTMIN+3", 37),
    ];
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    let mut known = KNOWN.iter().filter(|(name, _)| *name == bare);
    let number = known.next().map(|(_, number)| *number);
    let number = number.or_else(|| name.parse().ok());
    number
        .filter(|number| (1..=64).contains(number))
        .unwrap_or(0)
}

/// A path from the root, `..` resolved; `None` for the root itself and for none.
fn absolute(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    (!parts.is_empty()).then(|| format!("/{}", parts.join("/")))
}

/// The command of a health check, none if the image has none or switches it off.
fn health(check: HealthCheck) -> Vec<String> {
    let test = check.test.unwrap_or_default();
    match test.split_first() {
        Some((kind, command)) if kind == "CMD" => command.to_vec(),
        Some((kind, [line])) if kind == "CMD-SHELL" => {
            ["/bin/sh", "-c", line].map(str::to_owned).to_vec()
        }
        _ => Vec::new(),
    }
}
