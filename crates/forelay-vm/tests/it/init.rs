//! Handing the guest over to the image's own init.

use forelay_guest_protocol::config::{Network, Run, VmConfig};
use forelay_guest_protocol::messages::Attach;
use forelay_image::tree::Tree;
use forelay_vm::{Cause, VmmDriver};

use crate::fixture::{
    Bench, Guard, LIMIT, assets, directory_tree, file, sh, symlink, systemd_root,
};

#[tokio::test]
async fn privileged_systemd_boots_to_multi_user_and_the_agent_lives_beside_it() {
    let test = "privileged_systemd_boots_to_multi_user_and_the_agent_lives_beside_it";
    let Some(assets) = assets(test) else { return };
    let Some(root) = systemd_root(test) else {
        return;
    };
    let bench = Bench::new();
    let image = bench.image("debian", &directory_tree(&root));
    let config = VmConfig {
        hostname: "handed-over".into(),
        run: Run::Init {
            path: "/sbin/init".into(),
        },
        network: Some(Network::default()),
        ..VmConfig::default()
    };
    // Without udev the console's device never shows up, and its login waits for that.
    let mut masks = Tree::new();
    let console = b"etc/systemd/system/serial-getty@ttyS0.service";
    masks.insert_path(console, symlink("/dev/null")).unwrap();
    let masks = bench.image("masks", &masks);
    let spec = bench.spec(assets, &[&image, &masks], &config);
    let vm = Guard(bench.driver.launch(&spec).await.unwrap());
    if let Err(error) = vm.wait_ready(LIMIT).await {
        let jobs = vm.exec(&["systemctl", "list-jobs"], LIMIT).await;
        panic!("{error}\n{jobs:?}");
    }
    let progress = vm.progress();
    println!(
        "mounted {:?}\nready   {:?}",
        progress.mounted.unwrap(),
        progress.ready.unwrap()
    );
    assert_eq!(sh(&vm, "cat /proc/1/comm").await, "systemd\n");
    assert_eq!(
        sh(&vm, "systemctl is-active multi-user.target").await,
        "active\n"
    );
    assert_eq!(
        sh(
            &vm,
            "cat /etc/hostname /proc/sys/kernel/hostname | tail -n1"
        )
        .await,
        "handed-over\n"
    );

    // Attached files reach a service that runs in a mount namespace of its own already.
    let script = "while ! cat /opt/extra/data > /run/seen 2> /dev/null; do sleep 0.2; done";
    let unit = format!("[Service]\nPrivateMounts=yes\nExecStart=/bin/sh -c '{script}'\n");
    let write = format!(
        "mkdir -p /run/systemd/system; echo \"{unit}\" > /run/systemd/system/watch.service; \
         systemctl daemon-reload; systemctl start watch"
    );
    sh(&vm, &write).await;
    let mut extra = Tree::new();
    extra
        .insert_path(b"opt/extra/data", file("hot\n", 0o644))
        .unwrap();
    let extra = bench.image("extra", &extra);
    let request = Attach {
        uuid: extra.uuid(),
        name: "extra".into(),
        ..Attach::default()
    };
    vm.attach(&extra.device, request).await.unwrap();
    let seen = "while ! grep hot /run/seen; do sleep 0.2; done";
    assert_eq!(sh(&vm, seen).await, "hot\n");

    let ended = vm.stop(LIMIT).await.unwrap();
    assert_eq!(
        ended.cause,
        Cause::GuestPoweroff,
        "systemd shuts down in order"
    );
}
