//! Unpacked base images on the host, one directory each, to install packages on.
//!
//! Invariant: a directory named by a component's id is complete (it is renamed into place
//! last) and never changes: sandboxes use it as a read-only lower layer.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use forelay_image::component::{Component, NameRange};
use forelay_image::erofs::read::{Image, ReadAt};

use crate::error::{ImportError, io_error};
use crate::spool::{DEFAULT_LIMIT_BYTES, Spool};
use crate::tool::require_root;
use crate::unpack::write_directory;
use crate::users::UserRange;

/// Most content bytes of a base that are unpacked (they are held in memory meanwhile).
const BASE_LIMIT_BYTES: u64 = 8 << 30;

/// A base component, unpacked.
#[derive(Clone, Debug)]
pub struct BaseRoot {
    /// Its metadata.
    pub component: Component,
    /// Its files, their owners shifted into `users`.
    pub directory: PathBuf,
    /// Who builds on it are.
    pub users: UserRange,
}

impl BaseRoot {
    /// Where the base `component` is unpacked below `cache`, unpacked from `image` if it
    /// is not there yet. Needs root.
    pub fn open(
        cache: &Path,
        component: &Component,
        image: &dyn ReadAt,
        users: UserRange,
    ) -> Result<Self, ImportError> {
        let name = format!("{}-{}", component.id().hex(), users.first());
        let base = Self {
            component: component.clone(),
            directory: cache.join("roots").join(name),
            users,
        };
        if base.directory.is_dir() {
            return Ok(base);
        }
        require_root("unpacking a base")?;
        let read = |error| ImportError::Image(Box::new(error));
        let tree = Image::open(image).map_err(read)?;
        let tree = tree.to_tree(BASE_LIMIT_BYTES).map_err(read)?;
        let roots = cache.join("roots");
        let spool = Spool::new(&roots, DEFAULT_LIMIT_BYTES)?;
        // What is set-uid in a base is nothing for the host's users.
        fs::set_permissions(&roots, fs::Permissions::from_mode(0o700))
            .map_err(io_error("closing", &roots))?;
        let partial = spool.path().join("root");
        fs::create_dir(&partial).map_err(io_error("creating", &partial))?;
        write_directory(&tree, &partial, users)?;
        match fs::rename(&partial, &base.directory) {
            // Another build was quicker.
            Err(_) if base.directory.is_dir() => {}
            other => other.map_err(io_error("creating", &base.directory))?,
        }
        Ok(base)
    }

    /// The Debian release that the base says it is: `bookworm` if it provides
    /// `debian-bookworm` at its own version.
    pub fn suite(&self) -> Option<&str> {
        let own = Some(&self.component.version);
        let mut provided = self.component.provides.iter();
        provided.find_map(|capability| {
            let suite = capability.name.strip_prefix("debian-")?;
            (capability.version.as_ref() == own).then_some(suite)
        })
    }

    /// What a component that was built on this base requires of another: the same
    /// release, since what the scripts did holds there as well. A base that names no
    /// release is required as it is.
    pub(crate) fn requirement(&self) -> NameRange {
        match self.suite() {
            Some(suite) => NameRange {
                name: format!("debian-{suite}"),
                range: String::new(),
            },
            None => NameRange {
                name: self.component.name.clone(),
                range: format!("= {}", self.component.version),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::Digest;
    use forelay_image::component::{ImageRef, Role};

    use super::*;

    #[test]
    fn a_base_that_claims_anothers_image_is_unpacked_apart() {
        let cache = tempfile::tempdir().unwrap();
        let base = |chunk_index: &[u8]| {
            let image = ImageRef {
                digest: Digest::of(b"image"),
                bytes: 4096,
                metadata_bytes: 4096,
                inodes: 1,
                chunk_index: Digest::of(chunk_index),
            };
            Component::new("debian", "12", Role::Base, "amd64", image)
        };
        let (good, evil) = (base(b"good"), base(b"evil"));
        let roots = cache.path().join("roots");
        let unpacked = roots.join(format!("{}-7", evil.id().hex()));
        fs::create_dir_all(&unpacked).unwrap();
        // By what it claims, as earlier versions had it.
        fs::create_dir_all(roots.join(good.image.digest.hex())).unwrap();
        let nothing: &[u8] = &[];
        let opened = BaseRoot::open(cache.path(), &evil, &nothing, UserRange::new(7)).unwrap();
        assert_eq!(opened.directory, unpacked);
        assert!(BaseRoot::open(cache.path(), &good, &nothing, UserRange::new(7)).is_err());
    }
}
