//! Handing the guest over to the image's own init.

use std::time::Duration;

use forelay_guest::config::{Network, Run, VmConfig};
use forelay_guest::protocol::Attach;
use forelay_image::tree::Tree;
use forelay_vm::Cause;

use crate::fixture::{Bench, assets, directory_tree, file, sh, systemd_root};

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
    let vm = bench.ready(&bench.spec(assets, &[&image], &config)).await;
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

    // Files that are attached now reach what systemd starts later.
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
    let run = "systemd-run --quiet --wait --pipe -p PrivateTmp=yes -p PrivateMounts=yes \
               cat /opt/extra/data";
    assert_eq!(sh(&vm, run).await, "hot\n");

    let ended = vm.stop(Duration::from_secs(60)).await.unwrap();
    assert_eq!(
        ended.cause,
        Cause::GuestPoweroff,
        "systemd shuts down in order"
    );
}
