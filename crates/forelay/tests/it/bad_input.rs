//! What goes wrong from outside: each is told in words that name the thing, with an exit
//! code that is not 0, and harms no other VM.

use std::path::{Path, PathBuf};

use crate::fixture::{Host, RepositoryOf, Settings, bench, idle, lives, signal};

/// Replaces a file of a private repository, which may be a hard link into the shared one.
fn replace(path: &Path, content: &[u8]) {
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, content).unwrap();
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[test]
fn privileged_senseless_requests_are_refused_in_words() {
    let test = "privileged_senseless_requests_are_refused_in_words";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let run = |text: &str, further: &[&str]| {
        let manifest = host.write("bad.toml", text);
        let mut words = vec!["run", "--detach"];
        words.extend(further);
        words.push(manifest.to_str().unwrap());
        host.refused(words)
    };

    let said = run("base = \"debian\"\n\n[vm]\nmemory_mib = \"much\"\n", &[]);
    assert!(said.contains("line 4, column 14"), "{said}");
    let said = run("base = \"debian\"\ncomponent = [\"nginx\"]\n", &[]);
    assert!(
        said.contains("line 2") && said.contains("component"),
        "{said}"
    );
    let said = run("\u{0}\u{1}\u{2} nonsense", &[]);
    assert!(said.contains("line 1"), "{said}");
    let said = run("", &[]);
    assert!(said.contains("base"), "{said}");
    let said = run(
        "base = \"debian\"\nentrypoint = [\"x\"]\ninit = true\n",
        &[],
    );
    assert!(
        said.contains("entrypoint") && said.contains("init"),
        "{said}"
    );

    let said = run(&idle("web", "[\"ngnix\"]", ""), &[]);
    assert!(said.contains("did you mean nginx?"), "{said}");
    let said = run(&idle("web", "[\"nginx@>= 99\"]", ""), &[]);
    assert!(
        said.contains("nginx") && said.contains("1.22"),
        "names what there is: {said}"
    );
    let said = run(
        &idle("web", "[\"forelay-tool\", \"forelay-rival\"]", ""),
        &[],
    );
    assert!(said.contains("excludes"), "{said}");

    let fits = host.write("fits.toml", &idle("fits", "[]", ""));
    host.ok(["lock", fits.to_str().unwrap()]);
    let lock = host.dir().join("fits.lock");
    let lock = lock.to_str().unwrap();
    let said = run(&idle("other", "[\"nginx\"]", ""), &["--lock", lock]);
    assert!(said.contains("the lock is of another manifest"), "{said}");
    let broken = host.write("broken.lock", "version = \"?\n");
    let said = run(
        &idle("fits", "[]", ""),
        &["--lock", broken.to_str().unwrap()],
    );
    assert!(said.contains("line 1"), "{said}");
    let said = host.refused(["run", "/absent/manifest.toml"]);
    assert!(said.contains("/absent/manifest.toml"), "{said}");

    let said = run(&idle("foreign", "[\"forelay-foreign\"]", ""), &[]);
    assert!(said.contains("forelay-foreign 1.0 for s390x"), "{said}");
    let (manifest, lock) = foreign_lock(&host);
    let said = run(&manifest, &["--lock", lock.to_str().unwrap()]);
    assert!(said.contains("forelay-foreign 1.0 is for s390x"), "{said}");

    for command in ["map", "logs", "console"] {
        let said = host.refused([command, "nobody"]);
        assert!(said.contains("no VM is called \"nobody\""), "{said}");
    }
    let said = host.refused(["exec", "nobody", "--", "true"]);
    assert!(said.contains("no VM is called \"nobody\""), "{said}");

    let said = host.refused(["daemon"]);
    assert!(
        said.contains("a daemon answers on") && said.contains("already"),
        "{said}"
    );
    assert_eq!(
        host.json(["ps"]),
        serde_json::json!([]),
        "the first daemon goes on"
    );
}

