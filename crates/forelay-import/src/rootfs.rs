//! What a root file system says about itself: its packages, its release, its accounts.
//!
//! Owns where package databases are (dpkg's, also in the form of `distroless` images, and
//! apk's) and what they make of a base: what is installed, it provides, so that components
//! can be locked with it. Refuses to guess: a root without a database that is known provides
//! its name alone.

use std::path::Path;

use forelay_guest_protocol::accounts::{Fragments, fragments_path, merged_paths};
use forelay_image::component::{Capability, SbomPackage};
use forelay_image::control::{Paragraph, parse_paragraphs, parse_provides, sbom_package};
use forelay_image::tree::Tree;

use crate::base::made;
use crate::draft::Draft;
use crate::error::{ImportError, text_of, tree_error};

const DPKG_STATUS: &str = "var/lib/dpkg/status";
/// One file for each package, in images that have no dpkg.
const DPKG_STATUS_PARTS: &str = "var/lib/dpkg/status.d";
const APK_INSTALLED: [&str; 2] = ["lib/apk/db/installed", "usr/lib/apk/db/installed"];
const OS_RELEASE: [&str; 2] = ["usr/lib/os-release", "etc/os-release"];
const DEBIAN_VERSION: &str = "etc/debian_version";

/// Files that tell what a file system is, and a folder of such.
pub(crate) const TELLING: &[&str] = &[
    DPKG_STATUS,
    APK_INSTALLED[0],
    APK_INSTALLED[1],
    OS_RELEASE[0],
    OS_RELEASE[1],
    DEBIAN_VERSION,
];
pub(crate) const TELLING_FOLDER: &str = DPKG_STATUS_PARTS;

/// Adds to a container image's metadata what it offers as a base, by those of its files that
/// tell ([`TELLING`]). What the image says of itself stays.
pub(crate) fn describe_image(told: &Tree, draft: &mut Draft) -> Result<(), ImportError> {
    // Its release's names have the release's version, not the image's tag.
    let version = release_version(told)?.unwrap_or_else(|| draft.version.clone());
    let mut found = Draft::new(&draft.name, &version, draft.role, &draft.architecture, ());
    describe_base(told, &mut found)?;
    (draft.provides, draft.sbom) = (found.provides, found.sbom);
    Ok(())
}

/// Adds to a base's metadata what its file system says.
pub(crate) fn describe_base(tree: &Tree, draft: &mut Draft) -> Result<(), ImportError> {
    let release = Release::read(tree)?;
    let debian = dpkg_packages(tree)?;
    for package in &debian {
        draft.provides.push(Capability {
            name: package.field("Package").to_owned(),
            version: Some(package.field("Version").to_owned()),
        });
        draft
            .provides
            .extend(parse_provides(package.field("Provides")));
        draft.sbom.push(sbom_package(package));
    }
    let mut architectures = debian.iter().map(|one| one.field("Architecture"));
    if let Some(architecture) = architectures.find(|one| *one != "all") {
        architecture.clone_into(&mut draft.architecture);
    }
    add_apk_packages(tree, draft)?;
    if draft.sbom.is_empty() {
        let note = "no package database that is known: provides its name alone";
        draft.notes.push(note.to_owned());
    }
    if draft.description.is_empty() {
        draft.description = release.pretty;
    }
    let names = [
        release.id.clone(),
        format!("{}-{}", release.id, release.codename),
    ];
    let known = [!release.id.is_empty(), !release.codename.is_empty()];
    for (name, _) in names
        .into_iter()
        .zip(known)
        .filter(|(name, known)| *known && *name != draft.name)
    {
        let version = Some(draft.version.clone());
        draft.provides.push(Capability { name, version });
    }
    draft.provides.sort();
    draft.provides.dedup();
    Ok(())
}

