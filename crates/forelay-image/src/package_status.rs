//! dpkg's package status of a VM, out of its components' parts.
//!
//! A base carries the whole `var/lib/dpkg/status`; every other component carries the
//! paragraphs of its own packages in `var/lib/dpkg/status.d/NAME`. They are merged at
//! launch, for VMs that run their own init: the file is large and few others read it.

use std::collections::BTreeMap;

use crate::control::{Paragraph, parse_paragraphs};

/// Where the component `name` keeps its packages' status paragraphs, without leading `/`.
/// A base keeps them in `var/lib/dpkg/status`.
pub fn status_path(name: &str) -> String {
    format!("var/lib/dpkg/status.d/{name}")
}

/// Merges status paragraphs into `base`, the text of `/var/lib/dpkg/status`; a package
/// of the same name and architecture is replaced by the later component's.
pub fn merged_status(base: &str, fragments: &[&str]) -> String {
    let key = |paragraph: &Paragraph| {
        let architecture = match paragraph.field("Multi-Arch") {
            "same" => paragraph.field("Architecture").to_owned(),
            _ => String::new(),
        };
        (paragraph.field("Package").to_owned(), architecture)
    };
    let mut paragraphs: BTreeMap<(String, String), String> = BTreeMap::new();
    for text in std::iter::once(&base).chain(fragments) {
        for paragraph in parse_paragraphs(text) {
            paragraphs.insert(key(&paragraph), paragraph.text().to_owned());
        }
    }
    let texts: Vec<&str> = paragraphs.values().map(String::as_str).collect();
    texts.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_paragraphs_of_later_components_replace_the_base_ones() {
        let base = "Package: a\nVersion: 1\n\nPackage: b\nVersion: 1\n";
        let merged = merged_status(
            base,
            &["Package: b\nVersion: 2\n\nPackage: c\nVersion: 3\n"],
        );
        assert_eq!(
            merged,
            "Package: a\nVersion: 1\n\nPackage: b\nVersion: 2\n\nPackage: c\nVersion: 3\n"
        );
    }
}
