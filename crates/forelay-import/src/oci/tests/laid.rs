//! Layers on each other.

use super::*;

#[test]
fn layers_that_leave_nothing_and_those_that_come_again_are_one() {
    let nothing: &[TarEntry<'_>] = &[];
    let made = Made::new(&[nothing, BASE, nothing, &[(Regular, "x", "x")], BASE]);
    let imported = made.import().unwrap();
    assert_eq!(imported.split_off.len(), 2);
    let tree = laid(&imported);
    assert!(tree.lookup(b"x").is_some() && tree.lookup(b"etc/kept").is_some());
    // All that is below is gone.
    let made = Made::new(&[
        BASE,
        &[(Regular, ".wh..wh..opq", ""), (Regular, "only", "x")],
    ]);
    let imported = made.import().unwrap();
    assert_eq!(imported.split_off.len(), 1);
    assert_eq!(laid(&imported).reachable().len(), 2);
}

#[test]
fn links_to_files_of_layers_below_are_names_of_one_file() {
    let above: &[TarEntry<'_>] = &[
        (Link, "usr/one", "bin/sh"),
        (Link, "usr/two", "/sbin/bash"),
        (Regular, "etc/.wh.old", ""),
        (Link, "etc/older", "etc/old"),
    ];
    let made = Made::new(&[BASE, above]);
    let imported = made.import().unwrap();
    let tree = laid(&imported);
    let id = tree.lookup(b"bin/sh").unwrap();
    for name in ["bin/bash", "usr/one", "usr/two"] {
        assert_eq!(tree.lookup(name.as_bytes()), Some(id), "{name}");
    }
    assert!(tree.lookup(b"etc/old").is_none());
    assert_eq!(tree.text_of("etc/older").unwrap().as_deref(), Some("old"));
    // It is what it is on this base alone.
    assert_eq!(imported.split_off[0].draft.version, "1");
    assert!(imported.split_off[1].draft.version.starts_with("1+"));
    let nowhere = Made::new(&[BASE, &[(Link, "x", "none/such")]]);
    assert!(
        nowhere
            .refused()
            .contains("\"none/such\", which is no file")
    );
    let directory = Made::new(&[BASE, &[(Link, "x", "etc")]]);
    assert!(directory.refused().contains("which is no file"));
}

#[test]
fn privileged_a_layer_that_comes_again_is_laid_again() {
    let test = "privileged_a_layer_that_comes_again_is_laid_again";
    let root = rustix::process::geteuid().is_root();
    if !root || Command::new("umoci").arg("--version").output().is_err() {
        println!("SKIPPED {test}: needs root and umoci");
        return;
    }
    let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    // What lies between has names of its files, deletes, hides and changes them.
    let between: [&[TarEntry<'_>]; 4] = [
        &[(Link, "one", "bin/sh"), (Regular, "etc/.wh.old", "")],
        &[(Regular, "etc/.wh..wh..opq", ""), (Regular, "etc/new", "n")],
        &[(Regular, ".wh.bin", ""), (Regular, "etc/old", "changed")],
        &[(Regular, ".wh.sbin", ""), (Regular, "sbin/x", "x")],
    ];
    let deletes: &[TarEntry<'_>] = &[(Regular, "etc/.wh.kept", ""), (Regular, "y", "y")];
    let again: &[TarEntry<'_>] = &[(Regular, "etc/kept", "again")];
    let mut images: Vec<Vec<&[TarEntry<'_>]>> = between
        .iter()
        .map(|middle| vec![BASE, *middle, BASE])
        .collect();
    images.push(vec![BASE, deletes, again, deletes]);
    images.push(vec![BASE, deletes, BASE, deletes, again, BASE]);
    for layers in images {
        let made = Made::new(&layers);
        let imported = made.import().unwrap();
        let expected = unpacked(&made).expect("umoci takes it");
        let start = start.as_secs() as i64;
        let (found, expected) = (seen(&laid(&imported), start), seen(&expected, start));
        let paths: BTreeSet<&String> = found.keys().chain(expected.keys()).collect();
        for path in paths.into_iter().filter(|path| !path.is_empty()) {
            let (found, expected) = (found.get(path), expected.get(path));
            let timed = |one: Option<&String>| one.is_some_and(|one| !one.contains(" now "));
            match (timed(found) && timed(expected), found, expected) {
                (false, Some(found), Some(expected)) => {
                    assert_eq!(untimed(found), untimed(expected), "{path}: {layers:?}");
                }
                _ => assert_eq!(found, expected, "{path}: {layers:?}"),
            }
        }
        // A component is in a VM once.
        let drafts = imported.split_off.iter().map(|part| &part.draft);
        let names: BTreeSet<_> = drafts.map(|draft| &draft.name).collect();
        assert_eq!(names.len(), imported.split_off.len());
    }
}

#[test]
fn an_image_offers_what_its_package_database_has() {
    let status = format!(
        "Package: libc6\nStatus: install ok installed\nVersion: 2.36-9\nArchitecture: {}\n",
        crate::host_architecture()
    );
    let older = status.replace("2.36-9", "2.30-1");
    let made = Made::new(&[
        &[
            (Regular, "var/lib/dpkg/status", &older),
            (Regular, "etc/debian_version", "12.11\n"),
            (
                Regular,
                "usr/lib/os-release",
                "ID=debian\nVERSION_CODENAME=bookworm\n",
            ),
            (
                Regular,
                "var/lib/dpkg/status.d/gone",
                "Package: gone\nVersion: 1\n",
            ),
        ],
        &[
            (Regular, "var/lib/dpkg/status", &status),
            (Regular, "var/lib/dpkg/status.d/.wh.gone", ""),
            (
                Regular,
                "var/lib/dpkg/status.d/tz",
                "Package: tz\nVersion: 3\n",
            ),
        ],
    ]);
    let draft = made.import().unwrap().main.draft;
    let offered: Vec<(&str, Option<&str>)> = draft
        .provides
        .iter()
        .map(|one| (&*one.name, one.version.as_deref()))
        .collect();
    let expected = [
        ("debian", Some("12.11")),
        ("debian-bookworm", Some("12.11")),
        ("libc6", Some("2.36-9")),
        ("tz", Some("3")),
    ];
    assert_eq!(offered, expected);
    assert_eq!((&*draft.version, draft.sbom.len()), ("t", 2));
}
