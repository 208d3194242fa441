//! The image's own init.

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
         [vm]\nmemory_mib = 256\n",
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
    host.ok(["stop", "full"]);
    assert_eq!(host.vm("full")["state"], "stopped");
}
