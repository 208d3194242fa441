//! What hostile packages and bases try, in real scratch roots. They need root, and most a
//! Debian base (see `debian_tests.rs`).

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use forelay_image::tree::Kind;

use super::*;
use crate::tests::{base, give, missing, sandbox, test_cache};

/// A sandbox over the test base with other limits.
fn limited(scratch: &Path, change: impl FnOnce(&mut BuildLimits)) -> Sandbox {
    let mut limits = BuildLimits {
        time: Duration::from_secs(600),
        ..BuildLimits::default()
    };
    change(&mut limits);
    Sandbox::new(scratch, &[&base().directory], base().users, &limits).unwrap()
}

/// Seconds that nobody else sleeps: what is left of a test is found by them.
fn marked() -> String {
    format!("10{}", std::process::id())
}

/// How many processes of the host have the mark in their words.
fn still_there() -> usize {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let words = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let marked = marked();
    let has = |words: &Vec<u8>| {
        words
            .windows(marked.len())
            .any(|part| part == marked.as_bytes())
    };
    words.filter(has).count()
}

/// Puts a package whose `postinst` is `script` into the scratch root as `/packages/hostile.deb`.
fn put_package(sandbox: &Sandbox, script: &str) {
    let packages = sandbox.upper().join("packages");
    let root = packages.join("root");
    fs::create_dir_all(root.join("DEBIAN")).unwrap();
    let control = "Package: hostile\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\n\
                   Description: a package\n";
    fs::write(root.join("DEBIAN/control"), control).unwrap();
    let postinst = root.join("DEBIAN/postinst");
    fs::write(&postinst, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&postinst, fs::Permissions::from_mode(0o755)).unwrap();
    let made = Command::new("dpkg-deb")
        .args(["-Znone", "--build"])
        .arg(&root)
        .arg(packages.join("hostile.deb"))
        .output();
    assert!(made.unwrap().status.success());
    fs::remove_dir_all(&root).unwrap();
    give(&packages);
}

macro_rules! require_debian {
    ($name:literal) => {
        if let Some(why) = missing() {
            println!("SKIPPED {}: {why}", $name);
            return;
        }
    };
}

#[test]
fn privileged_a_maintainer_script_that_breaks_out_finds_no_host() {
    require_debian!("privileged_a_maintainer_script_that_breaks_out_finds_no_host");
    let scratch = tempfile::tempdir_in(test_cache()).unwrap();
    let host = tempfile::tempdir().unwrap();
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let secret = host.path().join("secret");
    fs::write(&secret, "the host's").unwrap();
    let made = host.path().join("made");
    let sandbox = sandbox(scratch.path(), &[&base().directory]);
    let script = format!(
        r#"cat /proc/self/uid_map /proc/self/gid_map; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status
        perl -e '
            $| = 1;
            print "sysctl\n" if open my $sysctl, ">", "/proc/sys/kernel/sysrq";
            my $disk = "/tmp/disk";
            print "node\n" if syscall(133, $disk, 060600, 0x801) == 0;
            sub refused {{ my ($name, $number, @args) = @_; my $got = syscall($number, @args); print "$name $got " . ($! + 0) . "\n" }}
            refused("mount", 165, "tmpfs", "/mnt", "tmpfs", 0, 0);
            refused("bpf", 321, 0, 0, 0);
            refused("keyctl", 250, 0, 0, 0);
            refused("ptrace", 101, 0, 0, 0, 0);
            refused("kexec", 246, 0, 0, 0, 0);
            refused("unshare", 272, 0x10000000);
            refused("clone", 56, 0x10000011, 0, 0, 0, 0);
            refused("clone3", 435, 0, 0);
            refused("setns", 308, 0, 0x20000);
            refused("vsock", 41, 40, 1, 0);
            mkdir "/tmp/x"; chroot "/tmp/x"; chdir ".." for 1..64; chroot ".";
            print "out\n" if -d "/target";
            print "read\n" if -e "{secret}";
            print "made\n" if open my $made, ">", "{made}";
            print "written\n" if open my $file, ">", "/usr/bin/forelay-escaped";
            print "cache\n" if open my $cache, ">", "/apt/lists/x";
        '"#,
        secret = secret.display(),
        made = made.display(),
    );
    put_package(&sandbox, &script);
    let said = sandbox.run("dpkg -i /packages/hostile.deb 2>&1").unwrap();
    let lines: HashSet<&str> = said.lines().collect();
    assert!(
        lines.contains("out"),
        "it did break out of the chroot: {said}"
    );
    for forbidden in ["sysctl", "node", "read", "made", "written", "cache"] {
        assert!(!lines.contains(forbidden), "{forbidden}: {said}");
    }
    assert!(!made.exists() && !Path::new("/usr/bin/forelay-escaped").exists());
    let not_permitted = [
        "mount", "bpf", "keyctl", "ptrace", "kexec", "unshare", "clone", "setns",
    ];
    for call in not_permitted {
        assert!(lines.contains(&*format!("{call} -1 1")), "{call}: {said}");
    }
    assert!(
        lines.contains("clone3 -1 38") && lines.contains("vsock -1 97"),
        "{said}"
    );
    let map = format!("0 {} 65536", base().users.first());
    let words = |line: &&str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(
        said.lines().filter(|line| words(line) == map).count(),
        2,
        "{said}"
    );
    let field = |name: &str| {
        let found = said.lines().find_map(|line| line.strip_prefix(name));
        found
            .unwrap_or_else(|| panic!("{name} {said}"))
            .trim()
            .to_owned()
    };
    // chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service,
    // sys_chroot, setfcap
    let kept = [0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31].map(|bit| 1u64 << bit);
    let kept = format!("{:016x}", kept.iter().sum::<u64>());
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(field(set), kept, "{set}");
    }
    assert_eq!(
        (field("NoNewPrivs:"), field("Seccomp:")),
        ("1".into(), "2".into())
    );
}

