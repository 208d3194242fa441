//! The image's own init.

use std::net::UdpSocket;
use std::time::Duration;

use crate::fixture::{Host, Settings, bench};

#[test]
fn privileged_systemd_reaches_multi_user_and_commands_run_beside_it() {
    let test = "privileged_systemd_reaches_multi_user_and_commands_run_beside_it";
    let Some(bench) = bench(test) else { return };
    let host = Host::started(&bench, &Settings::default());
    let manifest = host.write(
        "full.toml",
        "name = \"full\"\nowner = \"tests\"\nbase = \"debian-systemd\"\n\
         components = [\"forelay-tool\"]\ninit = true\n\
         ready = { exec = [\"systemctl\", \"is-active\", \"--quiet\", \"multi-user.target\"] }\n\n\
         [vm]\nmemory_mib = 256\nforward = [\":5353/udp\"]\n",
    );
    let vm = host.launch(&manifest, "full", &[]);
    assert_eq!(vm["state"], "ready");
    let says = host.sh(
        "full",
        "cat /proc/1/comm; systemctl is-active multi-user.target; hostname",
    );
    assert_eq!(says, "systemd\nactive\nfull\n");
    // The package database knows the base's packages and the component's.
    let installed = host.sh("full", "dpkg-query -W -f '${Status} ' forelay-tool systemd");
    assert_eq!(installed, "install ok installed install ok installed ");
    assert!(vm["forwards"][0]["udp"].as_bool().unwrap());
    let port = vm["forwards"][0]["host"].as_u64().unwrap() as u16;
    answers_datagrams(&host, port);
    host.ok(["stop", "full"]);
    assert_eq!(host.vm("full")["state"], "stopped");
}

/// Sends datagrams to a forwarded port until the guest sends one back.
fn answers_datagrams(host: &Host, port: u16) {
    let echo = "my $s = IO::Socket::INET->new(LocalPort => 5353, Proto => 'udp') or die; \
                while ($s->recv(my $m, 64)) { $s->send(uc $m) }";
    host.sh(
        "full",
        &format!(
            "perl -MIO::Socket::INET -e \"{}\" </dev/null >/dev/null 2>&1 &",
            echo.replace('$', "\\$")
        ),
    );
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let mut answer = [0; 64];
    let answered = (0..500).find_map(|_| {
        socket.send_to(b"ping", ("127.0.0.1", port)).unwrap();
        socket.recv(&mut answer).ok()
    });
    assert_eq!(&answer[..answered.expect("an answer")], b"PING");
}
