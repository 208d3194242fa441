//! Tests of the tar importer: well-formed archives of each kind, and hostile ones.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Command;

use forelay_image::erofs::xattr::{OPAQUE, REPLACES};
use tar::Builder;

use super::*;

fn spool(directory: &Path) -> Spool {
    Spool::new(&directory.join("spool"), 1 << 20).unwrap()
}

fn entry(builder: &mut Builder<Vec<u8>>, kind: EntryType, name: &[u8], content: &[u8]) {
    let mut header = Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(1);
    header.set_gid(2);
    header.set_mtime(77);
    header.set_cksum();
    builder.append(&header, content).unwrap();
}

/// What came out of an archive, with the files that its tree points into.
struct Imported {
    tree: Tree,
    notes: Vec<String>,
    _directory: tempfile::TempDir,
    _spool: Spool,
}

impl Imported {
    fn kind(&self, path: &str) -> Option<&Kind> {
        let id = self.tree.lookup(path.as_bytes())?;
        Some(&self.tree.node(id).kind)
    }
}

fn import(bytes: &[u8]) -> Result<Imported, ImportError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    fs::write(&path, bytes).unwrap();
    let mut spool = spool(directory.path());
    let Files { tree, notes } = read_files(&path, &mut spool, Ownership::Keep)?;
    Ok(Imported {
        tree,
        notes,
        _directory: directory,
        _spool: spool,
    })
}

/// An archive of these entries: kind, name, link target or content.
fn archive(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for &(kind, name, text) in entries {
        if matches!(kind, EntryType::Link | EntryType::Symlink) {
            let mut header = Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            header.set_mode(0o644);
            builder.append_link(&mut header, name, text).unwrap();
        } else {
            entry(&mut builder, kind, name.as_bytes(), text.as_bytes());
        }
    }
    builder.into_inner().unwrap()
}

fn content(tree: &Tree, path: &[u8]) -> Vec<u8> {
    tree.file(path).unwrap().read().unwrap()
}

#[test]
fn files_links_devices_and_binary_xattrs_are_read() {
    let mut builder = Builder::new(Vec::new());
    entry(&mut builder, EntryType::Directory, b"./", b"");
    let value: &[u8] = b"\x01\n\x00\n=x";
    let long = format!("deep/{}", "n".repeat(180));
    let records = [("SCHILY.xattr.user.raw", value), ("mtime", b"-1.5")];
    builder.append_pax_extensions(records).unwrap();
    entry(&mut builder, EntryType::Regular, b"file", b"hello");
    builder
        .append_pax_extensions([("path", long.as_bytes())])
        .unwrap();
    entry(&mut builder, EntryType::Regular, b"short", b"long name");
    let mut link = Header::new_gnu();
    link.set_entry_type(EntryType::Link);
    link.set_size(0);
    link.set_mode(0o644);
    builder.append_link(&mut link, "again", "./file").unwrap();
    let imported = import(&builder.into_inner().unwrap()).unwrap();
    let tree = &imported.tree;
    let file = tree.lookup(b"file").unwrap();
    assert_eq!(tree.lookup(b"again"), Some(file));
    assert_eq!(content(tree, b"file"), b"hello");
    assert_eq!(content(tree, long.as_bytes()), b"long name");
    let attributes = &tree.node(file).attributes;
    assert_eq!((attributes.uid, attributes.gid), (1, 2));
    assert_eq!((attributes.mtime_s, attributes.mtime_ns), (-2, 500_000_000));
    assert_eq!(attributes.xattrs[&b"user.raw"[..]], value);
    assert_eq!(tree.node(ROOT).attributes.mtime_s, 77);
}

