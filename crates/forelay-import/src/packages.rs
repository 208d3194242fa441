//! Debian packages as a component: what installing them on a base adds to it.
//!
//! The host's apt resolves against the base's package status and downloads; dpkg then
//! runs in a scratch root over the unpacked base, maintainer scripts included, and the
//! overlay's upper directory is the component. So their results are in it: users,
//! alternatives, generated configuration, byte-compiled modules.
//!
//! Files that several components would each replace as a whole are taken out: accounts
//! become fragments (see [`forelay_guest_protocol::accounts`]), package status goes to `status.d`, the
//! linker's cache and debconf's database are dropped. Debian's library directories are
//! on ld.so's built-in search path, so nothing needs the cache; a package that adds
//! another directory is named in the notes.
//!
//! Shared libraries may become components of their own (see [`crate::split`]).
//!
//! Invariant: the same base and packages give the same image, up to randomness in
//! maintainer scripts that [`crate::clean`] does not know.

use std::collections::BTreeMap;
use std::path::Path;

use forelay_image::tree::Tree;

use crate::apt::{AptCache, AptLock, network_error, report_line};
use crate::base::{FALLBACK_TIME_S, made, now_s};
use crate::clean::{clamp_times, remove_noise, remove_secrets};
use crate::describe::describe;
use crate::difference::remove_unchanged;
use crate::draft::{Imported, Part};
use crate::error::{ImportError, io_error, text_of, tree_error};
use crate::progress::{BuildPhase, Progress, Reporter};
use crate::roots::BaseRoot;
use crate::sandbox::Sandbox;
use crate::sandbox::jail::ARCHIVES;
use crate::sandbox::limits::BuildLimits;
use crate::split::{split_off, take_libraries};
use crate::stable_ids::{IdMap, without_change_days};
use crate::tool::Tool;
use crate::within::read_within;
use forelay_guest_protocol::accounts::{Fragments, fragment_of, fragments_path, merged_paths};
use forelay_image::control::{Paragraph, parse_paragraphs};
use forelay_image::package_status::status_path;

/// Whole files that no component may replace, and that are not needed in it.
const DROPPED: &[&str] = &[
    "etc/ld.so.cache",
    "etc/subuid",
    "etc/subgid",
    "var/cache/debconf/config.dat",
    "var/cache/debconf/passwords.dat",
    "var/cache/debconf/templates.dat",
    "var/lib/dpkg/status",
    "var/lib/dpkg/triggers/Unincorp",
    "var/lib/shells.state",
];

/// How the note begins of a component whose libraries are not where the linker looks.
pub const NEEDS_LDCONFIG: &str = "needs ldconfig in the VM";

/// dpkg's list of what is installed.
const STATUS: &str = "var/lib/dpkg/status";

/// Stays whole if a package changes it; the later component wins.
const DIVERSIONS: &str = "var/lib/dpkg/diversions";

/// What to install.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackageOptions {
    /// Packages as apt takes them: `nginx`, `nginx=1.22.1-9`. The first names the component.
    pub packages: Vec<String>,
    /// Make components of their own out of the shared libraries that come along.
    pub split: bool,
}

impl PackageOptions {
    /// The first package's name.
    pub fn default_name(&self) -> String {
        self.packages
            .first()
            .map_or("", |name| plain_name(name))
            .to_owned()
    }
}

pub(super) fn plain_name(package: &str) -> &str {
    package.split(['=', '/', ':']).next().unwrap_or(package)
}

