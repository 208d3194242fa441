//! What a component of Debian packages says about itself: dependencies, conflicts, role,
//! entrypoint and SBOM, all from the packages' own metadata.
//!
//! Refuses to know how the packages were installed.

use std::collections::BTreeSet;

use forelay_image::component::{Capability, NameRange, Requirement, Role};
use forelay_image::tree::Tree;

use crate::base::made;
use crate::clean::SNAKEOIL_LEFT_OUT;
use crate::draft::Draft;
use crate::entrypoint::{Start, from_unit, known_start, run_directories};
use crate::error::{ImportError, text_of, tree_error};
use crate::packages::{Installed, PackageOptions, plain_name};
use crate::roots::BaseRoot;
use forelay_image::control::{Paragraph, parse_provides, parse_relations, sbom_package};

/// Where packages have their systemd units.
const UNITS: &str = "usr/lib/systemd/system";
/// Where packages say which directories a boot makes.
const TMPFILES: &str = "usr/lib/tmpfiles.d";

pub(super) fn describe(
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
    let version = main.field("Version");
    let architecture = &base.component.architecture;
    Ok(Draft {
        description: main.summary().to_owned(),
        requires: requirements(base, installed, &provides),
        conflicts: conflicts(installed, &provides),
        provides,
        entrypoint,
        notes,
        sbom: installed.packages.values().map(sbom_package).collect(),
        ..Draft::new(name, version, role_of(&main), architecture, ())
    })
}

/// Names of the packages whose `postinst` was run.
pub(super) fn scripts_run(tree: &Tree, installed: &Installed) -> Vec<String> {
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
            Some((name, text)) => from_unit(&text, &name, &prepare(tree, notes)?),
            None => return Ok(Vec::new()),
        },
    };
    match start {
        Start::Command(words) => Ok(words),
        Start::Script(text) => {
            let path = format!("usr/lib/forelay/start/{name}");
            tree.put_file(&path, text.into_bytes(), made(0o755))
                .map_err(tree_error(&base.directory))?;
            Ok(vec![format!("/{path}")])
        }
        Start::Unknown(why) => {
            notes.push(format!("no entrypoint: {why}"));
            Ok(Vec::new())
        }
    }
}

/// What a start script does first: the directories that a boot would make, and a certificate
/// of the VM's own where the build's was left out.
fn prepare(tree: &Tree, notes: &[String]) -> Result<Vec<String>, ImportError> {
    let mut lines = run_directories(&tmpfiles(tree)?);
    if notes.iter().any(|note| note.contains(SNAKEOIL_LEFT_OUT)) {
        let pem = "/etc/ssl/certs/ssl-cert-snakeoil.pem";
        let make = "make-ssl-cert generate-default-snakeoil";
        lines.push(format!("[ -e {pem} ] || {make} || :"));
    }
    Ok(lines)
}

/// What the packages ask `systemd-tmpfiles` for.
fn tmpfiles(tree: &Tree) -> Result<String, ImportError> {
    let mut all = String::new();
    let entries = tree
        .lookup(TMPFILES.as_bytes())
        .and_then(|id| tree.entries(id));
    for name in entries.into_iter().flat_map(|entries| entries.keys()) {
        let path = format!("{TMPFILES}/{}", String::from_utf8_lossy(name));
        all.push_str(&text_of(tree, &path)?.unwrap_or_default());
        all.push('\n');
    }
    Ok(all)
}

/// Name and text of the systemd unit of the main package, or of one that it depends on by a
/// name like its own (`redis` depends on `redis-server`, `dovecot-imapd` on `dovecot-core`).
fn unit_of(
    tree: &Tree,
    first: &str,
    main: &Paragraph,
    installed: &Installed,
) -> Result<Option<(String, String)>, ImportError> {
    let stem = first.split('-').next().unwrap_or(first);
    let mut names = vec![first.to_owned(), main.field("Package").to_owned()];
    for relation in parse_relations(main.field("Depends")).into_iter().flatten() {
        let related =
            relation.name.split('-').next() == Some(stem) || relation.name.starts_with(first);
        if related && installed.packages.contains_key(&relation.name) {
            names.push(relation.name);
        }
    }
    for name in &names {
        for unit in [&name[..], name.trim_end_matches("-server")] {
            if let Some(text) = text_of(tree, &format!("{UNITS}/{unit}.service"))? {
                return Ok(Some((unit.to_owned(), text)));
            }
        }
    }
    // By another name (openssh-server has ssh.service): if it is the only one, or the only
    // one that a system starts by itself.
    for name in names {
        let list = text_of(tree, &format!("var/lib/dpkg/info/{name}.list"))?;
        let mut found = Vec::new();
        for unit in units(&list.unwrap_or_default()) {
            if let Some(text) = text_of(tree, &format!("{UNITS}/{unit}.service"))? {
                found.push((unit.to_owned(), text));
            }
        }
        if found.len() > 1 {
            found.retain(|(_, text)| text.contains("WantedBy=multi-user.target"));
        }
        if found.len() == 1 {
            return Ok(found.pop());
        }
    }
    Ok(None)
}

/// The services among a package's files that are no templates.
pub(super) fn units(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter_map(|path| {
        let (directory, name) = path.rsplit_once('/')?;
        let name = name.strip_suffix(".service")?;
        (!name.contains('@') && directory.ends_with("/systemd/system")).then_some(name)
    })
}

/// What the packages need from outside the component: their dependencies that no package
/// inside satisfies, and the Debian release they were installed on.
pub(super) fn requirements(
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
    let mut requires = vec![vec![base.requirement()]];
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

pub(super) fn conflicts(installed: &Installed, provides: &[Capability]) -> Vec<NameRange> {
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

pub(super) fn role_of(main: &Paragraph) -> Role {
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