#[test]
fn privileged_what_never_ends_is_ended() {
    require_debian!("privileged_what_never_ends_is_ended");
    let scratch = tempfile::tempdir_in(test_cache()).unwrap();
    let refused = |what: &str, change: &dyn Fn(&mut BuildLimits), script: &str, expected: &str| {
        let sandbox = limited(scratch.path(), |limits| change(limits));
        put_package(&sandbox, script);
        let error = sandbox
            .run("exec dpkg -i /packages/hostile.deb")
            .unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ImportError::Limit { .. }), "{what}: {text}");
        assert!(text.contains(expected), "{what}: {text}");
    };
    let short = |limits: &mut BuildLimits| limits.time = Duration::from_secs(3);
    let sleep = format!("sleep {}", marked());
    refused("sleep", &short, &sleep, "longer than 3 seconds");
    // Its output closed, and the package's own process gone.
    let hidden = format!("setsid {sleep} >/dev/null 2>&1 & exec {sleep} >&- 2>&-");
    refused("hidden", &short, &hidden, "longer than 3 seconds");
    let printed = |limits: &mut BuildLimits| limits.output_bytes = 1 << 20;
    refused("output", &printed, "yes", "printed more than 1048576 bytes");
    // Without an end of a line.
    let zeros = "cat /dev/zero";
    refused("zeros", &printed, zeros, "printed more than 1048576 bytes");
    let disk = |limits: &mut BuildLimits| limits.disk_bytes = 64 << 20;
    let many = "i=0; while :; do i=$((i+1)); head -c 8000000 /dev/zero >/var/$i; done";
    refused("disk", &disk, many, "wrote more than 67108864 bytes");
    let files = |limits: &mut BuildLimits| limits.files = 5000;
    let many = "perl -e 'while (1) { $i++; open F, \">\", \"/var/f$i\" }'";
    refused("files", &files, many, "made more than 5000 files");
    assert_eq!(still_there(), 0);
}

#[test]
fn privileged_processes_and_memory_of_a_build_are_bounded() {
    require_debian!("privileged_processes_and_memory_of_a_build_are_bounded");
    let scratch = tempfile::tempdir_in(test_cache()).unwrap();
    let sandbox = limited(scratch.path(), |limits| {
        limits.processes = 100;
        limits.time = Duration::from_secs(60);
    });
    // It goes on until nothing can be forked any more, and then says how many there are.
    let bomb = r#"perl -e '
        for (1..1000) { my $pid = fork; defined $pid or last; $pid or sleep MARK; }
        opendir my $proc, "/proc";
        print STDERR "processes ", scalar(grep /^\d+$/, readdir $proc), "\n"; exit 1'"#;
    put_package(&sandbox, &bomb.replace("MARK", &marked()));
    let run = sandbox.run("exec dpkg -i /packages/hostile.deb");
    let text = run.unwrap_err().to_string();
    assert!(
        text.contains("more than 100 processes") || text.contains("processes 9"),
        "{text}"
    );
    drop(sandbox);
    let bomb = format!("b() {{ b | b & }}; b; wait; sleep {}", marked());
    let sandbox = limited(scratch.path(), |limits| {
        limits.processes = 100;
        limits.time = Duration::from_secs(5);
    });
    put_package(&sandbox, &bomb);
    let error = sandbox
        .run("exec dpkg -i /packages/hostile.deb")
        .unwrap_err();
    assert!(matches!(error, ImportError::Limit { .. }), "{error}");
    let sandbox = limited(scratch.path(), |limits| limits.memory_bytes = 256 << 20);
    put_package(
        &sandbox,
        "perl -e 'my $all = \"x\" x (1 << 30); print length $all'",
    );
    let error = sandbox
        .run("exec dpkg -i /packages/hostile.deb")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("more than 268435456 bytes of memory") || error.contains("Out of memory"),
        "{error}"
    );
    assert_eq!(still_there(), 0);
}

