//! Who may know whom: crates against `cargo metadata`, and the daemon's folders against
//! the paths in their code. The tables of ARCHITECTURE.md are the rule.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::allowances::Violation;
use super::shape::product;
use super::sources::SourceFile;
use super::tables;
use crate::process;

/// The heading above the table of crates.
const CRATES: &str = "Crates, and what each refuses to know";
/// The heading above the table of the daemon's folders.
const FOLDERS: &str = "The daemon's folders";
/// Where the daemon's folders are.
const DAEMON: &str = "crates/forelay/src/daemon";

/// Edges: from, to.
type Edges = BTreeSet<(String, String)>;

/// Compares the dependencies between crates with ARCHITECTURE.md's table.
pub fn crates(root: &Path, architecture: &str) -> Result<Vec<String>> {
    let mut cargo = process::cargo(&["metadata", "--no-deps", "--format-version", "1"]);
    let metadata = process::output(cargo.current_dir(root))?;
    let metadata = serde_json::from_slice(&metadata).context("cargo metadata prints JSON")?;
    Ok(compare_crates(&metadata, architecture))
}

fn compare_crates(metadata: &Value, architecture: &str) -> Vec<String> {
    let Some(table) = tables::below(architecture, CRATES) else {
        return vec![format!("ARCHITECTURE.md: no table below `{CRATES}`")];
    };
    let uses = table[0].iter().position(|cell| *cell == "uses");
    let Some(uses) = uses else {
        return vec![format!(
            "ARCHITECTURE.md: the table below `{CRATES}` has no column `uses`"
        )];
    };
    let mut listed = BTreeSet::new();
    let mut permitted = Edges::new();
    for row in &table[1..] {
        let from = row[0].trim_matches('`').trim_start_matches("crates/");
        listed.insert(from.to_owned());
        let targets = row.get(uses).copied().unwrap_or_default().split(',');
        let targets = targets.map(|to| to.trim().trim_matches('`'));
        permitted.extend(
            targets
                .filter(|to| !to.is_empty())
                .map(|to| (from.to_owned(), to.to_owned())),
        );
    }
    let (packages, actual) = crate_edges(metadata);
    let mut findings = Vec::new();
    for name in packages.symmetric_difference(&listed) {
        findings.push(format!(
            "ARCHITECTURE.md: `{name}` is in the table of crates or in the workspace, not in both"
        ));
    }
    for (from, to) in actual.difference(&permitted) {
        findings.push(format!("crates/{from}/Cargo.toml: `{from}` may not depend on `{to}` (table of crates in ARCHITECTURE.md)"));
    }
    for (from, to) in permitted.difference(&actual) {
        findings.push(format!(
            "ARCHITECTURE.md: `{from}` does not depend on `{to}`: correct the table of crates"
        ));
    }
    findings
}

/// The product's crates and the dependencies between them; those of tests are free.
fn crate_edges(metadata: &Value) -> (BTreeSet<String>, Edges) {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages = list(&metadata["packages"]);
    let names: BTreeSet<String> = packages
        .iter()
        .map(|package| text(&package["name"]))
        .filter(|name| name != "xtask")
        .collect();
    let mut edges = Edges::new();
    for package in &packages {
        let from = text(&package["name"]);
        for dependency in list(&package["dependencies"]) {
            let to = text(&dependency["name"]);
            let for_tests = dependency["kind"] == "dev";
            if !for_tests && names.contains(&to) && names.contains(&from) {
                edges.insert((from.clone(), to));
            }
        }
    }
    (names, edges)
}

/// Edges between the daemon's folders that the table of ARCHITECTURE.md does not permit,
/// and the table's own errors.
pub fn folders(sources: &[SourceFile], architecture: &str) -> (Vec<Violation>, Vec<String>) {
    let uses = folder_uses(sources);
    let Some(table) = tables::below(architecture, FOLDERS) else {
        let missing = format!("ARCHITECTURE.md: no table below `{FOLDERS}`");
        return (
            Vec::new(),
            if uses.is_empty() {
                Vec::new()
            } else {
                vec![missing]
            },
        );
    };
    let mut permitted = Edges::new();
    let mut listed = BTreeSet::new();
    for row in &table[1..] {
        let from = row[0].trim_matches('`');
        listed.insert(from.to_owned());
        for (cell, to) in row.iter().zip(&table[0]).skip(1) {
            if *cell == "uses" {
                permitted.insert((from.to_owned(), to.trim_matches('`').to_owned()));
            }
        }
    }
    let mut findings = Vec::new();
    let mut violations = Vec::new();
    for folder in daemon_folders(sources).symmetric_difference(&listed) {
        findings.push(format!("ARCHITECTURE.md: the folder `{folder}` is in the daemon or in the table of folders, not in both"));
    }
    for (edge, places) in uses {
        if permitted.contains(&edge) {
            continue;
        }
        let (from, to) = edge;
        violations.push(Violation {
            text: format!(
                "`{from}` may not know `{to}` (table of folders in ARCHITECTURE.md); it does in {} place(s): {}",
                places.len(),
                places.join(", ")
            ),
            key: format!("{from} -> {to}"),
            amount: places.len(),
            place: places[0].clone(),
        });
    }
    (violations, findings)
}