/// The version that a root file system gives its release, if any.
pub(crate) fn release_version(tree: &Tree) -> Result<Option<String>, ImportError> {
    let debian = text_of(tree, DEBIAN_VERSION)?;
    // Testing and unstable are called `trixie/sid`.
    let debian = debian.filter(|text| text.starts_with(|c: char| c.is_ascii_digit()));
    let version = debian.unwrap_or(Release::read(tree)?.version);
    let version = version.trim();
    Ok((!version.is_empty()).then(|| version.to_owned()))
}

/// Puts the base's accounts and the like where composing finds them.
pub(crate) fn put_fragments(tree: &mut Tree, name: &str, shown: &Path) -> Result<(), ImportError> {
    let mut fragments = Fragments::default();
    for path in merged_paths() {
        if let Some(text) = text_of(tree, path)? {
            fragments.files.insert(path.to_owned(), text);
        }
    }
    tree.put_file(&fragments_path(name), fragments.encode(), made(0o600))
        .map(drop)
        .map_err(tree_error(shown))
}

fn dpkg_packages(tree: &Tree) -> Result<Vec<Paragraph>, ImportError> {
    let mut packages = parse_paragraphs(&text_of(tree, DPKG_STATUS)?.unwrap_or_default());
    packages.retain(Paragraph::is_installed);
    let parts = tree.lookup(DPKG_STATUS_PARTS.as_bytes());
    let names = parts.and_then(|id| tree.entries(id)).into_iter().flatten();
    for (name, _) in names.filter(|(name, _)| !name.ends_with(b".md5sums")) {
        let path = format!("{DPKG_STATUS_PARTS}/{}", String::from_utf8_lossy(name));
        packages.extend(parse_paragraphs(&text_of(tree, &path)?.unwrap_or_default()));
    }
    packages.retain(|package| package.get("Package").is_some());
    Ok(packages)
}

/// apk's database: paragraphs of `P:name`, `V:version`, `A:machine`, `p:provides`.
fn add_apk_packages(tree: &Tree, draft: &mut Draft) -> Result<(), ImportError> {
    for path in APK_INSTALLED {
        let Some(text) = text_of(tree, path)? else {
            continue;
        };
        for paragraph in text.split("\n\n") {
            let field = |key: &str| {
                let mut lines = paragraph.lines();
                lines.find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
            };
            let (Some(name), Some(version)) = (field("P"), field("V")) else {
                continue;
            };
            let capability = |text: &str| {
                let (name, version) = text.split_once('=').unwrap_or((text, ""));
                Capability {
                    name: name.to_owned(),
                    version: (!version.is_empty()).then(|| version.to_owned()),
                }
            };
            let provided = field("p").unwrap_or_default().split_whitespace();
            draft.provides.extend(provided.map(capability));
            draft
                .provides
                .push(capability(&format!("{name}={version}")));
            let machine = field("A").unwrap_or_default();
            if let Some(architecture) = debian_architecture(machine) {
                architecture.clone_into(&mut draft.architecture);
            }
            draft.sbom.push(SbomPackage {
                name: name.to_owned(),
                version: version.to_owned(),
                architecture: machine.to_owned(),
                purl: format!("pkg:apk/alpine/{name}@{version}?arch={machine}"),
            });
        }
    }
    Ok(())
}

/// Debian's name for a machine that others name as the kernel does.
fn debian_architecture(machine: &str) -> Option<&'static str> {
    Some(match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "armv7" => "armhf",
        "x86" => "i386",
        "ppc64le" => "ppc64el",
        "riscv64" => "riscv64",
        "s390x" => "s390x",
        _ => return None,
    })
}

/// `/etc/os-release`.
#[derive(Debug, Default)]
struct Release {
    id: String,
    version: String,
    codename: String,
    pretty: String,
}

