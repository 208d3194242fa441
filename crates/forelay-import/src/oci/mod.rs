//! Container images: each layer a component, and one that names them in their order and
//! says how the image runs.
//!
//! ```text
//! source.rs    what the user names            document.rs  indexes, manifests, configurations
//! layout.rs    archives and directories       registry.rs  registries
//! stack.rs     what layers say of each other  known.rs     layers that need not come again
//! ```
//! A layer is the same component in whatever image it is: its name is the digest of its
//! uncompressed archive, and it knows nothing of others.
//!
//! Invariants: what is not of the digest that the image gives it is refused before a
//! component is made of it; layers that leave nothing are left out, the order of the others
//! is kept.

mod document;
mod known;
mod layout;
mod registry;
mod source;
mod stack;

use std::collections::{HashMap, HashSet};
use std::io::{self, Cursor, Read};
use std::path::{Path, PathBuf};

use forelay_image::component::{Component, ContainerImage, Role};
use forelay_image::digest::Hasher;
use forelay_image::tree::{Attributes, FileData, ROOT, Tree};
use forelay_image::{Digest, NameOf};

use crate::draft::{Draft, Imported, Part};
use crate::error::{ImportError, archive_error, io_error, tree_error};
use crate::progress::{BuildPhase, Progress, Reporter};
use crate::rootfs::{TELLING, TELLING_FOLDER, describe_image};
use crate::spool::{Compression, DEFAULT_LIMIT_BYTES, Spool, check_free, read_up_to};
use crate::tar::{ImageLayer, TarRoom, read_layer};
use document::{
    Descriptor, ImageSettings, MAX_DOCUMENT_BYTES, Parsed, choose, parse, parse_config,
};
use source::ImageTitle;
use stack::{LaidLayer, Stack};

pub use known::KnownLayers;
pub use source::ImageSource;

/// Most indexes on the way to an image.
const MAX_INDEXES: usize = 4;

/// Which image, and how to get at it.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// Where it is.
    pub source: ImageSource,
    /// Its registry speaks HTTP without TLS, as those on this host do.
    pub plain_http: bool,
    /// Certificates (PEM) of authorities that its registry may be signed by, beside the host's.
    pub ca: Option<PathBuf>,
}

/// What an image is made of and what it is called.
enum Root {
    /// Known already.
    Manifest {
        title: ImageTitle,
        config: Blob,
        layers: Vec<Blob>,
    },
    /// To be read from this index or manifest.
    Document {
        title: ImageTitle,
        bytes: Vec<u8>,
        /// Which image of the index.
        name: Option<String>,
    },
}

/// A part of an image.
#[derive(Clone, Debug)]
struct Blob {
    /// Its digest, if the image tells.
    digest: Option<Digest>,
    bytes: Option<u64>,
    /// Its place in an archive without digests.
    path: Option<String>,
}

impl Blob {
    /// A file of an archive.
    fn at(path: &str) -> Self {
        Self {
            digest: None,
            bytes: None,
            path: Some(path.to_owned()),
        }
    }

    /// Its place in an archive.
    fn path(&self) -> String {
        match (&self.path, self.digest) {
            (Some(path), _) => path.clone(),
            (None, digest) => format!(
                "blobs/sha256/{}",
                digest.map_or_else(String::new, |digest| digest.hex())
            ),
        }
    }
}

impl From<&Descriptor> for Blob {
    fn from(descriptor: &Descriptor) -> Self {
        Self {
            digest: Some(descriptor.digest),
            bytes: Some(descriptor.size),
            path: None,
        }
    }
}

/// Where the parts of an image are. Nothing that comes from there is checked yet.
trait Blobs {
    /// What the image is made of, as far as its place tells.
    fn root(&mut self) -> Result<Root, ImportError>;
    /// A manifest or an index.
    fn manifest(&mut self, blob: &Blob) -> Result<Vec<u8>, ImportError>;
    /// A configuration or a layer, as a file.
    fn blob(
        &mut self,
        blob: &Blob,
        spool: &mut Spool,
        report: Reporter<'_>,
    ) -> Result<FileData, ImportError>;
}

