//! Snapshots for tests: of nobody's VM, of bytes that cannot be compressed.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forelay_cache::Domain;
use forelay_image::component::{ImageRef, Role};
use forelay_image::snapshot::{SnapshotOf, SnapshotOrigin};
use forelay_image::{ChunkIndex, Component, ComponentId, Digest};

use crate::daemon::snapshot::kept::Kept;
use crate::daemon::snapshot::on_disk::files;
use crate::daemon::snapshot::origin::tests::of_kernel;
use crate::daemon::snapshot::shelf::Shelf;

/// A snapshot of nobody's that is like no other, made at a time; its image is in `dir`.
pub fn snapshot(dir: &Path, name: &str, made_ms: i64) -> (Component, PathBuf, ChunkIndex) {
    sharing(dir, name, made_ms, name)
}

/// As [`snapshot`], known to the shelf that has it.
pub fn kept(dir: &Path, name: &str, made_ms: i64) -> Kept {
    let (component, ..) = snapshot(dir, name, made_ms);
    Kept::new(&Domain::from("me"), component.id(), Arc::new(component)).unwrap()
}

/// As [`snapshot`], with the first half of its bytes like those of all that say so.
pub fn sharing(
    dir: &Path,
    name: &str,
    made_ms: i64,
    half: &str,
) -> (Component, PathBuf, ChunkIndex) {
    let origin = of_kernel(Digest::of(name.as_bytes()));
    of_origin(dir, (name, half), made_ms, origin)
}

/// As [`sharing`], made from what a launch may look for.
pub fn of_origin(
    dir: &Path,
    (name, half): (&str, &str),
    made_ms: i64,
    origin: SnapshotOrigin,
) -> (Component, PathBuf, ChunkIndex) {
    let of = SnapshotOf {
        ram_bytes: u64::from(origin.memory_mib) << 20,
        origin,
        state_bytes: 1000,
        map: None,
        devices: Vec::new(),
    };
    // Nothing that can be compressed.
    let words = (2 << 20) / 64_u64;
    let word = |number: u64| {
        let of = if number < words / 2 { half } else { name };
        Digest::of(format!("{of} {number}").as_bytes()).hex()
    };
    let mut image: Vec<u8> = (0..words).map(word).flat_map(String::into_bytes).collect();
    image.resize(of.image_bytes() as usize, 0);
    let path = dir.join(name);
    std::fs::write(&path, &image).unwrap();
    let read = |buffer: &mut [u8], offset: u64| {
        let there = &image[offset as usize..];
        buffer.copy_from_slice(&there[..buffer.len()]);
        Ok(())
    };
    let index = ChunkIndex::of_plain(of.image_bytes(), 64 << 10, read).unwrap();
    let image = ImageRef {
        digest: index.image,
        bytes: index.image_bytes,
        metadata_bytes: 0,
        inodes: 0,
        chunk_index: index.digest(),
    };
    let version = made_ms.to_string();
    let mut component = Component::new("kept", &version, Role::Snapshot, "amd64", image);
    component.snapshot = Some(Box::new(of));
    (component, path, index)
}

/// Flips a byte in the first half of each pack, and has the files look as they were.
pub fn damage_and_trust(shelf: &Shelf, id: ComponentId) {
    let mut packs = files(&shelf.dir.join("repository/packs"));
    packs.retain(|path| path.extension().is_some_and(|end| end == "pack"));
    for path in packs {
        let mut bytes = std::fs::read(&path).unwrap();
        let quarter = bytes.len() / 4;
        bytes[quarter] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let meta = path.metadata().unwrap();
        let mut kept = shelf.kept.lock();
        let stamps = kept.get_mut(&id).unwrap().verified.iter_mut();
        let mut stamps = stamps.filter(|stamp| stamp.inode == meta.ino());
        let stamp = stamps.next().expect("a pack that was verified");
        stamp.changed_ns = (meta.ctime(), meta.ctime_nsec());
    }
}

/// The shelf of snapshots below a directory.
pub async fn open(dir: &Path) -> Shelf {
    let (dir, domain) = (dir.join("snapshots"), Domain::from("me"));
    let limit = Duration::from_secs(60);
    Shelf::open(&dir, &domain, limit).await.unwrap()
}

/// Has a shelf keep one like no other.
pub async fn publish(shelf: &Shelf, dir: &Path, name: &str) -> Kept {
    let (component, image, index) = snapshot(dir, name, 1);
    let publishing = shelf.publish(&component, &image, &index);
    publishing.await.unwrap()
}

/// The pack of the one snapshot that there is.
pub fn only_pack(dir: &Path) -> (PathBuf, [Digest; 1]) {
    let mut found = files(&dir.join("snapshots/me/repository/packs"));
    found.retain(|path| path.extension().is_some_and(|end| end == "pack"));
    let [pack] = &found[..] else {
        panic!("{found:?}");
    };
    let hex = pack.file_stem().unwrap().to_str().unwrap();
    let digest = format!("sha256:{hex}").parse().unwrap();
    (pack.clone(), [digest])
}

/// A shelf that has one.
pub async fn with_one(dir: &Path) -> (Shelf, Kept) {
    let shelf = open(dir).await;
    let kept = publish(&shelf, dir, "one").await;
    (shelf, kept)
}
