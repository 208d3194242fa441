//! Checks what drifts: module headers, names and paths told in ARCHITECTURE.md, and
//! commands shown in the docs.
//!
//! A finding names file and line and what to do about it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::process::workspace_root;

/// Runs all checks; fails with every finding listed.
pub fn run() -> Result<()> {
    let root = workspace_root();
    let sources = rust_sources(&root)?;
    let mut findings = Vec::new();
    for (path, text) in &sources {
        if !text.starts_with("//!") {
            findings.push(format!(
                "{}:1: does not open with a `//!` header",
                path.display()
            ));
        }
    }
    for page in ["ARCHITECTURE.md", "README.md"] {
        let path = root.join(page);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {page}"))?;
        check_page(&root, page, &text, &sources, &mut findings);
    }
    if findings.is_empty() {
        return Ok(());
    }
    bail!("{} finding(s):\n{}", findings.len(), findings.join("\n"));
}

/// Checks each `code span` of a page that looks like a path or a Rust symbol.
fn check_page(
    root: &Path,
    page: &str,
    text: &str,
    sources: &[(PathBuf, String)],
    findings: &mut Vec<String>,
) {
    let mut in_block = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continue;
        }
        if in_block {
            continue;
        }
        for span in line.split('`').skip(1).step_by(2) {
            if let Some(problem) = check_span(root, span, sources) {
                findings.push(format!("{page}:{}: {problem}", number + 1));
            }
        }
    }
}

fn check_span(root: &Path, span: &str, sources: &[(PathBuf, String)]) -> Option<String> {
    let is_path =
        span.starts_with("crates/") || span.starts_with("xtask/") || span.ends_with(".rs");
    if is_path && !span.contains([' ', '*', '{', '<']) {
        let exists = root.join(span).exists()
            || sources
                .iter()
                .any(|(path, _)| path.ends_with(span.trim_start_matches('/')));
        return (!exists).then(|| format!("`{span}` does not exist: correct or remove it"));
    }
    let parts: Vec<&str> = span.split("::").collect();
    let is_symbol = parts.len() > 1 && parts.iter().all(|part| is_identifier(part));
    if is_symbol {
        let last = parts[parts.len() - 1];
        let defined = sources.iter().any(|(_, text)| defines(text, last));
        return (!defined).then(|| format!("nothing named `{last}` is defined (in `{span}`)"));
    }
    None
}

fn is_identifier(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// True if `text` defines `name` as an item, a field or a variant.
fn defines(text: &str, name: &str) -> bool {
    let keywords = ["fn", "struct", "enum", "trait", "mod", "const", "type"];
    keywords.iter().any(|keyword| {
        text.match_indices(&format!("{keyword} {name}"))
            .any(|(at, found)| {
                !text[at + found.len()..]
                    .starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            })
    }) || text.lines().any(|line| {
        let line = line.trim_start().trim_start_matches("pub ");
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with([':', ',', '(']) || rest.starts_with(" {"))
    })
}

fn rust_sources(root: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    let mut pending = vec![root.join("crates"), root.join("xtask"), root.join("fuzz")];
    while let Some(dir) = pending.pop() {
        let Ok(entries) = fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                if !path.ends_with("target") && !path.ends_with("corpus") {
                    pending.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path)?;
                found.push((path.strip_prefix(root)?.to_path_buf(), text));
            }
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_path_and_an_unknown_symbol_are_found() {
        let sources = vec![(
            PathBuf::from("crates/a/src/lib.rs"),
            "pub fn known() {}".into(),
        )];
        let root = Path::new("/nonexistent");
        assert!(check_span(root, "crates/a/src/gone.rs", &sources).is_some());
        assert!(check_span(root, "a::known", &sources).is_none());
        assert!(check_span(root, "a::unknown", &sources).is_some());
        assert!(check_span(root, "cargo xtask test", &sources).is_none());
    }
}