/// Reads an image into components.
///
/// Layers that are `known` are not read.
pub(crate) fn import_image(
    options: &ImageOptions,
    known: Option<&dyn KnownLayers>,
    scratch: &Path,
    report: Reporter<'_>,
) -> Result<Imported, ImportError> {
    report(Progress::Started(BuildPhase::Read));
    let mut spool = Spool::new(scratch, DEFAULT_LIMIT_BYTES)?;
    let blobs: Box<dyn Blobs> = match &options.source {
        ImageSource::Registry(reference) => Box::new(registry::Registry::new(reference, options)?),
        ImageSource::Files { path, tag } => {
            Box::new(layout::Layout::open(path, tag.as_deref(), &mut spool)?)
        }
    };
    let mut reader = ContainerReader {
        shown: options.source.shown(),
        source: &options.source,
        blobs,
        known,
        spool,
        report,
    };
    let (title, settings, layers) = reader.image()?;
    let (layers, notes, told) = reader.layers(&settings.diff_ids, &layers)?;
    let mut main = image_part(title, settings, notes)?;
    describe_image(&told, &mut main.draft)?;
    Ok(Imported {
        main,
        split_off: layers,
        spools: vec![reader.spool],
    })
}

/// Archives of layers that were unpacked.
#[derive(Default)]
struct Unpacked {
    paths: HashMap<Digest, PathBuf>,
    /// What all of them may hold.
    room: TarRoom,
}

/// Reads one image.
struct ContainerReader<'a> {
    shown: PathBuf,
    source: &'a ImageSource,
    blobs: Box<dyn Blobs>,
    known: Option<&'a dyn KnownLayers>,
    spool: Spool,
    report: Reporter<'a>,
}

