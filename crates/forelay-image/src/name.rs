//! The one check of every name that may become part of a path: of VMs, profiles, owners,
//! hosts, components and versions.
//!
//! Manifests, locks, component metadata, flags and API requests all pass it before
//! anything is built from the name. Refuses to know which names exist.
//!
//! Invariant: a name that passed is one path component, the same in every file system: it
//! is never empty, `.`, `..` or hidden, and holds no separator, control or non-ASCII
//! character; no command takes it for an option.

use std::fmt;

/// What a name is of, which decides its length and characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NameOf {
    /// A VM on this host.
    Vm,
    /// A profile, under which launches are remembered.
    Profile,
    /// An owner, hence a trust domain.
    Owner,
    /// The name that a VM calls itself.
    Host,
    /// A component.
    Component,
    /// A component's version.
    Version,
}

/// A name that was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} cannot be {of}: use 1 to {} ASCII letters, digits and {}, starting with a letter, a digit \
     or `_`",
    shown(name), of.max_bytes(), of.marks_in_words()
)]
pub struct NameError {
    /// What it was to be the name of.
    pub of: NameOf,
    /// The name.
    pub name: String,
}

impl NameOf {
    /// Accepts a name of this kind.
    pub fn check(self, name: &str) -> Result<(), NameError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || self.marks().contains(byte as char);
        let start = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let ok = name.len() <= self.max_bytes()
            && name.bytes().next().is_some_and(start)
            && name.bytes().all(plain);
        if ok {
            return Ok(());
        }
        Err(NameError {
            of: self,
            name: name.to_owned(),
        })
    }

    /// Longest name. Sockets below a VM's directory leave little room for VM names, and
    /// Linux none for longer host names.
    fn max_bytes(self) -> usize {
        match self {
            Self::Vm | Self::Profile | Self::Owner | Self::Host => 64,
            Self::Component | Self::Version => 128,
        }
    }

    /// Characters besides letters and digits.
    fn marks(self) -> &'static str {
        match self {
            Self::Vm | Self::Profile | Self::Host => "-_.",
            Self::Owner => "-_.@",
            Self::Component => "-_.+",
            Self::Version => "-_.+~:",
        }
    }

    fn marks_in_words(self) -> String {
        let marks = self.marks().chars().map(|mark| format!("`{mark}`"));
        marks.collect::<Vec<_>>().join(" ")
    }
}

impl fmt::Display for NameOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vm => "the name of a VM",
            Self::Profile => "a profile",
            Self::Owner => "an owner",
            Self::Host => "a host name",
            Self::Component => "a component name",
            Self::Version => "the version of a component",
        })
    }
}

/// Text from outside, made fit to be shown: what would move a terminal's cursor, change its
/// colours or turn the direction of writing is escaped, all else stays.
pub fn printable(text: &str) -> String {
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
    };
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// The refused name, quoted and cut to what an error line can hold.
fn shown(name: &str) -> String {
    const SHOWN_CHARS: usize = 80;
    let start: String = name.chars().take(SHOWN_CHARS).collect();
    if start.len() == name.len() {
        return format!("{name:?}");
    }
    format!("{start:?}... ({} bytes)", name.len())
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use super::*;

    const ALL: [NameOf; 6] = [
        NameOf::Vm,
        NameOf::Profile,
        NameOf::Owner,
        NameOf::Host,
        NameOf::Component,
        NameOf::Version,
    ];

    #[test]
    fn names_in_use_pass() {
        for (of, names) in [
            (NameOf::Vm, &["web", "web-2", "_x", "A.b_c-9"][..]),
            (NameOf::Profile, &["web", "debian", "p0"]),
            (NameOf::Owner, &["default", "alice@example.org"]),
            (NameOf::Host, &["web", "mail.example.org"]),
            (
                NameOf::Component,
                &["libstdc++6", "nginx-core", "python3.11"],
            ),
            (
                NameOf::Version,
                &["1:2.36-9+deb12u7", "1.0~rc1", "0", "20240101_1"],
            ),
        ] {
            for name in names {
                assert_eq!(of.check(name), Ok(()));
            }
        }
    }

    #[test]
    fn what_could_leave_a_directory_or_pass_for_something_else_is_refused_for_every_kind() {
        let long = "x".repeat(300);
        let bad = [
            "",
            ".",
            "..",
            "../x",
            "../../etc",
            "/etc",
            "a/b",
            "a/../b",
            "a/",
            ".hidden",
            "-rf",
            "--name",
            "a\0b",
            "a\nb",
            "a b",
            "a\tb",
            "a\\b",
            "a,b",
            "caf\u{e9}",
            "\u{202e}x",
            "a\u{1b}[31m",
            "%2e%2e",
            "+x",
            "~x",
            "@x",
            ":x",
            &long,
        ];
        for of in ALL {
            for name in bad {
                let error = of.check(name).unwrap_err().to_string();
                assert!(error.contains("use 1 to"), "{error}");
                assert!(
                    error.len() < 400 && !error.contains(['\n', '\0', '\u{1b}']),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn what_would_steer_a_terminal_is_shown_escaped() {
        assert_eq!(printable("web server \u{e9}"), "web server \u{e9}");
        let shown = printable("\u{1b}]0;pwned\u{7}\u{1b}[31mred\r\n\u{9b}2J\u{202e}");
        let expected = "\\u{1b}]0;pwned\\u{7}\\u{1b}[31mred\\r\\n\\u{9b}2J\\u{202e}";
        assert_eq!(shown, expected);
    }

    proptest::proptest! {
        /// Whatever passes is one ordinary path component.
        #[test]
        fn a_name_that_passed_stays_where_it_is_put(name in "[-a-z0-9._/@+~: \u{0}]{0,8}") {
            for of in ALL {
                if of.check(&name).is_ok() {
                    let parts: Vec<_> = Path::new(&name).components().collect();
                    proptest::prop_assert!(matches!(parts[..], [Component::Normal(_)]), "{:?}", name);
                    proptest::prop_assert!(!name.starts_with(['.', '-']));
                }
            }
        }
    }
}