impl Release {
    fn read(tree: &Tree) -> Result<Self, ImportError> {
        let mut release = Self::default();
        for path in OS_RELEASE {
            for line in text_of(tree, path)?.unwrap_or_default().lines() {
                let Some((key, value)) = line.split_once('=') else {
                    continue;
                };
                let value = value.trim_matches(['"', '\'']).to_owned();
                match key {
                    "ID" => release.id = value,
                    "VERSION_ID" => release.version = value,
                    "VERSION_CODENAME" => release.codename = value,
                    "PRETTY_NAME" => release.pretty = value,
                    _ => {}
                }
            }
        }
        Ok(release)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draft::plain_files;
    use forelay_image::component::Role;

    fn described(files: &[(&str, &str)]) -> Draft {
        let mut tree = Tree::new();
        for (path, text) in files {
            tree.put_file(path, text.as_bytes(), made(0o644)).unwrap();
        }
        let version = release_version(&tree).unwrap().unwrap_or("0".into());
        let mut draft = plain_files("mine", &version, Role::Base);
        describe_base(&tree, &mut draft).unwrap();
        draft
    }

    fn provided(draft: &Draft) -> Vec<String> {
        let words = draft.provides.iter().map(|one| match &one.version {
            Some(version) => format!("{}={version}", one.name),
            None => one.name.clone(),
        });
        words.collect()
    }

    const DPKG: &str = "Package: libc6\nStatus: install ok installed\nVersion: 2.36-9\n\
        Architecture: arm64\nProvides: libc-bin-api (= 3), c-library\n\n\
        Package: gone\nStatus: deinstall ok config-files\nVersion: 1\nArchitecture: arm64\n";

    #[test]
    fn a_debian_root_provides_its_packages_and_its_release() {
        let release = "PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\nVERSION_ID=\"12\"\n\
                       VERSION_CODENAME=bookworm\n";
        let draft = described(&[
            ("var/lib/dpkg/status", DPKG),
            ("usr/lib/os-release", release),
            ("etc/debian_version", "12.11\n"),
        ]);
        assert_eq!(
            provided(&draft),
            [
                "c-library",
                "debian=12.11",
                "debian-bookworm=12.11",
                "libc-bin-api=3",
                "libc6=2.36-9"
            ]
        );
        assert_eq!(
            (draft.version.as_str(), draft.architecture.as_str()),
            ("12.11", "arm64")
        );
        assert_eq!(draft.sbom.len(), 1);
        assert!(draft.notes.is_empty());
    }

    #[test]
    fn other_databases_are_known_and_none_is_told() {
        let parts = [(
            "var/lib/dpkg/status.d/libc6",
            "Package: libc6\nVersion: 2\nArchitecture: amd64\n",
        )];
        assert_eq!(provided(&described(&parts)), ["libc6=2"]);
        let apk = "C:Q1x=\nP:musl\nV:1.2.5-r9\nA:aarch64\np:so:libc.musl-aarch64.so.1=1\n\n\
                   P:busybox\nV:1.37-r1\nA:aarch64\n\n";
        let draft = described(&[
            ("lib/apk/db/installed", apk),
            ("etc/os-release", "ID=alpine\nVERSION_ID=3.21.0\n"),
        ]);
        assert_eq!(
            provided(&draft),
            [
                "alpine=3.21.0",
                "busybox=1.37-r1",
                "musl=1.2.5-r9",
                "so:libc.musl-aarch64.so.1=1"
            ]
        );
        assert_eq!(draft.architecture, "arm64");
        assert_eq!(described(&[("etc/x", "")]).notes.len(), 1);
    }

    #[test]
    fn accounts_of_a_root_can_be_merged() {
        let mut tree = Tree::new();
        let passwd = "root:x:0:0::/:/bin/sh\nme:x:1000:1000::/:/bin/sh\n";
        tree.put_file("etc/passwd", passwd.as_bytes(), made(0o644))
            .unwrap();
        put_fragments(&mut tree, "mine", Path::new("x")).unwrap();
        let bytes = tree
            .file(fragments_path("mine").as_bytes())
            .unwrap()
            .read()
            .unwrap();
        let fragments = Fragments::decode("mine", &bytes).unwrap();
        assert_eq!(fragments.files["etc/passwd"], passwd);
    }
}
