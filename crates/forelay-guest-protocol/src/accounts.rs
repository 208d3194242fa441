//! Files that several components each hold a part of: accounts, login shells and dpkg's
//! trigger list.
//!
//! A component that adds a user cannot carry the whole `/etc/passwd`: the later of two
//! such components would hide the other's user. So components carry *fragments*, one
//! JSON file each (`usr/lib/forelay/fragments/NAME.json`, path to text), and a base
//! carries its own whole files there as well. The host merges the fragments of a VM's
//! components at launch, base first, into per-VM files; the agent merges those of a
//! component that is attached into the files that the VM has by then. Both by the rules
//! here, and by no others.
//!
//! Everything here is pure. Invariants: merging is deterministic; an entry that is
//! already there is not added twice; a name with two ids and an id with two names are
//! errors, never silently resolved; the only change to a line that is there is that a
//! group gets members.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// How fragments of one file become a whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// `name:…` lines; a name is taken from the first fragment that has it. The column
    /// of the numeric id, if the file has one, is checked.
    Accounts { id_column: Option<usize> },
    /// `name:…` lines whose last column is a member list, of which the union is taken.
    Groups { id_column: Option<usize> },
    /// Distinct lines, in the order of their first appearance.
    Lines,
}

/// A file that is merged at launch.
#[derive(Debug)]
struct MergedPath {
    path: &'static str,
    rule: Rule,
    mode: u16,
    gid: u32,
}

/// Debian's group `shadow`.
const SHADOW_GID: u32 = 42;

const MERGED: &[MergedPath] = &[
    MergedPath {
        path: "etc/passwd",
        rule: Rule::Accounts { id_column: Some(2) },
        mode: 0o644,
        gid: 0,
    },
    MergedPath {
        path: "etc/group",
        rule: Rule::Groups { id_column: Some(2) },
        mode: 0o644,
        gid: 0,
    },
    MergedPath {
        path: "etc/shadow",
        rule: Rule::Accounts { id_column: None },
        mode: 0o640,
        gid: SHADOW_GID,
    },
    MergedPath {
        path: "etc/gshadow",
        rule: Rule::Groups { id_column: None },
        mode: 0o640,
        gid: SHADOW_GID,
    },
    MergedPath {
        path: "etc/shells",
        rule: Rule::Lines,
        mode: 0o644,
        gid: 0,
    },
    MergedPath {
        path: "var/lib/dpkg/statoverride",
        rule: Rule::Lines,
        mode: 0o644,
        gid: 0,
    },
    MergedPath {
        path: "var/lib/dpkg/triggers/File",
        rule: Rule::Lines,
        mode: 0o644,
        gid: 0,
    },
];

/// Paths (without leading `/`) that components hold fragments of.
pub fn merged_paths() -> impl Iterator<Item = &'static str> {
    MERGED.iter().map(|merged| merged.path)
}

/// Directory of the fragments files, without leading `/`.
pub const FRAGMENTS_DIRECTORY: &str = "usr/lib/forelay/fragments";

/// Where the component `name` keeps its fragments, without leading `/`.
pub fn fragments_path(name: &str) -> String {
    format!("{FRAGMENTS_DIRECTORY}/{name}.json")
}

/// Why fragments do not merge.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// A name has two ids.
    #[error("{path}: {name:?} has id {first} in one component and {second} in another")]
    NameClash {
        /// The file.
        path: String,
        /// The user or group.
        name: String,
        /// Id in the earlier component.
        first: String,
        /// Id in the later component.
        second: String,
    },
    /// An id has two names.
    #[error("{path}: id {id} belongs to {first:?} in one component and {second:?} in another")]
    IdClash {
        /// The file.
        path: String,
        /// The user or group id.
        id: String,
        /// Name in the earlier component.
        first: String,
        /// Name in the later component.
        second: String,
    },
    /// Not a path that is merged.
    #[error("{0:?} is not a file that components hold fragments of")]
    UnknownPath(String),
    /// A fragments file is damaged.
    #[error("the fragments of component {component:?} are damaged: {problem}")]
    Damaged {
        /// The component.
        component: String,
        /// What is wrong.
        problem: String,
    },
}

/// One component's parts of the merged files: path (without `/`) to text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fragments {
    /// Text by path.
    pub files: BTreeMap<String, String>,
}

