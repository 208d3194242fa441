//! What goes wrong, and how it is said.

use std::time::Duration;

use forelay_guest_protocol::config::{Entrypoint, Run, VmConfig};
use forelay_guest_protocol::messages::ExitStatus;
use forelay_vm::{Boot, Cause, LaunchError, Phase, VmError, VmSpec, VmmDriver, Wrap};

use crate::fixture::{Bench, Guard, LIMIT, assets, base_tree, reached};

#[tokio::test]
async fn privileged_a_vmm_that_dies_during_boot_is_a_clear_error() {
    let test = "privileged_a_vmm_that_dies_during_boot_is_a_clear_error";
    let Some(assets) = assets(test) else { return };
    let bench = Bench::new();
    let base = bench.image("base", &base_tree(assets));
    // It waits for a device that never comes, so that it is not ready before it is killed.
    let mut spec = bench.spec(assets, &[&base], &VmConfig::default());
    spec.pmem.truncate(1);
    spec.append.push("forelay.device_wait_ms=3600000".into());
    let vm = Guard(bench.driver.launch(&spec).await.unwrap());
    assert_eq!(vm.progress().phase, Phase::Starting);
    vm.kill().unwrap();
    let VmError::Ended { ended, wanted, .. } = vm.wait_ready(LIMIT).await.unwrap_err() else {
        panic!("not ended");
    };
    assert_eq!(
        (wanted, ended.cause, ended.signal),
        ("ready", Cause::VmmDied, Some(9))
    );
    assert!(vm.exec(&["true"], Duration::from_secs(5)).await.is_err());
}

#[tokio::test]
async fn privileged_a_boot_that_fails_tells_why() {
    let Some(assets) = assets("privileged_a_boot_that_fails_tells_why") else {
        return;
    };
    let bench = Bench::new();
    let base = bench.image("base", &base_tree(assets));
    let good = bench.spec(assets, &[&base], &VmConfig::default());

    // The component's device is missing; the guest says so and powers off.
    let mut spec = good.clone();
    spec.pmem.truncate(1);
    spec.append.push("forelay.device_wait_ms=500".into());
    let vm = Guard(bench.driver.launch(&spec).await.unwrap());
    let text = vm.wait_ready(LIMIT).await.unwrap_err().to_string();
    assert!(
        text.contains("no pmem device holds the component"),
        "{text}"
    );
    assert_eq!(vm.wait_ended().await.cause, Cause::GuestPoweroff);

    // An initramfs that is none: the kernel panics.
    let mut spec = good.clone();
    spec.initrd = bench.dir.path().join("garbage");
    std::fs::write(&spec.initrd, [7; 5000]).unwrap();
    let vm = Guard(bench.driver.launch(&spec).await.unwrap());
    let text = vm.wait_ready(LIMIT).await.unwrap_err().to_string();
    assert!(
        text.contains("kernel panic") && text.contains("Unable to mount root"),
        "{text}"
    );

    // An entrypoint that does not exist ends with 127, as in a shell.
    let argv = vec!["/no/such/program".to_owned()];
    let run = Run::Entrypoint(Entrypoint {
        argv,
        poweroff_on_exit: true,
        ..Entrypoint::default()
    });
    let bench = Bench::new();
    let base = bench.image("base", &base_tree(assets));
    let spec = bench.spec(
        assets,
        &[&base],
        &VmConfig {
            run,
            ..VmConfig::default()
        },
    );
    let vm = Guard(bench.driver.launch(&spec).await.unwrap());
    let progress = reached(&vm, |progress| progress.entrypoint.is_some()).await;
    assert_eq!(progress.entrypoint, Some(ExitStatus::Code(127)));
    vm.wait_ended().await;
    assert!(vm.console_tail().contains("/no/such/program"));
}

#[tokio::test]
async fn privileged_a_vmm_that_cannot_start_is_a_clear_error() {
    let Some(assets) = assets("privileged_a_vmm_that_cannot_start_is_a_clear_error") else {
        return;
    };
    let bench = Bench::new();
    let boot = Boot::Flat {
        path: bench.dir.path().join("missing"),
    };
    let mut spec = VmSpec::new("test", assets.kernel.clone(), assets.initrd.clone(), boot);
    spec.runtime_dir = bench.dir.path().join("run");
    spec.console_log = bench.dir.path().join("console.log");
    let error = bench.driver.launch(&spec).await.err().unwrap();
    assert!(matches!(&error, LaunchError::File { path, .. } if path.ends_with("missing")));

    spec.boot = Boot::Root(forelay_vm::Disk {
        path: assets.kernel.clone(),
        format: forelay_vm::DiskFormat::Qcow2,
        read_only: false,
    });
    let error = bench.driver.launch(&spec).await.err().unwrap().to_string();
    assert!(error.contains("not in qcow2 format"), "{error}");

    let mut driver = bench.driver.clone();
    driver.binary = "/no/qemu".into();
    let error = driver.launch(&spec).await.err().unwrap();
    assert!(matches!(error, LaunchError::Start { .. }), "{error}");

    // The caller's wrap is applied.
    spec.wrap = Some(Wrap(std::sync::Arc::new(|command| {
        command.arg("-no-such-option");
    })));
    let error = bench.driver.launch(&spec).await.err().unwrap().to_string();
    assert!(error.contains("no-such-option"), "{error}");
}
