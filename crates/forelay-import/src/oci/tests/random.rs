//! Layers whose entries meet, made at random: `umoci` is the referee.

use super::*;

/// Makes layers whose entries meet: few names, in directories and to files that there were.
pub(super) struct Maker {
    random: ChaCha8Rng,
    directories: Vec<String>,
    files: Vec<String>,
}

impl Maker {
    pub fn seeded(seed: u64) -> Self {
        Self {
            random: ChaCha8Rng::seed_from_u64(seed),
            directories: vec![String::new()],
            files: vec!["a".to_owned()],
        }
    }

    fn one_of(&mut self, all: &[String]) -> String {
        all[self.random.random_range(0..all.len())].clone()
    }

    fn path(&mut self) -> String {
        let parent = self.one_of(&self.directories.clone());
        let name = ["a", "b", "c", "d"][self.random.random_range(0..4)];
        format!("{parent}{name}")
    }

    /// An entry: kind, path, content.
    fn entry(&mut self, lowest: bool) -> (EntryType, String, String) {
        let path = self.path();
        match self.random.random_range(if lowest { 5..18 } else { 0..18 }) {
            0 | 1 => {
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
                let separator = if parent.is_empty() { "" } else { "/" };
                (
                    Regular,
                    format!("{parent}{separator}.wh.{name}"),
                    String::new(),
                )
            }
            2 => {
                let directory = self.one_of(&self.directories.clone());
                (Regular, format!("{directory}.wh..wh..opq"), String::new())
            }
            3 | 4 => (Link, path, self.one_of(&self.files.clone())),
            5..=8 => {
                self.directories.push(format!("{path}/"));
                (Directory, path, String::new())
            }
            9 => (Symlink, path, self.path()),
            10 => (Symlink, path, format!("/{}", self.path())),
            11 => (Symlink, path, format!("../{}", self.path())),
            12 => {
                let kind = [Fifo, Char, Block][self.random.random_range(0..3)];
                (kind, path, String::new())
            }
            _ => {
                self.files.push(path.clone());
                (Regular, path, "x".repeat(self.random.random_range(0..9)))
            }
        }
    }

    pub fn layers(&mut self) -> Vec<OwnedEntries> {
        let count = self.random.random_range(2..=4);
        let mut layer = |number| {
            let entries = self.random.random_range(2..10);
            (0..entries).map(|_| self.entry(number == 0)).collect()
        };
        (0..count).map(&mut layer).collect()
    }
}

/// The entries of a layer.
pub(super) type OwnedEntries = Vec<(EntryType, String, String)>;

/// Layers as they were made.
type MadeLayers = [OwnedEntries];