impl Fragments {
    /// True if nothing is to be merged.
    pub fn is_empty(&self) -> bool {
        self.files.values().all(String::is_empty)
    }

    /// The bytes of the component's fragments file.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a map of texts serialises");
        bytes.push(b'\n');
        bytes
    }

    /// Reads a fragments file of `component`.
    pub fn decode(component: &str, bytes: &[u8]) -> Result<Self, MergeError> {
        serde_json::from_slice(bytes).map_err(|error| MergeError::Damaged {
            component: component.to_owned(),
            problem: error.to_string(),
        })
    }
}

/// A file to put into a VM's own tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergedFile {
    /// Path without leading `/`.
    pub path: String,
    /// Content.
    pub bytes: Vec<u8>,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Merges the fragments of a VM's components (compose order, base first). Only files to
/// which a component beyond the first adds something are returned: the others are right
/// as the base has them.
pub fn merged_files(layers: &[Fragments]) -> Result<Vec<MergedFile>, MergeError> {
    let Some((base, added)) = layers.split_first() else {
        return Ok(Vec::new());
    };
    let mut merged = Vec::new();
    for entry in MERGED {
        let text_of = |layer: &'_ Fragments| layer.files.get(entry.path).cloned();
        let added: Vec<String> = added.iter().filter_map(text_of).collect();
        let added: Vec<&str> = added.iter().map(String::as_str).collect();
        if added.iter().all(|text| text.is_empty()) {
            continue;
        }
        let base = text_of(base).unwrap_or_default();
        merged.push(MergedFile {
            path: entry.path.to_owned(),
            bytes: merge_file(entry.path, &base, &added)?.into_bytes(),
            mode: entry.mode,
            uid: 0,
            gid: entry.gid,
        });
    }
    Ok(merged)
}

/// Merges `fragments` into `base`, both texts of the file `path` (no leading `/`).
pub fn merge_file(path: &str, base: &str, fragments: &[&str]) -> Result<String, MergeError> {
    let Some(entry) = MERGED.iter().find(|entry| entry.path == path) else {
        return Err(MergeError::UnknownPath(path.to_owned()));
    };
    let layers = std::iter::once(&base).chain(fragments).enumerate();
    let lines = layers
        .flat_map(|(layer, text)| text.lines().map(move |line| (layer, line)))
        .filter(|(_, line)| !line.is_empty());
    match entry.rule {
        Rule::Lines => Ok(distinct_lines(lines.map(|(_, line)| line))),
        Rule::Accounts { id_column } => merge_named(path, lines, id_column, false),
        Rule::Groups { id_column } => merge_named(path, lines, id_column, true),
    }
}

fn distinct_lines<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let mut seen = BTreeSet::new();
    let fresh = lines.filter(|line| seen.insert(*line));
    fresh.fold(String::new(), |out, line| out + line + "\n")
}

fn merge_named<'a>(
    path: &str,
    lines: impl Iterator<Item = (usize, &'a str)>,
    id_column: Option<usize>,
    members: bool,
) -> Result<String, MergeError> {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut by_name: BTreeMap<String, usize> = BTreeMap::new();
    let mut by_id: BTreeMap<String, (usize, String)> = BTreeMap::new();
    for (layer, line) in lines {
        let row: Vec<String> = line.split(':').map(str::to_owned).collect();
        let name = row[0].clone();
        let id = id_column.and_then(|column| row.get(column)).cloned();
        if let Some(&at) = by_name.get(&name) {
            let known = id_column.and_then(|column| rows[at].get(column));
            if known != id.as_ref() {
                return Err(MergeError::NameClash {
                    path: path.to_owned(),
                    name,
                    first: known.cloned().unwrap_or_default(),
                    second: id.unwrap_or_default(),
                });
            }
            if members && let (Some(to), Some(from)) = (rows[at].last_mut(), row.last()) {
                *to = union(to, from);
            }
            continue;
        }
        if let Some(id) = id {
            // Several names for one id within a component are its own business.
            if let Some((from, first)) = by_id.insert(id.clone(), (layer, name.clone()))
                && from != layer
            {
                return Err(MergeError::IdClash {
                    path: path.to_owned(),
                    id,
                    first,
                    second: name,
                });
            }
        }
        by_name.insert(name, rows.len());
        rows.push(row);
    }
    Ok(rows
        .iter()
        .fold(String::new(), |out, row| out + &row.join(":") + "\n"))
}