#[test]
fn hostile_and_damaged_archives_are_refused() {
    let hostile: [&[u8]; 3] = [b"../etc/passwd", b"a/../../b", b"/.."];
    for name in hostile {
        let mut builder = Builder::new(Vec::new());
        entry(&mut builder, EntryType::Regular, name, b"x");
        let error = import(&builder.into_inner().unwrap()).err().unwrap();
        assert!(error.to_string().contains("leaves the archive"), "{error}");
    }
    // A file placed through a symbolic link that leaves the archive, as GNU tar refuses it.
    let mut builder = Builder::new(Vec::new());
    let mut link = Header::new_gnu();
    link.set_entry_type(EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "out", "/etc").unwrap();
    entry(&mut builder, EntryType::Regular, b"out/passwd", b"x");
    let error = import(&builder.into_inner().unwrap()).err().unwrap();
    assert!(matches!(error, ImportError::Tree { .. }), "{error}");

    let mut builder = Builder::new(Vec::new());
    entry(&mut builder, EntryType::Regular, b"file", &[7; 5000]);
    let good = builder.into_inner().unwrap();
    for cut in [100, 600, 4000] {
        assert!(import(&good[..cut]).is_err());
    }
    let mut flipped = good.clone();
    flipped[3] ^= 1;
    assert!(import(&flipped).is_err());
    assert!(import(b"no tar").is_err());
}

#[test]
fn an_archive_that_unpacks_to_too_much_is_refused() {
    use flate2::{Compression, write::GzEncoder};
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&vec![0; 3 << 20]).unwrap();
    let error = import(&encoder.finish().unwrap()).err().unwrap();
    assert!(matches!(error, ImportError::TooLarge { .. }), "{error}");
}

#[test]
fn an_archive_that_takes_too_much_memory_to_decompress_is_refused() {
    let mut lzma = vec![0x5d, 0, 0, 0, 0x80];
    lzma.extend([0xff; 8]);
    lzma.extend([0; 64]);
    // The block's header says the size of the dictionary: 1.5 GiB.
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&archive(&[])).unwrap();
    let mut xz = xz.finish().unwrap();
    assert_eq!(xz[12..16], [2, 0, 0x21, 1]);
    xz[16] = 37;
    let mut sum = flate2::Crc::new();
    sum.update(&xz[12..20]);
    xz[20..24].copy_from_slice(&sum.sum().to_le_bytes());
    for bytes in [lzma, xz] {
        let error = import(&bytes).err().unwrap().to_string();
        assert!(error.contains("512 MiB of memory"), "{error}");
    }
}

#[test]
fn names_that_are_deep_or_make_too_many_directories_are_refused() {
    let long = |first: &str, parts: usize, last: &str| {
        let path = [vec![first], vec!["d"; parts - 2], vec![last]];
        path.concat().join("/")
    };
    let placed = |entries: &[(EntryType, &str, &str)], names: &[String]| {
        let mut builder = Builder::new(Vec::new());
        for name in names {
            let path = [("path", name.as_bytes())];
            builder.append_pax_extensions(path).unwrap();
            entry(&mut builder, EntryType::Regular, b"short", b"");
        }
        let (mut bytes, long) = (archive(entries), builder.into_inner().unwrap());
        bytes.truncate(bytes.len() - 1024);
        [bytes, long].concat()
    };
    assert!(import(&placed(&[], &[long("a", 512, "f")])).is_ok());
    let error = import(&placed(&[], &[long("a", 513, "f")])).err().unwrap();
    assert!(error.to_string().contains("directories deep"), "{error}");
    let target = long("a", 300, "d");
    let link = [(EntryType::Symlink, "l", &target[..])];
    let error = import(&placed(&link, &[long("l", 300, "f")]))
        .err()
        .unwrap();
    assert!(error.to_string().contains("directories deep"), "{error}");

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    for last in ["f", ".wh.f"] {
        let names = ["a", "b", "c"].map(|first| long(first, 400, last));
        fs::write(&path, placed(&[], &names)).unwrap();
        let read = |limit: usize| {
            let mut spool = spool(directory.path());
            {
                let room = TarRoom {
                    nodes: limit,
                    ..TarRoom::default()
                };
                read_within(&path, &path, &mut spool, Ownership::Keep, room)
            }
        };
        assert!(read(1201).is_ok(), "{last}");
        let error = read(1200).err().unwrap();
        assert!(matches!(error, ImportError::TooLarge { .. }), "{error}");
    }
}

