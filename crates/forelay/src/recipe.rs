//! Recipes: all that composing a lock's map image needs, in memory.
//!
//! A recipe holds each component's metadata region, chunk index and account fragments, so
//! that a launch merges flat arrays and waits for nothing. Used by the daemon (which keeps
//! recipes of recent locks) and by `forelay compose`. Says in words what of the components
//! is not used as it is.
//!
//! Invariant: a recipe depends on its lock alone; what belongs to one VM (host name, keys,
//! files of the manifest) is added at compose time.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use forelay_guest_protocol::accounts::{
    Fragments, MergeError, MergedFile, fragments_path, merged_files, merged_paths,
};
use forelay_guest_protocol::config::{
    Entrypoint, Network, ReadyProbe, Run, VM_CONFIG_PATH, VmConfig,
};
use forelay_guest_protocol::snapshot::is_identity;
use forelay_host::atomic_write;
use forelay_image::bundle::Bundle;
use forelay_image::component::{Component, ContainerImage, Role};
use forelay_image::erofs::layout::FileType;
use forelay_image::erofs::merge::{
    ComposeError, ComposeOptions, Composed, Layer, MapLayout, compose,
};
use forelay_image::erofs::read::{Image, ReadAt, ReadError};
use forelay_image::lock::{Lock, LockedComponent};
use forelay_image::manifest::{Manifest, Ready};
use forelay_image::package_status::{merged_status, status_path};
use forelay_image::tree::{Attributes, Kind, Node, Tree, TreeError};
use forelay_import::NEEDS_LDCONFIG;
use forelay_store::{ImageMap, ImageReader, Store, StoreError};

use crate::aggregates::{self, Aggregates};
use crate::stacked::{FoundFile, InLayer, Layer as StackedLayer, Stacked};

/// Largest fragments file that is read.
const FRAGMENTS_LIMIT_BYTES: u64 = 16 << 20;
/// Where dpkg keeps what is installed.
const PACKAGE_STATUS_PATH: &str = "var/lib/dpkg/status";
/// Largest kernel or initramfs that is read.
const KERNEL_LIMIT_BYTES: u64 = 512 << 20;
/// Most metadata of a lock's components in bytes, all of which a recipe has in memory.
const METADATA_LIMIT_BYTES: u64 = 1 << 30;
/// Paths that are named in notes; of more only the number is told.
const NAMED_PATHS: usize = 20;

/// One component of a recipe.
struct Part {
    component: Arc<Component>,
    metadata: Bytes,
    map: Arc<ImageMap>,
    reader: Reader,
}

/// What composing a lock's map image needs.
pub struct Recipe {
    parts: Vec<Part>,
    merged: Vec<MergedFile>,
    /// Paths and targets of links that lead elsewhere than in the topmost component.
    links: Vec<(String, Vec<u8>)>,
}