/// A manifest, and a lock of it that pins a component for other machines.
fn foreign_lock(host: &Host) -> (String, PathBuf) {
    let text = idle("pinned", "[\"forelay-tool\"]", "");
    let manifest = host.write("pinned.toml", &text);
    let lock = host.json(["lock", manifest.to_str().unwrap()]);
    let pinned = lock["component"].as_array().unwrap();
    let pinned = pinned.iter().find(|one| one["name"] == "forelay-tool");
    let (pinned, foreign) = (
        pinned.unwrap(),
        host.json(["component", "show", "forelay-foreign"]),
    );
    let path = host.dir().join("pinned.lock");
    let mut lock = std::fs::read_to_string(&path).unwrap();
    for (old, new) in [
        (&pinned["name"], &foreign["name"]),
        (&pinned["id"], &foreign["id"]),
        (&pinned["image"], &foreign["image"]["digest"]),
    ] {
        lock = lock.replace(old.as_str().unwrap(), new.as_str().unwrap());
    }
    std::fs::write(&path, lock).unwrap();
    (text, path)
}

#[test]
fn privileged_whatever_the_umask_only_root_reaches_a_vm() {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;
    let test = "privileged_whatever_the_umask_only_root_reaches_a_vm";
    let Some(bench) = bench(test) else { return };
    let mut host = Host::new(&bench, &Settings::default());
    host.start_with_umask("000");
    let manifest = host.write("plain.toml", &idle("plain", "[]", ""));
    let run = host.ok(["run", "--detach", manifest.to_str().unwrap()]);
    assert!(run.contains("plain is Ready"), "{run}");
    let mode = |path: &str| {
        let found = std::fs::metadata(host.dir().join(path)).unwrap();
        found.permissions().mode() & 0o7777
    };
    assert_eq!(mode("run/forelay.sock"), 0o660);
    for (dir, its_mode, secret) in [
        ("run/vms", 0o700, "run/vms/plain/instance.json"),
        ("run/vms/plain", 0o710, "run/vms/plain/vm-state.json"),
        ("state", 0o700, "run/vms/plain/monitor.sock"),
    ] {
        assert_eq!(mode(dir), its_mode, "{dir}");
        assert_eq!(mode(secret) & 0o077, 0, "{secret}");
    }
    // What its VMM reads: the group is one that nobody else has.
    for lent in ["run/vms/plain", "run/vms/plain/map.img"] {
        use std::os::unix::fs::MetadataExt as _;
        let found = std::fs::metadata(host.dir().join(lent)).unwrap();
        assert!(found.uid() == 0 && found.gid() >= 2_100_000_000, "{lent}");
        assert_eq!(found.mode() & 0o007, 0, "{lent}");
    }
    let vmm = host.vm("plain")["pid"].to_string();
    let status = std::fs::read_to_string(format!("/proc/{vmm}/status")).unwrap();
    for line in [
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "Uid:\t21000",
    ] {
        assert!(status.contains(line), "{line} in {status}");
    }

    // A reader that has seen enough is no failure.
    for words in [
        &["ps"][..],
        &["component", "show", "debian"],
        &["logs", "plain"],
    ] {
        let mut command = host.command(words);
        let (reader, writer) = std::io::pipe().unwrap();
        command.stdout(writer).stderr(std::process::Stdio::piped());
        drop(reader);
        let _ = command.process_group(0);
        let ended = command.output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(
            ended.status.success() && !said.contains("panicked"),
            "{words:?}: {said}"
        );
    }
}

#[test]
fn privileged_a_name_that_leads_elsewhere_is_refused_before_anything_is_touched() {
    let test = "privileged_a_name_that_leads_elsewhere_is_refused_before_anything_is_touched";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let canary = host.dir().join("canary");
    std::fs::create_dir(&canary).unwrap();
    std::fs::write(canary.join("file"), "kept").unwrap();
    let long = "x".repeat(300);
    let names = [
        "",
        ".",
        "..",
        "../../canary",
        canary.to_str().unwrap(),
        "-x",
        "a b",
        "a\nb",
        "\u{e9}",
        &long,
    ];
    let plain = host.write("plain.toml", &idle("plain", "[]", ""));
    let plain = plain.to_str().unwrap();
    let refused = |words: &[&str], what: &str| {
        let said = host.refused(words);
        assert!(
            said.contains(what) && said.contains("use 1 to"),
            "{words:?}: {said}"
        );
    };
    for name in names {
        refused(
            &["run", "--detach", &format!("--name={name}"), plain],
            "the name of a VM",
        );
        for (key, what) in [
            ("name", "the name of a VM"),
            ("profile", "a profile"),
            ("owner", "an owner"),
            ("hostname", "a host name"),
        ] {
            let text = format!("{key} = {name:?}\nbase = \"debian\"\n");
            let manifest = host.write("named.toml", &text);
            refused(&["run", "--detach", manifest.to_str().unwrap()], what);
            refused(&["prefetch", manifest.to_str().unwrap()], what);
        }
        refused(&["stop", "--", name], "the name of a VM");
    }
    // A profile that comes from the base's name is no way around.
    let manifest = host.write("base.toml", "base = \"a/../../canary\"\n");
    refused(
        &["run", "--detach", manifest.to_str().unwrap()],
        "a profile",
    );
    assert_eq!(std::fs::read(canary.join("file")).unwrap(), b"kept");
    assert_eq!(std::fs::read_dir(&canary).unwrap().count(), 1);
    assert_eq!(files(&host.dir().join("run/vms")), Vec::<PathBuf>::new());
    assert_eq!(
        host.json(["history"]),
        serde_json::json!([]),
        "nothing is learned of them"
    );
}

