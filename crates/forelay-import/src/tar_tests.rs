//! Tests of the tar importer: well-formed archives of each kind, and hostile ones.

use std::fs;
use std::process::Command;

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

fn import(bytes: &[u8]) -> Result<(Tree, tempfile::TempDir, Spool), ImportError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.tar");
    fs::write(&path, bytes).unwrap();
    let mut spool = spool(directory.path());
    let tree = read_tar(&path, &mut spool, Ownership::Keep)?;
    Ok((tree, directory, spool))
}

fn content(tree: &Tree, path: &[u8]) -> Vec<u8> {
    let id = tree.lookup(path).unwrap();
    match &tree.node(id).kind {
        Kind::File(FileData::Bytes(bytes)) => bytes.to_vec(),
        Kind::File(FileData::HostFile { path, offset, len }) => {
            let mut bytes = vec![0; *len as usize];
            let file = File::open(path).unwrap();
            file.read_exact_at(&mut bytes, *offset).unwrap();
            bytes
        }
        other => panic!("{other:?}"),
    }
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
    let (tree, _directory, _spool) = import(&builder.into_inner().unwrap()).unwrap();
    let file = tree.lookup(b"file").unwrap();
    assert_eq!(tree.lookup(b"again"), Some(file));
    assert_eq!(content(&tree, b"file"), b"hello");
    assert_eq!(content(&tree, long.as_bytes()), b"long name");
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
        let error = import(&builder.into_inner().unwrap()).unwrap_err();
        assert!(error.to_string().contains("leaves the archive"), "{error}");
    }
    // A file placed through a symbolic link.
    let mut builder = Builder::new(Vec::new());
    let mut link = Header::new_gnu();
    link.set_entry_type(EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, "out", "/etc").unwrap();
    entry(&mut builder, EntryType::Regular, b"out/passwd", b"x");
    let error = import(&builder.into_inner().unwrap()).unwrap_err();
    assert!(matches!(error, ImportError::Tree { .. }), "{error}");

    let mut builder = Builder::new(Vec::new());
    entry(&mut builder, EntryType::Regular, b"file", &[7; 5000]);
    let good = builder.into_inner().unwrap();
    for cut in [100, 600, 4000] {
        import(&good[..cut]).unwrap_err();
    }
    let mut flipped = good.clone();
    flipped[3] ^= 1;
    import(&flipped).unwrap_err();
    import(b"no tar").unwrap_err();
}

#[test]
fn an_archive_that_unpacks_to_too_much_is_refused() {
    use flate2::{Compression, write::GzEncoder};
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&vec![0; 3 << 20]).unwrap();
    let error = import(&encoder.finish().unwrap()).unwrap_err();
    assert!(matches!(error, ImportError::TooLarge { .. }), "{error}");
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
        ("--sparse", "gnu"),
    ] {
        let path = directory.path().join(format!("a{option}.tar"));
        let made = Command::new("tar")
            .args([option, &format!("--format={format}"), "-C"])
            .arg(&from)
            .arg("-cf")
            .arg(&path)
            .arg(".")
            .status()
            .unwrap();
        assert!(made.success());
        let mut spool = spool(directory.path());
        let tree = read_tar(&path, &mut spool, Ownership::Keep).unwrap();
        assert_eq!(content(&tree, b"sub/text"), text, "{option}");
        assert_eq!(content(&tree, format!("sub/{long}").as_bytes()), b"long");
        assert_eq!(
            content(&tree, b"holes"),
            fs::read(from.join("holes")).unwrap()
        );
    }
}
