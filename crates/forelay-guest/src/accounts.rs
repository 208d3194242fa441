//! Users and groups that a hot-attached component brings along.
//!
//! Components carry their lines of the account files as fragments: one JSON object of path to
//! text in `usr/lib/forelay/fragments/` (written by the importers, merged by the host at
//! launch). Here the lines whose name the running VM does not know are appended.
//!
//! Invariants: a line that is there is never changed; an id that another name has is a
//! conflict, found before anything is written. Accounts stay after a detach: files may belong
//! to them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// Where fragments are in a component.
const FRAGMENTS: &str = "usr/lib/forelay/fragments";
/// Larger fragments are refused.
const MAX_BYTES: u64 = 1 << 20;
/// Files that are merged, with the column of the numeric id.
const FILES: [(&str, Option<usize>); 4] = [
    ("etc/passwd", Some(2)),
    ("etc/group", Some(2)),
    ("etc/shadow", None),
    ("etc/gshadow", None),
];

/// Lines to append, by file.
pub type Additions = BTreeMap<&'static str, Vec<String>>;

/// What the component adds to `root`'s accounts; `Err` names an id that is taken.
pub fn additions(component: &Path, root: &Path) -> io::Result<Result<Additions, String>> {
    let mut additions = Additions::new();
    for fragments in read_fragments(&component.join(FRAGMENTS))? {
        for (file, id_column) in FILES {
            let Some(text) = fragments.get(file) else {
                continue;
            };
            let there = fs::read_to_string(root.join(file)).unwrap_or_default();
            let added = additions.entry(file).or_default();
            if let Err(conflict) = missing_lines(&there, text, id_column, added) {
                return Ok(Err(format!("/{file}: {conflict}")));
            }
        }
    }
    additions.retain(|_, lines| !lines.is_empty());
    Ok(Ok(additions))
}

/// Appends the lines.
pub fn append(root: &Path, additions: &Additions) -> io::Result<()> {
    for (file, lines) in additions {
        let path = root.join(file);
        let ends_open =
            fs::read(&path).is_ok_and(|bytes| bytes.last().is_some_and(|&b| b != b'\n'));
        let mut text = if ends_open {
            "\n".to_owned()
        } else {
            String::new()
        };
        lines.iter().for_each(|line| {
            text.push_str(line);
            text.push('\n');
        });
        fs::File::options()
            .append(true)
            .create(true)
            .open(&path)?
            .write_all(text.as_bytes())?;
    }
    Ok(())
}

fn read_fragments(directory: &Path) -> io::Result<Vec<BTreeMap<String, String>>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| {
            if fs::symlink_metadata(path)?.len() > MAX_BYTES {
                return Err(io::Error::other(format!("{}: too large", path.display())));
            }
            serde_json::from_slice(&fs::read(path)?)
                .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))
        })
        .collect()
}

/// Collects the lines of `text` whose name is neither in `there` nor in `added`.
fn missing_lines(
    there: &str,
    text: &str,
    id_column: Option<usize>,
    added: &mut Vec<String>,
) -> Result<(), String> {
    let field = |line: &str, column: usize| line.split(':').nth(column).map(str::to_owned);
    for line in text.lines().filter(|line| line.contains(':')) {
        let name = field(line, 0);
        let known = |other: &str| field(other, 0) == name;
        if there.lines().any(known) || added.iter().any(|other| known(other)) {
            continue;
        }
        if let Some(column) = id_column {
            let id = field(line, column);
            let taken = there.lines().chain(added.iter().map(String::as_str));
            if let Some(other) = taken.into_iter().find(|other| field(other, column) == id) {
                let (id, name) = (id.unwrap_or_default(), name.unwrap_or_default());
                let other = field(other, 0).unwrap_or_default();
                return Err(format!("id {id} of {name:?} belongs to {other:?} here"));
            }
        }
        added.push(line.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
        fs::write(root.join(path), text).unwrap();
    }

    #[test]
    fn unknown_names_are_appended_once_and_taken_ids_refused() {
        let (component, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (component, root) = (component.path(), root.path());
        write(
            root,
            "etc/passwd",
            "root:x:0:0:r:/root:/bin/sh\nold:x:50:50::/:/bin/sh",
        );
        let fragments = r#"{"etc/passwd": "root:x:0:0:changed:/:\nredis:x:216:216::/:/bin/false\n",
            "etc/group": "redis:x:216:\n", "etc/shells": "/bin/odd\n"}"#;
        write(component, "usr/lib/forelay/fragments/redis.json", fragments);
        let found = additions(component, root).unwrap().unwrap();
        append(root, &found).unwrap();
        assert_eq!(
            fs::read_to_string(root.join("etc/passwd")).unwrap(),
            "root:x:0:0:r:/root:/bin/sh\nold:x:50:50::/:/bin/sh\nredis:x:216:216::/:/bin/false\n"
        );
        assert_eq!(
            fs::read_to_string(root.join("etc/group")).unwrap(),
            "redis:x:216:\n"
        );
        assert!(additions(component, root).unwrap().unwrap().is_empty());

        write(root, "etc/group", "other:x:216:\n");
        let conflict = additions(component, root).unwrap().unwrap_err();
        assert!(
            conflict.contains("redis") && conflict.contains("other"),
            "{conflict}"
        );
        write(component, "usr/lib/forelay/fragments/bad.json", "[");
        assert!(additions(component, root).is_err());
    }
}
