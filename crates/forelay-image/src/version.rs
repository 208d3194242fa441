//! Debian versions, ranges of them, and the `name@range` notation of manifests.
//!
//! The order is that of Debian Policy 5.6.12: epoch, upstream version and revision;
//! within a part, runs of non-digits and of digits alternate, letters sort before other
//! characters and `~` before everything, even the end.
//!
//! Refuses to know which versions exist: that is the solver's business.
//!
//! Invariant: [`compare`] is a total preorder on every string, valid version or not, so
//! that sorting never fails on data from outside.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use crate::component::NameRange;

/// Text that is not a version, a range or a `name@range`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// The version has no characters.
    #[error("the version is empty")]
    Empty,
    /// A character that versions may not contain.
    #[error("version {version:?} contains {found:?}; allowed are letters, digits and . + - ~ :")]
    Character {
        /// The whole version.
        version: String,
        /// The offending character.
        found: char,
    },
    /// A constraint that does not start with a known operator.
    #[error(
        "{0:?} is not a version constraint: write `>= 1.2`, `<< 2`, `= 1.2-3`, or join several with commas"
    )]
    Constraint(String),
    /// A component name with characters that names may not have.
    #[error(
        "{0:?} is not a component name: use letters, digits and . + - _ : /, starting with a letter or digit"
    )]
    Name(String),
}

/// How a version must relate to a bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Relation {
    /// `<<`: strictly earlier.
    Earlier,
    /// `<=`: earlier or equal.
    AtMost,
    /// `=`: equal.
    Equal,
    /// `>=`: later or equal.
    AtLeast,
    /// `>>`: strictly later.
    Later,
}

impl Relation {
    fn as_str(self) -> &'static str {
        match self {
            Self::Earlier => "<<",
            Self::AtMost => "<=",
            Self::Equal => "=",
            Self::AtLeast => ">=",
            Self::Later => ">>",
        }
    }
}

/// A conjunction of bounds; without bounds it admits every version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Range(Vec<(Relation, String)>);

impl Range {
    /// The range that admits every version.
    pub fn any() -> Self {
        Self::default()
    }

    /// True if every version is admitted, also "no version at all".
    pub fn is_any(&self) -> bool {
        self.0.is_empty()
    }

    /// True if `version` meets all bounds.
    pub fn admits(&self, version: &str) -> bool {
        self.0.iter().all(|(relation, bound)| {
            let order = compare(version, bound);
            match relation {
                Relation::Earlier => order == Ordering::Less,
                Relation::AtMost => order != Ordering::Greater,
                Relation::Equal => order == Ordering::Equal,
                Relation::AtLeast => order != Ordering::Less,
                Relation::Later => order == Ordering::Greater,
            }
        })
    }
}

impl FromStr for Range {
    type Err = VersionError;

    /// Reads `>= 1.2, << 2`. `<` and `>` mean `<<` and `>>`; a bare version means `=`.
    fn from_str(text: &str) -> Result<Self, VersionError> {
        if text.trim().is_empty() {
            return Ok(Self::any());
        }
        text.split(',')
            .map(|part| bound(part.trim()))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

fn bound(part: &str) -> Result<(Relation, String), VersionError> {
    const OPERATORS: [(&str, Relation); 8] = [
        ("<<", Relation::Earlier),
        ("<=", Relation::AtMost),
        (">=", Relation::AtLeast),
        (">>", Relation::Later),
        ("==", Relation::Equal),
        ("=", Relation::Equal),
        ("<", Relation::Earlier),
        (">", Relation::Later),
    ];
    let (relation, version) = OPERATORS
        .iter()
        .find_map(|(text, relation)| Some((*relation, part.strip_prefix(text)?.trim())))
        .unwrap_or((Relation::Equal, part));
    match check(version) {
        Ok(()) => Ok((relation, version.to_owned())),
        Err(VersionError::Empty) => Err(VersionError::Constraint(part.to_owned())),
        Err(error) => Err(error),
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (relation, version)) in self.0.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{} {version}", relation.as_str())?;
        }
        Ok(())
    }
}

/// Accepts what Debian accepts as characters of a bound; components' own versions are names
/// ([`crate::NameOf::Version`]).
fn check(version: &str) -> Result<(), VersionError> {
    if version.is_empty() {
        return Err(VersionError::Empty);
    }
    match version
        .chars()
        .find(|c| !c.is_ascii_alphanumeric() && !".+-~:_".contains(*c))
    {
        Some(found) => Err(VersionError::Character {
            version: version.to_owned(),
            found,
        }),
        None => Ok(()),
    }
}

/// Orders two versions by Debian's rules.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (a_epoch, a_upstream, a_revision) = split(a);
    let (b_epoch, b_upstream, b_revision) = split(b);
    compare_part(a_epoch, b_epoch)
        .then_with(|| compare_part(a_upstream, b_upstream))
        .then_with(|| compare_part(a_revision, b_revision))
}

/// Epoch, upstream version and revision; an absent epoch or revision counts as 0.
fn split(version: &str) -> (&str, &str, &str) {
    let (epoch, rest) = version.split_once(':').unwrap_or(("", version));
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, ""));
    (epoch, upstream, revision)
}