/// Why a map image could not be composed.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// A component cannot be read from the repository.
    #[error("component {component} cannot be read")]
    Component {
        /// Its name and version.
        component: String,
        /// The cause.
        #[source]
        source: StoreError,
    },
    /// A component's image is damaged.
    #[error("the image of component {component} is damaged: build it again")]
    Image {
        /// Its name and version.
        component: String,
        /// The cause.
        #[source]
        source: ReadError,
    },
    /// A component's image cannot be read now.
    #[error(
        "the image of component {component} cannot be read: look at the disk and the sources, and try again"
    )]
    Unreadable {
        /// Its name and version.
        component: String,
        /// The cause.
        #[source]
        source: ReadError,
    },
    /// Accounts of two components clash.
    #[error("the components' accounts do not fit together")]
    Accounts(#[from] MergeError),
    /// A file of the manifest cannot be placed.
    #[error("the manifest's files cannot be placed")]
    Files(#[from] TreeError),
    /// A component, or the manifest, has a file where another component has a directory.
    #[error("{path} is a directory in {below}; {above} must not have a file there")]
    OverDirectory {
        /// The path.
        path: String,
        /// Who has the file.
        above: String,
        /// The component that has the directory.
        below: String,
    },
    /// A component is for other machines than the base.
    #[error("{0}")]
    Architecture(#[from] ArchitectureError),
    /// Merging failed.
    #[error("the image cannot be composed")]
    Compose(#[source] ComposeError),
    /// The components have more metadata than a recipe may hold.
    #[error(
        "the components have {bytes} bytes of metadata, more than {METADATA_LIMIT_BYTES}: split the VM"
    )]
    TooMuchMetadata {
        /// Of all components.
        bytes: u64,
    },
    /// A kernel component lacks a file.
    #[error("kernel component {component} has no /{path}: build it with `--kernel`")]
    NoKernel {
        /// Its name and version.
        component: String,
        /// The file.
        path: &'static str,
    },
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A thread died.
    #[error("composing was interrupted")]
    Interrupted,
}

impl RecipeError {
    /// What is wrong with a component's image: its bytes, or that they cannot be had.
    fn of_image(component: String, source: ReadError) -> Self {
        match &source {
            // That an image ends early is in its bytes.
            ReadError::Io { source: cause, .. } if cause.kind() != ErrorKind::UnexpectedEof => {
                Self::Unreadable { component, source }
            }
            _ => Self::Image { component, source },
        }
    }
}

/// A blocking reader of a component's image, for [`Image`]. Not for async threads.
pub struct Reader(pub ImageReader);

impl ReadAt for Reader {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn size(&self) -> std::io::Result<u64> {
        Ok(self.0.image_bytes())
    }
}

impl Recipe {
    /// Reads what `lock` names from the store. `full_system` VMs (those that run their own
    /// init) also get a package database that knows all components' packages; the others
    /// have no use for the memory that it takes in each VM.
    pub async fn load(store: &Store, lock: &Lock, full_system: bool) -> Result<Self, RecipeError> {
        check_metadata(lock)?;
        let parts = lock
            .components
            .iter()
            .map(|component| load_part(store, component, full_system));
        let loaded = futures_util::future::try_join_all(parts).await?;
        let (parts, mut texts): (Vec<Part>, Vec<PartTexts>) = loaded.into_iter().unzip();
        let (parts, aggregates, of_image) = load_aggregates(parts, full_system).await?;
        if let (Some(base), Some(of_image)) = (texts.first_mut(), of_image) {
            *base = of_image;
        }
        let mut fragments = Vec::new();
        let mut statuses = Vec::new();
        for text in texts {
            fragments.push(text.fragments);
            statuses.push(text.package_status);
        }
        let mut merged = merged_files(&fragments)?;
        merged.extend(aggregates.files);
        merged.extend(package_database(&statuses));
        let kernel = store.locked_component(&lock.kernel).await;
        let kernel = kernel.map_err(|source| RecipeError::Component {
            component: label(&lock.kernel),
            source,
        })?;
        let components = parts.iter().map(|part| &*part.component);
        check_architectures(components.chain([&*kernel]))?;
        Ok(Self {
            parts,
            merged,
            links: aggregates.links,
        })
    }

    /// Bytes of its components' metadata, most of what it takes.
    pub fn metadata_bytes(&self) -> u64 {
        self.parts.iter().map(|one| one.metadata.len() as u64).sum()
    }

    /// What the base says as a container image, if it is one.
    fn container(&self) -> Option<&ContainerImage> {
        self.parts.first()?.component.container.as_ref()
    }

    /// Composes the map image of one VM. Images that `bundle` has are looked for there,
    /// all others on devices of their own.
    pub fn compose(
        &self,
        manifest: &Manifest,
        hostname: &str,
        layout: MapLayout,
        bundle: Option<&Bundle>,
    ) -> Result<Composed, RecipeError> {
        let own = self.own_files(manifest, hostname)?;
        let layers: Vec<Layer<'_>> = self
            .parts
            .iter()
            .map(|part| Layer {
                image: part.component.image.digest,
                image_bytes: part.component.image.bytes,
                metadata: &part.metadata,
                chunks: Some(&part.map.index),
                bundle: bundle.filter(|one| one.offset_of(&part.component.image.digest).is_some()),
            })
            .collect();
        let composed = compose(&layers, &own, ComposeOptions { layout });
        composed.map_err(|error| match error {
            ComposeError::OverDirectory { path, layer, below } => RecipeError::OverDirectory {
                path,
                above: self.layer_name(layer).to_owned(),
                below: self.layer_name(below).to_owned(),
            },
            other => RecipeError::Compose(other),
        })
    }

    /// Whose layer this is; one of a container image is the image's.
    fn layer_name(&self, layer: usize) -> &str {
        let part = match self.is_of_image(layer) {
            true => self.parts.first(),
            false => self.parts.get(layer),
        };
        part.map_or("the manifest", |part| &part.component.name)
    }

    /// True for a layer of the container image that is the base.
    fn is_of_image(&self, layer: usize) -> bool {
        layer < image_layers(&self.parts)
    }

    /// What the VM does not have as its components have it, in words.
    pub fn notes(&self, composed: &Composed) -> Vec<String> {
        // That layers of one image have a file differently is what they are for.
        let conflicts = composed.conflicts.iter();
        let conflicts =
            conflicts.filter(|one| !(self.is_of_image(one.loser) && self.is_of_image(one.winner)));
        let conflicts: Vec<_> = conflicts.collect();
        let mut notes: Vec<String> = conflicts
            .iter()
            .take(NAMED_PATHS)
            .map(|conflict| {
                format!(
                    "{} is in {} and in {}, whose is used",
                    String::from_utf8_lossy(&conflict.path),
                    self.layer_name(conflict.loser),
                    self.layer_name(conflict.winner),
                )
            })
            .collect();
        if conflicts.len() > NAMED_PATHS {
            let more = conflicts.len() - NAMED_PATHS;
            notes.push(format!("{more} more paths are in several components"));
        }
        for part in &self.parts {
            let of_launches = part.component.notes.iter();
            let of_launches = of_launches.filter(|note| note.starts_with(NEEDS_LDCONFIG));
            notes.extend(of_launches.map(|note| format!("{}: {note}", part.component.name)));
        }
        notes
    }

    /// The files that belong to this VM alone.
    fn own_files(&self, manifest: &Manifest, hostname: &str) -> Result<Tree, RecipeError> {
        let mut tree = Tree::new();
        for file in &self.merged {
            let attributes = Attributes::with_mode(file.mode).owned_by(file.uid, file.gid);
            tree.put_file(&file.path, &file.bytes[..], attributes)?;
        }
        for (path, target) in &self.links {
            let attributes = Attributes::with_mode(0o777);
            let kind = Kind::Symlink(target.clone());
            tree.insert_path(path.as_bytes(), Node { attributes, kind })?;
        }
        let plain = Attributes::with_mode(0o644);
        let name = format!("{hostname}\n").into_bytes();
        tree.put_file("etc/hostname", name, plain.clone())?;
        let hosts = format!("127.0.0.1 localhost\n127.0.1.1 {hostname}\n::1 localhost\n");
        tree.put_file("etc/hosts", hosts.into_bytes(), plain.clone())?;
        if !manifest.ssh_keys.is_empty() {
            let keys = manifest.ssh_keys.join("\n") + "\n";
            let private = Attributes::with_mode(0o600);
            tree.put_file("root/.ssh/authorized_keys", keys.into_bytes(), private)?;
            for dir in ["root", "root/.ssh"] {
                if let Some(id) = tree.lookup(dir.as_bytes()) {
                    tree.node_mut(id).attributes.mode = 0o700;
                }
            }
        }
        for (path, file) in &manifest.files {
            let attributes = Attributes::with_mode(file.mode).owned_by(file.uid, file.gid);
            tree.put_file(path, file.content.as_bytes(), attributes)?;
        }
        // A program in a container expects these.
        let volumes = self.container().map(|image| &image.volumes[..]);
        let workdir = Some(self.workdir(manifest)).filter(|path| !path.is_empty());
        for path in volumes
            .unwrap_or_default()
            .iter()
            .map(String::as_str)
            .chain(workdir)
        {
            tree.make_directories(path.as_bytes())?;
        }
        let config = serde_json::to_vec(&self.guest_config(manifest, hostname))
            .map_err(|_| RecipeError::Interrupted)?;
        tree.put_file(VM_CONFIG_PATH, config, plain)?;
        Ok(tree)
    }

    fn workdir<'a>(&'a self, manifest: &'a Manifest) -> &'a str {
        let of_image = || self.container().map(|image| image.workdir.as_str());
        manifest
            .workdir
            .as_deref()
            .or_else(of_image)
            .unwrap_or_default()
    }

    /// The program: the manifest's, else that of the last component with one, which is what
    /// the VM is for. A manifest's arguments take the place of a container image's.
    fn argv(&self, manifest: &Manifest) -> Vec<String> {
        let mut own = self.parts.iter().rev().map(|part| &*part.component);
        let program = match manifest.entrypoint.is_empty() {
            true => own.find(|component| !component.entrypoint.is_empty()),
            false => None,
        };
        let entrypoint = program.map_or(&manifest.entrypoint, |program| &program.entrypoint);
        let of_image = match (program, self.container()) {
            (Some(program), _) => program.container.as_ref(),
            (None, image) => image.filter(|_| entrypoint.is_empty()),
        };
        let arguments = match of_image {
            Some(image) if manifest.command.is_empty() => &image.command,
            _ => &manifest.command,
        };
        entrypoint.iter().chain(arguments).cloned().collect()
    }

    fn guest_config(&self, manifest: &Manifest, hostname: &str) -> VmConfig {
        let argv = self.argv(manifest);
        let image = self.container();
        let user = manifest.user.as_ref().or(image.map(|image| &image.user));
        let run = match &manifest.init {
            Some(path) => Run::Init { path: path.clone() },
            None if argv.is_empty() => Run::AgentOnly,
            None => Run::Entrypoint(Entrypoint {
                argv,
                cwd: self.workdir(manifest).to_owned(),
                user: user.cloned().unwrap_or_default(),
                stop_signal: image.map_or(0, |image| image.stop_signal),
                ..Entrypoint::default()
            }),
        };
        let health = image.map(|image| image.health.clone());
        let health = health.filter(|command| !command.is_empty() && manifest.init.is_none());
        let ready = manifest.ready.as_ref().map(|ready| match ready {
            Ready::Tcp(port) => ReadyProbe::Tcp(*port),
            Ready::Exec(command) => ReadyProbe::Exec(command.clone()),
            Ready::Path(path) => ReadyProbe::Path(path.clone()),
        });
        let mut env = image.map(|image| image.env.clone()).unwrap_or_default();
        env.extend(manifest.env.clone());
        let own = manifest.files.keys().filter(|path| is_identity(path));
        VmConfig {
            hostname: hostname.to_owned(),
            run,
            env,
            ready: ready.or(health.map(ReadyProbe::Exec)),
            network: Some(Network::default()),
            keeps: own.cloned().collect(),
            ..VmConfig::default()
        }
    }
}

/// Whether this host's VMs can run a component.
pub fn runs_here(component: &Component) -> bool {
    [forelay_import::host_architecture(), "all"].contains(&component.architecture.as_str())
}

/// Those components of a repository that this host's VMs can run: a newer one for other
/// machines is no candidate.
pub fn for_this_host(components: &[Arc<Component>]) -> Vec<Component> {
    let here = components.iter().filter(|one| runs_here(one));
    here.map(|one| (**one).clone()).collect()
}

/// Solves with what this host's VMs can run. What that lacks is told as it is with all
/// components: one for other machines is there, and is refused as such.
pub fn solve_for_this_host<E>(
    components: &[Arc<Component>],
    solve: impl Fn(&[Component]) -> Result<Lock, E>,
) -> Result<Lock, E> {
    let all = || {
        components
            .iter()
            .map(|one| (**one).clone())
            .collect::<Vec<_>>()
    };
    solve(&for_this_host(components)).or_else(|_| solve(&all()))
}

/// Checks that components, the base first, are for the same machines.
pub fn check_architectures<'a>(
    components: impl IntoIterator<Item = &'a Component>,
) -> Result<(), ArchitectureError> {
    let mut components = components.into_iter();
    let Some(base) = components.next() else {
        return Ok(());
    };
    match components.find(|other| !other.runs_beside(base)) {
        None => Ok(()),
        Some(other) => Err(ArchitectureError {
            component: format!("{} {}", other.name, other.version),
            architecture: other.architecture.clone(),
            base: format!("{} {}", base.name, base.version),
            of_base: base.architecture.clone(),
        }),
    }
}

