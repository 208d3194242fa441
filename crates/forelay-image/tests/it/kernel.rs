//! The kernel and erofs-utils as referees: what they see in an image is what was put in.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use forelay_image::erofs::merge::{Composed, MapLayout};
use forelay_image::erofs::read::Image;
use forelay_image::erofs::write::{Written, write_image};
use forelay_image::tree::{Attributes, FileData, Kind, Node, Tree};

use crate::compose::{Built, build, compose_all, tree};
use crate::host_tree::{attributes, read_host_tree};
use crate::images::one_of_everything;
use crate::model::{self, Description};
use crate::referee::{Mount, run, skip};

const PROGRAMS: [&str; 4] = ["mount", "losetup", "fsck.erofs", "dump.erofs"];

/// A Debian root file system: `FORELAY_TEST_ROOTFS`, else made once by mmdebstrap and
/// kept under `target/test-cache`.
fn debian() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("FORELAY_TEST_ROOTFS") {
        return Some(path.into());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-cache");
    let cached = root.join("debian-minbase");
    if cached.join("etc/debian_version").exists() {
        return Some(cached);
    }
    fs::create_dir_all(&root).unwrap();
    let partial = tempfile::tempdir_in(&root).unwrap();
    let tree = partial.path().join("tree");
    let made = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase", "bookworm"])
        .arg(&tree)
        .output();
    match made {
        // Another test run may have been first: then its tree is as good.
        Ok(output) if output.status.success() => {
            let _ = fs::rename(&tree, &cached);
            Some(cached)
        }
        other => {
            println!("SKIPPED: cannot make a Debian tree with mmdebstrap: {other:?}");
            None
        }
    }
}

fn write_to(tree: &Tree, path: &Path) -> Written {
    let mut out = File::create(path).unwrap();
    write_image(tree, &mut out).unwrap()
}

/// Link counts of regular files, which a description only implies.
fn link_counts(root: &Path) -> Vec<(PathBuf, u64)> {
    let mut out = Vec::new();
    let mut stack = vec![root.to_owned()];
    while let Some(path) = stack.pop() {
        for entry in fs::read_dir(&path).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            if metadata.is_dir() {
                stack.push(path.clone());
            }
            let relative = path.strip_prefix(root).unwrap().to_owned();
            out.push((relative, metadata.nlink()));
        }
    }
    out.sort();
    out
}

fn assert_same(found: &Description, expected: &Description) {
    for (path, expected) in expected {
        assert_eq!(found.get(path), Some(expected), "{path}");
    }
    assert_eq!(found.len(), expected.len());
}

fn fsck(image: &Path) {
    let image = image.to_str().unwrap();
    run("fsck.erofs", &[image]);
    run("fsck.erofs", &["--extract", image]);
    let dump = run("dump.erofs", &["-s", image]);
    let text = String::from_utf8_lossy(&dump.stdout).into_owned();
    assert!(text.contains("0xE0F5E1E2"), "{text}");
}

#[test]
fn privileged_one_of_everything_through_the_kernel() {
    if skip("privileged_one_of_everything_through_the_kernel", &PROGRAMS) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let tree = one_of_everything();
    write_to(&tree, &path);
    fsck(&path);
    let mount = Mount::new(&path, &[], &dir.path().join("mnt"));
    let seen = read_host_tree(&mount.point);
    assert_same(&model::describe(&seen), &model::describe(&tree));
    let links: Vec<_> = link_counts(&mount.point);
    let count = |path: &str| links.iter().find(|(p, _)| p == Path::new(path)).unwrap().1;
    assert_eq!(count("usr/bin/ping"), 2);
    assert_eq!(count("usr"), 5);
}

#[test]
fn privileged_debian_byte_for_byte() {
    if skip("privileged_debian_byte_for_byte", &PROGRAMS) {
        return;
    }
    let Some(debian) = debian() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let tree = read_host_tree(&debian);
    let written = write_to(&tree, &path);
    fsck(&path);
    let expected = model::describe(&tree);
    let mount = Mount::new(&path, &[], &dir.path().join("mnt"));
    assert_same(&model::describe(&read_host_tree(&mount.point)), &expected);
    assert_eq!(link_counts(&mount.point), link_counts(&debian));
    // The same tree out of another directory: the mount itself.
    let again = write_to(&read_host_tree(&mount.point), &dir.path().join("again"));
    assert_eq!(again, written);
    // And through the reader.
    let file = File::open(&path).unwrap();
    let read = Image::open(&file).unwrap().to_tree(1 << 30).unwrap();
    assert_same(&model::describe(&read), &expected);
}

/// Files of a composed VM: the components and the map image.
struct Files {
    dir: tempfile::TempDir,
    components: Vec<PathBuf>,
}