#[test]
fn privileged_what_breaks_one_vm_leaves_another_unharmed() {
    let test = "privileged_what_breaks_one_vm_leaves_another_unharmed";
    let Some(bench) = bench(test) else { return };
    let settings = Settings {
        repository: RepositoryOf::Test,
        ..Settings::default()
    };
    let host = Host::started(&bench, &settings);
    let good = host.write("good.toml", &idle("good", "[]", ""));
    let vm = host.launch(&good, "good", &[]);
    let pid = vm["pid"].as_u64().unwrap();
    let unharmed = || {
        let check = "cd /; md5sum -c --quiet --ignore-missing \
                     /var/lib/dpkg/info/perl-base.md5sums && echo fine";
        assert_eq!(host.sh("good", check), "fine\n");
        assert!(lives(pid));
    };
    let launch = |name: &str, components: &str, further: &[&str]| {
        let manifest = host.write("next.toml", &idle(name, components, ""));
        let mut words = vec!["run", "--detach", "--name", name];
        words.extend(further);
        words.push(manifest.to_str().unwrap());
        host.refused(words)
    };

    writes_to_pmem_go_nowhere(&host);
    unharmed();
    vanished(&host, &launch);
    unharmed();
    corrupt(&host, &launch);
    built_again(&host);
    unharmed();
    vmm_dies_during_boot(&host);
    unharmed();
}

/// The guest's root may write to /dev/pmem1; nothing of it arrives anywhere.
fn writes_to_pmem_go_nowhere(host: &Host) {
    let map = host.json(["map", "good"]);
    let device = map["devices"][1]["path"].as_str().unwrap().to_owned();
    let before = std::fs::read(&device).unwrap();
    let write = "dd if=/dev/urandom of=/dev/pmem1 bs=4096 count=512 conv=fsync 2>&1; \
                 dd if=/dev/urandom of=/dev/pmem1 bs=1M seek=20 count=8 oflag=direct 2>&1; sync";
    host.run(["exec", "good", "--", "sh", "-c", write]);
    assert!(
        std::fs::read(&device).unwrap() == before,
        "the host's bytes"
    );
    let opened = std::fs::File::options().write(true).open(&device);
    let error = opened.expect_err("the host itself cannot write either");
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}

/// A component that a lock pins is gone, or a part of it.
fn vanished(host: &Host, launch: &dyn Fn(&str, &str, &[&str]) -> String) {
    let repository = host.repository();
    let manifest = host.write("next.toml", &idle("gone", "[\"nginx\"]", ""));
    host.ok(["lock", manifest.to_str().unwrap()]);
    let lock = host.dir().join("next.lock");
    let shown = host.json(["component", "show", "nginx"]);
    let hex = |text: &serde_json::Value| text.as_str().unwrap().replace("sha256:", "");
    let (id, index) = (hex(&shown["id"]), hex(&shown["image"]["chunk_index"]));
    std::fs::remove_file(repository.join(format!("chunks/{index}.idx"))).unwrap();
    std::fs::remove_file(repository.join(format!("locations/{index}.loc"))).unwrap();
    // What the host has cached of it would serve as well.
    let said = launch("gone", "[\"nginx\"]", &["--lock", lock.to_str().unwrap()]);
    assert!(said.contains("component nginx 1.22"), "{said}");
    assert_eq!(host.vm("gone")["state"], "failed");
    std::fs::remove_file(repository.join(format!("components/{id}.json"))).unwrap();
    let said = launch("gone", "[\"nginx\"]", &[]);
    assert!(
        said.contains("nginx") && said.contains("no component"),
        "{said}"
    );
}

