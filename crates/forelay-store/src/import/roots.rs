//! Unpacked base images on the host, one directory each, to install packages on.
//!
//! Invariant: a directory named by an image digest is complete (it is renamed into place
//! last) and never changes: sandboxes use it as a read-only lower layer.

use std::fs;
use std::path::{Path, PathBuf};

use forelay_image::component::Component;
use forelay_image::erofs::read::{Image, ReadAt};

use super::error::{ImportError, io_error};
use super::spool::{DEFAULT_LIMIT_BYTES, Spool};
use super::tool::require_root;
use super::unpack::write_directory;

/// Most content bytes of a base that are unpacked (they are held in memory meanwhile).
const BASE_LIMIT_BYTES: u64 = 8 << 30;

/// A base component, unpacked.
#[derive(Clone, Debug)]
pub struct BaseRoot {
    /// Its metadata.
    pub component: Component,
    /// Its files.
    pub directory: PathBuf,
}

impl BaseRoot {
    /// Where the base `component` is unpacked below `cache`, unpacked from `image` if it
    /// is not there yet. Needs root.
    pub fn open(
        cache: &Path,
        component: &Component,
        image: &dyn ReadAt,
    ) -> Result<Self, ImportError> {
        let base = Self {
            component: component.clone(),
            directory: cache.join("roots").join(component.image.digest.hex()),
        };
        if base.directory.is_dir() {
            return Ok(base);
        }
        require_root("unpacking a base")?;
        let read = |error| ImportError::Image(Box::new(error));
        let tree = Image::open(image).map_err(read)?;
        let tree = tree.to_tree(BASE_LIMIT_BYTES).map_err(read)?;
        let spool = Spool::new(&cache.join("roots"), DEFAULT_LIMIT_BYTES)?;
        let partial = spool.path().join("root");
        fs::create_dir(&partial).map_err(io_error("creating", &partial))?;
        write_directory(&tree, &partial)?;
        match fs::rename(&partial, &base.directory) {
            // Another build was quicker.
            Err(_) if base.directory.is_dir() => {}
            other => other.map_err(io_error("creating", &base.directory))?,
        }
        Ok(base)
    }
}
