//! Images in archives and directories: what `docker save`, `skopeo copy`, `buildah push` and
//! their like write.
//!
//! ```text
//! manifest.json   Docker's list: configuration, layers, names (old archives have no other)
//! index.json      the OCI's: descriptors of blobs/sha256/...
//! ```
//! Docker's list is taken if there are both, since it names the images in full.

use std::path::{Path, PathBuf};

use forelay_image::Digest;
use forelay_image::tree::{FileData, Kind, Tree, split_path};
use oci_spec::distribution::Reference;
use serde::Deserialize;

use super::document::{MAX_DOCUMENT_BYTES, MAX_LAYERS, Refused, listed};
use super::source::ImageTitle;
use super::{Blob, Blobs, Root};
use crate::dir::{Ownership, read_directory};
use crate::error::{ImportError, archive_error, io_error};
use crate::progress::Reporter;
use crate::spool::Spool;
use crate::tar::read_tar;

/// Most links from one file of an archive to another.
const MAX_LINKS: usize = 8;

const NO_IMAGES: &str = "no container images: it has neither manifest.json nor index.json; build a \
                         tree of files with `--tar` or `--dir`";

/// An archive or a directory with images.
pub(super) struct Layout {
    files: Tree,
    path: PathBuf,
    tag: Option<String>,
}

/// An image in Docker's list.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl Layout {
    /// Lists what is in it; a compressed archive is unpacked into `spool`.
    pub fn open(path: &Path, tag: Option<&str>, spool: &mut Spool) -> Result<Self, ImportError> {
        let lists = ["index.json", "manifest.json"];
        if path.is_dir() && !lists.iter().any(|list| path.join(list).is_file()) {
            return Err(archive_error(path, NO_IMAGES));
        }
        let files = match path.is_dir() {
            true => read_directory(path, Ownership::Keep)?,
            false => read_tar(path, spool, Ownership::Keep)?,
        };
        Ok(Self {
            files: files.tree,
            path: path.to_owned(),
            tag: tag.map(str::to_owned),
        })
    }

    fn refused(&self, problem: impl Into<String>) -> ImportError {
        archive_error(&self.path, problem)
    }

    /// A file of it. Old archives have links from one layer to another.
    fn file(&self, name: &str) -> Result<&FileData, ImportError> {
        let mut path = name.as_bytes().to_vec();
        for _ in 0..MAX_LINKS {
            let missing = || self.refused(format!("{name:?} is not in it"));
            let id = self.files.lookup(&path).ok_or_else(missing)?;
            match &self.files.node(id).kind {
                Kind::File(data) => return Ok(data),
                Kind::Symlink(target) => path = beside(&path, target),
                _ => return Err(missing()),
            }
        }
        Err(self.refused(format!("{name:?} is a link through too many links")))
    }

    fn document(&self, name: &str) -> Result<Vec<u8>, ImportError> {
        let data = self.file(name)?;
        if data.len() > MAX_DOCUMENT_BYTES {
            return Err(self.refused(format!("{name:?} is too large to be read")));
        }
        data.read().map_err(io_error("reading", &self.path))
    }

    fn listed(&self) -> Result<Root, ImportError> {
        let bytes = self.document("manifest.json")?;
        let all: Vec<Listed> = serde_json::from_slice(&bytes)
            .map_err(|error| self.refused(format!("its manifest.json cannot be read: {error}")))?;
        let one = self.choose(&all).map_err(|problem| self.refused(problem))?;
        let layers = one.layers.as_deref().unwrap_or_default();
        if layers.len() > MAX_LAYERS {
            let count = layers.len();
            return Err(self.refused(format!("{count} layers; at most {MAX_LAYERS} are taken")));
        }
        let tags = one.repo_tags.as_deref().unwrap_or_default();
        let called = self.tag.as_deref().or(tags.first().map(String::as_str));
        Ok(Root::Manifest {
            title: ImageTitle::in_files(&self.path, called),
            config: Blob::at(&one.config),
            layers: layers.iter().map(|name| Blob::at(name)).collect(),
        })
    }

    fn choose<'a>(&self, all: &'a [Listed]) -> Result<&'a Listed, Refused> {
        let tags = |one: &'a Listed| one.repo_tags.iter().flatten();
        let names = || listed(all.iter().flat_map(tags));
        let Some(tag) = &self.tag else {
            return match all {
                [one] => Ok(one),
                [] => Err("no image in it".to_owned()),
                _ => Err(format!(
                    "several images in it: name one after a colon; it has {}",
                    names()
                )),
            };
        };
        // `nginx` is `docker.io/library/nginx:latest`.
        let full = |name: &str| name.parse::<Reference>().map(|one| one.whole()).ok();
        let is_meant =
            |name: &String| name == tag || full(name).is_some() && full(name) == full(tag);
        let mut found = all.iter().filter(|one| tags(one).any(is_meant));
        let none = || format!("no image {tag:?} in it; it has {}", names());
        found.next().ok_or_else(none)
    }
}

impl Blobs for Layout {
    fn root(&mut self) -> Result<Root, ImportError> {
        if self.files.file(b"manifest.json").is_some() {
            return self.listed();
        }
        if self.files.file(b"index.json").is_none() {
            return Err(self.refused(NO_IMAGES));
        }
        Ok(Root::Document {
            title: ImageTitle::in_files(&self.path, self.tag.as_deref()),
            bytes: self.document("index.json")?,
            name: self.tag.clone(),
        })
    }

    fn manifest(&mut self, blob: &Blob) -> Result<Vec<u8>, ImportError> {
        self.document(&blob.path())
    }

    fn blob(
        &mut self,
        blob: &Blob,
        _: &mut Spool,
        _: Reporter<'_>,
    ) -> Result<FileData, ImportError> {
        self.file(&blob.path()).cloned()
    }
}

/// Where a link at `path` leads, within the archive.
fn beside(path: &[u8], target: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = split_path(path).collect();
    parts.pop();
    for part in split_path(target) {
        match part {
            b".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts.join(&b'/')
}

/// The digest that a configuration's name in an archive is, if it is one.
pub(super) fn digest_in_name(name: &str) -> Option<Digest> {
    let name = name.rsplit('/').next().unwrap_or(name);
    name.strip_suffix(".json").unwrap_or(name).parse().ok()
}