/// A component is for other machines than the base.
#[derive(Debug, thiserror::Error)]
#[error("{component} is for {architecture}, {base} for {of_base}")]
pub struct ArchitectureError {
    component: String,
    architecture: String,
    base: String,
    of_base: String,
}

fn label(component: &LockedComponent) -> String {
    format!("{} {}", component.name, component.version)
}

/// Refuses components with more metadata than a recipe may hold. What the lock says of their
/// sizes is compared with their metadata when each is read.
fn check_metadata(lock: &Lock) -> Result<(), RecipeError> {
    let each = lock.components.iter().map(|one| one.metadata_bytes);
    let bytes = each.fold(0, u64::saturating_add);
    match bytes > METADATA_LIMIT_BYTES {
        true => Err(RecipeError::TooMuchMetadata { bytes }),
        false => Ok(()),
    }
}

/// Texts of a component that are merged with the other components'.
#[derive(Default)]
struct PartTexts {
    fragments: Fragments,
    /// Paragraphs of its packages, if they were asked for and there are any.
    package_status: Option<String>,
}

/// The package database of all components, whose parts are given, the base's first; `None` if
/// none but the base has one. A base that is no Debian may have none.
fn package_database(statuses: &[Option<String>]) -> Option<MergedFile> {
    let (base, added) = statuses.split_first()?;
    let added: Vec<&str> = added.iter().flatten().map(String::as_str).collect();
    let base = base.as_deref().unwrap_or_default();
    (!added.is_empty()).then(|| MergedFile {
        path: PACKAGE_STATUS_PATH.to_owned(),
        bytes: merged_status(base, &added).into_bytes(),
        mode: 0o644,
        uid: 0,
        gid: 0,
    })
}

