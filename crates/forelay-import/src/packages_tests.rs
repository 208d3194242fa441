//! Tests of what a package component says about itself; building one is tested with real
//! packages in `tests/`.

use std::path::PathBuf;

use forelay_image::Digest;
use forelay_image::component::{Capability, Component, ImageRef, Role};

use super::*;
use crate::describe::{conflicts, requirements, role_of, units};
use crate::draft::plain_files;
use crate::users::UserRange;

fn paragraphs(text: &str) -> BTreeMap<String, Paragraph> {
    parse_paragraphs(text)
        .into_iter()
        .map(|paragraph| (paragraph.field("Package").to_owned(), paragraph))
        .collect()
}

fn base(provides: &[(&str, &str)]) -> BaseRoot {
    let image = ImageRef {
        digest: Digest::of(b"base"),
        bytes: 4096,
        metadata_bytes: 4096,
        inodes: 1,
        chunk_index: Digest::of(b"index"),
    };
    let mut draft = plain_files("debian", "12.12+20260915", Role::Base);
    draft.provides = provides
        .iter()
        .map(|(name, version)| Capability {
            name: (*name).to_owned(),
            version: Some((*version).to_owned()),
        })
        .collect();
    let component: Component = draft.with_image(image);
    BaseRoot {
        component,
        directory: PathBuf::from("/nonexistent"),
        users: UserRange::new(0),
    }
}

const BEFORE: &str = "Package: libc6\nVersion: 2.36-9\n\nPackage: zlib1g\nVersion: 1\n";
const AFTER: &str = "Package: libc6\nVersion: 2.36-9\n\nPackage: zlib1g\nVersion: 2\n\n\
    Package: nginx\nVersion: 1.22\nProvides: httpd, nginx-abi (= 1)\n\
    Depends: libc6 (>= 2.34), nginx-common (<< 2), iproute2\nConflicts: httpd-lite\n\
    Breaks: nginx-common (<< 1)\n\n\
    Package: nginx-common\nVersion: 1.22\nDepends: debconf (>= 0.5) | debconf-2.0\n";

#[test]
fn new_and_upgraded_packages_are_told_apart() {
    let installed = Installed::compare(&paragraphs(BEFORE), &paragraphs(AFTER));
    let names: Vec<_> = installed.packages.keys().map(String::as_str).collect();
    assert_eq!(names, ["nginx", "nginx-common", "zlib1g"]);
    assert_eq!(installed.notes(), ["replaces the base's zlib1g 1 by 2"]);
}

#[test]
fn requirements_are_what_nothing_inside_satisfies() {
    let installed = Installed::compare(&paragraphs(BEFORE), &paragraphs(AFTER));
    let base = base(&[("debian-bookworm", "12.12+20260915"), ("libc6", "2.36-9")]);
    let requires = requirements(&base, &installed, &[]);
    let shown: Vec<String> = requires
        .iter()
        .map(|clause| {
            let names: Vec<_> = clause
                .iter()
                .map(|relation| format!("{} {}", relation.name, relation.range))
                .collect();
            names.join("|")
        })
        .collect();
    assert_eq!(
        shown,
        [
            "debconf >= 0.5|debconf-2.0 ",
            "debian-bookworm ",
            "iproute2 ",
            "libc6 >= 2.34"
        ]
    );
    let provides = [Capability {
        name: "nginx-common".into(),
        version: None,
    }];
    let conflicts = conflicts(&installed, &provides);
    assert_eq!(conflicts.len(), 1);
    assert_eq!(conflicts[0].name, "httpd-lite");
}

#[test]
fn an_unknown_base_is_required_as_it_is() {
    let requirement = base(&[]).requirement();
    assert_eq!(requirement.name, "debian");
    assert_eq!(requirement.range, "= 12.12+20260915");
}

#[test]
fn packages_that_the_base_has_or_that_are_no_names_are_refused() {
    let status = paragraphs(BEFORE);
    let check = |name: &str| {
        let packages = vec![name.to_owned()];
        let options = PackageOptions {
            packages,
            split: false,
        };
        check_request(&options, &status)
    };
    assert!(matches!(check("libc6"), Err(ImportError::InBase { .. })));
    assert!(matches!(check("-oDebug=1"), Err(ImportError::Request(_))));
    assert!(matches!(check("a b"), Err(ImportError::Request(_))));
    assert!(check("nginx=1.22").is_ok());
}

#[test]
fn roles_follow_names_and_sections() {
    let role = |name: &str, section: &str| {
        let text = format!("Package: {name}\nSection: {section}\n");
        role_of(&parse_paragraphs(&text)[0])
    };
    assert_eq!(role("python3", "python"), Role::Runtime);
    assert_eq!(role("python3.11", "python"), Role::Runtime);
    assert_eq!(role("nodejs", "javascript"), Role::Runtime);
    assert_eq!(role("python3-flask", "python"), Role::Library);
    assert_eq!(role("libssl3", "libs"), Role::Library);
    assert_eq!(role("nginx", "httpd"), Role::Package);
}

#[test]
fn the_unit_of_another_name_is_taken_if_it_is_the_only_one() {
    let list =
        "/.\n/lib/systemd/system/ssh.service\n/lib/systemd/system/ssh@.service\n/usr/x.service\n";
    assert_eq!(units(list).collect::<Vec<_>>(), ["ssh"]);
}

#[test]
fn libraries_are_split_off_if_all_they_need_is_in_the_base_or_split_off_too() {
    let after = "Package: libc6\nVersion: 2.36-9\nSection: libs\n\n\
        Package: zlib1g\nVersion: 2\nSection: libs\n\n\
        Package: nginx\nVersion: 1\nSection: web\nDepends: libssl3, libapart, libasked\n\n\
        Package: libssl3\nVersion: 3\nSection: libs\nDepends: libc6, libdep | libother\n\n\
        Package: libdep\nVersion: 1\nSection: libs\nDepends: libc6\n\n\
        Package: libapart\nVersion: 1\nSection: libs\nDepends: libneeds\n\n\
        Package: libneeds\nVersion: 1\nSection: libs\nDepends: media-types\n\n\
        Package: media-types\nVersion: 1\nSection: net\n\n\
        Package: libasked\nVersion: 1\nSection: libs\n";
    let mut installed = Installed::compare(&paragraphs(BEFORE), &paragraphs(after));
    let options = PackageOptions {
        packages: vec!["nginx".into(), "libasked=1".into()],
        split: true,
    };
    let base = base(&[("libc6", "2.36-9")]);
    let libraries = take_libraries(&mut installed, &options, &base);
    assert_eq!(
        libraries.into_keys().collect::<Vec<_>>(),
        ["libdep", "libssl3"]
    );
    let left: Vec<_> = installed.packages.keys().map(String::as_str).collect();
    // Another version of what the base has stays: it must lie above the base.
    let expected = [
        "libapart",
        "libasked",
        "libneeds",
        "media-types",
        "nginx",
        "zlib1g",
    ];
    assert_eq!(left, expected);
    let needs = requirements(&base, &installed, &[]);
    assert!(needs.iter().flatten().any(|need| need.name == "libssl3"));
}