/// Compares one part: alternating runs of non-digits and digits.
fn compare_part(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    while !a.is_empty() || !b.is_empty() {
        let (a_text, a_rest) = run(a, |byte| !byte.is_ascii_digit());
        let (b_text, b_rest) = run(b, |byte| !byte.is_ascii_digit());
        let weights = |text: &[u8], index: usize| text.get(index).map_or(0, |&byte| weight(byte));
        for index in 0..a_text.len().max(b_text.len()) {
            let order = weights(a_text, index).cmp(&weights(b_text, index));
            if order != Ordering::Equal {
                return order;
            }
        }
        let (a_digits, a_rest) = run(a_rest, |byte| byte.is_ascii_digit());
        let (b_digits, b_rest) = run(b_rest, |byte| byte.is_ascii_digit());
        let (a_number, b_number) = (significant(a_digits), significant(b_digits));
        let order = a_number
            .len()
            .cmp(&b_number.len())
            .then_with(|| a_number.cmp(b_number));
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (a_rest, b_rest);
    }
    Ordering::Equal
}

fn run(bytes: &[u8], belongs: impl Fn(u8) -> bool) -> (&[u8], &[u8]) {
    let end = bytes
        .iter()
        .position(|&byte| !belongs(byte))
        .unwrap_or(bytes.len());
    bytes.split_at(end)
}

fn significant(digits: &[u8]) -> &[u8] {
    let zeros = digits.iter().take_while(|&&digit| digit == b'0').count();
    &digits[zeros..]
}

/// `~` sorts before the end of the part (0), letters before other characters.
fn weight(byte: u8) -> i32 {
    match byte {
        b'~' => -1,
        _ if byte.is_ascii_alphabetic() => i32::from(byte),
        _ => i32::from(byte) + 256,
    }
}

/// Reads `nginx`, `nginx@>=1.22, << 2` or `nginx@1.22.1-9` (exactly that version).
pub fn parse_wanted(text: &str) -> Result<NameRange, VersionError> {
    let (name, range) = text.split_once('@').unwrap_or((text, ""));
    let name = name.trim();
    let first_ok = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let rest_ok = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || ".+-_:/".contains(c));
    if !first_ok || !rest_ok {
        return Err(VersionError::Name(name.to_owned()));
    }
    if text.contains('@') && range.trim().is_empty() {
        return Err(VersionError::Constraint(range.to_owned()));
    }
    let range: Range = range.parse()?;
    Ok(NameRange {
        name: name.to_owned(),
        range: range.to_string(),
    })
}

/// The notation that [`parse_wanted`] reads.
pub fn display_wanted(wanted: &NameRange) -> String {
    if wanted.range.is_empty() {
        wanted.name.clone()
    } else {
        format!("{}@{}", wanted.name, wanted.range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_examples_sort_as_the_policy_says() {
        let ordered = ["~~", "~~a", "~", "", "a"];
        for pair in ordered.windows(2) {
            assert_eq!(compare_part(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
        let ordered = [
            "1.0~rc1-1",
            "1.0-1",
            "1.0-1+b1",
            "1.0-2",
            "1.0a-1",
            "1.0+1-1",
            "1.2",
            "1.10",
            "1:0.1",
        ];
        for pair in ordered.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        for (a, b) in [
            ("1.0", "1.0-0"),
            ("0:1", "1"),
            ("1.01", "1.1"),
            ("1.", "1.0"),
        ] {
            assert_eq!(compare(a, b), Ordering::Equal, "{a} {b}");
        }
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(150))]

        /// `dpkg` is the referee.
        #[test]
        fn orders_like_dpkg(a in "([0-2]:)?[0-9][0-9a-cA-C.+~]{0,5}(-[0-9a-b+.~]{1,4})?",
                            b in "([0-2]:)?[0-9][0-9a-cA-C.+~]{0,5}(-[0-9a-b+.~]{1,4})?") {
            let dpkg = |relation: &str| {
                let arguments = ["--compare-versions", &a, relation, &b];
                std::process::Command::new("dpkg").args(arguments).status().map(|status| status.success())
            };
            let order = compare(&a, &b);
            match dpkg("lt") {
                Ok(earlier) => {
                    proptest::prop_assert_eq!(earlier, order == Ordering::Less, "{} {}", a, b);
                    proptest::prop_assert_eq!(dpkg("gt").unwrap(), order == Ordering::Greater, "{} {}", a, b);
                }
                Err(error) => println!("SKIPPED orders_like_dpkg: no dpkg here ({error})"),
            }
            proptest::prop_assert_eq!(compare(&b, &a), order.reverse());
        }
    }

    #[test]
    fn ranges_admit_what_lies_within_all_bounds() {
        let range: Range = ">= 1.2,<<2".parse().unwrap();
        assert!(range.admits("1.2") && range.admits("1.10-1"));
        assert!(!range.admits("1.2~rc1") && !range.admits("2"));
        assert_eq!(range.to_string(), ">= 1.2, << 2");
        assert!("".parse::<Range>().unwrap().admits("anything"));
        assert!("1.2-3".parse::<Range>().unwrap().admits("1.2-3"));
        assert_eq!(
            ">=".parse::<Range>(),
            Err(VersionError::Constraint(">=".into()))
        );
        assert!(matches!(
            "~> 1.2".parse::<Range>(),
            Err(VersionError::Character { .. })
        ));
    }

    #[test]
    fn wanted_notation_round_trips() {
        for (text, name, range) in [
            ("nginx", "nginx", ""),
            ("nginx@>=1.22", "nginx", ">= 1.22"),
            ("nginx@1.22.1-9", "nginx", "= 1.22.1-9"),
            ("g++ @ >> 1, << 3", "g++", ">> 1, << 3"),
        ] {
            let wanted = parse_wanted(text).unwrap();
            assert_eq!((wanted.name.as_str(), wanted.range.as_str()), (name, range));
            assert_eq!(parse_wanted(&display_wanted(&wanted)).unwrap(), wanted);
        }
        for bad in ["", "@1", "nginx@", "-x", "a b", "nginx@>=", "nginx@1,"] {
            assert!(parse_wanted(bad).is_err(), "{bad:?}");
        }
    }
}
