//! Snapshots of each tier: made, restored as several clones, refused when damaged.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use forelay_guest_protocol::config::{Entrypoint, Network, ReadyProbe, Run, VmConfig};
use forelay_guest_protocol::messages::{Attach, BootSteps};
use forelay_guest_protocol::snapshot::{Resume, Tier};
use forelay_image::tree::Tree;
use forelay_memory::command_hints::Hints;
use forelay_vm::{Cause, GuestMemory, SnapshotError, Upper, VmHandle, VmSpec, VmmDriver, Wrap};
use rustix::fs::{MemfdFlags, SealFlags};

use crate::fixture::{Assets, Bench, Guard, Image, LIMIT, assets, base_tree, file, sh, symlink};

/// The clone in which a hook hangs.
const HANGS: &str = "clone2";

/// Memory and state of a VM that was held. The memory's file cannot be written, as on the
/// daemon's mount.
struct Saved {
    memory: File,
    state: Vec<u8>,
    spec: VmSpec,
}

impl Saved {
    /// Boots a maker, waits until it is held, saves it.
    async fn make(bench: &Bench, mut spec: VmSpec, tier: Tier) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("memory");
        spec.hold = Some(tier);
        spec.memory = GuestMemory::Shared { path: path.clone() };
        let begun = Instant::now();
        let maker = Guard(bench.driver.launch(&spec).await.unwrap());
        let held = maker.wait_held(LIMIT).await;
        assert_eq!(held.unwrap_or_else(|error| panic!("{error}")), tier);
        let held_after = begun.elapsed();
        assert!(maker.exec(&["true"], LIMIT).await.is_err(), "it is held");
        // Free memory is given back, by the guest's kernel in its own time.
        let used_mib = || std::fs::metadata(&path).unwrap().blocks() >> 11;
        let deadline = Instant::now() + LIMIT;
        while used_mib() >= u64::from(spec.memory_mib) * 3 / 4 {
            assert!(Instant::now() < deadline, "{} MiB are used", used_mib());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let begun = Instant::now();
        let state = maker.save().await.unwrap();
        let saved_in = begun.elapsed();
        maker.kill().unwrap();
        maker.wait_ended().await;
        let file = File::open(path).unwrap();
        let used_mib = file.metadata().unwrap().blocks() >> 11;
        let (memory, content_mib) = sealed_copy(&file, u64::from(spec.memory_mib) << 20);
        println!(
            "{}: held after {held_after:?}, saved in {saved_in:?}; {used_mib} MiB of {} in use, \
             {content_mib} not zero; state {} bytes",
            tier.name(),
            spec.memory_mib,
            state.len()
        );
        Self {
            memory,
            state,
            spec,
        }
    }

    fn memory_path(&self) -> PathBuf {
        let fd = self.memory.as_raw_fd();
        format!("/proc/{}/fd/{fd}", std::process::id()).into()
    }

    fn clone_spec(&self, bench: &Bench, index: u8) -> VmSpec {
        let mut spec = self.spec.clone();
        let dir = bench.dir.path().join(format!("clone{index}"));
        spec.name = format!("clone{index}");
        spec.console_log = dir.join("console.log");
        spec.runtime_dir = dir;
        spec.memory = GuestMemory::Snapshot {
            path: self.memory_path(),
        };
        let hints = Hints {
            copies_memory: true,
            ..Hints::default()
        };
        spec.wrap = Some(Wrap(Arc::new(move |command| hints.apply(command))));
        spec
    }
}

/// A copy that nobody can write to, and how many MiB of its pages are not zero.
fn sealed_copy(from: &File, bytes: u64) -> (File, u64) {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = File::from(rustix::fs::memfd_create("snapshot", flags).unwrap());
    memory.set_len(bytes).unwrap();
    let mut page = [0; 4096];
    let mut pages = 0;
    for offset in (0..bytes).step_by(4096) {
        from.read_exact_at(&mut page, offset).unwrap();
        if page != [0; 4096] {
            memory.write_all_at(&page, offset).unwrap();
            pages += 1;
        }
    }
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::fcntl_add_seals(&memory, seals).unwrap();
    (memory, pages >> 8)
}