/// An image of these layers.
pub(super) fn image_of(layers: &MadeLayers) -> Made {
    let borrowed = layers.iter().map(|layer| {
        let entries = layer.iter();
        entries
            .map(|(kind, path, content)| (*kind, &path[..], &content[..]))
            .collect()
    });
    let borrowed: Vec<Vec<TarEntry<'_>>> = borrowed.collect();
    let slices: Vec<&[TarEntry<'_>]> = borrowed.iter().map(Vec::as_slice).collect();
    Made::new(&slices)
}

/// True if a layer has names in what a layer below has as a link.
fn goes_through_link(layers: &MadeLayers, path: &str) -> bool {
    let path = path.trim_start_matches('/');
    let below = format!("{path}/");
    let link = |layer: &Vec<(EntryType, String, String)>| {
        let last = layer.iter().rfind(|(_, name, _)| name == path);
        last.map(|(kind, ..)| *kind == Symlink)
    };
    let number = layers.iter().rposition(|layer| link(layer).is_some());
    number.is_some_and(|number| {
        let mut above = layers[number + 1..].iter().flatten();
        link(&layers[number]) == Some(true) && above.any(|(_, name, _)| name.starts_with(&below))
    })
}

/// True if a layer deletes a directory, alone or with one that it is in, and has names in
/// it, but no entry of it.
fn deletes_and_fills(layers: &MadeLayers, path: &str) -> bool {
    let path = path.trim_start_matches('/');
    let mut deletions = vec![".wh..wh..opq".to_owned()];
    for (at, _) in path.match_indices('/').chain([(path.len(), "")]) {
        let (parent, name) = path[..at].rsplit_once('/').unwrap_or(("", &path[..at]));
        let whiteout = format!("{parent}/.wh.{name}");
        deletions.push(whiteout.trim_start_matches('/').to_owned());
        if at < path.len() {
            deletions.push(format!("{}/.wh..wh..opq", &path[..at]));
        }
    }
    let below = format!("{path}/");
    layers.iter().any(|layer| {
        let mut names = layer.iter().map(|(_, name, _)| name);
        names.clone().any(|name| deletions.contains(name))
            && names.clone().any(|name| name.starts_with(&below))
            && !names.any(|name| name == path)
    })
}

#[test]
fn privileged_random_images_are_what_umoci_unpacks() {
    let test = "privileged_random_images_are_what_umoci_unpacks";
    let root = rustix::process::geteuid().is_root();
    if !root || Command::new("umoci").arg("--version").output().is_err() {
        println!("SKIPPED {test}: needs root and umoci");
        return;
    }
    let start = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs() as i64;
    let (mut same, mut copied, mut odd) = (0, 0, 0);
    let mut wrong: Vec<String> = Vec::new();
    for case in 0..100 {
        let layers = Maker::seeded(case).layers();
        let made = image_of(&layers);
        let imported = made.import();
        let Some(expected) = unpacked(&made) else {
            continue;
        };
        let imported = match imported {
            Ok(imported) => imported,
            Err(error) => {
                wrong.push(format!("case {case}: {error}\n{layers:?}"));
                continue;
            }
        };
        let (found, expected) = (seen(&laid(&imported), start), seen(&expected, start));
        let is = |all: &BTreeMap<String, String>, path: &str, kind: &str| {
            all.get(path).is_some_and(|what| what.starts_with(kind))
        };
        // umoci makes directories where a link leads to nothing; here they take its place.
        let beyond_link = |path: &String| {
            let is_odd = is(&found, path, "directory") && is(&expected, path, "link");
            is_odd && goes_through_link(&layers, path)
        };
        if found.keys().any(beyond_link) {
            odd += 1;
            continue;
        }
        // umoci keeps a deleted directory's attributes if the layer has names in it but no
        // entry of it.
        let new = "directory 755 0:0 now {}";
        let kept = |path: &str| {
            let is_odd = is(&found, path, new) && is(&expected, path, "directory");
            is_odd && deletes_and_fills(&layers, path)
        };
        let paths: BTreeSet<&String> = found.keys().chain(expected.keys()).collect();
        let is_same = |path: &str| match (found.get(path), expected.get(path)) {
            // umoci gave the directory the time when it put something in.
            (Some(found), Some(expected)) if expected.contains(" now ") => {
                untimed(found) == untimed(expected)
            }
            (found, expected) => found == expected,
        };
        let differ = paths
            .into_iter()
            .filter(|path| !path.is_empty() && !is_same(path) && !kept(path));
        let differ: Vec<_> = differ
            .map(|path| (path, found.get(path), expected.get(path)))
            .collect();
        if !differ.is_empty() {
            wrong.push(format!(
                "case {case}: path, composed, umoci: {differ:#?}\n{layers:?}"
            ));
        }
        same += 1;
        let changed = |part: &&Part| part.draft.version != "1";
        copied += imported.split_off.iter().filter(changed).count();
    }
    assert!(
        wrong.is_empty(),
        "{} cases\n{}",
        wrong.len(),
        wrong[..wrong.len().min(4)].join("\n\n")
    );
    println!("{same} images, {copied} layers with links to layers below");
    assert!(same > 30 && copied > 3 && odd < 9, "{same} {copied} {odd}");
}
