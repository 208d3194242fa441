//! Builds with real Debian packages. They need root, mmdebstrap and a mirror; the base
//! and downloads are kept in `target/test-cache` between runs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use forelay_image::component::{Capability, Component, Role};
use forelay_image::erofs::read::Image;
use forelay_image::{Digest, Extent};

use super::*;
use crate::apt::AptCache;
use crate::base::BaseOptions;
use crate::deb::read_small_file;
use crate::dir::Ownership;
use crate::kernel::{INITRD_PATH, KERNEL_PATH, KernelOptions};
use crate::packages::PackageOptions;
use crate::roots::BaseRoot;
use crate::sandbox::Sandbox;
use crate::sandbox::jail::TARGET;
use crate::unpack::write_directory;
use forelay_guest_protocol::accounts::{Fragments, fragments_path, merged_files};
use forelay_image::package_status::{merged_status, status_path};

fn silent(_: Progress) {}

pub(crate) fn test_cache() -> PathBuf {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    let cache = target.join("test-cache/import");
    fs::create_dir_all(&cache).unwrap();
    cache.canonicalize().unwrap()
}

/// Why builds with Debian packages cannot run here, if they cannot.
pub(crate) fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".to_owned());
    }
    let tools = ["mmdebstrap", "unshare", "apt-get", "dpkg"];
    let absent = tools.iter().find(|tool| {
        let found = Command::new("sh")
            .args(["-c", &format!("command -v {tool}")])
            .output();
        !found.is_ok_and(|found| found.status.success())
    });
    absent.map(|tool| format!("{tool} is not installed"))
}

macro_rules! require_debian {
    ($name:literal) => {
        if let Some(why) = missing() {
            println!("SKIPPED {}: {why}", $name);
            return;
        }
    };
}

fn builder() -> Builder {
    Builder::new(&test_cache())
        .unwrap()
        .refresh_after(Duration::from_secs(6 * 3600))
}

/// The base that all tests share, built once for each state of the code that makes it.
pub(crate) fn base() -> &'static BaseRoot {
    static BASE: OnceLock<BaseRoot> = OnceLock::new();
    BASE.get_or_init(|| {
        let sources = [
            include_str!("base.rs"),
            include_str!("rootfs.rs"),
            include_str!("clean.rs"),
            include_str!("stable_ids.rs"),
            include_str!("../../forelay-guest-protocol/src/accounts.rs"),
        ];
        let key = Digest::of(sources.concat().as_bytes()).short();
        let cache = test_cache();
        let lock = File::create(cache.join("lock")).unwrap();
        lock.lock().unwrap();
        let image_path = cache.join(format!("base-{key}.img"));
        let component_path = cache.join(format!("base-{key}.json"));
        // What an older program cached may have another form.
        let cached = || -> Option<Component> {
            serde_json::from_slice(&fs::read(&component_path).ok()?).ok()
        };
        let component = cached().unwrap_or_else(|| {
            let request = BuildRequest::new(BuildSource::Base(BaseOptions::default()));
            let built = builder().build(&request, &silent).unwrap().main;
            fs::rename(&built.image, &image_path).unwrap();
            let json = serde_json::to_vec(&built.component).unwrap();
            fs::write(&component_path, json).unwrap();
            built.component
        });
        let image = File::open(&image_path).unwrap();
        builder().base_root(&component, &image).unwrap()
    })
}

fn packages(names: &[&str]) -> BuildRequest {
    let packages = names.iter().map(|name| (*name).to_owned()).collect();
    BuildRequest::new(BuildSource::Packages {
        options: PackageOptions {
            packages,
            split: false,
        },
        base: Box::new(base().clone()),
    })
}

/// A scratch root over directories whose owners are as in [`base`].
pub(crate) fn sandbox(scratch: &Path, layers: &[&Path]) -> Sandbox {
    Sandbox::new(scratch, layers, base().users, &BuildLimits::default()).unwrap()
}

