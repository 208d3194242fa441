//! Files into which each package writes entries of its own, and dpkg's alternatives: what
//! several components have made of one such file becomes one again.
//!
//! Components are built apart, so each has the file as it was on its base, with its own
//! entries. Of plain lists the entries are united; what a component took out of the base's
//! list stays out. Of alternatives the choices are united, and the best one counts.
//!
//! Refuses to know images: it is given the versions' bytes, lowest layer first.

use std::collections::{BTreeMap, BTreeSet};

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

/// Paths (without leading `/`) of files that are lists of entries.
pub fn aggregate_paths() -> impl Iterator<Item = &'static str> {
    AGGREGATES.iter().map(|(path, _)| *path)
}

/// The versions of the file at one of [`aggregate_paths`] as one. `on_base` tells that the
/// first version is the one on which the others were made.
pub fn merged_entries(path: &str, versions: &[&str], on_base: bool) -> String {
    let known = AGGREGATES.iter().find(|(known, _)| *known == path);
    let entries = known.map_or(Entries::Lines(1), |(_, entries)| *entries);
    let split: Vec<Vec<&str>> = versions.iter().map(|text| split(text, entries)).collect();
    let removed: BTreeSet<&str> = match &split[..] {
        [base, added @ ..] if on_base => {
            let kept_by_all = |entry: &&&str| added.iter().all(|one| one.contains(*entry));
            let gone = base.iter().filter(|entry| !kept_by_all(entry));
            gone.copied().collect()
        }
        _ => BTreeSet::new(),
    };
    let all = split.into_iter().flatten();
    if entries == Entries::Lists {
        return united_lists(all);
    }
    let mut seen = removed;
    all.filter(|entry| seen.insert(entry)).collect()
}

/// The entries of a file, each with its line ends.
fn split(text: &str, entries: Entries) -> Vec<&str> {
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
            found.push(&text[from..at]);
            (from, lines) = (at, 0);
        }
    }
    found.extend(Some(&text[from..]).filter(|rest| !rest.is_empty()));
    found
}

fn united_lists<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    let mut keys: Vec<&str> = Vec::new();
    let mut lists: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for line in lines {
        let (key, values) = line
            .trim_end()
            .split_once('=')
            .unwrap_or((line.trim_end(), ""));
        let list = lists.entry(key).or_insert_with(|| {
            keys.push(key);
            Vec::new()
        });
        for value in values.split(';').filter(|value| !value.is_empty()) {
            if !list.contains(&value) {
                list.push(value);
            }
        }
    }
    let line = |key: &str| match &lists[key][..] {
        [] => format!("{key}\n"),
        values => format!("{key}={};\n", values.join(";")),
    };
    keys.into_iter().map(line).collect()
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
        if lines.next()? != "auto" {
            return None;
        }
        let link = lines.next()?.to_owned();
        let mut names = Vec::new();
        let mut followers = BTreeMap::new();
        loop {
            let name = lines.next()?;
            if name.is_empty() {
                break;
            }
            if name.contains('/') {
                return None;
            }
            names.push(name.to_owned());
            followers.insert(name.to_owned(), lines.next()?.to_owned());
        }
        let mut choices = BTreeMap::new();
        while let Some(path) = lines.next().filter(|path| !path.is_empty()) {
            let priority = lines.next()?.trim().parse().ok()?;
            let mut led = BTreeMap::new();
            for name in &names {
                let to = lines.next()?;
                if !to.is_empty() {
                    led.insert(name.clone(), to.to_owned());
                }
            }
            let followers = led;
            choices.insert(
                path.to_owned(),
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

    /// The text of dpkg's file.
    pub fn to_text(&self) -> String {
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
        }
        text.push('\n');
        text
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
        let merged = merged_entries(CERTIFICATES, &[&one, &two], false);
        assert_eq!(merged, [&a[..], &b, &c].concat());
    }

    #[test]
    fn what_a_component_takes_out_of_the_bases_list_stays_out() {
        let [a, b, c] = ["a", "b", "c"].map(certificate);
        let base = [a.clone(), b.clone()].concat();
        let (one, two) = (b.clone(), [base.clone(), c.clone()].concat());
        let merged = merged_entries(CERTIFICATES, &[&base, &one, &two], true);
        assert_eq!(merged, [&b[..], &c].concat());
    }

    #[test]
    fn diversions_are_three_lines_each_and_lists_have_a_line_a_key() {
        let path = "var/lib/dpkg/diversions";
        let (sh, man, x) = (
            "/bin/sh\n/bin/sh.d\ndash\n",
            "/m\n/m.d\ndash\n",
            "/x\n/m.d\nx\n",
        );
        let merged = merged_entries(path, &[&[sh, man].concat(), &[sh, x].concat()], false);
        assert_eq!(merged, [sh, man, x].concat());
        let path = "usr/share/applications/mimeinfo.cache";
        let (one, two) = (
            "[MIME Cache]\ntext/html=a.desktop;\ntext/plain=e.desktop;v.desktop;\n",
            "[MIME Cache]\nimage/png=i.desktop;\ntext/plain=v.desktop;x.desktop;\n",
        );
        assert_eq!(
            merged_entries(path, &[one, two], false),
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
        assert_eq!(editor.to_text(), NANO);
        editor.add(Alternative::parse(VIM).unwrap());
        assert_eq!(editor.best(), "/bin/nano");
        assert_eq!(
            editor.followers().collect::<Vec<_>>(),
            ["editor.1.gz", "editor.de.1.gz"]
        );
        let text = editor.to_text();
        let choices = "\n\n/bin/nano\n40\n/usr/share/man/man1/nano.1.gz\n\n\
                       /usr/bin/vim.basic\n30\n/usr/share/man/man1/vim.1.gz\n\n\n";
        assert!(text.ends_with(choices), "{text}");
        assert_eq!(Alternative::parse(&text), Some(editor));
    }

    #[test]
    fn what_was_settled_by_hand_or_is_damaged_is_no_alternative() {
        assert_eq!(Alternative::parse(&NANO.replace("auto", "manual")), None);
        let elsewhere = NANO.replace("editor.1.gz\n/usr", "../editor\n/usr");
        assert_eq!(Alternative::parse(&elsewhere), None);
        for cut in 0..NANO.len() - 40 {
            assert_eq!(Alternative::parse(&NANO[..cut]), None, "{cut}");
        }
        assert_eq!(Alternative::parse("auto\n/l\n\n/c\nmany\n\n"), None);
    }
}
