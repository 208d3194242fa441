//! Files into which each package writes entries of its own, and dpkg's alternatives: what
//! several components have made of one such file becomes one again.
//!
//! Components are built apart, so each has the file as it was on its base, with its own
//! entries. Of plain lists the entries are united. Of alternatives the choices are united,
//! and the best one counts.
//!
//! Refuses to know images: it is given the versions' bytes, lowest layer first. Their text is
//! hostile: time and output stay within a small multiple of it.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::tree::{is_plain_name, is_plain_path};

/// What the entries of a file are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entries {
    /// So many lines each.
    Lines(usize),
    /// Lines up to one that begins so.
    UpTo(&'static str),
    /// `key=value;value;` lines, of whose values there is one list a key.
    Lists,
}

const AGGREGATES: &[(&str, Entries)] = &[
    (
        "etc/ssl/certs/ca-certificates.crt",
        Entries::UpTo("-----END"),
    ),
    ("usr/share/applications/mimeinfo.cache", Entries::Lists),
    // What is diverted, to where, by which package.
    ("var/lib/dpkg/diversions", Entries::Lines(3)),
    ("var/lib/ucf/hashfile", Entries::Lines(1)),
    ("var/lib/ucf/registry", Entries::Lines(1)),
];

/// Where dpkg keeps what it knows of alternatives, one file for each.
pub const ALTERNATIVES: &str = "var/lib/dpkg/alternatives";
/// Where the links are that lead to the choices.
pub const ALTERNATIVE_LINKS: &str = "etc/alternatives";

/// Most that one alternative may be: the largest of Debian's have some dozens.
const TEXT_LIMIT_BYTES: usize = 64 << 10;
const FOLLOWERS_LIMIT: usize = 256;
const CHOICES_LIMIT: usize = 1024;

/// Paths (without leading `/`) of files that are lists of entries.
pub fn aggregate_paths() -> impl Iterator<Item = &'static str> {
    AGGREGATES.iter().map(|(path, _)| *path)
}

/// The versions of the file at one of [`aggregate_paths`] as one; `None` if one of them is no
/// such file. Of entries of the same key the later is right.
///
/// Nothing is ever taken out: that a component lacks an entry of the base may mean that it
/// removed it, but also that it was built before the base had it, and nobody tells which. A
/// certificate too many is what the base trusts anyway; one too few breaks what worked.
pub fn merged_entries(path: &str, versions: &[&str]) -> Option<String> {
    let known = AGGREGATES.iter().find(|(known, _)| *known == path);
    let entries = known.map_or(Entries::Lines(1), |(_, entries)| *entries);
    let split: Option<Vec<Vec<&str>>> = versions.iter().map(|text| split(text, entries)).collect();
    let all = split?.into_iter().flatten();
    if entries == Entries::Lists {
        return Some(united_lists(all));
    }
    let mut places = HashMap::new();
    let mut united: Vec<&str> = Vec::new();
    for entry in all {
        let place = *places.entry(key(entry, entries)).or_insert(united.len());
        match united.get_mut(place) {
            Some(earlier) => *earlier = entry,
            None => united.push(entry),
        }
    }
    let lines = united.into_iter().map(|entry| format!("{entry}\n"));
    Some(lines.collect())
}

/// The entries of a file, without the last one's line end; `None` if one is not whole.
fn split(text: &str, entries: Entries) -> Option<Vec<&str>> {
    let mut found = Vec::new();
    let (mut from, mut at, mut lines) = (0, 0, 0);
    for line in text.split_inclusive('\n') {
        (at, lines) = (at + line.len(), lines + 1);
        let ends = match entries {
            Entries::Lines(count) => lines == count,
            Entries::UpTo(end) => line.starts_with(end),
            Entries::Lists => true,
        };
        if ends {
            let entry = &text[from..at];
            found.push(entry.strip_suffix('\n').unwrap_or(entry));
            (from, lines) = (at, 0);
        }
    }
    text[from..].trim().is_empty().then_some(found)
}