fn unpack(built: &BuiltComponent, to: &Path) {
    let image = File::open(&built.image).unwrap();
    let tree = Image::open(&image).unwrap().to_tree(1 << 30).unwrap();
    fs::create_dir(to).unwrap();
    write_directory(&tree, to, base().users).unwrap();
}

/// What a launch does with fragments, written into a directory to be the topmost layer.
fn merged_layer(layers: &[(&str, &Path)], to: &Path) {
    let read = |(name, directory): &(&str, &Path)| {
        let bytes = fs::read(directory.join(fragments_path(name))).ok();
        bytes.map_or(Fragments::default(), |bytes| {
            Fragments::decode(name, &bytes).unwrap()
        })
    };
    let fragments: Vec<Fragments> = layers.iter().map(read).collect();
    for file in merged_files(&fragments).unwrap() {
        let path = to.join(&file.path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, file.bytes).unwrap();
    }
    let text = |path: PathBuf| fs::read_to_string(path).unwrap();
    let base = text(layers[0].1.join("var/lib/dpkg/status"));
    let added: Vec<String> = layers[1..]
        .iter()
        .map(|(name, directory)| text(directory.join(status_path(name))))
        .collect();
    let added: Vec<&str> = added.iter().map(String::as_str).collect();
    fs::create_dir_all(to.join("var/lib/dpkg")).unwrap();
    fs::write(to.join("var/lib/dpkg/status"), merged_status(&base, &added)).unwrap();
    give(to);
}

/// Makes a directory, with all in it, root's in a sandbox.
pub(crate) fn give(directory: &Path) {
    let root = base().users.first().to_string();
    let given = Command::new("chown")
        .args(["-R", &format!("{root}:{root}")])
        .arg(directory)
        .status();
    assert!(given.unwrap().success());
}

#[test]
fn privileged_components_built_apart_work_together_on_their_base() {
    require_debian!("privileged_components_built_apart_work_together_on_their_base");
    let nginx = builder()
        .build(&packages(&["nginx"]), &silent)
        .unwrap()
        .main;
    let redis = builder()
        .build(&packages(&["redis"]), &silent)
        .unwrap()
        .main;
    let again = builder()
        .build(&packages(&["redis"]), &silent)
        .unwrap()
        .main;
    assert_eq!(
        redis.component.id(),
        again.component.id(),
        "not reproducible"
    );

    let about = &nginx.component;
    assert_eq!((about.name.as_str(), about.role), ("nginx", Role::Package));
    assert_eq!(about.entrypoint, ["/usr/sbin/nginx", "-g", "daemon off;"]);
    assert!(
        about
            .sbom
            .iter()
            .any(|package| package.name == "nginx-common")
    );
    assert!(!about.sbom.iter().any(|package| package.name == "libc6"));
    assert!(
        about
            .requires
            .iter()
            .flatten()
            .any(|need| need.name == "libc6")
    );
    assert_eq!(redis.component.entrypoint, ["/usr/lib/forelay/start/redis"]);

    let scratch = tempfile::tempdir_in(test_cache()).unwrap();
    let directory = |name: &str| scratch.path().join(name);
    unpack(&nginx, &directory("nginx"));
    unpack(&redis, &directory("redis"));
    fs::create_dir(directory("merged")).unwrap();
    let layers = [
        ("debian", base().directory.as_path()),
        ("nginx", &directory("nginx")),
        ("redis", &directory("redis")),
    ];
    merged_layer(&layers, &directory("merged"));
    let layers = ["merged", "redis", "nginx"].map(directory);
    let layers = [&layers[0], &layers[1], &layers[2], &base().directory];
    let root = sandbox(scratch.path(), &layers.map(PathBuf::as_path));
    let script = "set -e; nginx -t 2>&1; redis-server --version; id -u redis; \
                  stat -c %U /var/lib/redis; dpkg -s nginx redis libc6 | grep -c '^Status: install ok'; \
                  dpkg --verify redis-server nginx-common || true";
    let said = root.run(script).unwrap();
    assert!(said.contains("test is successful"), "{said}");
    assert!(said.contains("Redis server v="), "{said}");
    assert!(said.contains("\n216\nredis\n3\n"), "{said}");
    // dpkg --verify also names what a slim base leaves out; changed content is a `5`.
    let changed = said.lines().any(|line| line.starts_with("??5"));
    assert!(!changed, "a packaged file differs: {said}");
}