fn identity(index: u8) -> Resume {
    let mut entropy = [0; 64];
    getrandom(&mut entropy);
    Resume {
        hostname: format!("clone{index}"),
        machine_id: format!("{index:032x}"),
        mac: Some(format!("52:54:00:00:00:{index:02x}")),
        entropy: entropy.iter().map(|byte| format!("{byte:02x}")).collect(),
        ..Resume::default()
    }
}

fn getrandom(bytes: &mut [u8]) {
    File::open("/dev/urandom")
        .unwrap()
        .read_exact_at(bytes, 0)
        .unwrap();
}

/// What a clone took.
#[derive(Debug)]
struct Took {
    /// The VMM's start, the state, the resume, and until ready after that.
    parts: [Duration; 4],
    _all: Duration,
    /// Guest's steps.
    _steps: Option<BootSteps>,
    _private_mib: u64,
}

/// A clone that is ready; `prepare` comes between the restore and the resume.
async fn clone_of(
    bench: &Bench,
    saved: &Saved,
    spec: &VmSpec,
    resume: Resume,
    plug: &[&Image],
) -> (Guard, Took) {
    let begun = Instant::now();
    let mut parts = [Duration::ZERO; 4];
    let expected = expected_failures(saved, &resume.hostname);
    let vm = Guard(bench.driver.launch(spec).await.unwrap());
    parts[0] = begun.elapsed();
    vm.restore(&saved.state).await.unwrap();
    if !plug.is_empty() {
        let devices: Vec<_> = plug.iter().map(|image| image.device.clone()).collect();
        let scratch = match &spec.upper {
            Upper::Scratch { path, .. } => Some(path.as_path()),
            Upper::Tmpfs => None,
        };
        vm.plug_all(&devices, scratch).await.unwrap();
    }
    parts[1] = begun.elapsed() - parts[0];
    let resumed = vm.resume(resume).await;
    let resumed = resumed.unwrap_or_else(|error| panic!("{error}: {}", vm.console_tail()));
    assert_eq!(resumed.failures, expected);
    parts[2] = begun.elapsed() - parts[0] - parts[1];
    let progress = vm.wait_ready(LIMIT).await;
    let progress = progress.unwrap_or_else(|error| panic!("{error}"));
    let all = begun.elapsed();
    parts[3] = all - parts[0] - parts[1] - parts[2];
    let uptime = progress.ready.unwrap().guest_uptime;
    assert!(uptime <= all, "{uptime:?} counts from the resume");
    let took = Took {
        parts,
        _all: all,
        _steps: progress.steps,
        _private_mib: private_mib(&vm),
    };
    (vm, took)
}

fn expected_failures(saved: &Saved, hostname: &str) -> Vec<String> {
    let mut failures = Vec::new();
    if saved.spec.hold == Some(Tier::Ready) {
        failures.push("20-fails: it ended with code 3");
        if hostname == HANGS {
            failures.push("30-hangs: it did not end within 20s");
        }
    }
    let full = |failure| format!("/etc/forelay/resume.d/{failure}");
    failures.into_iter().map(full).collect()
}

fn private_mib(vm: &VmHandle) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.parse::<u64>().unwrap() >> 10
}

/// What must differ between clones.
async fn facts(vm: &VmHandle) -> Vec<String> {
    let script = "busybox head -c16 /dev/urandom | busybox hexdump -e '16/1 \"%02x\"'; echo; \
                  cat /proc/sys/kernel/random/uuid /proc/sys/kernel/hostname /etc/hostname \
                  /etc/machine-id /sys/class/net/eth0/address";
    let facts: Vec<String> = sh(vm, script).await.lines().map(str::to_owned).collect();
    assert_eq!(facts.len(), 6, "{facts:?}");
    facts
}

