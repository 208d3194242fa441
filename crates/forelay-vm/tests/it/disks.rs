//! Disks: scratch upper, flat image, plain root disk; network and the entrypoint's end.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;

use forelay_guest_protocol::config::{Entrypoint, Network, ReadyProbe, Run, VmConfig};
use forelay_guest_protocol::messages::ExitStatus;
use forelay_vm::{Cause, Forward, Upper};

use crate::fixture::{Bench, LIMIT, assets, base_tree, reached, sh};

fn shell(script: &str) -> Run {
    Run::Entrypoint(Entrypoint {
        argv: ["sh", "-c", script].map(str::to_owned).into(),
        poweroff_on_exit: true,
        ..Entrypoint::default()
    })
}

/// A port of this machine that nobody else is given while the socket is there: it is bound,
/// does not listen, and lets QEMU, whose sockets ask for the same, bind it as well.
fn reserved_port() -> (OwnedFd, u16) {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket, sockopt};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_socket_reuseaddr(&socket, true).unwrap();
    bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let address = SocketAddr::try_from(getsockname(&socket).unwrap()).unwrap();
    (socket, address.port())
}

#[tokio::test]
async fn privileged_serves_a_forwarded_port_from_a_scratch_disk() {
    let test = "privileged_serves_a_forwarded_port_from_a_scratch_disk";
    let Some(assets) = assets(test) else { return };
    let bench = Bench::new();
    let base = bench.image("base", &base_tree(assets));
    let serve = "echo hello > /index.html; busybox httpd -p 80 -h /; \
                 while ! busybox test -e /stop; do sleep 0.1; done; exit 5";
    let config = VmConfig {
        run: shell(serve),
        ready: Some(ReadyProbe::Tcp(80)),
        network: Some(Network::default()),
        ..VmConfig::default()
    };
    let mut spec = bench.spec(assets, &[&base], &config);
    let scratch = bench.dir.path().join("scratch.ext4");
    spec.upper = Upper::Scratch {
        path: scratch.clone(),
        bytes: 1 << 30,
    };
    let (_reserved, port) = reserved_port();
    spec.forwards = vec![Forward {
        host: port,
        guest: 80,
        udp: false,
    }];
    let vm = bench.ready(&spec).await;

    let before = vm.traffic(LIMIT).await.unwrap();
    let mut page = String::new();
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
        .write_all(b"GET /index.html HTTP/1.0\r\n\r\n")
        .unwrap();
    stream.read_to_string(&mut page).unwrap();
    assert!(
        page.contains("200 OK") && page.ends_with("hello\n"),
        "{page}"
    );
    let after = vm.traffic(LIMIT).await.unwrap();
    let received = after.received_bytes - before.received_bytes;
    let sent = after.sent_bytes - before.sent_bytes;
    assert!(
        received > 28 && sent as usize > page.len(),
        "{received} and {sent} bytes for a page of {}",
        page.len()
    );
    let size = sh(&vm, "df -k / | busybox tail -n 1").await;
    let kib: u64 = size
        .split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        kib > 700_000,
        "the root's free space is the scratch disk's: {size}"
    );

    sh(&vm, "touch /stop").await;
    let progress = reached(&vm, |progress| progress.entrypoint.is_some()).await;
    assert_eq!(progress.entrypoint, Some(ExitStatus::Code(5)));
    assert_eq!(vm.wait_ended().await.cause, Cause::GuestPoweroff);
}

#[tokio::test]
async fn privileged_boots_without_pmem_from_a_flat_image_and_from_a_qcow2_root() {
    let test = "privileged_boots_without_pmem_from_a_flat_image_and_from_a_qcow2_root";
    let Some(assets) = assets(test) else { return };
    let bench = Bench::new();
    let base = bench.image("base", &base_tree(assets));
    let vm = bench
        .ready(&bench.flat_spec(assets, &[&base], &VmConfig::default()))
        .await;
    let root = vm.progress().root.unwrap();
    assert_eq!((root.source.as_str(), root.dax), ("flat", false));
    assert_eq!(
        sh(&vm, "cat /etc/motd; touch /new; ls /new").await,
        "from base\n/new\n"
    );
    vm.stop(LIMIT).await.unwrap();

    let bench = Bench::new();
    let files = bench.dir.path().join("files");
    for directory in [".forelay", "bin", "dev", "proc", "sys", "run", "tmp", "etc"] {
        std::fs::create_dir_all(files.join(directory)).unwrap();
    }
    std::fs::copy(&assets.busybox, files.join("bin/busybox")).unwrap();
    std::os::unix::fs::symlink("busybox", files.join("bin/sh")).unwrap();
    let config = VmConfig {
        run: shell("echo up; busybox sleep 1000"),
        ..VmConfig::default()
    };
    let json = serde_json::to_vec(&config).unwrap();
    std::fs::write(files.join(".forelay/vm.json"), json).unwrap();
    let vm = bench.ready(&bench.root_spec(assets, &files)).await;
    assert_eq!(vm.progress().root.unwrap().source, "disk");
    assert_eq!(sh(&vm, "echo x > /new; busybox cat /new").await, "x\n");
}