/// GNU tar is the referee: what it packs comes out with the same content.
#[test]
fn archives_of_gnu_tar_are_read_in_every_compression() {
    let directory = tempfile::tempdir().unwrap();
    let from = directory.path().join("from");
    fs::create_dir_all(from.join("sub")).unwrap();
    let text = b"some text that repeats ".repeat(1000);
    fs::write(from.join("sub/text"), &text).unwrap();
    let long = "l".repeat(240);
    fs::write(from.join("sub").join(&long), b"long").unwrap();
    let holes = File::create(from.join("holes")).unwrap();
    holes.set_len(700_000).unwrap();
    for at in [
        4096u64, 100_000, 200_000, 300_000, 400_000, 500_000, 699_000,
    ] {
        holes.write_all_at(b"data", at).unwrap();
    }
    for (option, format) in [
        ("--gzip", "gnu"),
        ("--xz", "gnu"),
        ("--zstd", "pax"),
        ("--bzip2", "pax"),
        ("--lzma", "gnu"),
        ("--sparse", "gnu"),
        ("--sparse --sparse-version=0.0", "pax"),
        ("--sparse --sparse-version=0.1", "pax"),
        ("--sparse --sparse-version=1.0", "pax"),
    ] {
        let path = directory.path().join("a.tar");
        let made = Command::new("tar")
            .args(option.split(' '))
            .args([&format!("--format={format}"), "-C"])
            .arg(&from)
            .arg("-cf")
            .arg(&path)
            .arg(".")
            .status()
            .unwrap();
        assert!(made.success());
        let mut spool = spool(directory.path());
        let tree = read_tar(&path, &mut spool, Ownership::Keep).unwrap().tree;
        assert_eq!(content(&tree, b"sub/text"), text, "{option}");
        assert_eq!(content(&tree, format!("sub/{long}").as_bytes()), b"long");
        assert_eq!(
            content(&tree, b"holes"),
            fs::read(from.join("holes")).unwrap(),
            "{option}"
        );
    }
}

#[test]
fn a_sparse_file_with_many_pieces_is_read_and_hostile_maps_are_refused() {
    let map: String = (0..60)
        .map(|piece| format!("{}\n4\n", piece * 100))
        .collect();
    let map = format!("60\n{map}");
    let sparse = |map: &str, size: &str| {
        let mut builder = Builder::new(Vec::new());
        let records = [
            ("GNU.sparse.major", &b"1"[..]),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"real/name"),
            ("GNU.sparse.realsize", size.as_bytes()),
        ];
        builder.append_pax_extensions(records).unwrap();
        let mut stored = map.as_bytes().to_vec();
        stored.resize(stored.len().next_multiple_of(512), 0);
        stored.extend_from_slice(&b"data".repeat(60));
        entry(
            &mut builder,
            EntryType::Regular,
            b"GNUSparseFile.1/name",
            &stored,
        );
        import(&builder.into_inner().unwrap())
    };
    let imported = sparse(&map, "6000").unwrap();
    let bytes = content(&imported.tree, b"real/name");
    assert_eq!(bytes.len(), 6000);
    assert!(bytes.chunks(100).all(|piece| piece.starts_with(b"data\0")));
    assert!(imported.tree.lookup(b"GNUSparseFile.1").is_none());
    for bad in [
        "",
        "x\n",
        "1\n0\n",
        "1\n99\n9999\n",
        "99999999999\n",
        "1\n18446744073709551615\n2\n",
    ] {
        assert!(sparse(bad, "6000").is_err(), "{bad:?}");
    }
    assert!(matches!(
        sparse(&map, "9000000000000").err().unwrap(),
        ImportError::TooLarge { .. }
    ));
}