#[test]
fn privileged_libraries_split_off_are_the_same_component_whoever_needs_them() {
    require_debian!("privileged_libraries_split_off_are_the_same_component_whoever_needs_them");
    let split = |name: &str| {
        let mut request = packages(&[name]);
        if let BuildSource::Packages { options, .. } = &mut request.source {
            options.split = true;
        }
        builder().build(&request, &silent).unwrap()
    };
    let (nginx, redis) = (split("nginx"), split("redis"));
    let ids = |built: &BuiltComponents| -> BTreeMap<String, Digest> {
        let built = built.in_order().map(|one| &one.component);
        built.map(|one| (one.name.clone(), one.id())).collect()
    };
    let (of_nginx, of_redis) = (ids(&nginx), ids(&redis));
    let shared = of_nginx.keys().filter(|name| of_redis.contains_key(*name));
    let shared: Vec<&String> = shared.collect();
    assert!(
        shared.iter().any(|name| *name == "libssl3"),
        "{of_nginx:?} {of_redis:?}"
    );
    for name in shared {
        assert_eq!(of_nginx[name], of_redis[name], "{name} differs");
    }
    let main = &nginx.main.component;
    assert_eq!(main.name, "nginx");
    let requires = |name: &str| main.requires.iter().flatten().any(|need| need.name == name);
    assert!(requires("libssl3") && requires("libc6"));
    assert!(!main.sbom.iter().any(|package| package.name == "libssl3"));

    let scratch = tempfile::tempdir_in(test_cache()).unwrap();
    let mut directories: BTreeMap<String, PathBuf> = BTreeMap::new();
    for one in nginx.in_order().chain(redis.in_order()) {
        let name = one.component.name.clone();
        let directory = scratch.path().join(&name);
        if directories.insert(name, directory.clone()).is_none() {
            unpack(one, &directory);
        }
    }
    let merged = scratch.path().join("merged");
    fs::create_dir(&merged).unwrap();
    let mut layers = vec![("debian", base().directory.as_path())];
    layers.extend(
        directories
            .iter()
            .map(|(name, path)| (&name[..], path.as_path())),
    );
    merged_layer(&layers, &merged);
    let mut stacked = vec![merged.as_path()];
    stacked.extend(layers.iter().rev().map(|(_, path)| *path));
    let root = sandbox(scratch.path(), &stacked);
    let script = "set -e; nginx -t 2>&1; redis-server --version; \
                  ldd /usr/sbin/nginx | grep -c 'not found' || true; \
                  dpkg --verify libssl3 nginx-common redis-server || true";
    let said = root.run(script).unwrap();
    assert!(said.contains("test is successful"), "{said}");
    assert!(said.contains("Redis server v="), "{said}");
    assert!(
        said.lines().any(|line| line == "0"),
        "libraries are missing: {said}"
    );
    // A slim base leaves documentation out.
    let lost = |line: &str| line.starts_with("missing") && !line.contains("/usr/share/");
    let changed = |line: &str| line.starts_with("??5");
    assert!(
        !said.lines().any(|line| lost(line) || changed(line)),
        "{said}"
    );
}