/// A base of nothing but the directories that must be there.
fn empty_base(at: &Path) {
    for directory in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "etc",
        "var/cache/apt/archives",
    ] {
        fs::create_dir_all(at.join(directory)).unwrap();
    }
}

#[test]
fn privileged_links_of_a_hostile_base_are_refused_where_something_is_mounted() {
    if let Err(error) = require_root("mounts") {
        let test = "privileged_links_of_a_hostile_base_are_refused_where_something_is_mounted";
        return println!("SKIPPED {test}: {error}");
    }
    let host = tempfile::tempdir().unwrap();
    let seen = |path: &Path| {
        let entries = fs::read_dir(path).unwrap().flatten();
        entries.map(|entry| entry.file_name()).collect::<Vec<_>>()
    };
    for place in [
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "var",
        "var/cache",
        "var/cache/apt",
    ] {
        for to in [
            host.path().to_owned(),
            "/etc".into(),
            "../../../../etc".into(),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().join("base");
            empty_base(&base);
            fs::remove_dir_all(base.join(place)).unwrap();
            symlink(&to, base.join(place)).unwrap();
            let scratch = dir.path().join("scratch");
            let users = UserRange::new(2_100_200_000);
            let limits = BuildLimits::default();
            let sandbox = Sandbox::new(&scratch, &[&base], users, &limits).unwrap();
            let error = sandbox.run("exit 0").unwrap_err().to_string();
            assert!(error.contains("a link or a file"), "{place}: {error}");
            assert!(error.contains(&format!("/{place} ")), "{place}: {error}");
            assert!(seen(host.path()).is_empty());
        }
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("/spool-"), "{mounts}");
}

#[test]
fn privileged_owners_modes_capabilities_and_lists_come_back_as_they_were_set() {
    require_debian!("privileged_owners_modes_capabilities_and_lists_come_back_as_they_were_set");
    let scratch = tempfile::tempdir_in(test_cache()).unwrap();
    let sandbox = sandbox(scratch.path(), &[&base().directory]);
    let script = r#"set -e; mkdir /x; cd /x; touch www suid caps list; chown www-data:mail www
        chmod 6755 suid; perl -e '
        sub set { my ($path, $name, $value) = @_;
            syscall(188, $path, $name, $value, length $value, 0) == 0 or die "$name: $!" }
        set("caps", "security.capability", pack("V5", 0x02000001, 1 << 13, 0, 0, 0));
        set("list", "system.posix_acl_access", pack("V(vvV)5", 2, 1, 6, 0xffffffff,
            2, 4, 33, 4, 4, 0xffffffff, 0x10, 6, 0xffffffff, 0x20, 4, 0xffffffff))'
        chmod 755 /usr/bin/passwd; chown daemon /etc/debian_version; rm /etc/issue"#;
    sandbox.run(script).unwrap();
    let tree = sandbox.changes().unwrap();
    let node = |path: &str| tree.node(tree.lookup(path.as_bytes()).unwrap());
    let owner = |path: &str| (node(path).attributes.uid, node(path).attributes.gid);
    assert_eq!(owner("x/www"), (33, 8));
    assert_eq!(
        (owner("x/suid"), node("x/suid").attributes.mode),
        ((0, 0), 0o6755)
    );
    assert_eq!(owner("etc/debian_version"), (1, 0));
    assert_eq!(node("usr/bin/passwd").attributes.mode, 0o755);
    assert!(matches!(
        node("etc/issue").kind,
        Kind::CharDevice { major: 0, minor: 0 }
    ));
    let xattr = |path: &str, name: &str| node(path).attributes.xattrs[name.as_bytes()].clone();
    let words = [0x0200_0001u32, 1 << 13, 0, 0, 0].map(u32::to_le_bytes);
    assert_eq!(xattr("x/caps", "security.capability"), words.concat());
    let list = xattr("x/list", "system.posix_acl_access");
    assert_eq!(list[12..20], [2, 0, 4, 0, 33, 0, 0, 0], "{list:?}");
    // On the host, nothing of it is root's.
    use std::os::unix::fs::MetadataExt as _;
    let suid = fs::metadata(sandbox.upper().join("x/suid")).unwrap();
    assert_eq!(suid.uid(), base().users.first());
}