/// What an entry is about: a diversion about the path it diverts, a line of ucf's about the
/// path after its first word, a certificate about itself.
fn key(entry: &str, entries: Entries) -> &str {
    match entries {
        Entries::Lines(1) => entry.split_once(' ').map_or(entry, |(_, path)| path.trim()),
        Entries::Lines(_) => entry.split('\n').next().unwrap_or(entry),
        _ => entry,
    }
}

fn united_lists<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let mut places: HashMap<&str, usize> = HashMap::new();
    // Keys with their values, and the values again, to look them up.
    let mut lists: Vec<(&str, Vec<&str>, HashSet<&str>)> = Vec::new();
    for line in lines {
        let line = line.trim_end();
        let (key, values) = line.split_once('=').unwrap_or((line, ""));
        let place = *places.entry(key).or_insert(lists.len());
        if place == lists.len() {
            lists.push((key, Vec::new(), HashSet::new()));
        }
        let (_, list, seen) = &mut lists[place];
        let values = values.split(';').filter(|value| !value.is_empty());
        list.extend(values.filter(|value| seen.insert(value)));
    }
    let line = |(key, values, _): (&str, Vec<&str>, _)| match &values[..] {
        [] => format!("{key}\n"),
        values => format!("{key}={};\n", values.join(";")),
    };
    lists.into_iter().map(line).collect()
}

/// One alternative as dpkg keeps it: a name for one of several choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alternative {
    link: String,
    /// Names that follow it, with their links.
    followers: BTreeMap<String, String>,
    choices: BTreeMap<String, Choice>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Choice {
    priority: i64,
    /// Where the followers' links lead; a choice may lack some.
    followers: BTreeMap<String, String>,
}

