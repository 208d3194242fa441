//! The driver: from a request to a written image with its metadata.
//!
//! Owns the choice of importer, the overrides a request may make, and the order import,
//! write, describe. Refuses to know repositories: the caller publishes what it gets.
//! Blocking; run it on a thread that may block.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forelay_image::component::{Component, Role};
use forelay_image::erofs::write::{WriteError, write_image};
use forelay_image::tree::{Kind, ROOT, Tree};
use forelay_image::{ChunkIndex, NameOf};
use tempfile::TempPath;

use crate::apt::{AptCache, DEFAULT_REFRESH_AFTER};
use crate::base::{BaseOptions, DEFAULT_SUITE, build_base, made};
use crate::deb::{merge_usr, read_deb};
use crate::dir::{Ownership, name_from_path, read_directory};
use crate::draft::{Draft, Files, Imported, Part, plain_files};
use crate::error::{ImportError, io_error, tree_error};
use crate::kernel::{KERNEL_NAME, KernelOptions, build_kernel};
use crate::oci::{ImageOptions, KnownLayers, import_image};
use crate::packages::{PackageOptions, build_packages};
use crate::progress::{BuildPhase, Progress, Reporter};
use crate::rootfs::{describe_base, put_fragments, release_version};
use crate::roots::BaseRoot;
use crate::sandbox::limits::BuildLimits;
use crate::spool::{DEFAULT_LIMIT_BYTES, Spool, check_free};
use crate::tar::read_files;
use crate::users::{DEFAULT_FIRST_USER, UserRange};
use forelay_image::control::{parse_provides, parse_relations, sbom_package};
use forelay_image::package_status::status_path;

/// What a component is built from.
#[derive(Clone, Debug)]
pub enum BuildSource {
    /// A host directory.
    Directory {
        /// Its path.
        path: PathBuf,
        /// Who owns the files.
        ownership: Ownership,
    },
    /// A tar archive, compressed or not.
    Tar {
        /// Its path.
        path: PathBuf,
        /// Who owns the files.
        ownership: Ownership,
    },
    /// One `.deb` file, unpacked; its maintainer scripts are not run.
    DebFile {
        /// Its path.
        path: PathBuf,
    },
    /// Debian packages installed on a base.
    Packages {
        /// What to install.
        options: PackageOptions,
        /// The base.
        base: Box<BaseRoot>,
    },
    /// A Debian base.
    Base(BaseOptions),
    /// The Debian cloud kernel with an initramfs.
    Kernel(KernelOptions),
    /// A container image.
    Image(ImageOptions),
}

/// A component to be built. What is `None` comes from the source.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// What it is built from.
    pub source: BuildSource,
    /// Its name.
    pub name: Option<String>,
    /// Its version.
    pub version: Option<String>,
    /// What it is for.
    pub role: Option<Role>,
    /// Its function in one line.
    pub description: Option<String>,
    /// Command that a VM runs if its manifest names none.
    pub entrypoint: Option<Vec<String>>,
}

impl BuildRequest {
    /// Builds `source` with what it says about itself.
    pub fn new(source: BuildSource) -> Self {
        Self {
            source,
            name: None,
            version: None,
            role: None,
            description: None,
            entrypoint: None,
        }
    }
}

/// A component that was built.
#[derive(Debug)]
pub struct BuiltComponent {
    /// Its metadata.
    pub component: Component,
    /// Its image, deleted when this is dropped.
    pub image: TempPath,
    /// The image's chunks.
    pub chunks: ChunkIndex,
}

/// What one request gave.
#[derive(Debug)]
pub struct BuiltComponents {
    /// The component that was asked for.
    pub main: BuiltComponent,
    /// Components that were split off it, which are published first: where one requires the
    /// other, it is the main one.
    pub split_off: Vec<BuiltComponent>,
    /// Components that go with it and were there before.
    pub at_hand: Vec<Component>,
}

impl BuiltComponents {
    /// All of them, the main one last.
    pub fn in_order(&self) -> impl Iterator<Item = &BuiltComponent> {
        self.split_off.iter().chain([&self.main])
    }
}

/// Builds components, with downloads and unpacked bases kept in a cache directory.
#[derive(Clone, Debug)]
pub struct Builder {
    cache: PathBuf,
    refresh_after: Duration,
    mirror: Option<String>,
    layers: Option<Arc<dyn KnownLayers>>,
    users: UserRange,
    limits: BuildLimits,
}

