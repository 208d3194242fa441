//! Hot attach and detach, and taking a VM over from an owner that died.

use std::process::{Command, Stdio};

use forelay_guest_protocol::config::VmConfig;
use forelay_guest_protocol::messages::{Attach, ErrorKind, Exec};
use forelay_image::tree::Tree;
use forelay_vm::channel::ChannelError;
use forelay_vm::state::VmState;
use forelay_vm::{AttachError, Phase, ReattachError, VmmDriver};

use crate::fixture::{Bench, Guard, Image, LIMIT, assets, base_tree, file, reached, sh};

/// Set for the process that launches a VM and dies.
const OWNER_DIR: &str = "FORELAY_TEST_OWNER_DIR";

fn request(image: &Image, etc: bool) -> Attach {
    Attach {
        uuid: image.uuid(),
        name: image.device.id.clone(),
        etc,
        timeout_ms: 0,
    }
}

fn extra_tree() -> Tree {
    let mut tree = Tree::new();
    tree.insert_path(
        b"usr/bin/extra",
        file("#!/bin/sh\ncat /opt/extra/data\n", 0o755),
    )
    .unwrap();
    tree.insert_path(b"opt/extra/data", file("hot\n", 0o644))
        .unwrap();
    let fragments = "{\"etc/passwd\": \"extra:x:300:300::/:/bin/sh\\n\"}";
    let path = b"usr/lib/forelay/fragments/extra.json";
    tree.insert_path(path, file(fragments, 0o644)).unwrap();
    tree.insert_path(b"etc/extra.conf", file("conf\n", 0o640))
        .unwrap();
    tree.insert_path(
        b"etc/motd",
        file("never over a file that is there\n", 0o644),
    )
    .unwrap();
    tree
}

#[tokio::test]
async fn privileged_hot_attach_is_visible_at_once_and_detach_refuses_while_in_use() {
    let test = "privileged_hot_attach_is_visible_at_once_and_detach_refuses_while_in_use";
    let Some(assets) = assets(test) else { return };
    let bench = Bench::new();
    let base = bench.image("base", &base_tree(assets));
    let vm = bench
        .ready(&bench.spec(assets, &[&base], &VmConfig::default()))
        .await;

    let extra = bench.image("extra", &extra_tree());
    let started = std::time::Instant::now();
    let attached = vm
        .attach(&extra.device, request(&extra, true))
        .await
        .unwrap();
    assert_eq!(sh(&vm, "ls /opt/extra").await, "data\n");
    println!("attach to ls {:?}: {attached:?}", started.elapsed());
    assert_eq!(
        (
            attached.guest.dax,
            attached.guest.mounts,
            attached.guest.copies
        ),
        (true, 3, 1)
    );
    let left_out = ["/etc/motd: the VM has another"];
    assert_eq!(attached.guest.left_out, left_out);
    assert_eq!(
        sh(&vm, "extra; cat /etc/extra.conf /etc/motd").await,
        "hot\nconf\nfrom base\n"
    );
    assert_eq!(vm.status().await.unwrap().attached, [extra.uuid()]);
    let exec = Exec {
        argv: ["id", "-u"].map(str::to_owned).into(),
        user: "extra".into(),
        ..Exec::default()
    };
    assert_eq!(vm.collect(exec).await.unwrap().stdout, b"300\n");

    // In use: by a process whose directory it is, and by an open file.
    // Known by its name once it is executed.
    let user = "cd /opt/extra; sleep 1000 < /dev/null > /dev/null 2>&1 & \
                until busybox grep -q sleep /proc/$!/comm; do :; done; echo $!";
    let pid = sh(&vm, user).await;
    let refused = vm.detach("extra", &extra.uuid()).await.unwrap_err();
    let AttachError::Guest(ChannelError::Refused {
        kind: ErrorKind::Busy,
        text,
    }) = &refused
    else {
        panic!("{refused}");
    };
    assert!(
        text.contains("sleep") && text.contains(pid.trim()),
        "{text}"
    );
    assert_eq!(
        sh(&vm, "extra").await,
        "hot\n",
        "a refused detach changes nothing"
    );
    let pid = pid.trim();
    let end = format!("busybox kill {pid}; while [ -e /proc/{pid} ]; do sleep 0.01; done");
    sh(&vm, &end).await;
    let detachment = vm.detach("extra", &extra.uuid()).await.unwrap();
    println!("detached: {detachment:?}");
    assert_eq!(
        sh(&vm, "ls /opt; ls /usr/bin | busybox grep extra || true").await,
        ""
    );

    // Again, on the device that the VMM kept; then what must be refused.
    vm.attach(&extra.device, request(&extra, false))
        .await
        .unwrap();
    assert_eq!(sh(&vm, "extra").await, "hot\n");
    let mut other = Tree::new();
    other
        .insert_path(b"usr/bin/extra", file("something else", 0o755))
        .unwrap();
    let other = bench.image("other", &other);
    let refused = vm
        .attach(&other.device, request(&other, false))
        .await
        .unwrap_err();
    let AttachError::Guest(ChannelError::Refused {
        kind: ErrorKind::Conflict,
        text,
    }) = &refused
    else {
        panic!("{refused}");
    };
    assert!(text.contains("/usr/bin/extra"), "{text}");
    let mut missing = request(&other, false);
    missing.uuid = "0".repeat(32);
    missing.timeout_ms = 100;
    let refused = vm.attach(&other.device, missing).await.unwrap_err();
    let AttachError::Guest(ChannelError::Refused { kind, .. }) = &refused else {
        panic!("{refused}");
    };
    assert_eq!(*kind, ErrorKind::NotFound);
    assert_eq!(sh(&vm, "extra").await, "hot\n");
}

