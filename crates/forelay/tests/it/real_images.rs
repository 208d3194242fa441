//! Container images that tools made of real packages: what composing their layers gives is what
//! `umoci` unpacks, and they run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, copy};
use std::path::Path;
use std::process::Command;
use std::time::UNIX_EPOCH;

use forelay_image::Digest;
use forelay_image::digest::Hasher;
use forelay_image::erofs::merge::{ComposeOptions, Layer, compose};
use forelay_image::erofs::read::{Image, ReadAt};
use forelay_image::erofs::write::write_image;
use forelay_image::tree::{Kind, NodeId, ROOT, Tree};
use forelay_import::dir::{Ownership, read_directory};
use forelay_import::{BuildRequest, BuildSource, Builder, ImageOptions, ImageSource, Imported};

use crate::fixture::{Host, RepositoryOf, Settings, bench, http_get, reserved_port};
use crate::making_images::{LAYERS, images, run};

/// Hashes what is written to it.
struct Hashing(Hasher);

impl std::io::Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn digest_of(mut from: impl Read) -> Digest {
    let mut to = Hashing(Hasher::new());
    copy(&mut from, &mut to).unwrap();
    to.0.finish()
}

/// All that can be seen of a path, and its time.
type SeenPath = (String, Option<i64>);

/// All that can be seen of a tree, by path. A directory that is no older than `start` has no
/// time: an unpacker made it.
fn seen(tree: &Tree, start: i64) -> BTreeMap<String, SeenPath> {
    let mut seen = BTreeMap::new();
    let mut first: BTreeMap<NodeId, String> = BTreeMap::new();
    let mut pending = vec![(String::new(), ROOT)];
    while let Some((path, id)) = pending.pop() {
        let node = tree.node(id);
        for (name, &child) in tree.entries(id).into_iter().flatten().rev() {
            pending.push((format!("{path}/{}", String::from_utf8_lossy(name)), child));
        }
        let kind = match &node.kind {
            Kind::File(data) => {
                let digest = digest_of(data.reader().unwrap());
                format!("file of {} bytes, {digest}", data.len())
            }
            Kind::Directory(_) => "directory".to_owned(),
            Kind::Symlink(to) => format!("link to {}", String::from_utf8_lossy(to)),
            other => format!("{other:?}"),
        };
        let one = &node.attributes;
        let is_made = matches!(node.kind, Kind::Directory(_)) && one.mtime_s >= start;
        let time = i128::from(one.mtime_s) * 1_000_000_000 + i128::from(one.mtime_ns);
        let name = first.entry(id).or_insert_with(|| path.clone());
        let owner = (one.uid, one.gid);
        let what = format!("{kind} {:o} {owner:?} {:?} as {name}", one.mode, one.xattrs);
        seen.insert(path, (what, (!is_made).then_some(time as i64)));
    }
    seen
}

/// What a VM sees of an image: its layers, written and composed.
fn laid(imported: &Imported, dir: &Path) -> Tree {
    let parts = std::iter::once(&imported.main).chain(&imported.split_off);
    let written = parts.enumerate().map(|(number, part)| {
        let path = dir.join(number.to_string());
        let mut file = File::options();
        let file = file.read(true).write(true).create_new(true).open(&path);
        let mut file = file.unwrap();
        let written = write_image(&part.tree, &mut file).unwrap();
        let mut metadata = vec![0; written.image.metadata_bytes as usize];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut metadata, 0).unwrap();
        (file, metadata, written)
    });
    let written: Vec<_> = written.collect();
    let layers = written.iter().map(|(_, metadata, written)| Layer {
        image: written.image.digest,
        image_bytes: written.image.bytes,
        metadata,
        chunks: Some(&written.chunks),
        bundle: None,
    });
    let layers: Vec<_> = layers.collect();
    let composed = compose(&layers, &Tree::new(), ComposeOptions::default()).unwrap();
    let sources = written
        .iter()
        .map(|(file, _, written)| (written.image.digest, file as &dyn ReadAt));
    let sources: Vec<_> = sources.collect();
    let image = Image::open_multi(&composed.map_image, &sources).unwrap();
    image.to_tree(1 << 30).unwrap()
}