impl Files {
    fn new(built: &[&Built]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let components = built.iter().enumerate().map(|(index, built)| {
            let path = dir.path().join(format!("component-{index}"));
            fs::write(&path, &built.bytes).unwrap();
            path
        });
        let components = components.collect();
        Self { dir, components }
    }

    fn map(&self, composed: &Composed) -> PathBuf {
        let path = self.dir.path().join("map");
        fs::write(&path, &composed.map_image).unwrap();
        path
    }

    fn flat(&self, composed: &Composed) -> PathBuf {
        let path = self.dir.path().join("flat");
        fs::write(&path, &composed.map_image).unwrap();
        let disk = File::options().write(true).open(&path).unwrap();
        for (device, component) in composed.devices.iter().zip(&self.components) {
            let bytes = fs::read(component).unwrap();
            disk.write_all_at(&bytes, u64::from(device.mapped_block) * 4096)
                .unwrap();
        }
        path
    }
}

#[test]
fn privileged_map_image_as_devices_and_as_one_disk() {
    if skip("privileged_map_image_as_devices_and_as_one_disk", &PROGRAMS) {
        return;
    }
    let base = one_of_everything();
    let mut top = tree(&[
        ("/usr/lib/blob", b"replaced"),
        ("/opt/tool/bin", &[3; 123_456]),
    ]);
    let whiteout = Kind::CharDevice { major: 0, minor: 0 };
    for path in ["/dev/null", "/usr/share/many/name-0500"] {
        let attributes = Attributes::with_mode(0);
        let kind = whiteout.clone();
        top.insert_path(path.as_bytes(), Node { attributes, kind })
            .unwrap();
    }
    let own = tree(&[
        ("/etc/hostname", b"vm"),
        ("/root/.ssh/authorized_keys", &[b'k'; 4097]),
    ]);
    let expected = model::Model::stack([&base, &top, &own]).unwrap().describe();
    let (base, top) = (build(&base), build(&top));
    let files = Files::new(&[&base, &top]);
    let devices = compose_all(&[&base, &top], &own, MapLayout::Devices);
    let flat = compose_all(&[&base, &top], &own, MapLayout::Flat);
    {
        let mount = Mount::new(
            &files.map(&devices),
            &files.components,
            &files.dir.path().join("devices"),
        );
        assert_same(&model::describe(&read_host_tree(&mount.point)), &expected);
    }
    // One disk without a device table: any kernel, and erofs-utils 1.5.
    let disk = files.flat(&flat);
    fsck(&disk);
    {
        let mount = Mount::new(&disk, &[], &files.dir.path().join("flat-mount"));
        assert_same(&model::describe(&read_host_tree(&mount.point)), &expected);
    }
    // The image for devices, as one disk (Linux 6.4 and later).
    let disk = files.flat(&devices);
    let mount = Mount::new(&disk, &[], &files.dir.path().join("unified-mount"));
    assert_same(&model::describe(&read_host_tree(&mount.point)), &expected);
}

/// The part that needs no kernel runs everywhere.
#[test]
fn privileged_file_beyond_4_gib() {
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("huge");
    let len = (4 << 30) + 5000;
    let file = File::create(&host).unwrap();
    file.set_len(len).unwrap();
    file.write_all_at(b"middle", 3 << 30).unwrap();
    file.write_all_at(b"end", len - 3).unwrap();
    let mut tree = Tree::new();
    let node = Node {
        attributes: attributes(&host, &fs::metadata(&host).unwrap()),
        kind: Kind::File(FileData::HostFile {
            path: host,
            offset: 0,
            len,
        }),
    };
    tree.insert_path(b"/huge", node).unwrap();
    let path = dir.path().join("image");
    let written = write_to(&tree, &path);
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), written.image.bytes);
    assert!(metadata.blocks() * 512 < 1 << 23, "zeros stay sparse");
    let opened = File::open(&path).unwrap();
    let image = Image::open(&opened).unwrap();
    let inode = image.lookup(b"huge").unwrap().unwrap();
    assert_eq!(inode.record.size, len);
    let mut bytes = [0; 6];
    assert_eq!(image.read_file(&inode, 3 << 30, &mut bytes).unwrap(), 6);
    assert_eq!(&bytes, b"middle");
    assert_eq!(image.read_file(&inode, len - 3, &mut bytes).unwrap(), 3);
    assert_eq!(&bytes[..3], b"end");
    if skip("privileged_file_beyond_4_gib", &PROGRAMS) {
        return;
    }
    let mount = Mount::new(&path, &[], &dir.path().join("mnt"));
    let seen = File::open(mount.point.join("huge")).unwrap();
    assert_eq!(seen.metadata().unwrap().len(), len);
    seen.read_exact_at(&mut bytes, 3 << 30).unwrap();
    assert_eq!(&bytes, b"middle");
    seen.read_exact_at(&mut bytes[..3], len - 3).unwrap();
    assert_eq!(&bytes[..3], b"end");
}
