//! What GNU tar and the compressors write and accept: their own files are the input, and
//! what they unpack is what has to come out.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use rustix::fs::{XattrFlags, lsetxattr};

use super::*;
use crate::dir::read_directory;

fn import(bytes: &[u8]) -> Result<Files, ImportError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    fs::write(&path, bytes).unwrap();
    let mut spool = Spool::new(&directory.path().join("spool"), 1 << 20).unwrap();
    read_tar(&path, &mut spool, Ownership::Keep)
}

fn compressed(compression: &str, bytes: &[u8]) -> Vec<u8> {
    match compression {
        "gzip" => {
            let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            to.write_all(bytes).unwrap();
            to.finish().unwrap()
        }
        "bzip2" => {
            let mut to = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            to.write_all(bytes).unwrap();
            to.finish().unwrap()
        }
        "xz" => {
            let mut to = liblzma::write::XzEncoder::new(Vec::new(), 1);
            to.write_all(bytes).unwrap();
            to.finish().unwrap()
        }
        _ => zstd::stream::encode_all(bytes, 1).unwrap(),
    }
}

#[test]
fn compressed_archives_have_members_and_zeros_behind_them() {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_size(7);
    header.set_cksum();
    builder
        .append_data(&mut header, "file", &b"content"[..])
        .unwrap();
    let archive = builder.into_inner().unwrap();
    let (head, tail) = archive.split_at(700);
    // What zstd's format has for others' use, and a frame that holds nothing.
    let skipped = [&[0x51, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    for compression in ["gzip", "bzip2", "xz", "zstd"] {
        let whole = compressed(compression, &archive);
        let parts = [compressed(compression, head), compressed(compression, tail)];
        let nothing = compressed(compression, b"");
        let mut given = vec![
            whole.clone(),
            [&whole[..], &[0; 512]].concat(),
            parts.concat(),
            [&parts[0][..], &nothing, &parts[1], &[0; 1024]].concat(),
        ];
        if compression == "zstd" {
            given.push([&skipped[..], &whole].concat());
            given.push([&skipped[..], &parts[0], &skipped, &parts[1], &skipped].concat());
        }
        for (number, bytes) in given.iter().enumerate() {
            let imported = import(bytes);
            let imported =
                imported.unwrap_or_else(|error| panic!("{compression} {number}: {error}"));
            assert!(
                imported.tree.file(b"file").is_some(),
                "{compression} {number}"
            );
        }
        for bad in [
            [&whole[..], b"something else"].concat(),
            [&whole[..], &[0; 512], b"x"].concat(),
            whole[..whole.len() - 9].to_vec(),
        ] {
            assert!(import(&bad).is_err(), "{compression}");
        }
    }
}

/// An access control list as Linux keeps it: tag, permissions, number of each entry.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    value
}

#[test]
fn access_control_lists_come_out_as_tar_unpacks_them() {
    const NO_ID: u32 = u32::MAX;
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let from = directory.path().join("from");
    fs::create_dir_all(from.join("shared")).unwrap();
    fs::write(from.join("shared/file"), b"x").unwrap();
    fs::write(from.join("plain"), b"x").unwrap();
    let access = [
        (1, 6, NO_ID),
        (2, 4, 33),
        (2, 7, 1234),
        (4, 4, NO_ID),
        (8, 6, 4),
        (16, 7, NO_ID),
        (32, 0, NO_ID),
    ];
    let default = [(1, 7, NO_ID), (4, 5, NO_ID), (32, 0, NO_ID)];
    let set = |path: &str, name: &str, entries: &[(u16, u16, u32)]| {
        lsetxattr(from.join(path), name, &acl(entries), XattrFlags::empty())
    };
    if set("shared/file", "system.posix_acl_access", &access).is_err() {
        println!(
            "SKIPPED access_control_lists_come_out_as_tar_unpacks_them: not on this file system"
        );
        return;
    }
    set("shared", "system.posix_acl_access", &access).unwrap();
    set("shared", "system.posix_acl_default", &default).unwrap();
    lsetxattr(
        from.join("plain"),
        "user.note",
        b"a note",
        XattrFlags::empty(),
    )
    .unwrap();
    let tar = |arguments: &[&str], at: &Path| {
        let archive = directory.path().join("a.tar");
        let mut command = Command::new("tar");
        command.args([
            "--acls",
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
        ]);
        command
            .args(arguments)
            .arg("-f")
            .arg(archive)
            .arg("-C")
            .arg(at);
        command
    };
    assert!(
        tar(&["-c", "--format=pax"], &from)
            .arg(".")
            .status()
            .unwrap()
            .success()
    );
    let to = directory.path().join("to");
    fs::create_dir(&to).unwrap();
    assert!(tar(&["-x"], &to).status().unwrap().success());
    let expected = read_directory(&to, Ownership::Keep).unwrap().tree;
    let found = import(&fs::read(directory.path().join("a.tar")).unwrap()).unwrap();
    assert_eq!(found.notes, Vec::<String>::new());
    for path in ["shared", "shared/file", "plain"] {
        let attributes = |tree: &Tree| {
            let id = tree.lookup(path.as_bytes()).unwrap();
            let attributes = tree.node(id).attributes.clone();
            (attributes.mode, attributes.xattrs)
        };
        assert_eq!(attributes(&found.tree), attributes(&expected), "{path}");
        assert!(!attributes(&found.tree).1.is_empty(), "{path}");
    }
}