fn all_differ(clones: &[Vec<String>]) {
    for fact in 0..clones[0].len() {
        let distinct: BTreeSet<&String> = clones.iter().map(|facts| &facts[fact]).collect();
        assert_eq!(distinct.len(), clones.len(), "{distinct:?}");
    }
}

/// The guest's clock may be off by what the message that set it took, which is less than the
/// resume did, and by what it took to ask it. A maker is older than that.
async fn clock_is_right(vm: &VmHandle, took: &Took) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let [_, _, resume, _] = took.parts;
    let limit = Duration::from_secs(1) + resume;
    let before = now();
    // The shell's own builtins cannot tell the time below a second.
    let text = sh(vm, "busybox adjtimex | busybox grep -E 'time.tv_'").await;
    let after = now();
    let number = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.contains(name)).unwrap();
        line.split_whitespace().last().unwrap().parse().unwrap()
    };
    let guest = Duration::from_secs(number("tv_sec")) + Duration::from_micros(number("tv_usec"));
    let early = before.saturating_sub(guest);
    let late = guest.saturating_sub(after);
    println!("the clock is between {early:?} behind and {late:?} ahead");
    assert!(
        early < limit && late < limit,
        "{before:?} {guest:?} {after:?}"
    );
}

fn config(tree_script: &str) -> VmConfig {
    let entrypoint = Entrypoint {
        argv: ["sh", "-c", tree_script].map(str::to_owned).into(),
        ..Entrypoint::default()
    };
    VmConfig {
        hostname: "forelay".into(),
        run: Run::Entrypoint(entrypoint),
        ready: Some(ReadyProbe::Path("/run/serving".into())),
        network: Some(Network::default()),
        ..VmConfig::default()
    }
}

/// A program that has its kernel reseed its random numbers now.
fn reseed_program(bench: &Bench) -> Vec<u8> {
    let source = bench.dir.path().join("reseed.c");
    let program = bench.dir.path().join("reseed");
    let text = "#include <fcntl.h>\n#include <sys/ioctl.h>\n#include <linux/random.h>\n\
                int main(void) { return ioctl(open(\"/dev/random\", O_RDWR), RNDRESEEDCRNG); }\n";
    std::fs::write(&source, text).unwrap();
    let mut compiler = Command::new("cc");
    let made = compiler.arg("-static").arg("-o").args([&program, &source]);
    assert!(made.status().unwrap().success());
    std::fs::read(program).unwrap()
}

fn tree(assets: &Assets, hooks: bool) -> Tree {
    let mut tree = base_tree(assets);
    let hosts = "127.0.0.1 localhost\n127.0.1.1 forelay\n";
    tree.insert_path(b"etc/hosts", file(hosts, 0o644)).unwrap();
    if hooks {
        let note = "#!/bin/sh\ncat /proc/sys/kernel/hostname /run/count > /run/hook\n\
                    cat /run/drawn > /run/before\n";
        let hangs = format!("#!/bin/sh\n! busybox grep {HANGS} /etc/hostname || sleep 1000\n");
        for (name, script) in [
            ("10-note", note),
            ("20-fails", "#!/bin/sh\nexit 3\n"),
            ("30-hangs", &hangs),
        ] {
            let path = format!("etc/forelay/resume.d/{name}");
            tree.insert_path(path.as_bytes(), file(script, 0o755))
                .unwrap();
        }
        add_program(&mut tree, Path::new("/usr/bin/ssh-keygen"));
        let key = file("the maker's", 0o600);
        tree.insert_path(b"etc/ssh/ssh_host_ed25519_key", key)
            .unwrap();
    }
    tree
}

