//! Checks what drifts: module headers, names and commands in the pages, who knows whom,
//! the size and names of what there is, functions that nobody calls, words.
//!
//! A finding names file and line and what to do about it. What is allowed, and what is
//! still to go, stands in `xtask/tidy.toml`.

mod allowances;
mod callers;
mod edges;
mod figures;
mod pages;
mod shape;
mod sources;
mod tables;
mod words;

use std::fs;

use anyhow::{Context, Result, bail};

use crate::process::workspace_root;
use allowances::{Allowance, Allowances, Violation};
use sources::SourceFile;

/// The pages whose claims are checked.
const PAGES: [&str; 2] = ["README.md", "ARCHITECTURE.md"];

/// Runs all checks that need no build; fails with every finding listed.
pub fn check() -> Result<()> {
    let root = workspace_root();
    let sources = sources::load(&root)?;
    let mut pages = Vec::new();
    for page in PAGES {
        let text = fs::read_to_string(root.join(page));
        pages.push((page, text.with_context(|| format!("cannot read {page}"))?));
    }
    let architecture = &pages[1].1;
    let mut findings = headers(&sources);
    for (page, text) in &pages {
        findings.extend(pages::names(&root, page, text, &sources));
    }
    findings.extend(edges::crates(&root, architecture)?);
    let (folder_edges, table_errors) = edges::folders(&sources, architecture);
    findings.extend(table_errors);
    let allowed = Allowances::load(&root)?;
    let mut judge = |check: &str, by: &Allowance, violations: &[Violation]| {
        let verdict = by.judge(check, violations);
        findings.extend(verdict.findings);
        if !verdict.remaining.is_empty() {
            eprintln!("{check}: {} known to go", verdict.remaining.len());
        }
        for note in verdict.notes {
            eprintln!("note: {note}");
        }
    };
    let long = shape::long_functions(&sources);
    judge("long_functions", &allowed.long_functions, &long);
    judge(
        "type_names",
        &allowed.type_names,
        &shape::type_names(&sources),
    );
    judge(
        "callers",
        &allowed.callers,
        &callers::without_caller(&sources),
    );
    judge("folder_edges", &allowed.folder_edges, &folder_edges);
    judge(
        "steps",
        &allowed.steps,
        &pages::steps(architecture, &sources),
    );
    let words = words::outdated(&sources, &pages, &allowed.terms);
    judge("words", &allowed.words, &words);
    if findings.is_empty() {
        return Ok(());
    }
    bail!("{} finding(s):\n{}", findings.len(), findings.join("\n"));
}

/// Files that do not open with a `//!` header.
fn headers(sources: &[SourceFile]) -> Vec<String> {
    let missing = sources
        .iter()
        .filter(|source| !source.text.starts_with("//!"));
    missing
        .map(|source| {
            format!(
                "{}:1: does not open with a `//!` header",
                source.path.display()
            )
        })
        .collect()
}

/// Prints the figures of the workspace at `root`, by default of this one.
pub fn print_figures(root: Option<&str>) -> Result<()> {
    let root = root.map_or_else(workspace_root, Into::into);
    print!("{}", figures::table(&sources::load(&root)?));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_header_is_found() {
        let parse = |text: &str| SourceFile::parse("crates/a/src/lib.rs".into(), text.into());
        assert_eq!(headers(&[parse("//! A.\n").unwrap()]), Vec::<String>::new());
        assert_eq!(headers(&[parse("/// A.\nstruct A;\n").unwrap()]).len(), 1);
    }
}