impl ContainerReader<'_> {
    fn refused(&self, problem: impl Into<String>) -> ImportError {
        archive_error(&self.shown, problem)
    }

    /// Name, configuration and layers.
    fn image(&mut self) -> Result<(ImageTitle, ImageSettings, Vec<Blob>), ImportError> {
        let (title, config, layers) = match self.blobs.root()? {
            Root::Manifest {
                title,
                config,
                layers,
            } => (title, config, layers),
            Root::Document { title, bytes, name } => self.manifest(title, bytes, name)?,
        };
        let too_large = "its configuration is too large to be read";
        if config.bytes.is_some_and(|bytes| bytes > MAX_DOCUMENT_BYTES) {
            return Err(self.refused(too_large));
        }
        let data = self.blobs.blob(&config, &mut self.spool, self.report)?;
        if data.len() > MAX_DOCUMENT_BYTES {
            return Err(self.refused(too_large));
        }
        let bytes = data.read().map_err(io_error("reading", &self.shown))?;
        // Archives of Docker's name a configuration by its digest.
        let named = config.path.as_deref().and_then(layout::digest_in_name);
        self.check(&bytes, config.digest.or(named), "configuration")?;
        let settings = parse_config(&bytes, layers.len());
        let settings = settings.map_err(|problem| self.refused(problem))?;
        Ok((title, settings, layers))
    }

    /// From an index, or a manifest, to the parts of one image.
    fn manifest(
        &mut self,
        mut title: ImageTitle,
        mut bytes: Vec<u8>,
        mut name: Option<String>,
    ) -> Result<(ImageTitle, Blob, Vec<Blob>), ImportError> {
        for _ in 0..=MAX_INDEXES {
            let parsed = parse(&bytes).map_err(|problem| self.refused(problem))?;
            let index = match parsed {
                Parsed::Manifest { config, layers } => {
                    let layers = layers.iter().map(Blob::from).collect();
                    return Ok((title, Blob::from(&config), layers));
                }
                Parsed::Index(index) => index,
            };
            let chosen = choose(&index, name.take().as_deref());
            let chosen = chosen.map_err(|problem| self.refused(problem))?;
            if let (Some(called), ImageSource::Files { path, .. }) = (chosen.called(), self.source)
            {
                title = ImageTitle::in_files(path, Some(called));
            }
            bytes = self.blobs.manifest(&Blob::from(chosen))?;
            self.check(&bytes, Some(chosen.digest), "manifest")?;
        }
        Err(self.refused(format!("more than {MAX_INDEXES} indexes in each other")))
    }

    fn check(&self, bytes: &[u8], expected: Option<Digest>, what: &str) -> Result<(), ImportError> {
        match expected.filter(|digest| *digest != Digest::of(bytes)) {
            None => Ok(()),
            Some(expected) => Err(self.refused(format!("its {what} is not of digest {expected}"))),
        }
    }

    /// The layers as components, the lowest first, what there is to say of them, and those
    /// files of theirs that tell what the image is.
    fn layers(
        &mut self,
        diff_ids: &[Digest],
        blobs: &[Blob],
    ) -> Result<(Vec<Part>, Vec<String>, Tree), ImportError> {
        let known = self.known_layers(diff_ids);
        let wanted = blobs
            .iter()
            .zip(&known)
            .filter(|(_, known)| known.is_none());
        self.check_room(wanted.map(|(blob, _)| blob))?;
        let mut stack = Stack::default();
        let mut drafts = Vec::new();
        let mut notes = Vec::new();
        let (mut unpacked, mut chain) = (Unpacked::default(), None);
        for (number, known) in known.into_iter().enumerate() {
            let (blob, diff_id) = (&blobs[number], diff_ids[number]);
            chain = Some(chain_id(chain, diff_id));
            (self.report)(Progress::Permille {
                phase: BuildPhase::Read,
                permille: (number * 1000 / blobs.len()) as u32,
                detail: format!("layer {} of {}", number + 1, blobs.len()),
            });
            let (component, mut layer) = match known {
                Some((component, layer)) => (Some(component), layer),
                None => (None, self.layer(number + 1, blob, diff_id, &mut unpacked)?),
            };
            let said = std::mem::take(&mut layer.notes);
            let said_of_it = said.iter();
            notes.extend(said_of_it.map(|note| format!("layer {}: {note}", number + 1)));
            let laid = stack.push(layer);
            let laid =
                laid.map_err(|problem| archive_error(self.layer_path(number + 1), problem))?;
            drafts.push(match component.filter(|_| laid == LaidLayer::AsItIs) {
                Some(component) => known::draft_of(component),
                None => (layer_draft(diff_id, chain, laid, said), None),
            });
        }
        let told = stack
            .excerpt(TELLING, TELLING_FOLDER)
            .map_err(tree_error(&self.shown))?;
        let parts = stack.trees.into_iter().zip(drafts);
        let parts = parts.filter(|(tree, _)| !leaves_nothing(tree));
        let parts = parts.map(|(tree, (draft, at_hand))| Part {
            tree,
            draft,
            at_hand,
        });
        Ok((without_repeated(parts.collect()), notes, told))
    }

    /// A layer as its archive has it.
    fn layer(
        &mut self,
        number: usize,
        blob: &Blob,
        diff_id: Digest,
        unpacked: &mut Unpacked,
    ) -> Result<ImageLayer, ImportError> {
        // One that comes again is laid again: what lies between may have changed it.
        let path = match unpacked.paths.get(&diff_id) {
            Some(path) => path.clone(),
            None => self.unpack(number, blob, diff_id)?,
        };
        let shown = self.layer_path(number);
        let layer = read_layer(&path, &shown, &mut self.spool, &mut unpacked.room)?;
        unpacked.paths.insert(diff_id, path);
        Ok(layer)
    }

    /// How errors name a layer.
    fn layer_path(&self, number: usize) -> PathBuf {
        self.shown.join(format!("layer {number}"))
    }

    /// The components that some of the layers are already.
    fn known_layers(&self, diff_ids: &[Digest]) -> Vec<Option<(Component, ImageLayer)>> {
        let mut chain = None;
        let found = diff_ids.iter().map(|diff_id| {
            let chained = chain_id(chain, *diff_id);
            chain = Some(chained);
            known::find(self.known?, *diff_id, chained)
        });
        found.collect()
    }

    /// Refuses an image for whose layers there is no room, before any is fetched. Each is here
    /// twice for a while, as it comes and unpacked, which takes more; what that is, nobody says.
    fn check_room<'b>(&self, blobs: impl Iterator<Item = &'b Blob>) -> Result<(), ImportError> {
        let sizes = blobs.filter_map(|blob| blob.bytes);
        let bytes = sizes.fold(0_u64, u64::saturating_add);
        if bytes > DEFAULT_LIMIT_BYTES {
            return Err(ImportError::TooLarge {
                path: self.shown.clone(),
                limit: DEFAULT_LIMIT_BYTES,
                unit: "bytes of layers",
            });
        }
        check_free(self.spool.path(), bytes.saturating_mul(2), &self.shown)
    }

    /// Decompresses a layer into the spool; returns the file.
    fn unpack(
        &mut self,
        number: usize,
        blob: &Blob,
        diff_id: Digest,
    ) -> Result<PathBuf, ImportError> {
        let data = self.blobs.blob(blob, &mut self.spool, self.report)?;
        let reading = || io_error("reading", &self.shown);
        let file = data.reader().map_err(reading())?;
        let mut raw = Hashed::new(file);
        let mut first = [0; 8];
        let count = read_up_to(&mut raw, &mut first).map_err(reading())?;
        let compression = Compression::detect(&first[..count]);
        let all = Cursor::new(first[..count].to_vec()).chain(&mut raw);
        let mut plain = Hashed::new(compression.reader(all).map_err(reading())?);
        let (stored, _) = self.spool.store(&mut plain, &self.shown)?;
        let (_, unpacked) = plain.finish();
        // What follows the compressed data counts to the blob's digest.
        io::copy(&mut raw, &mut io::sink()).map_err(reading())?;
        let (read, found) = raw.finish();
        let wrong = |what: &str| self.refused(format!("layer {number} {what}"));
        if blob.bytes.is_some_and(|bytes| bytes != read) {
            return Err(wrong("is not as long as the manifest says"));
        }
        if let Some(digest) = blob.digest.filter(|digest| *digest != found) {
            return Err(wrong(&format!("is not of digest {digest}")));
        }
        if unpacked != diff_id {
            return Err(wrong(&format!("does not unpack to {diff_id}")));
        }
        Ok(stored)
    }
}