#[test]
fn attributes_that_an_image_cannot_hold_are_left_out_and_named() {
    let mut builder = Builder::new(Vec::new());
    let kept = ["user.mime", "security.capability", "trusted.x"];
    let dropped = [
        "com.apple.provenance",
        "com.apple.quarantine",
        "security.selinux",
        "trusted.overlay.origin",
        "system.nfs4_acl",
    ];
    let records: Vec<String> = kept
        .iter()
        .chain(&dropped)
        .map(|name| format!("SCHILY.xattr.{name}"))
        .collect();
    let records = records.iter().map(|key| (key.as_str(), &b"v"[..]));
    builder.append_pax_extensions(records).unwrap();
    entry(&mut builder, EntryType::Regular, b"app", b"x");
    let imported = import(&builder.into_inner().unwrap()).unwrap();
    let id = imported.tree.lookup(b"app").unwrap();
    let xattrs = &imported.tree.node(id).attributes.xattrs;
    assert!(kept.iter().all(|name| xattrs.contains_key(name.as_bytes())));
    assert_eq!(xattrs.len(), kept.len());
    let [note] = &imported.notes[..] else {
        panic!("{:?}", imported.notes);
    };
    assert!(dropped.iter().all(|name| note.contains(name)), "{note}");
    // The writer takes what is left.
    let mut image = std::io::Cursor::new(Vec::new());
    forelay_image::erofs::write::write_image(&imported.tree, &mut image).unwrap();
}

#[test]
fn lists_name_the_archives_accounts_and_one_left_out_widens_no_rights() {
    let mut builder = Builder::new(Vec::new());
    let lists = [
        (
            "named",
            "user::rw-,user:me:r--,group::---,mask::rw-,other::---",
        ),
        (
            "unknown",
            "user::rw-,user:stranger:rw-,group::---,mask::rw-,other::---",
        ),
        (
            "within",
            "user::rw-,group:strangers:rw-,group::rwx,mask::r-x,other::---",
        ),
        ("malformed", "user::rw-,group::r--,mask::rw-,nonsense"),
        ("empty", "nonsense"),
        (
            "directory",
            "user::rw-,user:stranger:rw-,group::---,mask::rw-,other::---",
        ),
    ];
    for (name, list) in lists {
        let list = [("SCHILY.acl.access", list.as_bytes())];
        builder.append_pax_extensions(list).unwrap();
        let mut header = Header::new_ustar();
        let kind = match name {
            "directory" => EntryType::Directory,
            _ => EntryType::Regular,
        };
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(0o660);
        builder.append_data(&mut header, name, &b""[..]).unwrap();
    }
    let passwd = b"me:x:1234:1234::/:/bin/sh\nme:x:1:1::/:\n";
    entry(&mut builder, EntryType::Regular, b"etc/passwd", passwd);
    let imported = import(&builder.into_inner().unwrap()).unwrap();
    let attributes = |path: &str| {
        let id = imported.tree.lookup(path.as_bytes()).unwrap();
        &imported.tree.node(id).attributes
    };
    let named = attributes("named");
    assert_eq!(named.mode, 0o660);
    let value = &named.xattrs[&b"system.posix_acl_access"[..]];
    assert_eq!(value[4 + 8..4 + 16], [2, 0, 4, 0, 0xd2, 4, 0, 0]);
    for (path, mode) in [
        ("unknown", 0o600),
        ("within", 0o650),
        ("malformed", 0o640),
        ("empty", 0o600),
        ("directory", 0o600),
    ] {
        assert_eq!(attributes(path).mode, mode, "{path}");
        assert!(attributes(path).xattrs.is_empty(), "{path}");
    }
    assert!(
        imported.notes[0].contains("stranger"),
        "{:?}",
        imported.notes
    );
}

