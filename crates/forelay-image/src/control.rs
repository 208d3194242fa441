//! Debian control data: paragraphs (`dpkg` status, package control files) and the
//! relations between packages, as component requirements.
//!
//! Refuses to know where the text came from and to compare versions: ranges are passed
//! on as text in Debian's syntax.

use std::collections::BTreeMap;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use crate::component::{Capability, NameRange, Requirement, SbomPackage};

/// Package URLs encode all but unreserved characters, and leave `:` alone.
const PURL_ENCODED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b':');

/// One paragraph: fields by lower-case name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paragraph {
    fields: BTreeMap<String, String>,
    text: String,
}

impl Paragraph {
    /// The value of a field (name in any case), with continuation lines.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields
            .get(&name.to_ascii_lowercase())
            .map(String::as_str)
    }

    /// The value of a field, or the empty string.
    pub fn field(&self, name: &str) -> &str {
        self.get(name).unwrap_or_default()
    }

    /// The paragraph as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// True if this is a status paragraph of a package that is installed.
    pub fn is_installed(&self) -> bool {
        self.field("Status").split_whitespace().nth(2) == Some("installed")
    }

    /// First line of the description.
    pub fn summary(&self) -> &str {
        self.field("Description").lines().next().unwrap_or_default()
    }
}

/// Splits `text` into paragraphs. Lines that are no field are kept in the text only.
pub fn parse_paragraphs(text: &str) -> Vec<Paragraph> {
    let mut paragraphs = Vec::new();
    let mut current = Paragraph::default();
    let mut last: Option<String> = None;
    for line in text.lines() {
        if line.trim().is_empty() {
            if !current.fields.is_empty() {
                paragraphs.push(std::mem::take(&mut current));
            }
            last = None;
            continue;
        }
        current.text.push_str(line);
        current.text.push('\n');
        if line.starts_with([' ', '\t']) {
            let value = last.as_ref().and_then(|name| current.fields.get_mut(name));
            if let Some(value) = value {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':')
            && !name.starts_with('#')
        {
            let name = name.trim().to_ascii_lowercase();
            current.fields.insert(name.clone(), value.trim().to_owned());
            last = Some(name);
        }
    }
    if !current.fields.is_empty() {
        paragraphs.push(current);
    }
    paragraphs
}

/// Parses a dependency field: commas separate requirements, bars alternatives.
/// Architecture qualifiers and restrictions are dropped.
pub fn parse_relations(text: &str) -> Vec<Requirement> {
    let clauses = text.split(',').map(|clause| {
        let alternatives = clause.split('|').filter_map(parse_relation);
        alternatives.collect::<Requirement>()
    });
    clauses.filter(|clause| !clause.is_empty()).collect()
}

fn parse_relation(text: &str) -> Option<NameRange> {
    let text = text.split(['[', '<']).next().map_or("", |head| {
        // `<` also opens a version operator; that one stands inside parentheses.
        if head.contains('(') && !head.contains(')') {
            text.split_once(')').map_or(text, |(range, _)| range)
        } else {
            head
        }
    });
    let (name, range) = text.split_once('(').unwrap_or((text, ""));
    let name = name.trim().split(':').next().unwrap_or_default().trim();
    if name.is_empty() {
        return None;
    }
    let range = range.trim().trim_end_matches(')').trim();
    let digits = range.find(|c: char| !"<>= ".contains(c)).unwrap_or(0);
    let (operator, version) = range.split_at(digits);
    let range = match operator.trim() {
        "" => String::new(),
        operator => format!("{operator} {}", version.trim()),
    };
    Some(NameRange {
        name: name.to_owned(),
        range,
    })
}

/// What a `Provides` field offers.
pub fn parse_provides(text: &str) -> Vec<Capability> {
    let relations = parse_relations(text).into_iter().flatten();
    let capability = relations.map(|relation| Capability {
        name: relation.name,
        version: relation
            .range
            .strip_prefix("= ")
            .map(|version| version.to_owned()),
    });
    capability.collect()
}

/// The SBOM entry of a package's paragraph.
pub fn sbom_package(paragraph: &Paragraph) -> SbomPackage {
    let name = paragraph.field("Package").to_owned();
    let version = paragraph.field("Version").to_owned();
    let architecture = paragraph.field("Architecture").to_owned();
    let quoted = utf8_percent_encode(&version, PURL_ENCODED);
    let purl = format!("pkg:deb/debian/{name}@{quoted}?arch={architecture}");
    SbomPackage {
        name,
        version,
        architecture,
        purl,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_keep_continuation_lines_and_text() {
        let text = "Package: a\nDescription: one\n two\n .\nStatus: install ok installed\n\n\nPackage: b\n";
        let parsed = parse_paragraphs(text);
        assert_eq!(parsed.len(), 2);
        assert_eq!(parsed[0].field("description"), "one\ntwo\n.");
        assert_eq!(parsed[0].summary(), "one");
        assert!(parsed[0].is_installed());
        assert!(parsed[0].text().ends_with("installed\n"));
        assert!(!parsed[1].is_installed());
    }

    #[test]
    fn relations_keep_alternatives_and_ranges() {
        let text = "libc6 (>= 2.34), a:any (<< 2~) | b [amd64], python3 <!nocheck>, c(=1:2-3)";
        let shown: Vec<Vec<(String, String)>> = parse_relations(text)
            .into_iter()
            .map(|clause| clause.into_iter().map(|r| (r.name, r.range)).collect())
            .collect();
        let pair = |name: &str, range: &str| (name.to_owned(), range.to_owned());
        assert_eq!(
            shown,
            [
                vec![pair("libc6", ">= 2.34")],
                vec![pair("a", "<< 2~"), pair("b", "")],
                vec![pair("python3", "")],
                vec![pair("c", "= 1:2-3")],
            ]
        );
    }

    #[test]
    fn provides_carry_versions_only_when_given() {
        let provided = parse_provides("httpd, nginx-abi-1.22 (= 1.22.1-9)");
        assert_eq!(provided[0].version, None);
        assert_eq!(provided[1].version.as_deref(), Some("1.22.1-9"));
    }

    #[test]
    fn package_urls_are_encoded() {
        let text = "Package: nginx\nVersion: 1:1.22.1-9+deb12u2\nArchitecture: amd64\n";
        let package = sbom_package(&parse_paragraphs(text)[0]);
        let purl = "pkg:deb/debian/nginx@1:1.22.1-9%2Bdeb12u2?arch=amd64";
        assert_eq!(package.purl, purl);
    }
}