#[test]
fn privileged_failed_builds_say_why_and_leave_nothing() {
    require_debian!("privileged_failed_builds_say_why_and_leave_nothing");
    let build = |names: &[&str]| builder().build(&packages(names), &silent).unwrap_err();
    let unknown = build(&["ngnix"]).to_string();
    assert!(unknown.contains("did you mean nginx"), "{unknown}");
    assert!(matches!(build(&["bash"]), ImportError::InBase { .. }));
    let impossible = build(&["nginx=0.1"]);
    assert!(
        matches!(impossible, ImportError::Unsolvable { .. }),
        "{impossible}"
    );

    let cache = tempfile::tempdir_in(test_cache()).unwrap();
    let offline = Builder::new(cache.path())
        .unwrap()
        .mirror("http://127.0.0.1:9/debian");
    let error = offline.build(&packages(&["nginx"]), &silent).unwrap_err();
    assert!(matches!(error, ImportError::Network { .. }), "{error}");

    let left = fs::read_dir(cache.path().join("tmp")).unwrap().count();
    assert_eq!(left, 0, "temporary files are left");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains("test-cache/import"), "{mounts}");
}

#[test]
fn privileged_a_full_disk_is_named_and_nothing_is_left() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED privileged_a_full_disk_is_named_and_nothing_is_left: not root");
        return;
    }
    struct Mounted(PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let (small, source) = (
        directory.path().join("small"),
        directory.path().join("source"),
    );
    fs::create_dir(&small).unwrap();
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), vec![7; 3 << 20]).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"])
        .arg(&small)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("SKIPPED privileged_a_full_disk_is_named_and_nothing_is_left: cannot mount");
        return;
    }
    let _mounted = Mounted(small.clone());
    let request = BuildRequest::new(BuildSource::Directory {
        path: source,
        ownership: Ownership::Keep,
    });
    let error = Builder::new(&small)
        .unwrap()
        .build(&request, &silent)
        .unwrap_err();
    assert!(matches!(error, ImportError::NoRoom { .. }), "{error}");
    assert_eq!(fs::read_dir(small.join("tmp")).unwrap().count(), 0);
}