async fn load_part(
    store: &Store,
    component: &LockedComponent,
    full_system: bool,
) -> Result<(Part, PartTexts), RecipeError> {
    let failed = |source| RecipeError::Component {
        component: label(component),
        source,
    };
    let pinned = store.locked_component(component).await.map_err(failed)?;
    let map = store.component_image(component.id).await.map_err(failed)?;
    let metadata = store.image_metadata(&map).await.map_err(failed)?;
    let reader = Reader(store.image_reader(Arc::clone(&map)));
    let locked = component.clone();
    let read = tokio::task::spawn_blocking(move || {
        read_texts(&reader, &locked, full_system).map(|texts| (reader, texts))
    });
    let (reader, texts) = read.await.map_err(|_| RecipeError::Interrupted)??;
    Ok((
        Part {
            component: pinned,
            metadata,
            map,
            reader,
        },
        texts,
    ))
}

/// How many components, from the first on, are a container image: it and its layers.
fn image_layers(parts: &[Part]) -> usize {
    let is_layer = |part: &&Part| part.component.role == Role::Layer;
    match parts.split_first() {
        Some((base, above)) if base.component.container.is_some() => {
            1 + above.iter().take_while(is_layer).count()
        }
        _ => 0,
    }
}

/// Makes one of the files that several components have made entries in, and reads what a
/// container image that is the base says of accounts and packages.
async fn load_aggregates(
    parts: Vec<Part>,
    full_system: bool,
) -> Result<(Vec<Part>, Aggregates, Option<PartTexts>), RecipeError> {
    let read = tokio::task::spawn_blocking(move || {
        let layers = (0..).zip(&parts).map(|(number, part)| StackedLayer {
            number,
            metadata: &part.metadata,
            chunks: &part.map.index,
            reader: &part.reader,
        });
        let layers: Vec<StackedLayer<'_>> = layers.collect();
        let (image, others) = layers.split_at(image_layers(&parts));
        let merge = || -> InLayer<(Aggregates, Option<PartTexts>)> {
            let image = Some(image).filter(|layers| !layers.is_empty());
            let all = image.into_iter().chain(others.chunks(1));
            let stacks = all.map(Stacked::open).collect::<Result<Vec<_>, _>>()?;
            let texts = image.and(stacks.first());
            let texts = texts.map(|image| texts_of_image(image, full_system));
            Ok((aggregates::merge(&stacks)?, texts.transpose()?))
        };
        match merge() {
            Ok((merged, texts)) => Ok((parts, merged, texts)),
            Err((number, source)) => {
                let Component { name, version, .. } = &*parts[number].component;
                let component = format!("{name} {version}");
                Err(RecipeError::of_image(component, source))
            }
        }
    });
    read.await.map_err(|_| RecipeError::Interrupted)?
}

