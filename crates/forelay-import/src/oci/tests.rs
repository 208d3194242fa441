//! Images made by hand, in all the forms that there are; what composing gives is what
//! `umoci unpack` leaves.

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
    let options = ImageOptions {
        source: ImageSource::Files {
            path: path.to_owned(),
            tag: tag.map(str::to_owned),
        },
        plain_http: false,
    };
    let scratch = tempfile::tempdir().unwrap();
    import_image(&options, scratch.path(), &|_| {}).map(|mut imported| {
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

#[test]
fn a_layer_is_one_component_whatever_its_form_and_its_image() {
    let mut first = Made::new(&[BASE, &[(Regular, "etc/new", "new")]]);
    let imported = first.import().unwrap();
    let expected = names(&imported);
    assert_eq!(expected.len(), 2);
    let container = imported.main.draft.container.clone().unwrap();
    assert_eq!(container.command, ["a"]);
    assert_eq!(container.env.get("A").map(String::as_str), Some("b=c"));
    assert_eq!((&*container.workdir, &*container.user), ("/data", "me"));
    assert_eq!(container.stop_signal, 3);
    assert_eq!(container.health, ["/bin/sh", "-c", "true"]);
    assert_eq!(container.ports, ["80/tcp"]);
    assert_eq!(imported.main.draft.entrypoint, ["/run"]);
    assert_eq!(imported.main.draft.version, "t");
    for how in ["", "zstd"] {
        first.layers.iter_mut().for_each(|layer| layer.0 = how);
        assert_eq!(names(&first.import().unwrap()), expected, "{how}");
    }
    let other = Made::new(&[&[(Directory, "x", "")], BASE]);
    let build = |made: &Made| {
        made.write();
        let cache = tempfile::tempdir().unwrap();
        let source = ImageSource::parse(&format!("oci:{}:t", made.path().display())).unwrap();
        let options = ImageOptions {
            source,
            plain_http: false,
        };
        let request = BuildRequest::new(BuildSource::Image(options));
        let builder = Builder::new(cache.path()).unwrap();
        let built = builder.build(&request, &|_| {}).unwrap();
        let ids = built.split_off.iter().map(|one| one.component.id());
        let named = built.main.component.container.unwrap().layers;
        assert_eq!(ids.collect::<Vec<_>>(), named);
        named
    };
    assert_eq!(build(&first)[0], build(&other)[1]);
}

#[test]
fn layers_that_leave_nothing_and_those_that_come_again_are_one() {
    let nothing: &[TarEntry<'_>] = &[];
    let made = Made::new(&[nothing, BASE, nothing, &[(Regular, "x", "x")], BASE]);
    let imported = made.import().unwrap();
    assert_eq!(imported.split_off.len(), 2);
    let tree = laid(&imported);
    assert!(tree.lookup(b"x").is_some() && tree.lookup(b"etc/kept").is_some());
    // All that is below is gone.
    let made = Made::new(&[
        BASE,
        &[(Regular, ".wh..wh..opq", ""), (Regular, "only", "x")],
    ]);
    let imported = made.import().unwrap();
    assert_eq!(imported.split_off.len(), 1);
    assert_eq!(laid(&imported).reachable().len(), 2);
}

#[test]
fn links_to_files_of_layers_below_are_names_of_one_file() {
    let above: &[TarEntry<'_>] = &[
        (Link, "usr/one", "bin/sh"),
        (Link, "usr/two", "/sbin/bash"),
        (Regular, "etc/.wh.old", ""),
        (Link, "etc/older", "etc/old"),
    ];
    let made = Made::new(&[BASE, above]);
    let imported = made.import().unwrap();
    let tree = laid(&imported);
    let id = tree.lookup(b"bin/sh").unwrap();
    for name in ["bin/bash", "usr/one", "usr/two"] {
        assert_eq!(tree.lookup(name.as_bytes()), Some(id), "{name}");
    }
    assert!(tree.lookup(b"etc/old").is_none());
    assert_eq!(tree.text_of("etc/older").unwrap().as_deref(), Some("old"));
    // It is what it is on this base alone.
    assert_eq!(imported.split_off[0].draft.version, "1");
    assert!(imported.split_off[1].draft.version.starts_with("1+"));
    let nowhere = Made::new(&[BASE, &[(Link, "x", "none/such")]]);
    assert!(
        nowhere
            .refused()
            .contains("\"none/such\", which is no file")
    );
    let directory = Made::new(&[BASE, &[(Link, "x", "etc")]]);
    assert!(directory.refused().contains("which is no file"));
}

#[test]
fn what_is_not_what_the_image_says_is_refused() {
    let plain = || Made::new(&[BASE]);
    let twisted = |twist: fn(&mut serde_json::Value), said: &str| {
        let mut made = plain();
        made.twist = twist;
        let refused = made.refused();
        assert!(refused.contains(said), "{refused}");
    };
    twisted(|all| all["layers"][0]["size"] = 7.into(), "is not as long");
    twisted(
        |all| all["layers"][0]["urls"] = json!(["http://x"]),
        "layer 1 is foreign",
    );
    twisted(
        |all| {
            all["layers"][0]["mediaType"] =
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip".into()
        },
        "layer 1 is foreign",
    );
    twisted(
        |all| all["layers"][0]["mediaType"] = "text/x".into(),
        "\"text/x\", which is not known",
    );
    twisted(
        |all| all["config"]["mediaType"] = "application/vnd.cncf.helm".into(),
        "an artifact",
    );
    twisted(|all| all["schemaVersion"] = 1.into(), "2015");
    twisted(
        |all| all["layers"] = json!([]),
        "0 layers, but its configuration has digests of 1",
    );
    twisted(
        |all| *all = json!({"schemaVersion": 2}),
        "neither an index nor a manifest",
    );
    twisted(
        |all| {
            let layer = all["layers"][0].clone();
            all["layers"] = vec![layer; 257].into();
        },
        "257 layers; at most 256",
    );
    let mut wrong = plain();
    wrong.config["rootfs"] = json!({"diff_ids": [Digest::of(b"other")]});
    assert!(
        wrong
            .refused()
            .contains("layer 1 does not unpack to sha256:")
    );
    let mut windows = plain();
    windows.config["os"] = "windows".into();
    assert!(windows.refused().contains("for windows; VMs run Linux"));
    let mut settings = plain();
    settings.config["config"]["Env"] = json!([format!("A={}", "x".repeat(300 << 10))]);
    assert!(settings.refused().contains("bytes of settings"));
    for path in ["/x".repeat(2100), "y".repeat(256), "a\0b".to_owned()] {
        for key in ["WorkingDir", "Volumes"] {
            let mut made = plain();
            made.config["config"][key] = match key {
                "Volumes" => json!({ (path.as_str()): {} }),
                _ => path.as_str().into(),
            };
            assert!(made.refused().contains("no usable path"), "{key}");
        }
    }
    twisted(
        |all| all["manifests"] = json!([]),
        "neither an index nor a manifest",
    );
    // A blob that is not its name's.
    for number in 0..3 {
        let made = plain();
        made.write();
        let mut blobs: Vec<_> = fs::read_dir(made.path().join("blobs/sha256"))
            .unwrap()
            .collect();
        blobs.sort_by_key(|blob| blob.as_ref().unwrap().file_name());
        let path = blobs[number].as_ref().unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        let error = import(made.path(), None).err().unwrap().to_string();
        assert!(
            error.contains("digest") || error.contains("damaged"),
            "{error}"
        );
    }
}

#[test]
fn of_an_index_the_hosts_image_is_taken_or_the_one_that_is_named() {
    let mut made = Made::new(&[BASE]);
    made.twist_index = |index| {
        let one = index["manifests"][0].clone();
        let platform = |architecture: &str| {
            let mut one = one.clone();
            one["digest"] = Digest::of(architecture.as_bytes()).to_string().into();
            one["platform"] = json!({"os": "linux", "architecture": architecture});
            one
        };
        let mut here = one.clone();
        here["platform"] = json!({"os": "linux", "architecture": go_name()});
        index["manifests"] = json!([platform("unknown"), platform("mips"), here]);
    };
    made.import().unwrap();
    made.twist_index = |index| {
        index["manifests"][0]["platform"] = json!({"os": "linux", "architecture": "mips"});
    };
    let said = made.refused();
    assert!(
        said.contains("no image for linux/") && said.contains("linux/mips"),
        "{said}"
    );
    made.twist_index = |index| {
        let mut other = index["manifests"][0].clone();
        other["annotations"] = json!({"org.opencontainers.image.ref.name": "u"});
        index["manifests"] = json!([index["manifests"][0], other]);
    };
    assert!(made.refused().contains("it has t, u"));
    import(made.path(), Some("u")).unwrap();
    let none = import(made.path(), Some("v")).err().unwrap().to_string();
    assert!(none.contains("no image \"v\" in it"), "{none}");
    let empty = tempfile::tempdir().unwrap();
    let none = import(empty.path(), None).err().unwrap().to_string();
    assert!(none.contains("no container images"), "{none}");
}

#[test]
fn archives_of_docker_old_and_new_are_the_same_image() {
    let made = Made::new(&[BASE, &[(Regular, "etc/new", "new")], BASE]);
    let expected = made.import().unwrap();
    let config = made.full_config();
    let name = format!("{}.json", Digest::of(&config).hex());
    let old = |name: &str| {
        let mut builder = tar::Builder::new(Vec::new());
        let mut put = |path: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, bytes).unwrap();
        };
        put(name, &config);
        put("one/layer.tar", &made.layers[0].1);
        put("two/layer.tar", &made.layers[1].1);
        let list = json!([{"Config": name, "RepoTags": ["web/app:2.0"],
            "Layers": ["one/layer.tar", "two/layer.tar", "three/layer.tar"]}]);
        put("manifest.json", &serde_json::to_vec(&list).unwrap());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(Symlink);
        header.set_size(0);
        builder
            .append_link(&mut header, "three/layer.tar", "../one/layer.tar")
            .unwrap();
        builder.into_inner().unwrap()
    };
    let file = made.path().join("saved.tar");
    for bytes in [old(&name), compressed("gzip", &old(&name)), old("any.json")] {
        fs::write(&file, bytes).unwrap();
        for tag in [None, Some("web/app:2.0"), Some("docker.io/web/app:2.0")] {
            let imported = import(&file, tag).unwrap();
            assert_eq!(names(&imported), names(&expected));
            assert_eq!(imported.main.draft.name, "oci-web-app");
            assert_eq!(imported.main.draft.version, "2.0");
        }
    }
    let other = import(&file, Some("web/app:3")).err().unwrap().to_string();
    assert!(other.contains("it has web/app:2.0"), "{other}");
    let wrong = format!("{}.json", Digest::of(b"other").hex());
    fs::write(&file, old(&wrong)).unwrap();
    let error = import(&file, None).err().unwrap().to_string();
    assert!(error.contains("configuration is not of digest"), "{error}");
    fs::remove_file(&file).unwrap();
    // As Docker 25 and later: the OCI's files and Docker's list of them.
    let ids = made.layers.iter().map(|(_, tar)| {
        made.blob(tar);
        format!("blobs/sha256/{}", Digest::of(tar).hex())
    });
    let path = format!("blobs/sha256/{}", Digest::of(&config).hex());
    let list = json!([{"Config": path, "RepoTags": null, "Layers": ids.collect::<Vec<_>>()}]);
    fs::write(
        made.path().join("manifest.json"),
        serde_json::to_vec(&list).unwrap(),
    )
    .unwrap();
    let archive = tempfile::Builder::new().suffix(".tar").tempfile().unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-C")
        .arg(made.path())
        .arg("-cf")
        .arg(archive.path());
    assert!(tar.arg(".").status().unwrap().success());
    assert_eq!(
        names(&import(archive.path(), None).unwrap()),
        names(&expected)
    );
}

#[test]
fn hostile_layers_are_refused() {
    let above = |entries: &[TarEntry<'_>]| Made::new(&[BASE, entries]).refused();
    let deep = ["d"; 600].join("/");
    assert!(above(&[(Regular, &deep, "x")]).contains("directories deep"));
    assert!(
        above(&[(Symlink, "a", "b"), (Symlink, "b", "a"), (Link, "c", "a/x")]).contains("no file")
    );
    assert!(above(&[(Regular, "f", "x"), (Regular, "f/x", "y")]).contains("not a directory"));
    assert!(above(&[(Regular, "a/.wh.", "")]).contains("without a name"));
    // Links lead anywhere within the image and nowhere else.
    let out: &[TarEntry<'_>] = &[
        (Symlink, "up", "../../.."),
        (Regular, "up/x", "x"),
        (Symlink, "abs", "/etc"),
        (Regular, "abs/y", "y"),
    ];
    let tree = laid(&Made::new(&[out]).import().unwrap());
    assert!(tree.lookup(b"x").is_some() && tree.lookup(b"etc/y").is_some());
    let mut bytes = layer(&[(Regular, "ab", "x")]);
    let name = b"..";
    let at = bytes
        .windows(4)
        .rposition(|four| four == b"ab\0\0")
        .unwrap();
    bytes[at..at + 2].copy_from_slice(name);
    let header = &mut bytes[at..at + 512];
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut made = Made::new(&[]);
    made.layers = vec![("", bytes)];
    assert!(made.refused().contains("leaves the archive"));
    made.layers = vec![("gzip", b"no tar".to_vec())];
    assert!(made.refused().contains("cut off"));
}

/// Makes layers whose entries meet: few names, in directories and to files that there were.
struct Maker {
    random: ChaCha8Rng,
    directories: Vec<String>,
    files: Vec<String>,
}

impl Maker {
    fn one_of(&mut self, all: &[String]) -> String {
        all[self.random.random_range(0..all.len())].clone()
    }

    fn path(&mut self) -> String {
        let parent = self.one_of(&self.directories.clone());
        let name = ["a", "b", "c", "d"][self.random.random_range(0..4)];
        format!("{parent}{name}")
    }

    /// An entry: kind, path, content.
    fn entry(&mut self, lowest: bool) -> (EntryType, String, String) {
        let path = self.path();
        match self.random.random_range(if lowest { 5..18 } else { 0..18 }) {
            0 | 1 => {
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
                let separator = if parent.is_empty() { "" } else { "/" };
                (
                    Regular,
                    format!("{parent}{separator}.wh.{name}"),
                    String::new(),
                )
            }
            2 => {
                let directory = self.one_of(&self.directories.clone());
                (Regular, format!("{directory}.wh..wh..opq"), String::new())
            }
            3 | 4 => (Link, path, self.one_of(&self.files.clone())),
            5..=8 => {
                self.directories.push(format!("{path}/"));
                (Directory, path, String::new())
            }
            9 => (Symlink, path, self.path()),
            10 => (Symlink, path, format!("/{}", self.path())),
            11 => (Symlink, path, format!("../{}", self.path())),
            12 => {
                let kind = [Fifo, Char, Block][self.random.random_range(0..3)];
                (kind, path, String::new())
            }
            _ => {
                self.files.push(path.clone());
                (Regular, path, "x".repeat(self.random.random_range(0..9)))
            }
        }
    }

    fn layers(&mut self) -> Vec<Vec<(EntryType, String, String)>> {
        let count = self.random.random_range(2..=4);
        let mut layer = |number| {
            let entries = self.random.random_range(2..10);
            (0..entries).map(|_| self.entry(number == 0)).collect()
        };
        (0..count).map(&mut layer).collect()
    }
}

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

/// Layers as they were made.
type MadeLayers = [Vec<(EntryType, String, String)>];

/// True if a layer has names in what a layer below has as a link.
fn goes_through_link(layers: &MadeLayers, path: &str) -> bool {
    let path = path.trim_start_matches('/');
    let below = format!("{path}/");
    let link = |layer: &Vec<(EntryType, String, String)>| {
        let last = layer.iter().rfind(|(_, name, _)| name == path);
        last.map(|(kind, ..)| *kind == Symlink)
    };
    let number = layers.iter().rposition(|layer| link(layer).is_some());
    number.is_some_and(|number| {
        let mut above = layers[number + 1..].iter().flatten();
        link(&layers[number]) == Some(true) && above.any(|(_, name, _)| name.starts_with(&below))
    })
}

/// True if a layer deletes a directory, alone or with one that it is in, and has names in
/// it, but no entry of it.
fn deletes_and_fills(layers: &MadeLayers, path: &str) -> bool {
    let path = path.trim_start_matches('/');
    let mut deletions = vec![".wh..wh..opq".to_owned()];
    for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
        let (parent, name) = path[..at].rsplit_once('/').unwrap_or(("", &path[..at]));
        let whiteout = format!("{parent}/.wh.{name}");
        deletions.push(whiteout.trim_start_matches('/').to_owned());
        if at < path.len() {
            deletions.push(format!("{}/.wh..wh..opq", &path[..at]));
        }
    }
    let below = format!("{path}/");
    layers.iter().any(|layer| {
        let mut names = layer.iter().map(|(_, name, _)| name);
        names.clone().any(|name| deletions.contains(name))
            && names.clone().any(|name| name.starts_with(&below))
            && !names.any(|name| name == path)
    })
}

#[test]
fn privileged_random_images_are_what_umoci_unpacks() {
    let test = "privileged_random_images_are_what_umoci_unpacks";
    let root = rustix::process::geteuid().is_root();
    if !root || Command::new("umoci").arg("--version").output().is_err() {
        println!("SKIPPED {test}: needs root and umoci");
        return;
    }
    let start = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs() as i64;
    let (mut same, mut copied, mut odd) = (0, 0, 0);
    let mut wrong: Vec<String> = Vec::new();
    for case in 0..100 {
        let mut maker = Maker {
            random: ChaCha8Rng::seed_from_u64(case),
            directories: vec![String::new()],
            files: vec!["a".to_owned()],
        };
        let layers = maker.layers();
        let borrowed = layers.iter().map(|layer| {
            let entries = layer.iter();
            entries
                .map(|(kind, path, content)| (*kind, &path[..], &content[..]))
                .collect()
        });
        let borrowed: Vec<Vec<TarEntry<'_>>> = borrowed.collect();
        let slices: Vec<&[TarEntry<'_>]> = borrowed.iter().map(Vec::as_slice).collect();
        let made = Made::new(&slices);
        let imported = made.import();
        let Some(expected) = unpacked(&made) else {
            continue;
        };
        let imported = match imported {
            Ok(imported) => imported,
            Err(error) => {
                wrong.push(format!("case {case}: {error}\n{layers:?}"));
                continue;
            }
        };
        let (found, expected) = (seen(&laid(&imported), start), seen(&expected, start));
        let is = |all: &BTreeMap<String, String>, path: &str, kind: &str| {
            all.get(path).is_some_and(|what| what.starts_with(kind))
        };
        // umoci makes directories where a link leads to nothing; here they take its place.
        let beyond_link = |path: &String| {
            let is_odd = is(&found, path, "directory") && is(&expected, path, "link");
            is_odd && goes_through_link(&layers, path)
        };
        if found.keys().any(beyond_link) {
            odd += 1;
            continue;
        }
        // umoci keeps a deleted directory's attributes if the layer has names in it but no
        // entry of it.
        let new = "directory 755 0:0 now {}";
        let kept = |path: &str| {
            let is_odd = is(&found, path, new) && is(&expected, path, "directory");
            is_odd && deletes_and_fills(&layers, path)
        };
        let paths: BTreeSet<&String> = found.keys().chain(expected.keys()).collect();
        let is_same = |path: &str| match (found.get(path), expected.get(path)) {
            // umoci gave the directory the time when it put something in.
            (Some(found), Some(expected)) if expected.contains(" now ") => {
                untimed(found) == untimed(expected)
            }
            (found, expected) => found == expected,
        };
        let differ = paths
            .into_iter()
            .filter(|path| !path.is_empty() && !is_same(path) && !kept(path));
        let differ: Vec<_> = differ
            .map(|path| (path, found.get(path), expected.get(path)))
            .collect();
        if !differ.is_empty() {
            wrong.push(format!(
                "case {case}: path, composed, umoci: {differ:#?}\n{layers:?}"
            ));
        }
        same += 1;
        let changed = |part: &&Part| part.draft.version != "1";
        copied += imported.split_off.iter().filter(changed).count();
    }
    assert!(
        wrong.is_empty(),
        "{} cases\n{}",
        wrong.len(),
        wrong[..wrong.len().min(4)].join("\n\n")
    );
    println!("{same} images, {copied} layers with links to layers below");
    assert!(same > 30 && copied > 3 && odd < 9, "{same} {copied} {odd}");
}