/// The daemon's folders.
fn daemon_folders(sources: &[SourceFile]) -> BTreeSet<String> {
    daemon_files(sources)
        .filter_map(|(folder, _)| folder)
        .collect()
}

/// Product files of the daemon, each with its folder. A file beside the folders is one of its
/// own; that which ties them together has none.
fn daemon_files(sources: &[SourceFile]) -> impl Iterator<Item = (Option<String>, &SourceFile)> {
    product(sources).filter_map(|source| {
        let below = source.path.strip_prefix(DAEMON).ok()?;
        let first = below.iter().next()?.to_string_lossy();
        let folder = first.strip_suffix(".rs").unwrap_or(&first);
        Some(((folder != "mod").then(|| folder.to_owned()), source))
    })
}

/// Each edge between two folders of the daemon with the places that make it. `mod.rs` ties
/// them together and may use all; a folder that uses it makes an edge to `daemon`.
pub fn folder_uses(sources: &[SourceFile]) -> BTreeMap<(String, String), Vec<String>> {
    let folders = daemon_folders(sources);
    let mut uses: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for (folder, source) in daemon_files(sources) {
        let Some(from) = folder else {
            continue;
        };
        let module = source.module();
        for (path, line) in &source.paths {
            let path = absolute(&module, path);
            let [first, rest @ ..] = path.as_slice() else {
                continue;
            };
            if first != "daemon" {
                continue;
            }
            let to = match rest.first() {
                Some(name) if folders.contains(name) => name.clone(),
                _ => "daemon".to_owned(),
            };
            if to != from {
                let place = format!("{}:{line}", source.path.display());
                uses.entry((from.clone(), to)).or_default().push(place);
            }
        }
    }
    uses
}

/// A path from the crate's root, without `crate`.
fn absolute(module: &[String], path: &[String]) -> Vec<String> {
    let mut at = module.to_vec();
    let mut rest = path;
    while let [first, tail @ ..] = rest {
        match first.as_str() {
            "crate" => at.clear(),
            "self" => {}
            "super" => drop(at.pop()),
            _ => break,
        }
        rest = tail;
    }
    at.extend_from_slice(rest);
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crates_page(uses: &str) -> String {
        format!(
            "## {CRATES}\n\n| crate | owns | uses |\n|---|---|---|\n| `crates/a` | x | |\n| `crates/b` | y | {uses} |\n"
        )
    }

    #[test]
    fn an_edge_of_crates_is_in_the_table_or_found() {
        let metadata = serde_json::json!({ "packages": [
            { "name": "a", "dependencies": [{ "name": "b", "kind": "dev" }] },
            { "name": "b", "dependencies": [{ "name": "a", "kind": null }, { "name": "serde" }] },
            { "name": "xtask", "dependencies": [{ "name": "a", "kind": null }] },
        ]});
        let check = |uses: &str| compare_crates(&metadata, &crates_page(uses));
        assert_eq!(check("`a`"), Vec::<String>::new());
        assert!(check("")[0].contains("`b` may not depend on `a`"));
        assert!(check("`a`, `c`")[0].contains("does not depend on `c`"));
        let other = serde_json::json!({ "packages": [{ "name": "a", "dependencies": [] }] });
        assert!(compare_crates(&other, &crates_page(""))[0].contains("not in both"));
    }

    #[test]
    fn an_edge_of_folders_is_in_the_table_or_found() {
        let file = |name: &str, text: &str| {
            let path = format!("{DAEMON}/{name}");
            SourceFile::parse(path.into(), text.to_owned()).unwrap()
        };
        let sources = [
            file("mod.rs", "use memory::Memory; pub struct Host;"),
            file(
                "memory/mod.rs",
                "use super::vm::Vm; use crate::daemon::memory::x;",
            ),
            file("vm/mod.rs", "mod run;"),
            file(
                "vm/run.rs",
                "use super::super::memory::M;\nuse crate::daemon::Host;\nfn f() { super::x(); }\n#[cfg(test)]\nmod tests { use crate::daemon::memory::T; }",
            ),
        ];
        let page = |memory: &str, vm: &str| {
            format!(
                "## {FOLDERS}\n\n| | `daemon` | `memory` | `vm` |\n|---|---|---|---|\n| `memory` | | - | {memory} |\n| `vm` | uses | {vm} | - |\n"
            )
        };
        let (violations, findings) = folders(&sources, &page("uses", "uses"));
        assert_eq!((violations, findings), (Vec::new(), Vec::new()));
        let (_, findings) = folders(&sources, "## Other\n");
        assert_eq!(findings.len(), 1);
        let renamed = page("uses", "uses").replace("| `vm` | uses", "| `wm` | uses");
        assert_eq!(folders(&sources, &renamed).1.len(), 2);
        let (violations, findings) = folders(&sources, &page("", "uses"));
        assert_eq!(findings, Vec::<String>::new());
        assert_eq!(violations.len(), 1);
        assert_eq!(
            (violations[0].key.as_str(), violations[0].amount),
            ("memory -> vm", 1)
        );
    }
}