/// What a container image says, where a base that was built as one has files for it.
fn texts_of_image(image: &Stacked<'_>, full_system: bool) -> InLayer<PartTexts> {
    let read = |path: &str| -> InLayer<Option<String>> {
        let found = image.find(path)?;
        let is_file = |found: &FoundFile| {
            let record = &found.inode.record;
            record.file_type == FileType::File && record.size <= FRAGMENTS_LIMIT_BYTES
        };
        let Some(found) = found.filter(is_file) else {
            return Ok(None);
        };
        let bytes = image.read(&found, FRAGMENTS_LIMIT_BYTES)?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    };
    let mut fragments = Fragments::default();
    for path in merged_paths() {
        if let Some(text) = read(path)? {
            fragments.files.insert(path.to_owned(), text);
        }
    }
    Ok(PartTexts {
        fragments,
        package_status: match full_system {
            true => read(PACKAGE_STATUS_PATH)?,
            false => None,
        },
    })
}

fn read_texts(
    reader: &Reader,
    component: &LockedComponent,
    full_system: bool,
) -> Result<PartTexts, RecipeError> {
    let damaged = |source| RecipeError::of_image(label(component), source);
    let image = Image::open(reader).map_err(damaged)?;
    let read = |path: &str| read_file(&image, path, FRAGMENTS_LIMIT_BYTES).map_err(damaged);
    let fragments = match read(&fragments_path(&component.name))? {
        Some(bytes) => Fragments::decode(&component.name, &bytes)?,
        None => Fragments::default(),
    };
    let status_path = match component.role {
        Role::Base => PACKAGE_STATUS_PATH.to_owned(),
        _ => status_path(&component.name),
    };
    let status = if full_system {
        read(&status_path)?
    } else {
        None
    };
    Ok(PartTexts {
        fragments,
        package_status: status.map(|text| String::from_utf8_lossy(&text).into_owned()),
    })
}

