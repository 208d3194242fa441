//! Debian packages as a component: what installing them on a base adds to it.
//!
//! The host's apt resolves against the base's package status and downloads; dpkg then
//! runs in a scratch root over the unpacked base, maintainer scripts included, and the
//! overlay's upper directory is the component. So their results are in it: users,
//! alternatives, generated configuration, byte-compiled modules.
//!
//! Files that several components would each replace as a whole are taken out: accounts
//! become fragments (see [`super::merge`]), package status goes to `status.d`, the
//! linker's cache and debconf's database are dropped. Debian's library directories are
//! on ld.so's built-in search path, so nothing needs the cache; a package that adds
//! another directory is named in the notes.
//!
//! Invariant: the same base and packages give the same image, up to randomness in
//! maintainer scripts that [`super::clean`] does not know.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use forelay_image::component::{Capability, NameRange, Requirement, Role};
use forelay_image::tree::Tree;

use super::accounts::{IdMap, without_change_days};
use super::apt::{AptCache, AptLock, network_error, report_line};
use super::base::{FALLBACK_TIME_S, now_s, put_file, text_of};
use super::clean::{clamp_times, remove_noise, remove_path, remove_secrets};
use super::control::{Paragraph, parse_paragraphs, parse_provides, parse_relations, sbom_package};
use super::difference::remove_unchanged;
use super::dir::{Ownership, read_directory};
use super::draft::{Draft, Imported};
use super::entrypoint::{Start, from_unit, known_start};
use super::error::{ImportError, io_error};
use super::merge::{Fragments, fragment_of, fragments_path, merged_paths, status_path};
use super::progress::{Phase, Progress, Reporter};
use super::roots::BaseRoot;
use super::sandbox::Sandbox;
use super::tool::Tool;

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

/// Stays whole if a package changes it; the later component wins.
const DIVERSIONS: &str = "var/lib/dpkg/diversions";

/// What to install.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackageOptions {
    /// Packages as apt takes them: `nginx`, `nginx=1.22.1-9`. The first names the component.
    pub packages: Vec<String>,
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

fn plain_name(package: &str) -> &str {
    package.split(['=', '/', ':']).next().unwrap_or(package)
}