/// A program of this machine's, with its libraries.
fn add_program(tree: &mut Tree, program: &Path) {
    let listed = Command::new("ldd").arg(program).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let libraries = listed
        .split_whitespace()
        .filter(|word| word.starts_with('/'));
    for path in libraries.map(Path::new).chain([program]) {
        // `/lib` is a link to `/usr/lib`.
        let place = match path.strip_prefix("/lib") {
            Ok(rest) => Path::new("usr/lib").join(rest),
            Err(_) => path.strip_prefix("/").unwrap().to_owned(),
        };
        let node = file(std::fs::read(path).unwrap(), 0o755);
        let place = place.as_os_str().as_encoded_bytes();
        tree.insert_path(place, node).unwrap();
    }
}

#[tokio::test]
async fn privileged_clones_of_a_ready_vm_are_machines_of_their_own() {
    let Some(assets) = assets("privileged_clones_of_a_ready_vm_are_machines_of_their_own") else {
        return;
    };
    let bench = Bench::new();
    let base = {
        let mut tree = tree(assets, true);
        tree.insert_path(b"usr/bin/reseed", file(reseed_program(&bench), 0o755))
            .unwrap();
        bench.image("base", &tree)
    };
    // A young kernel reseeds itself every few seconds, which would hide that a clone was not
    // reseeded: this one is ready when it does so less often, and was reseeded just before.
    // (The shell reads byte by byte, and each read draws: each digit is of a number of its own.)
    // Its clock is a day ahead of the host's that clones wake up on.
    let script = "while read up rest < /proc/uptime; [ ${up%.*} -lt 12 ]; do busybox usleep 200000; \
                  done; busybox date -s @$(( $(busybox date +%s) + 86400 )) || exit 1; \
                  reseed || exit 1; touch /run/serving; i=0; while :; do i=$((i+1)); \
                  read r < /proc/sys/kernel/random/uuid; echo $r >> /run/drawn; \
                  echo $i > /run/count; busybox usleep 200000; done";
    let spec = bench.spec(assets, &[&base], &config(script));
    let saved = Saved::make(&bench, spec, Tier::Ready).await;

    let specs: Vec<VmSpec> = (0..3)
        .map(|index| saved.clone_spec(&bench, index))
        .collect();
    let mut clones = Vec::new();
    for (index, spec) in (0..).zip(&specs) {
        let (vm, took) = clone_of(&bench, &saved, spec, identity(index), &[]).await;
        println!("ready: {took:?}");
        clock_is_right(&vm, &took).await;
        clones.push(vm);
    }
    let (mut all, mut first, mut keys) = (Vec::new(), Vec::new(), Vec::new());
    for (index, vm) in (0_u8..).zip(&clones) {
        let found = facts(vm).await;
        let name = format!("clone{index}");
        assert_eq!(found[2..4], [name.clone(), name.clone()]);
        assert_eq!(found[4], format!("{index:032x}"));
        assert_eq!(found[5], format!("52:54:00:00:00:{index:02x}"));
        let hosts = sh(vm, "cat /etc/hosts").await;
        assert_eq!(hosts, format!("127.0.0.1 localhost\n127.0.1.1 {name}\n"));
        // The hook ran as this machine, while the entrypoint stood still; now it goes on.
        let hook = sh(vm, "cat /run/hook").await;
        let (hook_name, count) = hook.trim().split_once('\n').unwrap();
        assert_eq!(hook_name, name);
        let count: u64 = count.parse().unwrap();
        let deadline = Instant::now() + LIMIT;
        while sh(vm, "cat /run/count")
            .await
            .trim()
            .parse::<u64>()
            .unwrap_or(0)
            <= count
        {
            assert!(Instant::now() < deadline, "the entrypoint does not go on");
        }
        let key = sh(vm, "ssh-keygen -y -f /etc/ssh/ssh_host_ed25519_key").await;
        assert!(key.starts_with("ssh-ed25519 "), "{key}");
        keys.push(vec![key]);
        if name == HANGS {
            sh(
                vm,
                "while busybox pgrep -f '[s]leep 1000'; do busybox usleep 50000; done",
            )
            .await;
        }
        all.push(found);
        // The first number that the entrypoint drew as this machine.
        let script = "busybox sed -n \"$(( $(busybox wc -l < /run/before) + 1 ))p\" /run/drawn";
        first.push(vec![sh(vm, script).await]);
    }
    all_differ(&all);
    all_differ(&first);
    all_differ(&keys);

    let extra = {
        let mut tree = Tree::new();
        tree.insert_path(b"opt/extra/data", file("hot\n", 0o644))
            .unwrap();
        bench.image("extra", &tree)
    };
    let request = Attach {
        uuid: extra.uuid(),
        name: "extra".into(),
        ..Attach::default()
    };
    clones[0].attach(&extra.device, request).await.unwrap();
    assert_eq!(sh(&clones[0], "cat /opt/extra/data").await, "hot\n");
    // One that runs is no clone to be resumed.
    let again = clones[1].resume(identity(9)).await.unwrap_err();
    assert!(format!("{again:?}").contains("not held"), "{again:?}");
    what_a_clone_frees_goes_back(&clones[0]).await;
    stops(&clones[2]).await;
}