impl Builder {
    /// A builder that keeps its files in `cache` (which needs room for a few copies of
    /// what is built, on a file system that overlayfs accepts as upper layer).
    pub fn new(cache: &Path) -> Result<Self, ImportError> {
        std::fs::create_dir_all(cache).map_err(io_error("creating", cache))?;
        let cache = cache.canonicalize().map_err(io_error("opening", cache))?;
        Ok(Self {
            cache,
            refresh_after: DEFAULT_REFRESH_AFTER,
            mirror: None,
            layers: None,
            users: UserRange::new(DEFAULT_FIRST_USER),
            limits: BuildLimits::default(),
        })
    }

    /// Uses package indexes that are up to `age` old.
    pub fn refresh_after(mut self, age: Duration) -> Self {
        self.refresh_after = age;
        self
    }

    /// Downloads from the Debian mirror at `uri` alone, instead of the host's sources.
    pub fn mirror(mut self, uri: &str) -> Self {
        self.mirror = Some(uri.to_owned());
        self
    }

    /// Fetches no layer of a container image that `known` has.
    pub fn known_layers(mut self, known: Arc<dyn KnownLayers>) -> Self {
        self.layers = Some(known);
        self
    }

    /// Has what a build runs be of `users`, which are nobody's on the host, and take no more
    /// than `limits`.
    pub fn confined(mut self, users: UserRange, limits: BuildLimits) -> Self {
        self.users = users;
        self.limits = limits;
        self
    }

    /// Where temporary files of builds are.
    fn scratch(&self) -> PathBuf {
        self.cache.join("tmp")
    }

    /// Builds the component that was asked for, and those that are split off it.
    pub fn build(
        &self,
        request: &BuildRequest,
        report: Reporter<'_>,
    ) -> Result<BuiltComponents, ImportError> {
        if let Some(name) = &request.name {
            let checked = NameOf::Component.check(name);
            checked.map_err(|error| ImportError::Request(format!("{error} (--name)")))?;
        }
        let mut imported = self.import(request, report)?;
        apply_overrides(&mut imported.main.draft, request)?;
        let mut others = Vec::new();
        for part in &imported.split_off {
            others.push(match &part.at_hand {
                Some(component) => Beside::AtHand(component.clone()),
                None => Beside::Built(self.write(part, report)?),
            });
        }
        if let Some(container) = &mut imported.main.draft.container {
            keep_last(&mut others);
            let ids = others.iter().map(|layer| layer.component().id());
            container.layers = ids.collect();
        }
        let mut built = BuiltComponents {
            main: self.write(&imported.main, report)?,
            split_off: Vec::new(),
            at_hand: Vec::new(),
        };
        for one in others {
            match one {
                Beside::Built(one) => built.split_off.push(one),
                Beside::AtHand(component) => built.at_hand.push(component),
            }
        }
        Ok(built)
    }

    /// Reads the source into a tree, without writing an image.
    pub fn import(
        &self,
        request: &BuildRequest,
        report: Reporter<'_>,
    ) -> Result<Imported, ImportError> {
        let scratch = self.scratch();
        let name = |default: String| request.name.clone().unwrap_or(default);
        match &request.source {
            BuildSource::Base(options) => {
                let apt = self.apt(&options.suite)?;
                let name = name(options.default_name());
                build_base(options, &name, &apt, &scratch, report)
            }
            BuildSource::Packages { options, base } => {
                let apt = self.apt(base.suite().unwrap_or(DEFAULT_SUITE))?;
                let name = name(options.default_name());
                build_packages(options, &name, base, &apt, &scratch, &self.limits, report)
            }
            BuildSource::Kernel(options) => {
                let apt = self.apt(&options.suite)?;
                let name = name(KERNEL_NAME.to_owned());
                build_kernel(options, &name, &apt, &scratch, report)
            }
            BuildSource::Directory { path, ownership } => {
                report(Progress::Started(BuildPhase::Read));
                let files = read_directory(path, *ownership)?;
                plain_component(path, files, request, Vec::new())
            }
            BuildSource::Tar { path, ownership } => {
                report(Progress::Started(BuildPhase::Read));
                let mut spool = Spool::new(&scratch, DEFAULT_LIMIT_BYTES)?;
                let files = read_files(path, &mut spool, *ownership)?;
                plain_component(path, files, request, vec![spool])
            }
            BuildSource::Image(options) => {
                let known = self.layers.as_deref();
                // What is in a file is at hand, too.
                let known = known.filter(|_| options.source.reference().is_some());
                import_image(options, known, &scratch, report)
            }
            BuildSource::DebFile { path } => {
                import_deb_file(path, request.name.as_deref(), &scratch, report)
            }
        }
    }