/// Builds the component `name` on `base`. Needs root.
pub fn build_packages(
    options: &PackageOptions,
    name: &str,
    base: &BaseRoot,
    apt: &AptCache,
    scratch: &Path,
    report: Reporter<'_>,
) -> Result<Imported, ImportError> {
    let base_status = read_status(&base.directory)?;
    check_request(options, &base_status)?;
    let started_s = now_s() - 1;
    let sandbox = Sandbox::new(scratch, &[&base.directory])?;
    {
        let lock = apt.lock()?;
        apt.refresh(&lock, report)?;
        download(options, base, apt, &lock, report)?;
        install(options, &sandbox, apt, &lock, report)?;
    }
    report(Progress::Started(Phase::Read));
    let mut tree = read_directory(&sandbox.upper(), Ownership::Keep)?;
    let installed = Installed::compare(&base_status, &read_status(&sandbox.upper())?);
    let mut notes = installed.notes();
    separate_shared_files(&mut tree, name, base, &installed)?;
    remove_noise(&mut tree);
    let secrets = remove_secrets(&mut tree);
    notes.extend(secrets.into_iter().map(|what| format!("left out: {what}")));
    for path in DROPPED {
        remove_path(&mut tree, path.as_bytes());
    }
    remove_unchanged(&mut tree, &base.directory)?;
    notes.extend(linker_notes(&tree));
    if tree.lookup(DIVERSIONS.as_bytes()).is_some() {
        notes.push(format!("replaces /{DIVERSIONS} as a whole"));
    }
    let draft = describe(&mut tree, options, name, base, &installed, notes)?;
    clamp_times(&mut tree, started_s, FALLBACK_TIME_S);
    Ok(Imported {
        tree,
        draft,
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
    let path = root.join("var/lib/dpkg/status");
    let text = fs::read(&path).map_err(io_error("reading", &path))?;
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
    report(Progress::Started(Phase::Download));
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
    report(Progress::Started(Phase::Install));
    let root = sandbox.root();
    let config = apt.write_config(Some(&root))?;
    let doing = format!("installing {}", options.packages.join(" "));
    let archives = root.join("var/cache/apt/archives");
    sandbox
        .host_tool("apt-get", "util-linux", &doing)?
        .env("APT_CONFIG", config)
        .env("FORELAY_ARCHIVES", apt.archives())
        .arg("-o")
        .arg(format!("Dir::Cache::archives={}", archives.display()))
        .args([
            "-q",
            "-o",
            "APT::Status-Fd=1",
            "--no-download",
            "install",
            "--",
        ])
        .args(&options.packages)
        .run(|line| report_line(line, report))
}

/// The packages that the component adds.
struct Installed {
    /// New or changed packages by name.
    packages: BTreeMap<String, Paragraph>,
    /// Packages of the base that were replaced by another version: (name, old version).
    upgraded: Vec<(String, String)>,
    /// Packages of the base that were removed.
    removed: Vec<String>,
}

impl Installed {
    fn compare(base: &BTreeMap<String, Paragraph>, now: &BTreeMap<String, Paragraph>) -> Self {
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
    let base_text = |path: &str| fs::read_to_string(base.directory.join(path)).unwrap_or_default();
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
        remove_path(tree, path.as_bytes());
    }
    let shown = base.directory.as_path();
    if !fragments.is_empty() {
        put_file(
            tree,
            &fragments_path(name),
            fragments.encode(),
            0o600,
            shown,
        )?;
    }
    let status: Vec<&str> = installed.packages.values().map(Paragraph::text).collect();
    put_file(
        tree,
        &status_path(name),
        status.join("\n").into_bytes(),
        0o644,
        shown,
    )
}

fn linker_notes(tree: &Tree) -> Vec<String> {
    let directory = tree.lookup(b"etc/ld.so.conf.d");
    let entries = directory.and_then(|id| tree.entries(id));
    let names = entries.into_iter().flat_map(|entries| entries.keys());
    let note = |name: &Vec<u8>| {
        format!(
            "needs ldconfig in the VM for the library directories in /etc/ld.so.conf.d/{}",
            String::from_utf8_lossy(name)
        )
    };
    names.map(note).collect()
}

fn describe(
    tree: &mut Tree,
    options: &PackageOptions,
    name: &str,
    base: &BaseRoot,
    installed: &Installed,
    mut notes: Vec<String>,
) -> Result<Draft, ImportError> {
    let first = plain_name(&options.packages[0]);
    // A virtual name was asked for: the package that provides it.
    let provider = || {
        let mut all = installed.packages.values();
        all.find(|p| {
            parse_provides(p.field("Provides"))
                .iter()
                .any(|c| c.name == first)
        })
    };
    let Some(main) = installed.packages.get(first).or_else(provider) else {
        return Err(ImportError::Request(format!(
            "{first} adds nothing to the base"
        )));
    };
    let main = main.clone();
    let entrypoint = find_entrypoint(tree, name, first, &main, base, installed, &mut notes)?;
    let scripts = scripts_run(tree, installed);
    if !scripts.is_empty() {
        notes.push(format!(
            "maintainer scripts ran for: {}",
            scripts.join(", ")
        ));
    }
    let mut provides = Vec::new();
    for package in installed.packages.values() {
        let version = Some(package.field("Version").to_owned());
        let package_name = package.field("Package").to_owned();
        if package_name != name {
            provides.push(Capability {
                name: package_name,
                version,
            });
        }
        provides.extend(parse_provides(package.field("Provides")));
    }
    provides.sort();
    provides.dedup();
    Ok(Draft {
        name: name.to_owned(),
        version: main.field("Version").to_owned(),
        role: role_of(&main),
        description: main.summary().to_owned(),
        architecture: base.component.architecture.clone(),
        requires: requirements(base, installed, &provides),
        conflicts: conflicts(installed, &provides),
        provides,
        entrypoint,
        cmdline: None,
        notes,
        sbom: installed.packages.values().map(sbom_package).collect(),
    })
}

/// Names of the packages whose `postinst` was run.
fn scripts_run(tree: &Tree, installed: &Installed) -> Vec<String> {
    let names = installed.packages.iter().filter(|(name, paragraph)| {
        let architecture = paragraph.field("Architecture");
        [
            format!("var/lib/dpkg/info/{name}.postinst"),
            format!("var/lib/dpkg/info/{name}:{architecture}.postinst"),
        ]
        .iter()
        .any(|path| tree.lookup(path.as_bytes()).is_some())
    });
    names.map(|(name, _)| name.clone()).collect()
}

fn find_entrypoint(
    tree: &mut Tree,
    name: &str,
    first: &str,
    main: &Paragraph,
    base: &BaseRoot,
    installed: &Installed,
    notes: &mut Vec<String>,
) -> Result<Vec<String>, ImportError> {
    let main_name = main.field("Package");
    let start = match known_start(first).or_else(|| known_start(main_name)) {
        Some(start) => start,
        None => match unit_of(tree, first, main, installed)? {
            Some(unit) => from_unit(&unit),
            None => return Ok(Vec::new()),
        },
    };
    match start {
        Start::Command(words) => Ok(words),
        Start::Script(text) => {
            let path = format!("usr/lib/forelay/start/{name}");
            put_file(tree, &path, text.into_bytes(), 0o755, &base.directory)?;
            Ok(vec![format!("/{path}")])
        }
        Start::Unknown(why) => {
            notes.push(format!("no entrypoint: {why}"));
            Ok(Vec::new())
        }
    }
}

/// The systemd unit of the main package, or of one that it depends on by a name like its
/// own (`redis` depends on `redis-server`).
fn unit_of(
    tree: &Tree,
    first: &str,
    main: &Paragraph,
    installed: &Installed,
) -> Result<Option<String>, ImportError> {
    let mut names = vec![first.to_owned(), main.field("Package").to_owned()];
    for relation in parse_relations(main.field("Depends")).into_iter().flatten() {
        let related = relation.name.starts_with(first);
        if related && installed.packages.contains_key(&relation.name) {
            names.push(relation.name);
        }
    }
    for name in names {
        let short = name.trim_end_matches("-server");
        for unit in [&name[..], short] {
            for directory in ["usr/lib/systemd/system", "lib/systemd/system"] {
                let path = format!("{directory}/{unit}.service");
                if let Some(text) = text_of(tree, &path)? {
                    return Ok(Some(text));
                }
            }
        }
    }
    Ok(None)
}

/// What the packages need from outside the component: their dependencies that no package
/// inside satisfies, and the Debian release they were installed on.
fn requirements(
    base: &BaseRoot,
    installed: &Installed,
    provides: &[Capability],
) -> Vec<Requirement> {
    let inside: BTreeSet<&str> = installed
        .packages
        .keys()
        .map(String::as_str)
        .chain(provides.iter().map(|capability| &capability.name[..]))
        .collect();
    let mut requires = vec![vec![base_requirement(base)]];
    for package in installed.packages.values() {
        for field in ["Pre-Depends", "Depends"] {
            let clauses = parse_relations(package.field(field)).into_iter();
            requires.extend(clauses.filter(|clause| {
                !clause
                    .iter()
                    .any(|relation| inside.contains(&relation.name[..]))
            }));
        }
    }
    requires.sort();
    requires.dedup();
    requires
}

/// Any base of the same release: what the scripts did holds there as well. A base that
/// names no release is required as it is.
fn base_requirement(base: &BaseRoot) -> NameRange {
    let release = base.component.provides.iter().find(|capability| {
        capability.name.starts_with("debian-")
            && capability.version.as_ref() == Some(&base.component.version)
    });
    match release {
        Some(capability) => NameRange {
            name: capability.name.clone(),
            range: String::new(),
        },
        None => NameRange {
            name: base.component.name.clone(),
            range: format!("= {}", base.component.version),
        },
    }
}

fn conflicts(installed: &Installed, provides: &[Capability]) -> Vec<NameRange> {
    let mut conflicts = Vec::new();
    for package in installed.packages.values() {
        for field in ["Conflicts", "Breaks"] {
            conflicts.extend(parse_relations(package.field(field)).into_iter().flatten());
        }
    }
    // A package may provide and conflict with one virtual name ("only one of us"): that
    // is about others, and stays. A range on a package that is inside was satisfied.
    conflicts.retain(|conflict| {
        let inside = provides
            .iter()
            .any(|capability| capability.name == conflict.name);
        !inside || conflict.range.is_empty()
    });
    conflicts.sort();
    conflicts.dedup();
    conflicts
}

fn role_of(main: &Paragraph) -> Role {
    let name = main.field("Package");
    let section = main.field("Section");
    let section = section.rsplit('/').next().unwrap_or(section);
    let versioned = |stem: &str| {
        let rest = name.strip_prefix(stem);
        rest.is_some_and(|rest| {
            rest.bytes()
                .all(|byte| byte.is_ascii_digit() || byte == b'.')
        })
    };
    let runtimes = ["python", "perl", "ruby", "php", "lua", "tcl", "golang"];
    let named = [
        "nodejs",
        "default-jre",
        "default-jre-headless",
        "erlang-base",
        "r-base-core",
    ];
    if runtimes.iter().any(|stem| versioned(stem))
        || named.contains(&name)
        || (name.starts_with("openjdk-") && section == "java")
    {
        return Role::Runtime;
    }
    match section {
        "libs" | "oldlibs" | "libdevel" => Role::Library,
        "python" | "perl" | "ruby" | "javascript" | "php" => Role::Library,
        _ => Role::Package,
    }
}

#[cfg(test)]
#[path = "packages_tests.rs"]
mod tests;
