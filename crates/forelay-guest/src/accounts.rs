//! Users and groups that a hot-attached component brings along.
//!
//! Components carry their lines of the account files as fragments; here those of one
//! component are merged into the files of the running VM, by the rules of
//! [`forelay_guest_protocol::accounts`], which are the host's at launch.
//!
//! Invariants: what does not fit together is found before anything is written; a reader
//! of an account file sees all of the old or all of the new one. Accounts stay after a
//! detach: files may belong to them.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::Path;

use forelay_guest_protocol::accounts::{
    FRAGMENTS_DIRECTORY, Fragments, MergeError, MergedFile, merged_files, merged_paths,
};

/// Larger fragments, and larger account files, are refused.
const MAX_BYTES: u64 = 16 << 20;

/// The files of `root` as they are with what `component` adds; those alone that it changes.
pub fn changes(component: &Path, root: &Path) -> io::Result<Result<Vec<MergedFile>, MergeError>> {
    let mut layers = vec![present(root)?];
    for (name, bytes) in read_fragments(&component.join(FRAGMENTS_DIRECTORY))? {
        match Fragments::decode(&name, &bytes) {
            Ok(fragments) => layers.push(fragments),
            Err(error) => return Ok(Err(error)),
        }
    }
    let mut files = match merged_files(&layers) {
        Ok(files) => files,
        Err(error) => return Ok(Err(error)),
    };
    files.retain(|file| {
        let now = layers[0].files.get(&file.path).map(String::as_bytes);
        let has_place = root.join(&file.path).parent().is_some_and(Path::is_dir);
        has_place && now.unwrap_or_default() != file.bytes
    });
    Ok(Ok(files))
}

/// Puts the files in their places. One that exists keeps its owner and permissions.
pub fn write(root: &Path, files: &[MergedFile]) -> io::Result<()> {
    for file in files {
        let path = root.join(&file.path);
        let path = fs::canonicalize(&path).unwrap_or(path);
        let (mode, uid, gid) = match fs::metadata(&path) {
            Ok(old) => (old.mode() & 0o7777, old.uid(), old.gid()),
            Err(_) => (file.mode.into(), file.uid, file.gid),
        };
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".forelay-new");
        let new = path.with_file_name(name);
        let written = fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut out| {
                out.write_all(&file.bytes)?;
                fchown(&out, Some(uid), Some(gid))?;
                out.set_permissions(fs::Permissions::from_mode(mode))
            })
            .and_then(|()| fs::rename(&new, &path));
        if let Err(error) = written {
            let _ = fs::remove_file(&new);
            return Err(error);
        }
    }
    Ok(())
}

/// The merged files as `root` has them now.
fn present(root: &Path) -> io::Result<Fragments> {
    let mut present = Fragments::default();
    for path in merged_paths() {
        match read_limited(&root.join(path)) {
            Ok(bytes) => {
                let text = String::from_utf8(bytes)
                    .map_err(|_| io::Error::other(format!("/{path} is not UTF-8")))?;
                present.files.insert(path.to_owned(), text);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(present)
}

/// The fragments files of a component, by file name, in the order of their names.
fn read_fragments(directory: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let read = paths.iter().map(|path| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Ok((name.into_owned(), read_limited(path)?))
    });
    read.collect()
}

fn read_limited(path: &Path) -> io::Result<Vec<u8>> {
    if fs::metadata(path)?.len() > MAX_BYTES {
        return Err(io::Error::other(format!("{}: too large", path.display())));
    }
    fs::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(root: &Path, path: &str, text: &str) {
        fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
        fs::write(root.join(path), text).unwrap();
    }

    fn text(root: &Path, path: &str) -> String {
        fs::read_to_string(root.join(path)).unwrap()
    }

    #[test]
    fn what_a_component_adds_is_merged_as_at_launch() {
        let (component, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (component, root) = (component.path(), root.path());
        let passwd = "root:x:0:0:r:/root:/bin/sh\nold:x:50:50::/:/bin/sh";
        place(root, "etc/passwd", passwd);
        place(root, "etc/group", "ssl-cert:x:101:old\n");
        fs::set_permissions(root.join("etc/group"), fs::Permissions::from_mode(0o640)).unwrap();
        let fragments = r#"{"etc/passwd": "root:x:0:0:changed:/:\nredis:x:216:216::/:/bin/false\n",
            "etc/group": "redis:x:216:\nssl-cert:x:101:redis\n", "etc/shells": "/bin/odd\n",
            "var/lib/dpkg/triggers/File": "/usr/x redis\n"}"#;
        place(component, "usr/lib/forelay/fragments/redis.json", fragments);
        let found = changes(component, root).unwrap().unwrap();
        write(root, &found).unwrap();
        assert_eq!(
            text(root, "etc/passwd"),
            format!("{passwd}\nredis:x:216:216::/:/bin/false\n")
        );
        assert_eq!(
            text(root, "etc/group"),
            "ssl-cert:x:101:old,redis\nredis:x:216:\n"
        );
        assert_eq!(text(root, "etc/shells"), "/bin/odd\n");
        // There is no dpkg in this root.
        assert!(!root.join("var").exists());
        let mode = fs::metadata(root.join("etc/group")).unwrap().mode();
        assert_eq!(mode & 0o777, 0o640);
        assert_eq!(fs::read_dir(root.join("etc")).unwrap().count(), 3);
        assert!(changes(component, root).unwrap().unwrap().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused_before_anything_is_written() {
        let (component, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (component, root) = (component.path(), root.path());
        let fragments = r#"{"etc/passwd": "redis:x:216:216::/:/bin/false\n"}"#;
        place(component, "usr/lib/forelay/fragments/redis.json", fragments);
        place(root, "etc/passwd", "other:x:216:216::/:/bin/sh\n");
        let taken = changes(component, root).unwrap().unwrap_err();
        assert!(matches!(taken, MergeError::IdClash { .. }), "{taken}");
        // The files of the component belong to an id that is not the VM's `redis`.
        place(root, "etc/passwd", "redis:x:999:999::/:/bin/sh\n");
        let differs = changes(component, root).unwrap().unwrap_err();
        assert!(matches!(differs, MergeError::NameClash { .. }), "{differs}");
        place(component, "usr/lib/forelay/fragments/bad.json", "[");
        let damaged = changes(component, root).unwrap().unwrap_err();
        assert!(matches!(damaged, MergeError::Damaged { .. }), "{damaged}");
    }
}