/// Builds the component `name` on `base`. Needs root.
pub fn build_packages(
    options: &PackageOptions,
    name: &str,
    base: &BaseRoot,
    apt: &AptCache,
    scratch: &Path,
    limits: &BuildLimits,
    report: Reporter<'_>,
) -> Result<Imported, ImportError> {
    let base_status = read_status(&base.directory)?;
    check_request(options, &base_status)?;
    let started_s = now_s() - 1;
    let sandbox = Sandbox::new(scratch, &[&base.directory], base.users, limits)?;
    {
        let lock = apt.lock()?;
        apt.refresh(&lock, report)?;
        download(options, base, apt, &lock, report)?;
        install(options, &sandbox, apt, &lock, report)?;
    }
    report(Progress::Started(BuildPhase::Read));
    let mut tree = sandbox.changes()?;
    let mut installed = Installed::compare(&base_status, &read_status(&sandbox.upper())?);
    let mut notes = installed.notes();
    let libraries = match options.split {
        true => take_libraries(&mut installed, options, base),
        false => BTreeMap::new(),
    };
    separate_shared_files(&mut tree, name, base, &installed)?;
    remove_noise(&mut tree);
    let secrets = remove_secrets(&mut tree);
    notes.extend(secrets.into_iter().map(|what| format!("left out: {what}")));
    for path in DROPPED {
        tree.remove_path(path.as_bytes());
    }
    remove_unchanged(&mut tree, &base.directory, base.users)?;
    let mut parts = split_off(&mut tree, libraries, base, started_s)?;
    notes.extend(linker_notes(&tree));
    if tree.lookup(DIVERSIONS.as_bytes()).is_some() {
        notes.push(format!("replaces /{DIVERSIONS} as a whole"));
    }
    let draft = describe(&mut tree, options, name, base, &installed, notes)?;
    let trees = parts.iter_mut().map(|part| &mut part.tree);
    for tree in trees.chain([&mut tree]) {
        clamp_times(tree, started_s, FALLBACK_TIME_S);
    }
    Ok(Imported {
        main: Part::new(tree, draft),
        split_off: parts,
        spools: vec![sandbox.into_spool()],
    })
}

fn check_request(
    options: &PackageOptions,
    base_status: &BTreeMap<String, Paragraph>,
) -> Result<(), ImportError> {
    if options.packages.is_empty() {
        return Err(ImportError::Request("name at least one package".to_owned()));
    }
    for package in &options.packages {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "+-.=:~/".contains(c);
        let starts_well = package.starts_with(|c: char| c.is_ascii_alphanumeric());
        if !starts_well || !package.chars().all(allowed) {
            return Err(ImportError::Request(format!(
                "{package:?} is not a Debian package name"
            )));
        }
    }
    let [only] = &options.packages[..] else {
        return Ok(());
    };
    match base_status.get(only) {
        Some(paragraph) => Err(ImportError::InBase {
            name: only.clone(),
            version: paragraph.field("Version").to_owned(),
        }),
        None => Ok(()),
    }
}

/// Installed packages by name (with architecture if several of one name are installed).
fn read_status(root: &Path) -> Result<BTreeMap<String, Paragraph>, ImportError> {
    let path = root.join(STATUS);
    let text = read_within(root, STATUS).map_err(io_error("reading", &path))?;
    let mut packages = BTreeMap::new();
    for paragraph in parse_paragraphs(&String::from_utf8_lossy(&text)) {
        if paragraph.is_installed() {
            let name = paragraph.field("Package").to_owned();
            packages.insert(name, paragraph);
        }
    }
    Ok(packages)
}

/// Resolves against the base and downloads.
fn download(
    options: &PackageOptions,
    base: &BaseRoot,
    apt: &AptCache,
    _lock: &AptLock,
    report: Reporter<'_>,
) -> Result<(), ImportError> {
    report(Progress::Started(BuildPhase::Download));
    let config = apt.write_config(Some(&base.directory))?;
    let doing = format!("resolving {}", options.packages.join(" "));
    Tool::new("apt-get", "apt", doing)
        .env("APT_CONFIG", config)
        .args([
            "-q",
            "-o",
            "APT::Status-Fd=1",
            "--download-only",
            "install",
            "--",
        ])
        .args(&options.packages)
        .run(|line| report_line(line, report))
        .map_err(|error| resolve_error(error, options, apt))
}

fn resolve_error(error: ImportError, options: &PackageOptions, apt: &AptCache) -> ImportError {
    let ImportError::Tool { tail, .. } = &error else {
        return error;
    };
    for package in &options.packages {
        let name = plain_name(package);
        let unknown = [
            format!("Unable to locate package {name}"),
            format!("Package '{name}' has no installation candidate"),
        ];
        if unknown.iter().any(|text| tail.contains(text)) {
            return apt.no_such_package(name);
        }
    }
    let explained = [
        "unmet dependencies",
        "held broken packages",
        "was not found",
    ];
    if explained.iter().any(|text| tail.contains(text)) {
        return ImportError::Unsolvable {
            packages: options.packages.join(" "),
            explanation: tail.clone(),
        };
    }
    network_error(error)
}

/// Runs dpkg in the scratch root, without network.
fn install(
    options: &PackageOptions,
    sandbox: &Sandbox,
    apt: &AptCache,
    _lock: &AptLock,
    report: Reporter<'_>,
) -> Result<(), ImportError> {
    report(Progress::Started(BuildPhase::Install));
    let config = apt.write_sandbox_config(ARCHIVES)?;
    let doing = format!("installing {}", options.packages.join(" "));
    sandbox
        .tool("apt-get", &doing, true)
        .env("APT_CONFIG", &config)
        .apt(apt.directory())
        .args([
            "-q",
            "-o",
            "APT::Status-Fd=3",
            "--no-download",
            "install",
            "--",
        ])
        .args(&options.packages)
        .run(|line| report_line(line, report))
}