#[test]
fn deletions_of_an_image_layer_become_those_of_overlayfs() {
    use EntryType::{Directory, Regular};
    let imported = import(&archive(&[
        (Regular, "etc/.wh.motd", ""),
        (Regular, "usr/share/doc/.wh..wh..opq", ""),
        (Directory, "usr/share/doc/", ""),
        (Regular, "usr/share/doc/new", "x"),
        (Regular, "etc/.wh.kept", ""),
        (Regular, "etc/kept", "this layer's own"),
        (Regular, ".wh.top", ""),
        (Regular, ".wh..wh.plnk", ""),
        (Regular, "opt/app/run", "content"),
    ]))
    .unwrap();
    for deleted in ["etc/motd", "top"] {
        assert!(imported.kind(deleted).unwrap().is_whiteout(), "{deleted}");
    }
    assert_eq!(content(&imported.tree, b"etc/kept"), b"this layer's own");
    let doc = imported.tree.lookup(b"usr/share/doc").unwrap();
    let xattrs = &imported.tree.node(doc).attributes.xattrs;
    assert_eq!(xattrs[&b"trusted.overlay.opaque"[..]], b"y");
    assert_eq!(imported.tree.entries(doc).unwrap().len(), 1);
    assert_eq!(imported.tree.entries(ROOT).unwrap().len(), 4);
    assert!(
        imported.notes[0].contains("deletes 4 names"),
        "{:?}",
        imported.notes
    );
    for name in [".wh.", "etc/.wh..", "etc/.wh..."] {
        let error = import(&archive(&[(Regular, name, "")])).err().unwrap();
        assert!(error.to_string().contains(".wh."), "{error}");
    }
}

#[test]
fn what_an_image_layer_has_stands_as_it_is() {
    use EntryType::{Directory, Regular, Symlink};
    let entries = [
        (Regular, "etc/.wh.x.d", ""),
        (Symlink, "etc/x.d", "../y"),
        (Directory, "etc/again/", ""),
        (Regular, "etc/again/new", "x"),
        (Regular, "etc/.wh.again", ""),
        (Directory, "opt/", ""),
        (Symlink, "opt/dir", "elsewhere"),
    ];
    let marks = |imported: &Imported, path: &str| {
        let id = imported.tree.lookup(path.as_bytes()).unwrap();
        let xattrs = &imported.tree.node(id).attributes.xattrs;
        [REPLACES, OPAQUE].map(|mark| xattrs.get(mark).is_some_and(|value| value == b"y"))
    };
    let imported = import(&archive(&entries)).unwrap();
    for (path, expected) in [
        ("etc", [false, false]),
        ("etc/x.d", [true, false]),
        ("etc/again", [true, true]),
        ("etc/again/new", [true, false]),
        ("opt", [true, false]),
        ("opt/dir", [true, false]),
    ] {
        assert_eq!(marks(&imported, path), expected, "{path}");
    }
    let files = import(&archive(&[entries[1], entries[5], entries[6]])).unwrap();
    for path in ["etc", "etc/x.d", "opt", "opt/dir"] {
        assert_eq!(marks(&files, path), [false; 2], "{path}");
    }
}

#[test]
fn archives_of_whole_images_are_refused_with_what_to_do() {
    use EntryType::Regular;
    let manifest = r#"[{"Config":"c.json","RepoTags":["a:b"],"Layers":["l/layer.tar"]}]"#;
    let layout = r#"{"imageLayoutVersion": "1.0.0"}"#;
    for image in [
        // Before Docker 25, since then, and OCI's own form.
        &[
            (Regular, "l/layer.tar", "x"),
            (Regular, "manifest.json", manifest),
        ][..],
        &[
            (Regular, "blobs/sha256/x", "x"),
            (Regular, "manifest.json", manifest),
            (Regular, "oci-layout", layout),
            (Regular, "index.json", "{}"),
        ],
        &[
            (Regular, "./oci-layout", layout),
            (Regular, "./index.json", "{}"),
        ],
    ] {
        let error = import(&archive(image)).err().unwrap().to_string();
        assert!(error.contains("--oci"), "{error}");
    }
    let other = [
        (Regular, "manifest.json", "{}"),
        (Regular, "index.json", "{}"),
    ];
    assert!(import(&archive(&other)).is_ok());
}