#[test]
fn privileged_an_archive_where_the_caller_stands_hides_no_package() {
    let test = "privileged_an_archive_where_the_caller_stands_hides_no_package";
    if let Some(why) = missing() {
        println!("SKIPPED {test}: {why}");
        return;
    }
    let apt = AptCache::open(&test_cache(), "bookworm", Duration::from_secs(6 * 3600)).unwrap();
    let lock = apt.lock().unwrap();
    apt.refresh(&lock, &silent).unwrap();
    let archive = apt.download(&lock, "hostname", &silent).unwrap();
    // Of an archive in its own directory, apt prints nothing.
    let (here, caller) = (
        std::env::current_dir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    fs::copy(&archive, caller.path().join(archive.file_name().unwrap())).unwrap();
    std::env::set_current_dir(caller.path()).unwrap();
    let again = apt.download(&lock, "hostname", &silent);
    std::env::set_current_dir(here).unwrap();
    assert_eq!(again.unwrap(), archive);
}

#[test]
fn privileged_the_kernel_component_holds_what_a_guest_needs_to_boot() {
    require_debian!("privileged_the_kernel_component_holds_what_a_guest_needs_to_boot");
    // Any executable stands in for init here; VMs boot the real one in forelay-vm's tests.
    let options = KernelOptions::new(Path::new("/bin/true"));
    let request = BuildRequest::new(BuildSource::Kernel(options));
    let built = builder().build(&request, &silent).unwrap();
    let [modules] = &built.split_off[..] else {
        panic!("one component of modules");
    };
    let kernel = &built.main.component;
    assert_eq!(modules.component.name, "linux-cloud-modules");
    let package = modules.component.requires.iter().flatten();
    let package = package.filter(|one| one.name.starts_with("linux-image-"));
    let offered = package.map(|one| Capability {
        name: one.name.clone(),
        version: one.range.strip_prefix("= ").map(str::to_owned),
    });
    assert!(
        offered
            .into_iter()
            .all(|one| kernel.provides.contains(&one))
    );
    let built = built.main;
    assert_eq!(built.component.role, Role::Kernel);
    assert!(built.component.cmdline.is_some());
    let image = File::open(&built.image).unwrap();
    let tree = Image::open(&image).unwrap().to_tree(1 << 30).unwrap();
    let shown = Path::new("kernel component");
    let kernel = read_small_file(&tree, KERNEL_PATH.as_bytes(), shown).unwrap();
    assert_eq!(&kernel[0x202..0x206], b"HdrS", "not a bootable kernel");
    let initrd = read_small_file(&tree, INITRD_PATH.as_bytes(), shown).unwrap();
    let text = String::from_utf8_lossy(&initrd);
    let lines = text
        .lines()
        .map(|line| line.rsplit('\0').next().unwrap_or(line));
    let paths = lines.filter(|line| line.starts_with("lib/modules/") && line.ends_with(".ko"));
    let list: Vec<String> = paths.map(modules::module_name).collect();
    let at = |name: &str| list.iter().position(|known| known == name);
    assert!(
        at("virtio").unwrap() < at("virtio_pmem").unwrap(),
        "{list:?}"
    );
    assert!(
        at("libnvdimm").unwrap() < at("nd_pmem").unwrap(),
        "{list:?}"
    );
    assert!(at("erofs").is_some() && at("overlay").is_some(), "{list:?}");
    let whole = Extent::new(0, built.component.image.bytes);
    assert_eq!(
        built.chunks.overlapping(whole).len(),
        built.chunks.chunks.len()
    );
}

#[test]
fn privileged_what_scripts_print_is_apart_from_what_apt_reports() {
    require_debian!("privileged_what_scripts_print_is_apart_from_what_apt_reports");
    let scratch = test_cache().join("scripts");
    let sandbox = sandbox(&scratch, &[&base().directory]);
    let script = "read line || echo no input >&3; echo said; echo said >&2; echo status >&3; \
                  hostname --fqdn >&3; getent hosts debian.localdomain >&3; cat /etc/hostname >&3; \
                  for stream in stdin stdout stderr null zero full random urandom tty ptmx; do \
                  test -e /dev/$stream || echo no $stream >&3; done; env | grep FORELAY >&3";
    let out = sandbox
        .tool("chroot", "testing", true)
        .args([TARGET, "sh", "-c", &format!("{script}; exit 0")])
        .output()
        .unwrap();
    let lines: Vec<Vec<&str>> = out
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let expected: [&[&str]; 5] = [
        &["no", "input"],
        &["status"],
        &["debian.localdomain"],
        &["127.0.1.1", "debian.localdomain", "debian"],
        &["debian"],
    ];
    assert_eq!(lines, expected);
}

/// Scripts of these print to standard output (`cron`, `ca-certificates`) and ask for the
/// host's full name (`postfix`).
#[test]
fn privileged_packages_whose_scripts_print_and_ask_for_the_host_are_built() {
    require_debian!("privileged_packages_whose_scripts_print_and_ask_for_the_host_are_built");
    let request = packages(&["postfix", "cron", "ca-certificates"]);
    let built = builder().build(&request, &silent).unwrap().main;
    let image = File::open(&built.image).unwrap();
    let tree = Image::open(&image).unwrap().to_tree(1 << 30).unwrap();
    let settings = tree.text_of("etc/postfix/main.cf").unwrap().unwrap();
    assert!(
        settings.contains("myhostname = debian.localdomain"),
        "{settings}"
    );
    let certificates = tree.text_of("etc/ssl/certs/ca-certificates.crt").unwrap();
    assert!(certificates.unwrap().contains("BEGIN CERTIFICATE"));
    for sandbox_file in ["etc/hosts", "etc/hostname", "usr/sbin/policy-rc.d"] {
        assert!(
            tree.lookup(sandbox_file.as_bytes()).is_none(),
            "{sandbox_file}"
        );
    }
}