/// The packages that the component adds.
pub(super) struct Installed {
    /// New or changed packages by name.
    pub packages: BTreeMap<String, Paragraph>,
    /// Packages of the base that were replaced by another version: (name, old version).
    upgraded: Vec<(String, String)>,
    /// Packages of the base that were removed.
    removed: Vec<String>,
}

impl Installed {
    pub(super) fn compare(
        base: &BTreeMap<String, Paragraph>,
        now: &BTreeMap<String, Paragraph>,
    ) -> Self {
        let mut installed = Self {
            packages: BTreeMap::new(),
            upgraded: Vec::new(),
            removed: base
                .keys()
                .filter(|name| !now.contains_key(*name))
                .cloned()
                .collect(),
        };
        for (name, paragraph) in now {
            let before = base.get(name).map(|before| before.field("Version"));
            if before == Some(paragraph.field("Version")) {
                continue;
            }
            if let Some(before) = before {
                installed.upgraded.push((name.clone(), before.to_owned()));
            }
            installed.packages.insert(name.clone(), paragraph.clone());
        }
        installed
    }

    /// One package that is new.
    pub(super) fn only(name: &str, package: Paragraph) -> Self {
        Self {
            packages: BTreeMap::from([(name.to_owned(), package)]),
            upgraded: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// Whether this package is another version of one that the base has.
    pub(super) fn replaces_base(&self, name: &str) -> bool {
        self.upgraded.iter().any(|(upgraded, _)| upgraded == name)
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for (name, before) in &self.upgraded {
            let now = self.packages[name].field("Version");
            notes.push(format!("replaces the base's {name} {before} by {now}"));
        }
        for name in &self.removed {
            notes.push(format!("removes the base's {name}"));
        }
        notes
    }
}

/// Replaces account files and package status by this component's fragments of them.
fn separate_shared_files(
    tree: &mut Tree,
    name: &str,
    base: &BaseRoot,
    installed: &Installed,
) -> Result<(), ImportError> {
    let base_text = |path: &str| {
        let text = read_within(&base.directory, path).unwrap_or_default();
        String::from_utf8(text).unwrap_or_default()
    };
    let changed = |tree: &Tree, path: &str| -> Result<String, ImportError> {
        Ok(text_of(tree, path)?.unwrap_or_else(|| base_text(path)))
    };
    let passwd = changed(tree, "etc/passwd")?;
    let group = changed(tree, "etc/group")?;
    let map = IdMap::new(
        &base_text("etc/passwd"),
        &passwd,
        &base_text("etc/group"),
        &group,
    );
    map.apply(tree);
    let mut fragments = Fragments::default();
    for path in merged_paths() {
        let Some(text) = text_of(tree, path)? else {
            continue;
        };
        let text = match path {
            "etc/passwd" => map.passwd(&text),
            "etc/group" => map.group_file(&text),
            "etc/shadow" => without_change_days(&text),
            _ => text,
        };
        let fragment = fragment_of(path, &base_text(path), &text)?;
        if !fragment.is_empty() {
            fragments.files.insert(path.to_owned(), fragment);
        }
        tree.remove_path(path.as_bytes());
    }
    let shown = base.directory.as_path();
    if !fragments.is_empty() {
        tree.put_file(&fragments_path(name), fragments.encode(), made(0o600))
            .map_err(tree_error(shown))?;
    }
    let status: Vec<&str> = installed.packages.values().map(Paragraph::text).collect();
    let status = status.join("\n").into_bytes();
    tree.put_file(&status_path(name), status, made(0o644))
        .map(drop)
        .map_err(tree_error(shown))
}

fn linker_notes(tree: &Tree) -> Vec<String> {
    let directory = tree.lookup(b"etc/ld.so.conf.d");
    let entries = directory.and_then(|id| tree.entries(id));
    let names = entries.into_iter().flat_map(|entries| entries.keys());
    let note = |name: &Vec<u8>| {
        format!(
            "{NEEDS_LDCONFIG} for the library directories in /etc/ld.so.conf.d/{}",
            String::from_utf8_lossy(name)
        )
    };
    names.map(note).collect()
}

#[cfg(test)]
#[path = "packages_tests.rs"]
mod tests;