#[test]
fn links_that_the_archive_made_are_followed_as_gnu_tar_does() {
    use EntryType::{Directory, Link, Regular, Symlink};
    let entries = [
        (Symlink, "lib", "usr/lib"),
        (Directory, "usr/lib/", ""),
        (Symlink, "usr/lib/now", "versions/2"),
        (Directory, "usr/lib/versions/2/", ""),
        (Regular, "lib/now/file", "two"),
        (Link, "again", "lib/now/file"),
        (Directory, "lib/now/sub/", ""),
        (Symlink, "bin", "usr/bin"),
        (Regular, "bin/tool", "not there before"),
    ];
    let bytes = archive(&entries);
    let imported = import(&bytes).unwrap();
    let tree = &imported.tree;
    assert_eq!(content(tree, b"usr/lib/versions/2/file"), b"two");
    assert_eq!(
        tree.lookup(b"again"),
        tree.lookup(b"usr/lib/versions/2/file")
    );
    assert!(tree.lookup(b"usr/lib/versions/2/sub").is_some());
    assert_eq!(content(tree, b"usr/bin/tool"), b"not there before");
    assert!(matches!(imported.kind("lib"), Some(Kind::Symlink(_))));
    // GNU tar is the referee for all but the last entry, whose directory it does not make.
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("a.tar"), archive(&entries[..7])).unwrap();
    let unpacked = Command::new("tar")
        .args(["-xf", "a.tar"])
        .current_dir(directory.path())
        .status()
        .unwrap();
    assert!(unpacked.success());
    let file = fs::read(directory.path().join("usr/lib/versions/2/file")).unwrap();
    assert_eq!(file, b"two");

    for target in ["/etc", "../etc", "usr/../../etc", "loop"] {
        let entries = [(Symlink, "loop", target), (Regular, "loop/file", "x")];
        assert!(import(&archive(&entries)).is_err(), "{target}");
    }
}

#[test]
fn owners_and_times_that_octal_digits_do_not_hold_are_kept() {
    let mut builder = Builder::new(Vec::new());
    for (name, mode, time) in [(b"late", 0o4755, Some(1 << 33)), (b"past", 0o1777, None)] {
        let mut header = Header::new_gnu();
        header.as_old_mut().name[..4].copy_from_slice(name);
        header.set_entry_type(EntryType::Regular);
        header.set_size(0);
        header.set_mode(mode);
        header.set_uid(70_000);
        header.set_gid(3_000_000_000);
        match time {
            Some(time) => header.set_mtime(time),
            // Before 1970: a negative number, in base 256.
            None => {
                header.as_old_mut().mtime = [0xff; 12];
                header.as_old_mut().mtime[11] = 0xfb;
            }
        }
        header.set_cksum();
        builder.append(&header, &b""[..]).unwrap();
    }
    let imported = import(&builder.into_inner().unwrap()).unwrap();
    for (name, mode, time) in [("late", 0o4755, 1 << 33), ("past", 0o1777, -5)] {
        let id = imported.tree.lookup(name.as_bytes()).unwrap();
        let kept = &imported.tree.node(id).attributes;
        let found = (kept.mode, kept.uid, kept.gid, kept.mtime_s);
        assert_eq!(found, (mode, 70_000, 3_000_000_000, time), "{name}");
    }
}