    /// Writes the image of a part, whose content is still where its tree says.
    fn write(&self, part: &Part, report: Reporter<'_>) -> Result<BuiltComponent, ImportError> {
        report(Progress::Started(BuildPhase::Write));
        let scratch = self.scratch();
        std::fs::create_dir_all(&scratch).map_err(io_error("creating", &scratch))?;
        let file = tempfile::Builder::new()
            .prefix("image-")
            .tempfile_in(&scratch)
            .map_err(io_error("creating an image in", &scratch))?;
        let (file, image) = file.into_parts();
        let total_bytes = content_bytes(&part.tree);
        check_free(&scratch, total_bytes, Path::new(&part.draft.name))?;
        let mut out = Counted {
            inner: BufWriter::with_capacity(1 << 20, file),
            done_bytes: 0,
            reported_bytes: 0,
            total_bytes,
            report,
        };
        let written = write_image(&part.tree, &mut out).map_err(write_error)?;
        out.flush().map_err(io_error("writing", &image))?;
        Ok(BuiltComponent {
            component: part.draft.clone().with_image(written.image),
            image,
            chunks: written.chunks,
        })
    }

    /// Unpacks the base `component`, whose image is `image`, unless it is unpacked already.
    pub fn base_root(
        &self,
        component: &Component,
        image: &dyn forelay_image::erofs::read::ReadAt,
    ) -> Result<BaseRoot, ImportError> {
        BaseRoot::open(&self.cache, component, image, self.users)
    }

    fn apt(&self, suite: &str) -> Result<AptCache, ImportError> {
        let apt = AptCache::open(&self.cache, suite, self.refresh_after)?;
        Ok(apt.with_mirror(self.mirror.clone()))
    }
}

/// A component that goes with another.
enum Beside {
    Built(BuiltComponent),
    AtHand(Component),
}

impl Beside {
    fn component(&self) -> &Component {
        match self {
            Self::Built(one) => &one.component,
            Self::AtHand(component) => component,
        }
    }
}

/// Of layers with the same files, the last place counts.
fn keep_last(layers: &mut Vec<Beside>) {
    let mut seen = HashSet::new();
    layers.reverse();
    layers.retain(|layer| seen.insert(layer.component().image.digest));
    layers.reverse();
}

/// A component of plain files. What is laid over a base has its files where the base's links
/// would lead; a base is as it is, and says what it has.
fn plain_component(
    path: &Path,
    files: Files,
    request: &BuildRequest,
    spools: Vec<Spool>,
) -> Result<Imported, ImportError> {
    let Files { mut tree, notes } = files;
    let mut draft = plain_files(&name_from_path(path), "0", Role::Package);
    draft.notes.extend(notes);
    if request.role == Some(Role::Base) {
        draft.name = request.name.clone().unwrap_or(draft.name);
        draft.version = release_version(&tree)?.unwrap_or(draft.version);
        describe_base(&tree, &mut draft)?;
        put_fragments(&mut tree, &draft.name, path)?;
        draft.notes.extend(open_root(&mut tree));
    } else {
        let moved = merge_usr(&mut tree, path)?;
        let moved = moved
            .iter()
            .map(|name| format!("/{name} is placed in /usr/{name}"));
        draft.notes.extend(moved);
    }
    Ok(Imported::alone(tree, draft, spools))
}

/// The root directory of an archive is often one that `mktemp` made, for its owner alone:
/// nobody but root could use such a VM.
fn open_root(tree: &mut Tree) -> Option<String> {
    let attributes = &mut tree.node_mut(ROOT).attributes;
    let (mode, owner) = (attributes.mode, (attributes.uid, attributes.gid));
    if mode & 0o555 == 0o555 && owner == (0, 0) {
        return None;
    }
    attributes.mode = 0o755;
    (attributes.uid, attributes.gid) = (0, 0);
    let (uid, gid) = owner;
    Some(format!(
        "/ had mode {mode:04o} and owner {uid}:{gid}; it has 0755 and 0:0 now"
    ))
}

