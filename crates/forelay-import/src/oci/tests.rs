//! Images made by hand, in all the forms that there are; what composing gives is what
//! `umoci unpack` leaves.

mod forms;
mod known;
mod laid;
mod random;
mod refused;
mod registry;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use forelay_image::tree::{Kind, NodeId};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tar::EntryType::{self, Block, Char, Directory, Fifo, Link, Regular, Symlink};

use super::*;
use crate::build::{BuildRequest, BuildSource, Builder};
use crate::dir::{Ownership, read_directory};
use crate::laid_tests::composed;

/// One entry of a layer: kind, path, content or target.
type TarEntry<'a> = (EntryType, &'a str, &'a str);

/// A layer's archive. Each entry has attributes of its own.
fn layer(entries: &[TarEntry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (number, (kind, path, content)) in entries.iter().enumerate() {
        let salt = path.len() as u64 + content.len() as u64 + number as u64;
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(*kind);
        header.set_mode([0o755, 0o700, 0o4711, 0o1777][salt as usize % 4]);
        header.set_uid([0, 1000, 33][salt as usize % 3]);
        header.set_gid([0, 50][salt as usize % 2]);
        let time = format!("{}.{:09}", 1_600_000_000 + salt * 1000, salt * 1_000_001);
        header.set_size(0);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        let mut records = vec![("mtime", time.as_bytes())];
        if *kind == Regular && salt.is_multiple_of(4) {
            records.push(("SCHILY.xattr.user.note", b"a\nnote"));
            records.push(("SCHILY.xattr.security.capability", CAPABILITY));
        }
        builder.append_pax_extensions(records).unwrap();
        match kind {
            Link | Symlink => builder.append_link(&mut header, path, content).unwrap(),
            Regular => {
                header.set_size(content.len() as u64);
                builder
                    .append_data(&mut header, path, content.as_bytes())
                    .unwrap();
            }
            _ => builder.append_data(&mut header, path, io::empty()).unwrap(),
        }
    }
    builder.into_inner().unwrap()
}

/// `cap_net_bind_service=ep`.
const CAPABILITY: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn compressed(how: &str, bytes: &[u8]) -> Vec<u8> {
    match how {
        "gzip" => {
            let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            to.write_all(bytes).unwrap();
            to.finish().unwrap()
        }
        "zstd" => zstd::stream::encode_all(bytes, 1).unwrap(),
        _ => bytes.to_vec(),
    }
}

fn suffix(how: &str) -> String {
    match how {
        "" => String::new(),
        how => format!("+{how}"),
    }
}

/// A directory with one image, or what is to be wrong in it.
struct Made {
    dir: tempfile::TempDir,
    config: serde_json::Value,
    /// Compression and bytes of each layer.
    layers: Vec<(&'static str, Vec<u8>)>,
    /// Changes of the manifest before it is written.
    twist: fn(&mut serde_json::Value),
    /// Changes of the index.
    twist_index: fn(&mut serde_json::Value),
}

impl Made {
    fn new(layers: &[&[TarEntry<'_>]]) -> Self {
        let layers: Vec<_> = layers
            .iter()
            .map(|entries| ("gzip", layer(entries)))
            .collect();
        Self {
            dir: tempfile::tempdir().unwrap(),
            config: json!({
                "architecture": go_name(), "os": "linux",
                "config": {"Entrypoint": ["/run"], "Cmd": ["a"], "Env": ["PATH=/x", "bad", "A=b=c"],
                    "User": "me", "WorkingDir": "srv/../data/", "ExposedPorts": {"80/tcp": {}},
                    "Volumes": {"/v": {}}, "StopSignal": "SIGQUIT",
                    "Healthcheck": {"Test": ["CMD-SHELL", "true"]}},
            }),
            layers,
            twist: |_| {},
            twist_index: |_| {},
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn blob(&self, bytes: &[u8]) -> serde_json::Value {
        let digest = Digest::of(bytes);
        let blobs = self.path().join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({"digest": digest, "size": bytes.len()})
    }

    /// The configuration with the layers' digests.
    fn full_config(&self) -> Vec<u8> {
        let ids = self
            .layers
            .iter()
            .map(|(_, tar)| Digest::of(tar).to_string());
        let mut config = self.config.clone();
        if config.get("rootfs").is_none() {
            config["rootfs"] = json!({"type": "layers", "diff_ids": ids.collect::<Vec<_>>()});
        }
        serde_json::to_vec(&config).unwrap()
    }

    /// Writes the layout of the OCI.
    fn write(&self) {
        let described = |kind: String, bytes: &[u8]| {
            let mut blob = self.blob(bytes);
            blob["mediaType"] = kind.into();
            blob
        };
        let kind = |how| format!("application/vnd.oci.image.layer.v1.tar{}", suffix(how));
        let layers = self.layers.iter();
        let layers = layers.map(|(how, tar)| described(kind(how), &compressed(how, tar)));
        let config = "application/vnd.oci.image.config.v1+json".to_owned();
        let mut manifest = json!({"schemaVersion": 2, "layers": layers.collect::<Vec<_>>(),
            "config": described(config, &self.full_config())});
        (self.twist)(&mut manifest);
        let mut manifest = self.blob(&serde_json::to_vec(&manifest).unwrap());
        manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json".into();
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "t"});
        let mut index = json!({"schemaVersion": 2, "manifests": [manifest]});
        (self.twist_index)(&mut index);
        let write = |name: &str, value: &serde_json::Value| {
            fs::write(self.path().join(name), serde_json::to_vec(value).unwrap()).unwrap();
        };
        write("index.json", &index);
        write("oci-layout", &json!({"imageLayoutVersion": "1.0.0"}));
    }

    fn import(&self) -> Result<Imported, ImportError> {
        self.write();
        import(self.path(), None)
    }

    fn refused(&self) -> String {
        match self.import() {
            Ok(_) => panic!("not refused"),
            Err(error) => error.to_string(),
        }
    }
}

fn import(path: &Path, tag: Option<&str>) -> Result<Imported, ImportError> {
    import_knowing(path, tag, None)
}

fn import_knowing(
    path: &Path,
    tag: Option<&str>,
    known: Option<&dyn KnownLayers>,
) -> Result<Imported, ImportError> {
    let options = ImageOptions {
        source: ImageSource::Files {
            path: path.to_owned(),
            tag: tag.map(str::to_owned),
        },
        plain_http: false,
        ca: None,
    };
    let scratch = tempfile::tempdir().unwrap();
    import_image(&options, known, scratch.path(), &|_| {}).map(|mut imported| {
        // The content is needed after the spool is gone.
        for part in &mut imported.split_off {
            read_in(&mut part.tree);
        }
        imported
    })
}

fn read_in(tree: &mut Tree) {
    for index in 0..tree.len() {
        if let Kind::File(data) = &mut tree.node_mut(NodeId(index as u32)).kind {
            *data = FileData::Bytes(data.read().unwrap().into());
        }
    }
}

fn go_name() -> &'static str {
    match crate::host_architecture() {
        "i386" => "386",
        "armhf" => "arm",
        "ppc64el" => "ppc64le",
        other => other,
    }
}

fn names(imported: &Imported) -> Vec<String> {
    let layers = imported.split_off.iter();
    layers.map(|part| part.draft.name.clone()).collect()
}

/// What composing the image gives.
fn laid(imported: &Imported) -> Tree {
    let layers = imported.split_off.iter().map(|part| part.tree.clone());
    let all: Vec<Tree> = [imported.main.tree.clone()]
        .into_iter()
        .chain(layers)
        .collect();
    composed(&all).unwrap()
}

/// All that can be seen of a tree, by path. Directories that changed since `start` are an
/// unpacker's own: it gave them the time.
fn seen(tree: &Tree, start: i64) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    let mut first: BTreeMap<NodeId, String> = BTreeMap::new();
    let mut pending = vec![(String::new(), ROOT)];
    while let Some((path, id)) = pending.pop() {
        let node = tree.node(id);
        for (name, &child) in tree.entries(id).into_iter().flatten().rev() {
            let name = String::from_utf8_lossy(name);
            pending.push((format!("{path}/{name}"), child));
        }
        let kind = match &node.kind {
            Kind::File(data) => format!("file {:?}", data.read().unwrap()),
            Kind::Directory(_) => "directory".to_owned(),
            Kind::Symlink(to) => format!("link to {}", String::from_utf8_lossy(to)),
            other => format!("{other:?}"),
        };
        let Attributes {
            mode,
            uid,
            gid,
            mtime_s,
            mtime_ns,
            xattrs,
        } = &node.attributes;
        let made = matches!(node.kind, Kind::Directory(_)) && (*mtime_s == 0 || *mtime_s >= start);
        let time = if made {
            "now".to_owned()
        } else {
            format!("{mtime_s}.{mtime_ns:09}")
        };
        let same = first.entry(id).or_insert_with(|| path.clone());
        let words = format!("{kind} {mode:o} {uid}:{gid} {time} {xattrs:?} as {same}");
        seen.insert(path, words);
    }
    seen
}

/// What was seen of a path, without its time.
fn untimed(seen: &str) -> Vec<&str> {
    let words = seen.split(' ').enumerate();
    words
        .filter(|(number, _)| *number != 3)
        .map(|(_, word)| word)
        .collect()
}

const BASE: &[TarEntry<'_>] = &[
    (Directory, "./", ""),
    (Directory, "bin", ""),
    (Regular, "bin/sh", "shell"),
    (Link, "bin/bash", "bin/sh"),
    (Directory, "etc", ""),
    (Regular, "etc/old", "old"),
    (Regular, "etc/kept", "kept"),
    (Symlink, "sbin", "bin"),
];

/// What `umoci unpack` leaves, or that it refuses.
fn unpacked(made: &Made) -> Option<Tree> {
    let to = made.path().join("bundle");
    let image = format!("{}:t", made.path().display());
    let output = Command::new("umoci")
        .args(["raw", "unpack", "--image", &image])
        .arg(&to)
        .output();
    let output = output.unwrap();
    if !output.status.success() {
        return None;
    }
    let mut tree = read_directory(&to, Ownership::Keep).unwrap().tree;
    read_in(&mut tree);
    Some(tree)
}