#[test]
fn of_a_name_that_comes_again_the_last_counts() {
    use EntryType::{Directory, Link, Regular, Symlink};
    let imported = import(&archive(&[
        (Regular, "d/a", "first"),
        (Link, "d/l", "d/a"),
        (Regular, "d/a", "second"),
        (Directory, "d/sub/", ""),
        (Regular, "d/sub/x", "x"),
        (Directory, "d/sub/", ""),
        (Symlink, "d/s", "a"),
        (Regular, "d/s", "no link"),
        (Directory, "k", ""),
        (Regular, "k/x", "x"),
        (Regular, "k", "a file now"),
        (Regular, "j", "a file"),
        (Directory, "j", ""),
        (Regular, "j/x", "x"),
    ]))
    .unwrap();
    let tree = &imported.tree;
    assert_eq!(content(tree, b"d/a"), b"second");
    assert_eq!(content(tree, b"d/l"), b"first");
    assert_eq!(content(tree, b"d/sub/x"), b"x");
    assert_eq!(content(tree, b"d/s"), b"no link");
    assert_eq!(content(tree, b"k"), b"a file now");
    assert_eq!(content(tree, b"j/x"), b"x");
    let below_a_file = [(Regular, "k", "a file"), (Regular, "k/x", "x")];
    assert!(import(&archive(&below_a_file)).is_err());
}

#[test]
fn hard_links_to_all_but_directories_work_and_none_before_its_target() {
    use EntryType::{Directory, Fifo, Link, Regular, Symlink};
    let imported = import(&archive(&[
        (Symlink, "s", "x"),
        (Link, "s2", "./s"),
        (Regular, "f", "x"),
        (Link, "g", "f"),
        (Link, "h", "g"),
        (Link, "f", "f"),
        (Fifo, "p", ""),
        (Link, "p2", "/p"),
    ]))
    .unwrap();
    let tree = &imported.tree;
    for (one, other) in [("s", "s2"), ("f", "g"), ("f", "h"), ("p", "p2")] {
        assert_eq!(tree.lookup(one.as_bytes()), tree.lookup(other.as_bytes()));
    }
    let to_directory = [(Directory, "d", ""), (Link, "e", "d")];
    assert!(import(&archive(&to_directory)).is_err());
    let early = [(Link, "b", "a"), (Regular, "a", "x")];
    let error = import(&archive(&early)).err().unwrap();
    assert!(error.to_string().contains("not before it"), "{error}");
}

#[test]
fn what_follows_an_archive_is_none_of_it_and_what_is_cut_off_is_refused() {
    use EntryType::Regular;
    let (one, two) = (
        archive(&[(Regular, "one", "content")]),
        archive(&[(Regular, "two", "2")]),
    );
    let both = import(&[&one[..], &two].concat()).unwrap();
    assert_eq!(both.tree.reachable().len(), 2);
    assert_eq!(both.notes, Vec::<String>::new());
    // One block of zeros is no end.
    let lone = import(&[&one[..1536], &two].concat()).unwrap();
    assert_eq!(content(&lone.tree, b"two"), b"2");
    for unended in [&one[..1024], &one[..1536]] {
        let imported = import(unended).unwrap();
        assert_eq!(content(&imported.tree, b"one"), b"content");
        let told = imported.notes.iter().any(|note| note.contains("no end"));
        assert_eq!(told, unended.len() == 1024, "{:?}", imported.notes);
    }
    assert!(import(&one[..512]).is_err());
    assert!(import(&one[..515]).is_err());
}