/// Powers off when it is told to, for which the kernel asks each device to finish.
async fn stops(vm: &VmHandle) {
    let begun = Instant::now();
    let ended = vm.stop(LIMIT).await.unwrap();
    println!("stopped in {:?}", begun.elapsed());
    assert_eq!(ended.cause, Cause::GuestPoweroff, "{}", vm.console_tail());
}

/// To the host, not into the snapshot, and without a line in the VMM's log.
async fn what_a_clone_frees_goes_back(vm: &VmHandle) {
    sh(vm, "dd if=/dev/zero of=/dev/shm/used bs=1M count=64").await;
    let used = private_mib(vm);
    sh(vm, "busybox rm /dev/shm/used").await;
    let deadline = Instant::now() + LIMIT;
    while private_mib(vm) + 32 > used {
        assert!(
            Instant::now() < deadline,
            "{used} MiB stay {}",
            private_mib(vm)
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let log = std::fs::read_to_string(vm.runtime_dir().join("qemu.log")).unwrap();
    assert_eq!(log, "");
}

#[tokio::test]
async fn privileged_clones_of_a_composed_vm_start_its_entrypoint() {
    let Some(assets) = assets("privileged_clones_of_a_composed_vm_start_its_entrypoint") else {
        return;
    };
    let bench = Bench::new();
    let base = bench.image("base", &tree(assets, false));
    let script = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/hostname > /run/drawn; \
                  touch /run/serving; sleep 1000";
    let spec = bench.spec(assets, &[&base], &config(script));
    let saved = Saved::make(&bench, spec, Tier::Composed).await;
    let mut drawn = Vec::new();
    for index in 0..2 {
        let spec = saved.clone_spec(&bench, index);
        let (vm, took) = clone_of(&bench, &saved, &spec, identity(index), &[]).await;
        println!("composed: {took:?}");
        let found = sh(&vm, "cat /run/drawn").await;
        drawn.push(found.lines().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(drawn[usize::from(index)][1], format!("clone{index}"));
        clock_is_right(&vm, &took).await;
        stops(&vm).await;
    }
    all_differ(&drawn);
}

#[tokio::test]
async fn privileged_a_clone_of_a_composed_vm_starts_an_init_of_its_own() {
    let Some(assets) = assets("privileged_a_clone_of_a_composed_vm_starts_an_init_of_its_own")
    else {
        return;
    };
    let bench = Bench::new();
    let base = {
        let mut tree = tree(assets, false);
        let init = b"usr/bin/init";
        tree.insert_path(init, symlink("busybox")).unwrap();
        let started = "::sysinit:/bin/sh -c 'cat /etc/hostname > /run/drawn; touch /run/serving'\n";
        tree.insert_path(b"etc/inittab", file(started, 0o644))
            .unwrap();
        bench.image("base", &tree)
    };
    let mut config = config("");
    config.run = Run::Init {
        path: "/sbin/init".into(),
    };
    let spec = bench.spec(assets, &[&base], &config);
    let saved = Saved::make(&bench, spec, Tier::Composed).await;
    let spec = saved.clone_spec(&bench, 0);
    let (vm, took) = clone_of(&bench, &saved, &spec, identity(0), &[]).await;
    println!("init: {took:?}");
    let found = sh(&vm, "cat /proc/1/comm /run/drawn").await;
    assert_eq!(found, "init\nclone0\n");
    assert_eq!(facts(&vm).await[3], "clone0");
    // A flush is answered: the device works, and not its memory alone.
    sh(&vm, "busybox sync -d /dev/pmem0 /dev/pmem1").await;
}

#[tokio::test]
async fn privileged_a_kernel_that_booted_without_an_image_becomes_any_vm() {
    let Some(assets) = assets("privileged_a_kernel_that_booted_without_an_image_becomes_any_vm")
    else {
        return;
    };
    let bench = Bench::new();
    let spec = {
        let mut spec = VmSpec::new(
            "maker",
            assets.kernel.clone(),
            assets.initrd.clone(),
            forelay_vm::Boot::Map {
                uuid: "0".repeat(32),
            },
        );
        spec.memory_mib = 256;
        spec.runtime_dir = bench.dir.path().join("run");
        spec.console_log = bench.dir.path().join("console.log");
        spec
    };
    let saved = Saved::make(&bench, spec, Tier::Kernel).await;

    let damaged = |change: fn(&mut Vec<u8>)| {
        let mut state = saved.state.clone();
        change(&mut state);
        state
    };
    let states = [
        damaged(|state| state.truncate(state.len() / 2)),
        damaged(|state| state.clear()),
        damaged(|state| state[..64].fill(7)),
    ];
    for (index, state) in (10..).zip(&states) {
        let spec = saved.clone_spec(&bench, index);
        let vm = Guard(bench.driver.launch(&spec).await.unwrap());
        let refused = vm.restore(state).await.unwrap_err();
        println!("refused: {refused}");
        assert!(matches!(refused, SnapshotError::Refused(_)), "{refused:?}");
        vm.wait_ended().await;
    }

    let base = bench.image("base", &tree(assets, false));
    let script = "touch /run/serving; sleep 1000";
    let composed = bench.spec(assets, &[&base], &config(script));
    let map = &composed.pmem[0];
    let forelay_vm::Boot::Map { uuid } = &composed.boot else {
        panic!("no map image");
    };
    let mut clones = Vec::new();
    for index in 0..2 {
        let mut spec = saved.clone_spec(&bench, index);
        if index == 1 {
            let path = spec.runtime_dir.join("scratch");
            std::fs::create_dir_all(&spec.runtime_dir).unwrap();
            spec.upper = Upper::Scratch {
                path,
                bytes: 64 << 20,
            };
        }
        let resume = Resume {
            map: Some(uuid.clone()),
            scratch: index == 1,
            ..identity(index)
        };
        let map = Image {
            reference: base.reference,
            metadata: Vec::new(),
            device: map.clone(),
        };
        let (vm, took) = clone_of(&bench, &saved, &spec, resume, &[&base, &map]).await;
        println!("kernel: {took:?}");
        let root = vm.progress().root.unwrap();
        assert_eq!(
            (root.source.as_str(), root.devices, root.dax),
            ("pmem", 1, true)
        );
        let disks = sh(&vm, "ls /sys/block").await;
        assert_eq!(disks.contains("vda"), index == 1, "{disks}");
        clock_is_right(&vm, &took).await;
        clones.push(facts(&vm).await);
        stops(&vm).await;
    }
    all_differ(&clones);
}