/// A whole file of an image, if there is one at `path` (symbolic links are not followed).
pub fn read_file(
    image: &Image<'_>,
    path: &str,
    limit_bytes: u64,
) -> Result<Option<Vec<u8>>, ReadError> {
    match image.lookup(path.as_bytes())? {
        Some(inode) => image.read_whole(&inode, limit_bytes).map(Some),
        None => Ok(None),
    }
}

/// Kernel and initramfs on the host.
#[derive(Clone, Debug)]
pub struct KernelFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// Kernel and initramfs of a kernel component as files in `dir`, extracted once. What is in
/// `dir` already must be of the same component.
pub async fn kernel_files(
    store: &Store,
    kernel: &LockedComponent,
    dir: &Path,
) -> Result<KernelFiles, RecipeError> {
    let files = KernelFiles {
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
    };
    let failed = |source| RecipeError::Component {
        component: label(kernel),
        source,
    };
    store.locked_component(kernel).await.map_err(failed)?;
    if files.kernel.exists() && files.initrd.exists() {
        return Ok(files);
    }
    let image = store.component_image(kernel.id).await.map_err(failed)?;
    let reader = Reader(store.image_reader(image));
    let (name, dir) = (label(kernel), dir.to_path_buf());
    let extracted = tokio::task::spawn_blocking(move || {
        extract_kernel(&reader, &name, &dir, &files).map(|()| files)
    });
    extracted.await.map_err(|_| RecipeError::Interrupted)?
}

