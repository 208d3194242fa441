//! Shared libraries out of a component, each as a component of its own: several components
//! that need `libssl3` then require one and the same image, which is in memory once.
//!
//! A package is split off if it is a library that nobody asked for by name, new on the base,
//! and all that it depends on is in the base or split off as well. Its component holds the
//! files that dpkg says are its own; what maintainer scripts made besides stays with the
//! component that was asked for.
//!
//! Invariant: the same version of a library gives the same component, whatever was built
//! with it: nothing in it comes from the other packages.

use std::collections::{BTreeMap, BTreeSet};

use forelay_image::component::Role;
use forelay_image::tree::{Attributes, Kind, Node, NodeId, ROOT, Tree};

use crate::base::made;
use crate::describe::{conflicts, requirements, scripts_run};
use crate::draft::{Draft, Part};
use crate::error::{ImportError, text_of, tree_error};
use crate::packages::{Installed, PackageOptions, plain_name};
use crate::roots::BaseRoot;
use forelay_image::control::{Paragraph, parse_provides, parse_relations, sbom_package};
use forelay_image::package_status::status_path;

/// Where dpkg keeps what it knows of installed packages.
const INFO: &str = "var/lib/dpkg/info";

/// Takes the packages to be split off out of `installed`.
pub(super) fn take_libraries(
    installed: &mut Installed,
    options: &PackageOptions,
    base: &BaseRoot,
) -> BTreeMap<String, Paragraph> {
    let asked: Vec<&str> = options.packages.iter().map(|one| plain_name(one)).collect();
    let mut chosen: BTreeSet<String> = installed
        .packages
        .iter()
        .filter(|(name, paragraph)| {
            is_library(paragraph) && !asked.contains(&&name[..]) && !installed.replaces_base(name)
        })
        .map(|(name, _)| name.clone())
        .collect();
    loop {
        let offered = offered(chosen.iter().map(|name| &installed.packages[name]), base);
        let before = chosen.len();
        chosen.retain(|name| {
            let package = &installed.packages[name];
            let fields = ["Pre-Depends", "Depends"];
            let mut clauses = fields
                .iter()
                .flat_map(|field| parse_relations(package.field(field)));
            clauses.all(|clause| clause.iter().any(|one| offered.contains(&one.name)))
        });
        if chosen.len() == before {
            break;
        }
    }
    let libraries = installed
        .packages
        .extract_if(.., |name, _| chosen.contains(name));
    libraries.collect()
}

fn is_library(package: &Paragraph) -> bool {
    let section = package.field("Section");
    let section = section.rsplit('/').next().unwrap_or(section);
    matches!(section, "libs" | "oldlibs")
}

/// Names that the base and these packages offer.
fn offered<'a>(packages: impl Iterator<Item = &'a Paragraph>, base: &BaseRoot) -> BTreeSet<String> {
    let of_base = base.component.provides.iter().map(|one| one.name.clone());
    let mut offered: BTreeSet<String> = of_base.collect();
    for package in packages {
        offered.insert(package.field("Package").to_owned());
        let provides = parse_provides(package.field("Provides"));
        offered.extend(provides.into_iter().map(|one| one.name));
    }
    offered
}

/// Moves the files of `libraries` out of `tree`. New files have times from `started_s` on.
pub(super) fn split_off(
    tree: &mut Tree,
    libraries: BTreeMap<String, Paragraph>,
    base: &BaseRoot,
    started_s: i64,
) -> Result<Vec<Part>, ImportError> {
    let kept_directories = listed_by_others(tree, &libraries)?;
    let mut parts = Vec::new();
    for (name, paragraph) in libraries {
        let mut moved = Move {
            from: tree,
            to: Tree::new(),
            links: BTreeMap::new(),
            started_s,
        };
        let listed = moved.files(&name)?;
        moved.prune(&listed, &kept_directories);
        let mut part = moved.to;
        let status = paragraph.text().to_owned();
        let shown = base.directory.as_path();
        part.put_file(&status_path(&name), status.into_bytes(), made(0o644))
            .map_err(tree_error(shown))?;
        let draft = draft(&part, &name, paragraph, base);
        parts.push(Part::new(part, draft));
    }
    Ok(parts)
}

fn draft(tree: &Tree, name: &str, paragraph: Paragraph, base: &BaseRoot) -> Draft {
    let version = paragraph.field("Version").to_owned();
    let provides = parse_provides(paragraph.field("Provides"));
    let architecture = &base.component.architecture;
    let mut draft = Draft::new(name, &version, Role::Library, architecture, ());
    draft.description = paragraph.summary().to_owned();
    draft.sbom = vec![sbom_package(&paragraph)];
    let alone = Installed::only(name, paragraph);
    draft.requires = requirements(base, &alone, &provides);
    draft.conflicts = conflicts(&alone, &provides);
    draft.provides = provides;
    if !scripts_run(tree, &alone).is_empty() {
        draft
            .notes
            .push(format!("maintainer scripts ran for: {name}"));
    }
    draft
}

/// The paths that a package's list names, without leading `/`.
fn list_of(tree: &Tree, name: &str) -> Result<Vec<String>, ImportError> {
    let mut paths = Vec::new();
    for info in info_files(tree, name) {
        if info.ends_with(".list") {
            let text = text_of(tree, &format!("{INFO}/{info}"))?;
            let text = text.unwrap_or_default();
            let lines = text.lines().map(|line| line.trim_start_matches('/'));
            paths.extend(
                lines
                    .filter(|line| !matches!(*line, "" | "."))
                    .map(str::to_owned),
            );
        }
    }
    Ok(paths)
}