/// A pack whose bytes are not what its name says, and one that is cut short.
fn corrupt(host: &Host, launch: &dyn Fn(&str, &str, &[&str]) -> String) {
    let repository = host.repository();
    for (name, cut) in [("flipped", false), ("cut", true)] {
        let tree = host.dir().join(name);
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("words"), format!("unlike any other: {name}\n")).unwrap();
        let before = files(&repository.join("packs"));
        let tree = tree.to_str().unwrap();
        let words = ["component", "build", "--dir", tree, "--name", name];
        host.ok(words.iter().chain(&["--component-version", "1"]));
        let after = files(&repository.join("packs"));
        let new = after.into_iter().filter(|path| !before.contains(path));
        let packs = new.filter(|path| path.extension().is_some_and(|end| end == "pack"));
        let packs: Vec<_> = packs.collect();
        assert_eq!(packs.len(), 1, "{packs:?}");
        let sound = std::fs::read(&packs[0]).unwrap();
        let broken: Vec<u8> = match cut {
            true => sound[..sound.len() / 2].to_vec(),
            false => sound.iter().map(|byte| byte ^ 0x20).collect(),
        };
        replace(&packs[0], &broken);
        let said = launch(name, &format!("[{name:?}]"), &[]);
        assert!(said.contains(&format!("component {name} 1")), "{said}");
        assert_eq!(host.vm(name)["state"], "failed");
        let pack = packs[0].file_name().unwrap().to_str().unwrap();
        let said = host.run(["verify"]);
        assert_eq!(said.code, Some(1), "{}{}", said.stdout, said.stderr);
        assert!(said.stdout.contains(pack), "{}", said.stdout);
        replace(&packs[0], &sound);
    }
}

/// Two builds of one version: launches take one of them, and are told which.
fn built_again(host: &Host) {
    let build = |content: &str| {
        let tree = host.dir().join(format!("again-{content}"));
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("again"), content).unwrap();
        let tree = tree.to_str().unwrap();
        let words = ["component", "build", "--json", "--name", "again"];
        let further = ["--component-version", "1", "--dir", tree];
        let built = host.run(words.iter().chain(&further));
        assert_eq!(built.code, Some(0), "{}", built.stderr);
        let component: serde_json::Value = serde_json::from_str(&built.stdout).unwrap();
        (component["id"].as_str().unwrap().to_owned(), built.stderr)
    };
    let (first, said) = build("one");
    assert!(!said.contains("other builds"), "{said}");
    let (second, said) = build("two");
    let takes = match first < second {
        true => format!("take that with the id {first}, not this one"),
        false => "take this one".to_owned(),
    };
    assert!(said.contains(&takes), "{said}");
    assert!(
        said.contains(&format!("component remove {first}")),
        "{said}"
    );
    host.ok(["component", "remove", &first]);
    assert!(host.run(["component", "show", &first]).code != Some(0));
    host.ok(["component", "show", &second]);
}

/// The VMM is killed before its VM is ready, which it never would be.
fn vmm_dies_during_boot(host: &Host) {
    let never = "\nready = { path = \"/never\" }\n\n[vm]";
    let manifest = idle("short", "[]", "").replacen("\n\n[vm]", never, 1);
    let manifest = host.write("short.toml", &manifest);
    let before = host.vmms();
    let words = ["run", "--detach", "--name", "short"];
    let mut command = host.command(
        words
            .iter()
            .map(std::ffi::OsStr::new)
            .chain([manifest.as_os_str()]),
    );
    let command = command
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null());
    let running = command.spawn().unwrap();
    let mut pid = None;
    host.until("the VMM boots", |host| {
        pid = host.vmms().into_iter().find(|pid| !before.contains(pid));
        pid.is_some() && host.vm("short")["state"] == "booting"
    });
    signal("KILL", pid.unwrap());
    let output = running.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("VM short failed") && said.contains("signal 9"),
        "{said}"
    );
    let vm = host.vm("short");
    assert_eq!((&vm["state"], &vm["pid"]), (&"failed".into(), &().into()));
}