/// The process that launches a VM and dies; does nothing when run as a test.
#[tokio::test]
async fn privileged_owner_process() {
    let Some(dir) = std::env::var_os(OWNER_DIR) else {
        return;
    };
    let Some(assets) = assets("privileged_owner_process") else {
        return;
    };
    let bench = Bench::new();
    let base = bench.image("base", &base_tree(assets));
    let mut spec = bench.spec(assets, &[&base], &VmConfig::default());
    spec.runtime_dir = dir.into();
    let vm = bench.driver.launch(&spec).await.unwrap();
    reached(&vm, |progress| progress.mounted.is_some()).await;
    // The files live as long as the VM maps them.
    drop(bench);
    std::process::abort();
}

#[tokio::test]
async fn privileged_a_vm_is_taken_over_after_its_owner_died() {
    let Some(_) = assets("privileged_a_vm_is_taken_over_after_its_owner_died") else {
        return;
    };
    let bench = Bench::new();
    let runtime_dir = bench.dir.path().join("owned");
    let owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "attach::privileged_owner_process"])
        .env(OWNER_DIR, &runtime_dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(!owner.success(), "the owner was to die");

    let vm = Guard(bench.driver.reattach(&runtime_dir).await.unwrap());
    let progress = vm.wait_ready(LIMIT).await.unwrap();
    assert_eq!(progress.phase, Phase::Ready);
    assert!(progress.root.unwrap().dax);
    assert_eq!(sh(&vm, "cat /etc/motd").await, "from base\n");
    let extra = bench.image("extra", &extra_tree());
    vm.attach(&extra.device, request(&extra, false))
        .await
        .unwrap();
    assert_eq!(VmState::read(&runtime_dir).unwrap().hotplugged.len(), 1);

    vm.kill().unwrap();
    vm.wait_ended().await;
    let gone = bench.driver.reattach(&runtime_dir).await;
    assert!(matches!(gone, Err(ReattachError::Ended { .. })));
    let nothing = bench.driver.reattach(bench.dir.path()).await;
    assert!(matches!(nothing, Err(ReattachError::State { .. })));
}