fn import_deb_file(
    path: &Path,
    name: Option<&str>,
    scratch: &Path,
    report: Reporter<'_>,
) -> Result<Imported, ImportError> {
    report(Progress::Started(BuildPhase::Read));
    let mut spool = Spool::new(scratch, DEFAULT_LIMIT_BYTES)?;
    let mut deb = read_deb(path, &mut spool)?;
    merge_usr(&mut deb.tree, path)?;
    let control = &deb.control;
    let status = format!(
        "{}\nStatus: install ok installed\n",
        control.text().trim_end()
    );
    let name = name.unwrap_or(control.field("Package"));
    let checked = NameOf::Component.check(name);
    checked.map_err(|error| ImportError::Request(format!("{error} (--name)")))?;
    let status_path = status_path(name);
    deb.tree
        .put_file(&status_path, status.into_bytes(), made(0o644))
        .map_err(tree_error(path))?;
    let relations = |field: &str| parse_relations(control.field(field));
    let mut draft = Draft::new(
        control.field("Package"),
        control.field("Version"),
        Role::Package,
        control.field("Architecture"),
        (),
    );
    draft.description = control.summary().to_owned();
    draft.provides = parse_provides(control.field("Provides"));
    draft.requires = relations("Pre-Depends");
    draft.requires.extend(relations("Depends"));
    draft.conflicts = relations("Conflicts").into_iter().flatten().collect();
    draft
        .conflicts
        .extend(relations("Breaks").into_iter().flatten());
    draft.sbom = vec![sbom_package(control)];
    if !deb.scripts.is_empty() {
        let scripts = deb.scripts.join(", ");
        draft
            .notes
            .push(format!("maintainer scripts were not run: {scripts}"));
    }
    Ok(Imported::alone(deb.tree, draft, vec![spool]))
}

fn apply_overrides(draft: &mut Draft, request: &BuildRequest) -> Result<(), ImportError> {
    if let Some(name) = &request.name {
        draft.name = name.clone();
    }
    if let Some(role) = request.role {
        draft.role = role;
    }
    if let Some(version) = &request.version {
        let before = std::mem::replace(&mut draft.version, version.clone());
        let (sbom, is_base) = (&draft.sbom, draft.role == Role::Base);
        // The other names of a base (its release) have its version.
        for offered in draft.provides.iter_mut().filter(|_| is_base) {
            let is_package = sbom.iter().any(|package| package.name == offered.name);
            if offered.version.as_ref() == Some(&before) && !is_package {
                offered.version = Some(version.clone());
            }
        }
    }
    if let Some(description) = &request.description {
        draft.description = description.clone();
    }
    if let Some(entrypoint) = &request.entrypoint {
        draft.entrypoint = entrypoint.clone();
    }
    let checked = draft.check_names();
    checked.map_err(|error| ImportError::Request(format!("{error} (--name, --component-version)")))
}

fn content_bytes(tree: &Tree) -> u64 {
    let nodes = tree.reachable().into_iter();
    let sizes = nodes.map(|id| match &tree.node(id).kind {
        Kind::File(data) => data.len(),
        _ => 0,
    });
    sizes.sum()
}

fn write_error(error: WriteError) -> ImportError {
    match error {
        WriteError::Write(error) if error.kind() == io::ErrorKind::StorageFull => {
            ImportError::DiskFull {
                doing: "writing the component image".to_owned(),
            }
        }
        other => ImportError::Image(Box::new(other)),
    }
}

/// Reports bytes on their way into the image.
struct Counted<'a> {
    inner: BufWriter<File>,
    done_bytes: u64,
    reported_bytes: u64,
    total_bytes: u64,
    report: Reporter<'a>,
}

/// Bytes between two reports.
const REPORT_EVERY_BYTES: u64 = 4 << 20;

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.done_bytes += count as u64;
        if self.done_bytes - self.reported_bytes >= REPORT_EVERY_BYTES {
            self.reported_bytes = self.done_bytes;
            (self.report)(Progress::Bytes {
                phase: BuildPhase::Write,
                done_bytes: self.done_bytes,
                total_bytes: Some(self.total_bytes.max(self.done_bytes)),
            });
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Seek for Counted<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}