/// Writes kernel and initramfs; they appear when they are whole.
fn extract_kernel(
    reader: &Reader,
    name: &str,
    dir: &Path,
    files: &KernelFiles,
) -> Result<(), RecipeError> {
    let damaged = |source| RecipeError::of_image(name.to_owned(), source);
    let image = Image::open(reader).map_err(damaged)?;
    for (path, target) in [
        ("boot/vmlinuz", &files.kernel),
        ("boot/initrd.cpio", &files.initrd),
    ] {
        let bytes = read_file(&image, path, KERNEL_LIMIT_BYTES).map_err(damaged)?;
        let bytes = bytes.ok_or_else(|| RecipeError::NoKernel {
            component: name.to_owned(),
            path,
        })?;
        // Launches at the same time each write their own, of the same bytes.
        std::fs::create_dir_all(dir)
            .and_then(|()| atomic_write(target, &bytes))
            .map_err(|source| RecipeError::Write {
                path: target.clone(),
                source,
            })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use forelay_image::Digest;
    use forelay_image::component::ImageRef;
    use forelay_image::solve::solve;
    use forelay_import::host_architecture;

    use super::*;

    #[test]
    fn a_base_without_packages_has_those_of_its_components() {
        let text = |name: &str| Some(format!("Package: {name}\nVersion: 1\n"));
        let known = |statuses: &[Option<String>]| {
            let file = package_database(statuses)?;
            Some(String::from_utf8(file.bytes).unwrap())
        };
        assert_eq!(known(&[None, text("a")]), text("a"));
        assert_eq!(
            known(&[None, text("a"), None, text("b"), text("a")]),
            known(&[text("a"), text("b")])
        );
        assert_eq!(known(&[text("a"), None]), None);
        assert_eq!(known(&[None, None]), None);
    }

    #[test]
    fn an_image_that_cannot_be_read_is_not_called_damaged() {
        let said = |kind: ErrorKind| {
            let source = ReadError::Io {
                offset: 0,
                source: kind.into(),
            };
            RecipeError::of_image("nano 1".to_owned(), source).to_string()
        };
        assert!(said(ErrorKind::TimedOut).contains("cannot be read"));
        assert!(said(ErrorKind::UnexpectedEof).contains("is damaged"));
    }

    #[test]
    fn what_other_machines_run_is_no_candidate_here() {
        let component = |name: &str, version: &str, role, architecture: &str| {
            let image = ImageRef {
                digest: Digest::of(format!("{name} {version} {architecture}").as_bytes()),
                bytes: 4096,
                metadata_bytes: 4096,
                inodes: 1,
                chunk_index: Digest::of(b"index"),
            };
            Arc::new(Component::new(name, version, role, architecture, image))
        };
        let here = host_architecture();
        let all = [
            component("debian", "12", Role::Base, here),
            component("debian", "13", Role::Base, "riscv32"),
            component("linux", "6.1", Role::Kernel, here),
            component("linux", "6.1", Role::Kernel, "riscv32"),
            component("scripts", "2", Role::Package, "all"),
            component("scripts", "3", Role::Package, "riscv32"),
        ];
        let manifest = Manifest::parse("base = 'debian'\ncomponents = ['scripts']").unwrap();
        let lock = solve(&manifest, &for_this_host(&all)).unwrap();
        let versions: Vec<&str> = lock.all().map(|one| one.version.as_str()).collect();
        assert_eq!(versions.len(), 3, "{versions:?}");
        assert!(
            !versions.contains(&"13") && !versions.contains(&"3"),
            "{versions:?}"
        );
        assert!(lock.all().all(|one| {
            let pinned = all.iter().find(|known| known.id() == one.id);
            runs_here(pinned.unwrap())
        }));
    }
}