impl Alternative {
    /// Reads dpkg's file of an alternative; `None` for one that was settled by hand, and for
    /// what is no such file.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if text.len() > TEXT_LIMIT_BYTES || lines.next()? != "auto" {
            return None;
        }
        let plain = |path: &str| is_plain_path(path).then(|| path.to_owned());
        let link = plain(lines.next()?)?;
        let mut names = Vec::new();
        let mut followers = BTreeMap::new();
        loop {
            let name = lines.next()?;
            if name.is_empty() {
                break;
            }
            if !is_plain_name(name) || names.len() == FOLLOWERS_LIMIT {
                return None;
            }
            names.push(name.to_owned());
            followers.insert(name.to_owned(), plain(lines.next()?)?);
        }
        let mut choices = BTreeMap::new();
        while let Some(path) = lines.next().filter(|path| !path.is_empty()) {
            if choices.len() == CHOICES_LIMIT {
                return None;
            }
            let path = plain(path)?;
            let priority = lines.next()?.trim().parse().ok()?;
            let mut led = BTreeMap::new();
            for name in &names {
                let to = lines.next()?;
                if !to.is_empty() {
                    led.insert(name.clone(), plain(to)?);
                }
            }
            let followers = led;
            choices.insert(
                path,
                Choice {
                    priority,
                    followers,
                },
            );
        }
        (!choices.is_empty()).then_some(Self {
            link,
            followers,
            choices,
        })
    }

    /// Adds the choices of a later component; where both have one, the later is right.
    pub fn add(&mut self, later: Self) {
        self.link = later.link;
        self.followers.extend(later.followers);
        self.choices.extend(later.choices);
    }

    /// The choice that counts: of the highest priority the first, as update-alternatives has
    /// it.
    pub fn best(&self) -> &str {
        let mut choices = self.choices.iter();
        let first = choices.next().expect("parsing refuses one without choices");
        let better = |best: (&'_ String, &'_ Choice), next: (&'_ String, &'_ Choice)| {
            next.1.priority > best.1.priority
        };
        let best = choices.fold(first, |best, next| match better(best, next) {
            true => next,
            false => best,
        });
        best.0
    }

    /// Names of the links that follow this one.
    pub fn followers(&self) -> impl Iterator<Item = &str> {
        self.followers.keys().map(String::as_str)
    }

    /// The text of dpkg's file; `None` if there is too much of it. Every choice has a line for
    /// every follower, so that little from several components makes much.
    pub fn to_text(&self) -> Option<String> {
        if self.followers.len() > FOLLOWERS_LIMIT || self.choices.len() > CHOICES_LIMIT {
            return None;
        }
        let mut text = format!("auto\n{}\n", self.link);
        for (name, link) in &self.followers {
            text.push_str(&format!("{name}\n{link}\n"));
        }
        text.push('\n');
        for (path, choice) in &self.choices {
            text.push_str(&format!("{path}\n{}\n", choice.priority));
            for name in self.followers.keys() {
                let to = choice.followers.get(name).map_or("", |to| to);
                text.push_str(&format!("{to}\n"));
            }
            if text.len() > TEXT_LIMIT_BYTES {
                return None;
            }
        }
        text.push('\n');
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CERTIFICATES: &str = "etc/ssl/certs/ca-certificates.crt";

    fn certificate(name: &str) -> String {
        format!("-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n")
    }

    #[test]
    fn certificates_of_all_components_are_trusted_once() {
        let [a, b, c] = ["a", "b", "c"].map(certificate);
        let (one, two) = (
            [a.clone(), b.clone()].concat(),
            [b.clone(), c.clone()].concat(),
        );
        let all = [&a[..], &b, &c].concat();
        let merged = merged_entries(CERTIFICATES, &[&one, &two]);
        assert_eq!(merged, Some(all.clone()));
        // A last entry without a line end stays an entry of its own.
        let merged = merged_entries(CERTIFICATES, &[one.trim_end(), &two]);
        assert_eq!(merged, Some(all));
        let cut = &two[..two.len() - 30];
        assert_eq!(merged_entries(CERTIFICATES, &[&one, cut]), None);
    }

    #[test]
    fn a_component_of_an_older_base_takes_nothing_from_the_newer_base() {
        let [old, new, own] = ["old", "new", "own"].map(certificate);
        let base = [old.clone(), new.clone()].concat();
        let component = [old.clone(), own.clone()].concat();
        let merged = merged_entries(CERTIFICATES, &[&base, &component]);
        assert_eq!(merged, Some([base, own].concat()));
    }

    #[test]
    fn ucf_has_one_line_a_path_and_that_is_the_latest() {
        let merged = merged_entries(
            "var/lib/ucf/hashfile",
            &["1  /etc/a\n2  /etc/b", "3  /etc/a\n4  /etc/c\n"],
        );
        let expected = "3  /etc/a\n2  /etc/b\n4  /etc/c\n";
        assert_eq!(merged.as_deref(), Some(expected));
    }

    #[test]
    fn lists_of_many_entries_take_no_time_of_their_square() {
        // 400,000 values: looked up one by one in lists, they take longer than a test may.
        let values: String = (0..400_000).map(|number| format!("{number};")).collect();
        let (list, path) = (
            format!("k={values}\n"),
            "usr/share/applications/mimeinfo.cache",
        );
        let merged = merged_entries(path, &[&list, &list]);
        assert_eq!(merged, Some(list));
        let lines: String = (0..400_000)
            .map(|number| format!("0  /{number}\n"))
            .collect();
        let merged = merged_entries("var/lib/ucf/hashfile", &[&lines, &lines]);
        assert_eq!(merged, Some(lines));
    }

    #[test]
    fn diversions_are_three_lines_each_and_lists_have_a_line_a_key() {
        let path = "var/lib/dpkg/diversions";
        let (sh, man, x) = (
            "/bin/sh\n/bin/sh.d\ndash\n",
            "/m\n/m.d\ndash\n",
            "/x\n/m.d\nx\n",
        );
        let merged = merged_entries(path, &[&[sh, man].concat(), &[sh, x].concat()]);
        assert_eq!(merged, Some([sh, man, x].concat()));
        assert_eq!(merged_entries(path, &[sh, "/x\n/m.d\n"]), None);
        let path = "usr/share/applications/mimeinfo.cache";
        let (one, two) = (
            "[MIME Cache]\ntext/html=a.desktop;\ntext/plain=e.desktop;v.desktop;\n",
            "[MIME Cache]\nimage/png=i.desktop;\ntext/plain=v.desktop;x.desktop;\n",
        );
        assert_eq!(
            merged_entries(path, &[one, two]).unwrap(),
            "[MIME Cache]\ntext/html=a.desktop;\ntext/plain=e.desktop;v.desktop;x.desktop;\n\
             image/png=i.desktop;\n"
        );
    }

    const NANO: &str = "auto\n/usr/bin/editor\neditor.1.gz\n/usr/share/man/man1/editor.1.gz\n\n\
                        /bin/nano\n40\n/usr/share/man/man1/nano.1.gz\n\n";
    const VIM: &str = "auto\n/usr/bin/editor\neditor.1.gz\n/usr/share/man/man1/editor.1.gz\n\
                       editor.de.1.gz\n/usr/share/man/de/man1/editor.1.gz\n\n\
                       /usr/bin/vim.basic\n30\n/usr/share/man/man1/vim.1.gz\n\n\n";

    #[test]
    fn the_choices_of_all_components_are_there_and_the_best_counts() {
        let mut editor = Alternative::parse(NANO).unwrap();
        assert_eq!(editor.to_text().unwrap(), NANO);
        editor.add(Alternative::parse(VIM).unwrap());
        assert_eq!(editor.best(), "/bin/nano");
        assert_eq!(
            editor.followers().collect::<Vec<_>>(),
            ["editor.1.gz", "editor.de.1.gz"]
        );
        let text = editor.to_text().unwrap();
        let choices = "\n\n/bin/nano\n40\n/usr/share/man/man1/nano.1.gz\n\n\
                       /usr/bin/vim.basic\n30\n/usr/share/man/man1/vim.1.gz\n\n\n";
        assert!(text.ends_with(choices), "{text}");
        assert_eq!(Alternative::parse(&text), Some(editor));
    }

    #[test]
    fn what_was_settled_by_hand_or_is_damaged_is_no_alternative() {
        assert_eq!(Alternative::parse(&NANO.replace("auto", "manual")), None);
        for name in ["../editor", "..", ".", "a/b"] {
            let elsewhere = NANO.replace("\neditor.1.gz\n/usr", &format!("\n{name}\n/usr"));
            assert_ne!(elsewhere, NANO);
            assert_eq!(Alternative::parse(&elsewhere), None, "{name}");
        }
        for path in [
            "/usr/bin/editor",
            "/usr/share/man/man1/editor.1.gz",
            "/bin/nano",
        ] {
            for bad in ["/usr/../etc/shadow", "relative", "/usr//bin", "/"] {
                let elsewhere = NANO.replace(path, bad);
                assert_eq!(Alternative::parse(&elsewhere), None, "{path} {bad}");
            }
        }
        for cut in 0..NANO.len() - 40 {
            assert_eq!(Alternative::parse(&NANO[..cut]), None, "{cut}");
        }
        assert_eq!(Alternative::parse("auto\n/l\n\n/c\nmany\n\n"), None);
    }

    #[test]
    fn an_alternative_of_hostile_size_is_none() {
        let followers = |from: usize, to: usize| -> String {
            (from..to)
                .map(|number| format!("{number}\n/{number}\n"))
                .collect()
        };
        let choices = |count: usize, followers: usize| -> String {
            let empty = "\n".repeat(followers);
            (0..count)
                .map(|number| format!("/{number}\n1\n{empty}"))
                .collect()
        };
        let parse = |names: String, choices: String| {
            Alternative::parse(&format!("auto\n/l\n{names}\n{choices}\n"))
        };
        assert!(parse(followers(0, 256), choices(1, 256)).is_some());
        assert!(parse(followers(0, 257), choices(1, 257)).is_none());
        assert!(parse(String::new(), choices(1024, 0)).is_some());
        assert!(parse(String::new(), choices(1025, 0)).is_none());
        assert!(
            parse(followers(0, 200), choices(400, 200)).is_none(),
            "too long"
        );
        // Neither has much, but all choices times all followers is.
        let mut united = parse(followers(0, 200), choices(1, 200)).unwrap();
        united.add(parse(String::new(), choices(1000, 0)).unwrap());
        assert_eq!(united.to_text(), None);
        let mut united = parse(followers(0, 200), choices(1, 200)).unwrap();
        united.add(parse(followers(200, 300), choices(1, 100)).unwrap());
        assert_eq!(united.to_text(), None);
    }
}
