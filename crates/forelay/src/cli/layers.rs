//! Layers of container images that the repository has, for imports that need not fetch them.
//!
//! Refuses to know images: a layer is a component by its name.

use std::fmt;
use std::sync::Arc;

use anyhow::{Result, bail};
use bytes::Bytes;
use forelay_image::component::{Component, Role};
use forelay_image::erofs::read::{ReadAt, SharedSource, tree_over};
use forelay_image::tree::Tree;
use forelay_import::KnownLayers;
use forelay_store::Store;

use crate::recipe::Reader;

/// The layers of a repository. Not for async threads.
pub struct RepositoryLayers {
    store: Store,
    layers: Vec<Arc<Component>>,
    runtime: tokio::runtime::Handle,
}

impl RepositoryLayers {
    /// Those that the repository has now.
    pub async fn list(store: &Store) -> Result<Self> {
        let mut layers = store.components().await?;
        layers.retain(|one| one.role == Role::Layer);
        Ok(Self {
            store: store.clone(),
            layers,
            runtime: tokio::runtime::Handle::current(),
        })
    }

    async fn source(&self, layer: &Component) -> Result<LayerBytes> {
        let map = self.store.component_image(layer.id()).await?;
        Ok(LayerBytes {
            metadata: self.store.image_metadata(&map).await?,
            rest: Reader(self.store.image_reader(map)),
        })
    }

    fn tree(&self, layer: &Component) -> Result<Tree> {
        let source = self.runtime.block_on(self.source(layer))?;
        let source: SharedSource = Arc::new(source);
        Ok(tree_over(&source)?)
    }
}

impl fmt::Debug for RepositoryLayers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} layers of a repository", self.layers.len())
    }
}

impl KnownLayers for RepositoryLayers {
    fn find(&self, name: &str, version: &str) -> Option<(Component, Tree)> {
        let is_meant = |one: &&Arc<Component>| one.name == name && one.version == version;
        let layer = self.layers.iter().find(is_meant)?;
        match self.tree(layer) {
            Ok(tree) => Some((Component::clone(layer), tree)),
            Err(error) => {
                // It can be had from where the image is.
                tracing::warn!(layer = name, error = %format!("{error:#}"), "fetched again");
                None
            }
        }
    }
}

/// Refuses an image of which the repository lost layers that it had when the image was read.
pub async fn check_present(store: &Store, layers: &[Component]) -> Result<()> {
    if layers.is_empty() {
        return Ok(());
    }
    let present = store.components().await?;
    let is_there = |layer: &Component| present.iter().any(|one| one.id() == layer.id());
    match layers.iter().find(|layer| !is_there(layer)) {
        Some(gone) => bail!("{} was removed meanwhile: do it again", gone.name),
        None => Ok(()),
    }
}

/// A layer's image: its metadata at hand, the rest where it is.
struct LayerBytes {
    metadata: Bytes,
    rest: Reader,
}

impl ReadAt for LayerBytes {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        match offset < self.metadata.len() as u64 {
            true => self.metadata[..].read_at(buffer, offset),
            false => self.rest.read_at(buffer, offset),
        }
    }

    fn size(&self) -> std::io::Result<u64> {
        self.rest.size()
    }
}
