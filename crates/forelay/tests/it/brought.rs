//! What people bring along: a root file system, archives, packages, files of a manifest.
//! Built, locked and composed through the command; what the VM would see is read from the
//! composed disk.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use forelay_image::erofs::read::Image;
use forelay_import::host_architecture;

use crate::fixture::{FORELAY, Host, Settings, bench, idle};

/// A repository with a base and a kernel that were brought along.
struct Place {
    dir: tempfile::TempDir,
}

const OS_RELEASE: &str = "PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\nVERSION_ID=\"12\"\n\
                          VERSION_CODENAME=bookworm\n";

impl Place {
    fn new() -> Self {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let config = format!(
            "state_dir = {:?}\nruntime_dir = {:?}\n[repository]\npath = {:?}\n",
            place.path("state"),
            place.path("run"),
            place.path("repository")
        );
        fs::write(place.path("forelay.toml"), config).unwrap();
        let status = format!(
            "Package: libc6\nStatus: install ok installed\nVersion: 2.36-9\nArchitecture: {}\n\n\
             Package: mawk\nStatus: install ok installed\nVersion: 1.3\nArchitecture: {0}\n\
             Provides: awk\n",
            host_architecture()
        );
        let base = place.tree(
            "base",
            &[
                ("usr/bin/sh", "sh"),
                ("usr/sbin/nologin", "no"),
                ("usr/lib/os-release", OS_RELEASE),
                ("usr/lib/ld.so", "ld"),
                ("run/keep", ""),
                ("etc/debian_version", "12.11\n"),
                ("etc/passwd", "root:x:0:0::/root:/bin/sh\n"),
                ("var/lib/dpkg/status", &status),
            ],
        );
        for (path, to) in [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib")] {
            symlink(to, base.join(path)).unwrap();
        }
        symlink("/run", base.join("var/run")).unwrap();
        // As mktemp makes it.
        fs::set_permissions(&base, fs::Permissions::from_mode(0o700)).unwrap();
        let archive = place.tar(&base, "base.tar", &["--owner=0", "--group=0"]);
        place.build(&["--tar", &archive, "--role", "base", "--name", "mine"]);
        let kernel = place.tree(
            "kernel",
            &[("boot/vmlinuz", "k"), ("boot/initrd.cpio", "i")],
        );
        let kernel = kernel.to_str().unwrap();
        place.build(&["--dir", kernel, "--role", "kernel", "--name", "linux"]);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn tree(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let root = self.path(name);
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn tar(&self, root: &Path, name: &str, further: &[&str]) -> String {
        let archive = self.path(name);
        let mut command = Command::new("tar");
        command
            .args(further)
            .arg("-C")
            .arg(root)
            .arg("-cf")
            .arg(&archive);
        assert!(command.arg(".").status().unwrap().success());
        archive.to_str().unwrap().to_owned()
    }

    /// A package of these files; fields follow its name.
    fn deb(&self, name: &str, fields: &str, files: &[(&str, &str)]) -> String {
        let root = self.tree(name, files);
        let control = format!("Package: {name}\n{fields}\nMaintainer: a <a@b>\nDescription: x\n");
        self.tree(name, &[("DEBIAN/control", &control)]);
        let out = self.path(&format!("{name}.deb"));
        let mut command = Command::new("dpkg-deb");
        command
            .args(["--root-owner-group", "--build"])
            .arg(root)
            .arg(&out);
        assert!(command.output().unwrap().status.success());
        out.to_str().unwrap().to_owned()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(FORELAY);
        command
            .arg("--config")
            .arg(self.path("forelay.toml"))
            .args(arguments);
        command.output().unwrap()
    }

    /// Builds a component; returns its metadata.
    fn build(&self, arguments: &[&str]) -> serde_json::Value {
        let words = [&["component", "build", "--json"], arguments].concat();
        let output = self.run(&words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn manifest(&self, components: &str, further: &str) -> String {
        let path = self.path("vm.toml");
        let text = format!("base = \"mine\"\ncomponents = {components}\n{further}\n");
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The names in a manifest's lock, or why there is none.
    fn lock(&self, components: &str) -> Result<Vec<String>, String> {
        let manifest = self.manifest(components, "");
        let output = self.run(&["lock", "--upgrade", "--json", &manifest]);
        if !output.status.success() {
            assert_eq!(output.status.code(), Some(1));
            return Err(String::from_utf8(output.stderr).unwrap());
        }
        let lock: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let names = lock["component"].as_array().unwrap().iter();
        Ok(names
            .map(|one| one["name"].as_str().unwrap().to_owned())
            .collect())
    }

    /// Composes; returns the disk and what was said, or why it was refused.
    fn compose(&self, components: &str, further: &str) -> Result<(Vec<u8>, String), String> {
        let manifest = self.manifest(components, further);
        let out = self.path("out");
        let out = out.to_str().unwrap();
        let output = self.run(&["compose", &manifest, "--emit", "flat", "--out", out]);
        let said = String::from_utf8(output.stderr).unwrap();
        match output.status.code() {
            Some(0) => Ok((fs::read(Path::new(out).join("disk.img")).unwrap(), said)),
            code => {
                assert_eq!(code, Some(1));
                Err(said)
            }
        }
    }
}

/// What the disk has at a path: mode, owner, content or target.
fn at(disk: &[u8], path: &str) -> Option<(u16, u32, String)> {
    let image = Image::open(&disk).unwrap();
    let inode = image.lookup(path.as_bytes()).unwrap()?;
    let bytes = image
        .read_whole(&inode, 1 << 20)
        .or_else(|_| image.read_link(&inode))
        .unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Some((inode.record.mode, inode.record.uid, text))
}

fn text(disk: &[u8], path: &str) -> Option<String> {
    at(disk, path).map(|(_, _, text)| text)
}

#[test]
fn a_root_file_system_as_base_provides_what_it_has() {
    let place = Place::new();
    let shown = place.run(&["component", "show", "mine", "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    assert_eq!(shown["version"], "12.11");
    let provided = shown["provides"].to_string();
    for name in ["libc6", "2.36-9", "awk", "debian-bookworm"] {
        assert!(
            provided.contains(&format!("{name:?}")),
            "{name}: {provided}"
        );
    }
    assert!(
        shown["notes"].to_string().contains("/ had mode 0700"),
        "{shown}"
    );
    let fields = |depends: &str| {
        format!(
            "Version: 1\nArchitecture: {}\nDepends: {depends}",
            host_architecture()
        )
    };
    let fits = place.deb(
        "fits",
        &fields("libc6 (>= 2.30), awk"),
        &[("usr/bin/fits", "")],
    );
    place.build(&["--deb-file", &fits]);
    let future = place.deb(
        "future",
        &fields("libc6 (>= 99)"),
        &[("usr/bin/future", "")],
    );
    place.build(&["--deb-file", &future]);
    assert_eq!(place.lock("['fits']").unwrap(), ["mine", "fits"]);
    let said = place.lock("['future']").unwrap_err();
    assert!(
        said.contains("libc6 2.36-9 (provided by mine 12.11)"),
        "{said}"
    );
    let (disk, _) = place.compose("[]", "").unwrap();
    assert_eq!(
        at(&disk, "").map(|(mode, uid, _)| (mode, uid)),
        Some((0o755, 0))
    );
    // A component of a name that the base provides.
    let awk = place.tree("awk", &[("usr/bin/awk", "awk")]);
    place.build(&["--dir", awk.to_str().unwrap(), "--name", "awk"]);
    assert_eq!(place.lock("['awk']").unwrap(), ["mine", "awk"]);
}

#[test]
fn archives_and_files_go_through_the_links_of_the_base() {
    let place = Place::new();
    let files = [
        ("bin/mytool", "tool"),
        ("lib/libmine.so", "lib"),
        ("var/run/x/pid", "1"),
    ];
    let archive = place.tar(&place.tree("merge", &files), "merge.tar", &["--owner=0"]);
    place.build(&["--tar", &archive, "--name", "merge"]);
    let start = "[files.'/sbin/start.sh']\ncontent = 'start'\nmode = '0755'";
    let (disk, said) = place.compose("['merge']", start).unwrap();
    assert_eq!(text(&disk, "bin").as_deref(), Some("usr/bin"));
    assert_eq!(text(&disk, "var/run").as_deref(), Some("/run"));
    for (path, expected) in [
        ("usr/bin/mytool", "tool"),
        ("usr/bin/sh", "sh"),
        ("usr/lib/libmine.so", "lib"),
        ("run/x/pid", "1"),
        ("usr/sbin/start.sh", "start"),
        ("usr/sbin/nologin", "no"),
    ] {
        assert_eq!(text(&disk, path).as_deref(), Some(expected), "{path}");
    }
    assert!(!said.contains("note:"), "{said}");
    let said = place
        .compose("[]", "[files.'/etc']\ncontent = 'x'")
        .unwrap_err();
    assert!(
        said.contains("/etc is a directory in mine; the manifest must not"),
        "{said}"
    );
}

#[test]
fn directories_keep_their_owner_and_files_that_two_have_are_told() {
    let place = Place::new();
    let files = [("usr/bin/odd", "odd"), ("etc/debian_version", "odd")];
    let root = place.tree("odd", &files);
    fs::set_permissions(root.join("usr/bin"), fs::Permissions::from_mode(0o775)).unwrap();
    let archive = place.tar(&root, "odd.tar", &["--owner=1000", "--group=1000"]);
    place.build(&["--tar", &archive, "--name", "odd"]);
    let (disk, said) = place.compose("['odd']", "").unwrap();
    for path in ["", "usr", "usr/bin", "etc"] {
        assert_eq!(
            at(&disk, path).map(|(mode, uid, _)| (mode, uid)),
            Some((0o755, 0)),
            "{path}"
        );
    }
    assert_eq!(at(&disk, "usr/bin/odd").unwrap().1, 1000);
    let note = "note: /etc/debian_version is in mine and in odd, whose is used";
    assert!(said.contains(note), "{said}");
    let root = place.tree("over", &[("usr/bin", "a file")]);
    place.build(&["--dir", root.to_str().unwrap(), "--name", "over"]);
    let said = place.compose("['over']", "").unwrap_err();
    assert!(
        said.contains("/usr/bin is a directory in mine; over must not"),
        "{said}"
    );
}

/// What dpkg keeps of the alternative `editor` with one choice, and its links.
fn editor(choice: &str, priority: &str) -> (String, [(String, String); 2]) {
    let page = format!("/usr/share/man/man1/{choice}.1");
    let text = format!(
        "auto\n/usr/bin/editor\neditor.1\n/usr/share/man/man1/editor.1\n\n\
         /usr/bin/{choice}\n{priority}\n{page}\n\n"
    );
    let links = [("editor", format!("/usr/bin/{choice}")), ("editor.1", page)];
    (
        text,
        links.map(|(name, to)| (format!("etc/alternatives/{name}"), to)),
    )
}

#[test]
fn files_in_which_several_have_entries_are_one() {
    let place = Place::new();
    let bundle = "etc/ssl/certs/ca-certificates.crt";
    let certificate =
        |name: &str| format!("-----BEGIN CERTIFICATE-----\n{name}\n-----END CERTIFICATE-----\n");
    // The later of the two is the worse choice.
    for (name, choice, priority) in [("one", "nano", "40"), ("two", "vim", "30")] {
        let (text, links) = editor(choice, priority);
        let trusted = [certificate("all"), certificate(name)].concat();
        let program = format!("usr/bin/{choice}");
        let root = place.tree(
            name,
            &[
                (bundle, &trusted),
                ("var/lib/dpkg/alternatives/editor", &text),
                ("etc/nsswitch.conf", name),
                (&program, choice),
            ],
        );
        fs::create_dir_all(root.join("etc/alternatives")).unwrap();
        for (link, to) in links {
            symlink(to, root.join(link)).unwrap();
        }
        symlink("/etc/alternatives/editor", root.join("usr/bin/editor")).unwrap();
        let archive = place.tar(&root, &format!("{name}.tar"), &["--owner=0", "--group=0"]);
        place.build(&["--tar", &archive, "--name", name]);
    }
    let (disk, said) = place.compose("['one', 'two']", "").unwrap();
    let trusted = ["all", "one", "two"].map(certificate).concat();
    assert_eq!(text(&disk, bundle), Some(trusted));
    for (path, expected) in editor("nano", "40").1 {
        assert_eq!(text(&disk, &path), Some(expected));
    }
    let known = text(&disk, "var/lib/dpkg/alternatives/editor").unwrap();
    assert!(known.contains("/usr/bin/nano\n40\n") && known.contains("/usr/bin/vim\n30\n"));
    // What cannot be made one is told, and nothing else is.
    let notes: Vec<&str> = said
        .lines()
        .filter(|line| line.starts_with("note:"))
        .collect();
    assert_eq!(
        notes,
        ["note: /etc/nsswitch.conf is in one and in two, whose is used"]
    );
    // One alone is as it is.
    let (disk, _) = place.compose("['two']", "").unwrap();
    assert_eq!(
        text(&disk, "etc/alternatives/editor").as_deref(),
        Some("/usr/bin/vim")
    );
}

#[test]
fn packages_for_other_machines_are_refused() {
    let place = Place::new();
    let fields = |architecture: &str| format!("Version: 1\nArchitecture: {architecture}");
    let other = place.deb("other-arch", &fields("s390x"), &[("usr/bin/other", "")]);
    place.build(&["--deb-file", &other]);
    let any = place.deb("any-arch", &fields("all"), &[("usr/bin/any", "")]);
    place.build(&["--deb-file", &any]);
    let needs = format!("{}\nDepends: other-arch", fields(host_architecture()));
    let needs = place.deb("needs-other", &needs, &[("usr/bin/needs", "")]);
    place.build(&["--deb-file", &needs]);
    assert_eq!(place.lock("['any-arch']").unwrap(), ["mine", "any-arch"]);
    for wanted in ["['other-arch']", "['needs-other']"] {
        let said = place.lock(wanted).unwrap_err();
        let expected = format!(
            "mine 12.11 is for {}, other-arch 1 for s390x",
            host_architecture()
        );
        assert!(said.contains(&expected), "{said}");
        assert!(!said.contains("any-arch"), "{said}");
    }
}

#[test]
fn privileged_run_tells_what_compose_notes() {
    let test = "privileged_run_tells_what_compose_notes";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let manifest = host.write("clash.toml", &idle("clash", "[\"forelay-clash\"]", ""));
    let manifest = manifest.to_str().unwrap();
    let note = "/usr/bin/bash is in debian and in forelay-clash, whose is used";
    let out = host.dir().join("out");
    let composed = host.run(["compose", manifest, "--out", out.to_str().unwrap()]);
    assert!(composed.stderr.contains(note), "{}", composed.stderr);
    let ran = host.run(["run", "--detach", "--name", "clash", manifest]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains(note), "{}", ran.stderr);
    let vm = &host.json(["ps"])[0];
    assert_eq!(vm["launch"]["notes"][0], note);
}