/// Names of dpkg's own files about a package: `NAME.list`, `NAME:amd64.md5sums`.
fn info_files(tree: &Tree, name: &str) -> Vec<String> {
    let entries = tree.lookup(INFO.as_bytes()).and_then(|id| tree.entries(id));
    let names = entries.into_iter().flat_map(|entries| entries.keys());
    let names = names.map(|name| String::from_utf8_lossy(name).into_owned());
    let of_package = |file: &String| {
        let stem = file.rsplit_once('.').map_or(&file[..], |(stem, _)| stem);
        stem.split(':').next() == Some(name)
    };
    names.filter(of_package).collect()
}

/// Directories that packages list which stay.
fn listed_by_others(
    tree: &Tree,
    libraries: &BTreeMap<String, Paragraph>,
) -> Result<BTreeSet<String>, ImportError> {
    let entries = tree.lookup(INFO.as_bytes()).and_then(|id| tree.entries(id));
    let names = entries.into_iter().flat_map(|entries| entries.keys());
    let stems: BTreeSet<String> = names
        .filter_map(|name| {
            let name = String::from_utf8_lossy(name);
            let stem = name.strip_suffix(".list")?;
            Some(stem.split(':').next().unwrap_or(stem).to_owned())
        })
        .filter(|name| !libraries.contains_key(name))
        .collect();
    let mut listed = BTreeSet::new();
    for name in stems {
        listed.extend(list_of(tree, &name)?.iter().map(|path| merged(path)));
    }
    Ok(listed)
}

/// Where a packaged path is on a system with merged `/usr`.
fn merged(path: &str) -> String {
    let first = path.split('/').next().unwrap_or(path);
    match matches!(first, "bin" | "sbin" | "lib" | "lib32" | "lib64" | "libx32") {
        true => format!("usr/{path}"),
        false => path.to_owned(),
    }
}

/// One package on its way from one tree to another.
struct Move<'a> {
    from: &'a mut Tree,
    to: Tree,
    /// Files with several names: old node to new.
    links: BTreeMap<NodeId, NodeId>,
    started_s: i64,
}

impl Move<'_> {
    /// Moves what the package owns; returns the paths that it lists.
    fn files(&mut self, name: &str) -> Result<Vec<String>, ImportError> {
        let mut listed: Vec<String> = list_of(self.from, name)?
            .iter()
            .map(|path| merged(path))
            .collect();
        let info = info_files(self.from, name);
        listed.extend(info.into_iter().map(|file| format!("{INFO}/{file}")));
        for path in &listed {
            self.one(path)?;
        }
        Ok(listed)
    }

    fn one(&mut self, path: &str) -> Result<(), ImportError> {
        let Some(id) = self.from.lookup(path.as_bytes()) else {
            // Left out of a slim base, or the same as in the base.
            return Ok(());
        };
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        if self.from.entries(id).is_some() {
            return self.directory(path).map(drop);
        }
        let to = self.directory(parent)?;
        match self.links.get(&id) {
            Some(&known) => self
                .to
                .link(to, name.as_bytes(), known)
                .map_err(tree_error(path))?,
            None => {
                let node = self.from.node(id).clone();
                let new = self.to.insert(to, name.as_bytes(), node);
                self.links.insert(id, new.map_err(tree_error(path))?);
            }
        }
        self.from.remove_path(path.as_bytes());
        Ok(())
    }

    /// The directory at `path`, made with the attributes that it has where files come from.
    /// Its time is the build's: that of a directory depends on what else is in it.
    fn directory(&mut self, path: &str) -> Result<NodeId, ImportError> {
        let mut at = ROOT;
        let mut so_far = String::new();
        for name in path.split('/').filter(|name| !name.is_empty()) {
            so_far.push_str(name);
            let known = self.to.entries(at).and_then(|all| all.get(name.as_bytes()));
            at = match known.copied() {
                Some(known) => known,
                None => {
                    let from = self.from.lookup(so_far.as_bytes());
                    let mut attributes = from.map_or(Attributes::with_mode(0o755), |id| {
                        self.from.node(id).attributes.clone()
                    });
                    attributes.mtime_s = self.started_s;
                    attributes.mtime_ns = 0;
                    attributes.xattrs.clear();
                    let kind = Kind::Directory(BTreeMap::new());
                    let made = self
                        .to
                        .insert(at, name.as_bytes(), Node { attributes, kind });
                    made.map_err(tree_error(&so_far))?
                }
            };
            so_far.push('/');
        }
        Ok(at)
    }

    /// Removes directories that are empty now and that no package which stays has.
    fn prune(&mut self, listed: &[String], kept: &BTreeSet<String>) {
        // A directory comes before what is in it.
        for path in listed.iter().rev().filter(|path| !kept.contains(*path)) {
            let id = self.from.lookup(path.as_bytes());
            let entries = id.and_then(|id| self.from.entries(id));
            if entries.is_some_and(BTreeMap::is_empty) {
                self.from.remove_path(path.as_bytes());
            }
        }
    }
}
