//! From launch to ready and back, on pmem.

use std::time::{Duration, Instant};

use forelay_guest_protocol::config::{Entrypoint, ReadyProbe, Run, VmConfig};
use forelay_guest_protocol::messages::{Exec, ExitStatus};
use forelay_image::tree::Tree;
use forelay_vm::{Cause, ExecEvent, Phase, VmHandle};

use crate::fixture::{Bench, LIMIT, assets, base_tree, file, sh};

#[tokio::test]
async fn privileged_boots_a_merged_image_from_pmem() {
    let Some(assets) = assets("privileged_boots_a_merged_image_from_pmem") else {
        return;
    };
    let bench = Bench::new();
    let base = bench.image("base", &base_tree(assets));
    let mut tool = Tree::new();
    tool.insert_path(b"usr/bin/tool", file("#!/bin/sh\necho tool $X\n", 0o755))
        .unwrap();
    tool.insert_path(b"etc/motd", file("from tool\n", 0o644))
        .unwrap();
    let tool = bench.image("tool", &tool);
    let entrypoint = Entrypoint {
        argv: ["sh", "-c", "echo serving; touch /run/serving; sleep 1000"]
            .map(str::to_owned)
            .into(),
        ..Entrypoint::default()
    };
    let config = VmConfig {
        hostname: "merged".into(),
        run: Run::Entrypoint(entrypoint),
        env: [("X".to_owned(), "42".to_owned())].into(),
        ready: Some(ReadyProbe::Path("/run/serving".into())),
        ..VmConfig::default()
    };
    let spec = bench.spec(assets, &[&base, &tool], &config);
    let before = std::fs::read(&base.device.path).unwrap();
    let vm = bench.ready(&spec).await;

    let progress = vm.progress();
    let root = progress.root.clone().unwrap();
    assert_eq!(
        (root.source.as_str(), root.devices, root.dax),
        ("pmem", 2, true)
    );
    assert_eq!(progress.phase, Phase::Ready);
    println!(
        "mounted {:?}\nready   {:?}",
        progress.mounted.unwrap(),
        progress.ready.unwrap()
    );

    assert_eq!(sh(&vm, "cat /etc/motd; tool").await, "from tool\ntool 42\n");
    assert_eq!(sh(&vm, "cat /proc/sys/kernel/hostname").await, "merged\n");
    sh(&vm, "echo changed > /etc/motd && grep -q changed /etc/motd || busybox grep -q changed /etc/motd")
        .await;
    let exec = Exec {
        argv: ["sh", "-c", "id -u; cat; exit 7"].map(str::to_owned).into(),
        user: "web".into(),
        stdin: true,
        ..Exec::default()
    };
    let program = vm.start_program(exec).await.unwrap();
    program.stdin(&[0, 255, 10]).await.unwrap();
    program.stdin(&[]).await.unwrap();
    let mut output = Vec::new();
    let status = loop {
        match program.next().await.unwrap() {
            ExecEvent::Stdout(bytes) => output.extend(bytes),
            ExecEvent::Stderr(bytes) => panic!("{}", String::from_utf8_lossy(&bytes)),
            ExecEvent::StdinCredit(_) => {}
            ExecEvent::Ended(status) => break status,
        }
    };
    assert_eq!(status, ExitStatus::Code(7));
    assert_eq!(output, b"33\n\x00\xff\n");
    let late = vm
        .exec(&["sleep", "600"], Duration::from_millis(300))
        .await
        .unwrap();
    assert_eq!(late.status, ExitStatus::TimedOut);

    // A guest that writes to its pmem harms nobody: neither the host's file nor itself.
    let devices = sh(&vm, "ls /dev | busybox grep pmem").await;
    assert_eq!(devices.lines().count(), 3, "{devices}");
    for device in devices.lines() {
        let script = format!("dd if=/dev/zero of=/dev/{device} bs=4096 count=64 conv=fsync 2>&1");
        let _ = vm.exec(&["sh", "-c", &script], LIMIT).await.unwrap();
    }
    assert!(
        std::fs::read(&base.device.path).unwrap() == before,
        "the host's file has changed"
    );

    let steps = progress.steps.unwrap();
    let ready_us = progress.ready.unwrap().guest_uptime.as_micros() as u64;
    assert!(
        steps.kernel_us > 0 && steps.entrypoint_us > steps.mount_us,
        "{steps:?}"
    );
    assert_eq!(steps, steps.in_order(ready_us));

    what_it_frees_goes_back_to_the_host(&vm).await;

    let ended = vm.stop(LIMIT).await.unwrap();
    assert_eq!(
        (ended.cause, ended.exit_code),
        (Cause::GuestPoweroff, Some(0))
    );
    assert!(
        vm.console_tail().contains("serving"),
        "{}",
        vm.console_tail()
    );
}

async fn what_it_frees_goes_back_to_the_host(vm: &VmHandle) {
    let status = format!("/proc/{}/status", vm.pid());
    let private_kib = || -> u64 {
        let text = std::fs::read_to_string(&status).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        line.unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap()
    };
    sh(vm, "dd if=/dev/zero of=/dev/shm/used bs=1M count=64").await;
    let used = private_kib();
    sh(vm, "busybox rm /dev/shm/used").await;
    let deadline = Instant::now() + LIMIT;
    while private_kib() + (48 << 10) > used {
        assert!(
            Instant::now() < deadline,
            "{used} KiB stay {}",
            private_kib()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