fn union(one: &str, other: &str) -> String {
    let mut names: Vec<&str> = one.split(',').filter(|name| !name.is_empty()).collect();
    for name in other.split(',').filter(|name| !name.is_empty()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(",")
}

/// What `merged` has that `base` has not, as a fragment of the file `path`: new entries,
/// and groups with new members (whose list then holds only those).
pub fn fragment_of(path: &str, base: &str, merged: &str) -> Result<String, MergeError> {
    let Some(entry) = MERGED.iter().find(|entry| entry.path == path) else {
        return Err(MergeError::UnknownPath(path.to_owned()));
    };
    let known: BTreeSet<&str> = base.lines().collect();
    let new_lines = merged.lines().filter(|line| !known.contains(line));
    let mut lines: Vec<String> = Vec::new();
    for line in new_lines.filter(|line| !line.is_empty()) {
        let name = line.split(':').next().unwrap_or_default();
        let before = base.lines().find(|old| old.split(':').next() == Some(name));
        match (entry.rule, before) {
            (Rule::Lines, _) | (_, None) => lines.push(line.to_owned()),
            (Rule::Accounts { .. }, Some(_)) => {}
            (Rule::Groups { .. }, Some(before)) => {
                let old = before.rsplit(':').next().unwrap_or_default();
                let (head, new) = line.rsplit_once(':').unwrap_or((line, ""));
                let old: Vec<&str> = old.split(',').collect();
                let added: Vec<&str> = new.split(',').filter(|m| !old.contains(m)).collect();
                if !added.is_empty() {
                    lines.push(format!("{head}:{}", added.join(",")));
                }
            }
        }
    }
    lines.sort();
    Ok(lines
        .iter()
        .fold(String::new(), |out, line| out + line + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/false\n";
    const NGINX: &str = "nginx:x:231:231::/nonexistent:/bin/false\n";
    const REDIS: &str = "redis:x:232:232::/var/lib/redis:/bin/false\n";

    #[test]
    fn two_components_keep_both_their_users() {
        let merged = merge_file("etc/passwd", BASE, &[NGINX, REDIS, NGINX]).unwrap();
        assert_eq!(merged, [BASE, NGINX, REDIS].concat());
    }

    #[test]
    fn clashing_names_and_ids_are_errors() {
        let other_id = NGINX.replace("231", "999");
        let merge = |part: &str| merge_file("etc/passwd", BASE, &[NGINX, part]).unwrap_err();
        assert!(matches!(merge(&other_id), MergeError::NameClash { .. }));
        let other_name = NGINX.replace("nginx", "apache");
        assert!(matches!(merge(&other_name), MergeError::IdClash { .. }));
        assert!(matches!(
            merge_file("etc/hosts", "", &[]),
            Err(MergeError::UnknownPath(_))
        ));
    }

    #[test]
    fn group_members_are_united_and_fragments_hold_only_what_is_new() {
        let base = "ssl-cert:x:101:\nadm:x:4:syslog\n";
        let merged = "ssl-cert:x:101:postgres\nadm:x:4:syslog,me\npostgres:x:233:\n";
        let fragment = fragment_of("etc/group", base, merged).unwrap();
        assert_eq!(
            fragment,
            "adm:x:4:me\npostgres:x:233:\nssl-cert:x:101:postgres\n"
        );
        let again = merge_file("etc/group", base, &[&fragment]).unwrap();
        assert_eq!(again, merged);
    }

    #[test]
    fn only_files_that_a_later_component_adds_to_are_made() {
        let layer = |pairs: &[(&str, &str)]| Fragments {
            files: pairs
                .iter()
                .map(|(path, text)| (path.to_string(), text.to_string()))
                .collect(),
        };
        let base = layer(&[("etc/passwd", BASE), ("etc/shells", "/bin/sh\n")]);
        assert_eq!(merged_files(&[base.clone(), layer(&[])]).unwrap(), []);
        let nginx = layer(&[("etc/passwd", NGINX)]);
        let files = merged_files(&[base.clone(), nginx.clone()]).unwrap();
        assert_eq!(files.len(), 1);
        assert_eq!(files[0].path, "etc/passwd");
        assert_eq!(Fragments::decode("n", &nginx.encode()).unwrap(), nginx);
        assert!(Fragments::decode("n", b"{").is_err());
    }
}