/// A reader that hashes what it reads.
struct Hashed<R> {
    inner: R,
    hasher: Hasher,
    bytes: u64,
}

impl<R> Hashed<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            hasher: Hasher::new(),
            bytes: 0,
        }
    }

    /// Bytes that were read, and their digest.
    fn finish(self) -> (u64, Digest) {
        (self.bytes, self.hasher.finish())
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(out)?;
        self.hasher.update(&out[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

/// Digest of a layer with all below it (OCI image specification, "Layer ChainID").
fn chain_id(below: Option<Digest>, diff_id: Digest) -> Digest {
    match below {
        None => diff_id,
        Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
    }
}

/// Name and version of a layer; one that is what it is on others alone is called by the digest
/// of all of them, since a VM may have it in two places.
fn called(diff_id: Digest, on: Option<Digest>) -> (String, String) {
    let version = on.map_or_else(|| "1".to_owned(), |chain| format!("1+{}", chain.short()));
    (format!("layer-{}", on.unwrap_or(diff_id).hex()), version)
}

/// Metadata of a layer, laid over those that `chain` is the digest of with it.
fn layer_draft(
    diff_id: Digest,
    chain: Option<Digest>,
    laid: LaidLayer,
    notes: Vec<String>,
) -> Draft {
    let (name, version) = match laid {
        LaidLayer::AsItIs => called(diff_id, None),
        LaidLayer::Settled => called(diff_id, chain),
        // Its tree does not say that it hides all others: it is not to be found as known.
        LaidLayer::Alone => {
            let (name, version) = called(diff_id, chain);
            (name, format!("{version}.alone"))
        }
    };
    let mut draft = Draft::new(&name, &version, Role::Layer, "all", ());
    draft.description = "layer of container images".to_owned();
    draft.notes = notes;
    draft
}

/// Without layers that come again higher up as they are: all that one has is above all that
/// lies between then.
fn without_repeated(mut parts: Vec<Part>) -> Vec<Part> {
    let mut seen = HashSet::new();
    parts.reverse();
    parts.retain(|part| seen.insert((part.draft.name.clone(), part.draft.version.clone())));
    parts.reverse();
    parts
}

/// True for a layer without which the image is the same.
fn leaves_nothing(tree: &Tree) -> bool {
    tree.entries(ROOT).is_some_and(|entries| entries.is_empty())
        && tree.node(ROOT).attributes == Attributes::with_mode(0o755)
}

/// The component that names the layers, without any file.
fn image_part(
    title: ImageTitle,
    settings: ImageSettings,
    notes: Vec<String>,
) -> Result<Part, ImportError> {
    let ImageSettings {
        architecture,
        entrypoint,
        container,
        ..
    } = settings;
    let ImageTitle {
        name,
        version,
        reference,
    } = title;
    NameOf::Component
        .check(&name)
        .map_err(|error| ImportError::Request(format!("{error}: give a --name")))?;
    let mut draft = Draft::new(&name, &version, Role::Base, &architecture, ());
    draft.description = format!("container image {reference}");
    draft.entrypoint = entrypoint;
    draft.notes = notes;
    draft.container = Some(ContainerImage {
        reference,
        ..container
    });
    Ok(Part::new(Tree::new(), draft))
}

#[cfg(test)]
mod tests;