/// Compares an image with what `umoci` unpacks; its files, and layers of it that leave something.
fn compared(layout: &Path, tag: &str) -> (usize, usize) {
    let start = UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
    let dir = tempfile::tempdir().unwrap();
    let options = ImageOptions {
        source: ImageSource::Files {
            path: layout.to_owned(),
            tag: Some(tag.to_owned()),
        },
        plain_http: false,
        ca: None,
    };
    let builder = Builder::new(&dir.path().join("build")).unwrap();
    let request = BuildRequest::new(BuildSource::Image(options));
    let imported = builder.import(&request, &|_| {}).unwrap();
    let found = seen(&laid(&imported, dir.path()), start);

    let to = dir.path().join("unpacked");
    let image = format!("{}:{tag}", layout.display());
    run(Command::new("umoci")
        .args(["raw", "unpack", "--image", &image])
        .arg(&to));
    let unpacked = read_directory(&to, Ownership::Keep).unwrap().tree;
    let expected = seen(&unpacked, start);
    let paths = found
        .keys()
        .chain(expected.keys())
        .filter(|path| !path.is_empty());
    let differ = paths.filter(|path| match (found.get(*path), expected.get(*path)) {
        (Some((found, at)), Some((expected, time))) => {
            found != expected || time.is_some() && time != at
        }
        _ => true,
    });
    let differ: Vec<_> = differ
        .map(|path| (path, found.get(path), expected.get(path)))
        .take(9)
        .collect();
    assert!(
        differ.is_empty(),
        "{tag}: path, composed, umoci: {differ:#?}"
    );
    (found.len(), imported.split_off.len())
}

#[test]
fn privileged_real_images_are_what_umoci_unpacks() {
    let test = "privileged_real_images_are_what_umoci_unpacks";
    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED {test}: needs root");
    }
    let (layout, tags) = match images() {
        Ok(images) => images,
        Err(why) => return println!("SKIPPED {test}: {why}"),
    };
    let compared = tags.iter().map(|tag| {
        let (paths, layers) = compared(&layout, tag);
        println!("{tag}: {paths} paths, {layers} layers");
        (&**tag, (paths, layers))
    });
    let compared: BTreeMap<&str, (usize, usize)> = compared.collect();
    assert_eq!(compared["layers"].1, LAYERS);
    assert!(
        compared["debian"].0 > 3000 && compared["debian"].1 == 4,
        "{compared:?}"
    );
    assert!(
        compared["python"].0 > 4000 && compared["python"].1 >= 7,
        "{compared:?}"
    );
    assert!(compared["busybox"].0 > 100, "{compared:?}");
}

#[test]
fn privileged_real_images_run_and_answer() {
    let test = "privileged_real_images_run_and_answer";
    let Some(bench) = bench(test) else { return };
    let (layout, _) = match images() {
        Ok(images) => images,
        Err(why) => return println!("SKIPPED {test}: {why}"),
    };
    let settings = Settings {
        repository: RepositoryOf::Test,
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let image = |tag: &str| format!("oci:{}:{tag}", layout.display());
    let port = reserved_port();
    let publish = format!("{port}:8000");
    let detached = [
        "--detach",
        "--name",
        "app",
        "--publish",
        &publish,
        "--memory",
        "192M",
    ];
    host.ok(["run", "--image", &image("python")].iter().chain(&detached));
    let page = http_get(port, "/");
    assert!(
        page.contains("hello from flask as 1234 in /srv/app"),
        "{page}"
    );
    host.ok(["stop", "app"]);
    // Of the image below it nothing is new.
    let said = host.ok(["component", "build", "--oci", &image("debian")]);
    assert!(said.contains("4 layers, 0 of them new"), "{said}");
    let words: Vec<&str> = said.split(' ').collect();
    let name = format!("{}@{}", words[0], words[1]);
    let ran = host.run(["run", "--image", &name, "--memory", "160M"]);
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    let version = ran
        .stdout
        .lines()
        .any(|line| line.trim().starts_with("12."));
    assert!(version, "{}", ran.stdout);
}
