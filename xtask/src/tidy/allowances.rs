//! What `tidy` allows: `xtask/tidy.toml`, one table a check.
//!
//! `allow` names what may stay, each with its reason. `known` is a ratchet for what is to
//! go: a number for each name that may fall and never rise. An entry without a violation
//! is a finding itself where it allows, and a note where it is a ratchet.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The file, relative to the workspace's root.
pub const FILE: &str = "xtask/tidy.toml";

/// What all checks allow.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Allowances {
    /// Functions longer than the limit.
    pub long_functions: Allowance,
    /// Type names that occur too often.
    pub type_names: Allowance,
    /// Public functions without a caller.
    pub callers: Allowance,
    /// Edges between the daemon's folders that ARCHITECTURE.md does not permit.
    pub folder_edges: Allowance,
    /// Steps of the life of a page that name no function.
    pub steps: Allowance,
    /// Places of the words in `terms`.
    pub words: Allowance,
    /// Words not to be used, each with what to say instead.
    pub terms: BTreeMap<String, String>,
}

/// What one check allows.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Allowance {
    /// Names that may stay, with the reason.
    pub allow: BTreeMap<String, String>,
    /// Names that are to go, with the number that may only fall.
    pub known: BTreeMap<String, usize>,
}

/// Something that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// By which `tidy.toml` names it.
    pub key: String,
    /// How bad it is: lines, places, uses.
    pub amount: usize,
    /// File and line.
    pub place: String,
    /// What is wrong, and what to do.
    pub text: String,
}

/// What a rule leaves of a check's violations.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// To be mended now.
    pub findings: Vec<String>,
    /// Violations under the ratchet.
    pub remaining: Vec<String>,
    /// Ratchets that can be lowered.
    pub notes: Vec<String>,
}

impl Allowances {
    /// Reads what the checks allow in the workspace at `root`; without a file everything is a
    /// finding.
    pub fn load(root: &Path) -> Result<Self> {
        let path = root.join(FILE);
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {FILE}"))?;
        toml::from_str(&text).with_context(|| format!("cannot parse {FILE}"))
    }
}

impl Allowance {
    /// Judges a check's violations.
    pub fn judge(&self, check: &str, violations: &[Violation]) -> Verdict {
        let mut verdict = Verdict::default();
        for violation in violations {
            let Violation {
                key,
                amount,
                place,
                text,
            } = violation;
            let known = self.known.get(key).copied().unwrap_or(0);
            let line = format!("{place}: {text} [{check}: {key:?} = {amount}]");
            if self.allow.contains_key(key) {
                continue;
            } else if *amount > known {
                verdict.findings.push(line);
            } else {
                verdict.remaining.push(line);
            }
        }
        let amount_of = |key: &str| {
            let found = violations.iter().filter(|violation| violation.key == key);
            found.map(|violation| violation.amount).max()
        };
        for (key, reason) in &self.allow {
            if amount_of(key).is_none() {
                verdict.findings.push(format!("{FILE}: {check} allows `{key}` ({reason}), but there is no such violation: remove the line"));
            }
        }
        for (key, known) in &self.known {
            let amount = amount_of(key).unwrap_or(0);
            if amount < *known {
                verdict.notes.push(format!(
                    "{FILE}: {check}: `{key}` is at {amount}, not {known}: lower it"
                ));
            }
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violation(key: &str, amount: usize) -> Violation {
        Violation {
            key: key.into(),
            amount,
            place: "a.rs:1".into(),
            text: "wrong".into(),
        }
    }

    #[test]
    fn the_ratchet_lets_a_number_fall_and_never_rise() {
        let rule: Allowance = toml::from_str("known = { a = 3 }").unwrap();
        let at = |amount| rule.judge("check", &[violation("a", amount)]);
        assert_eq!(at(4).findings.len(), 1);
        assert_eq!(at(3).remaining.len(), 1);
        assert_eq!((at(3).findings.len(), at(3).notes.len()), (0, 0));
        assert_eq!((at(2).findings.len(), at(2).notes.len()), (0, 1));
        assert_eq!(rule.judge("check", &[]).notes.len(), 1);
        assert_eq!(rule.judge("check", &[violation("b", 1)]).findings.len(), 1);
    }

    #[test]
    fn what_is_allowed_must_exist() {
        let rule: Allowance = toml::from_str("allow = { a = \"needed\" }").unwrap();
        assert_eq!(
            rule.judge("check", &[violation("a", 9)]),
            Verdict::default()
        );
        assert_eq!(rule.judge("check", &[]).findings.len(), 1);
    }
}