#[test]
fn names_are_kept_byte_for_byte() {
    let long = [b'x'; 255];
    let names: [&[u8]; 6] = [
        b"caf\xe9",
        b"new\nline",
        "你好".as_bytes(),
        b"esc\x1b[31m",
        b"a\\b",
        &long,
    ];
    let mut builder = Builder::new(Vec::new());
    for name in names {
        builder.append_pax_extensions([("path", name)]).unwrap();
        entry(&mut builder, EntryType::Regular, b"short", name);
    }
    let target = "t".repeat(4000);
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Symlink);
    header.set_size(0);
    builder.append_link(&mut header, "link", &target).unwrap();
    entry(&mut builder, EntryType::Regular, b"/abs", b"relative");
    let imported = import(&builder.into_inner().unwrap()).unwrap();
    for name in names {
        assert_eq!(content(&imported.tree, name), name);
    }
    let Some(Kind::Symlink(to)) = imported.kind("link") else {
        panic!("no link");
    };
    assert_eq!(to, target.as_bytes());
    assert_eq!(content(&imported.tree, b"abs"), b"relative");
    let mut builder = Builder::new(Vec::new());
    builder
        .append_pax_extensions([("path", &[b'x'; 256][..])])
        .unwrap();
    entry(&mut builder, EntryType::Regular, b"short", b"");
    assert!(import(&builder.into_inner().unwrap()).is_err());
}

#[test]
fn compressions_that_are_not_read_are_named() {
    for (first, word) in [
        (&b"LZIP\x01\x0c\0\0"[..], "lzip"),
        (b"\x89LZO\0\r\n\x1a", "lzop"),
        (b"\x1f\x9d\x90\0\0\0\0\0", "compress"),
        (b"\x04\x22\x4d\x18\0\0\0\0", "lz4"),
        (b"PK\x03\x04\0\0\0\0", "zip"),
    ] {
        let error = import(first).err().unwrap();
        let shown = format!("{error} {:?}", std::error::Error::source(&error));
        assert!(shown.contains(word), "{shown}");
    }
}

#[test]
fn what_an_archive_holds_in_memory_and_claims_on_disk_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    let read = |held_bytes: u64| {
        let mut spool = spool(directory.path());
        let room = TarRoom {
            held_bytes,
            ..TarRoom::default()
        };
        read_within(&path, &path, &mut spool, Ownership::Keep, room)
    };
    let entry = |builder: &mut tar::Builder<Vec<u8>>, name: &str, records: &[(&str, &[u8])]| {
        builder
            .append_pax_extensions(records.iter().copied())
            .unwrap();
        let mut header = Header::new_ustar();
        header.set_size(0);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &[][..]).unwrap();
    };
    let value = vec![b'x'; 1000];
    let note = [("SCHILY.xattr.user.note", &value[..])];
    let mut builder = tar::Builder::new(Vec::new());
    for number in 0..10 {
        entry(&mut builder, &format!("f{number}"), &note);
    }
    fs::write(&path, builder.into_inner().unwrap()).unwrap();
    let bytes = 10 * (2 + "SCHILY.xattr.user.note".len() + value.len()) as u64;
    assert!(read(bytes).is_ok());
    let error = read(bytes - 1).err().unwrap().to_string();
    assert!(error.contains("names, links and attributes"), "{error}");
    // One entry alone: attributes, and headers that say nothing.
    let large = vec![b'x'; 300 << 10];
    for (key, count, said) in [
        (
            "SCHILY.xattr.user.large",
            1,
            "bytes of names and attributes",
        ),
        ("comment", 4, "extension headers of"),
    ] {
        let mut builder = tar::Builder::new(Vec::new());
        for _ in 0..count {
            builder.append_pax_extensions([(key, &large[..])]).unwrap();
        }
        entry(&mut builder, "f", &note);
        fs::write(&path, builder.into_inner().unwrap()).unwrap();
        let error = read(u64::MAX).err().unwrap().to_string();
        assert!(error.contains(said), "{error}");
    }
    // Files that are all holes: each fits, both do not.
    let mut builder = tar::Builder::new(Vec::new());
    for name in ["a", "b"] {
        let size = [("GNU.sparse.size", &b"700000"[..]), ("GNU.sparse.map", b"")];
        entry(&mut builder, name, &size);
    }
    fs::write(&path, builder.into_inner().unwrap()).unwrap();
    let error = read(u64::MAX).err().unwrap().to_string();
    assert!(error.contains("bytes when unpacked"), "{error}");
}
