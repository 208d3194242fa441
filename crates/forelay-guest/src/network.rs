//! Static IPv4 configuration: loopback and `eth0`, `/etc/resolv.conf`.
//!
//! No DHCP: the address is part of the VM's configuration, and a boot should not wait for
//! an answer it already knows.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use forelay_guest_protocol::config::Network;

use crate::boot::context;
use crate::{devices, sys};

/// Configures the network; without `network` only the loopback interface.
pub fn configure(network: Option<&Network>) -> io::Result<()> {
    sys::configure_interface("lo", None).map_err(context("lo"))?;
    let Some(network) = network else {
        return Ok(());
    };
    devices::wait_for(Duration::from_secs(2), || {
        Path::new("/sys/class/net/eth0").exists().then_some(())
    })
    .ok_or_else(|| io::Error::other("no eth0 appeared"))?;
    // Nobody answers to these here: a router is asked for again and again, also by each clone.
    for setting in ["router_solicitations", "dad_transmits"] {
        // A kernel without this protocol has no such setting.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/eth0/{setting}"), "0");
    }
    sys::configure_interface("eth0", Some((network.address, network.prefix)))
        .map_err(context("eth0"))?;
    // A clone gets a MAC address of its own later on. Who asked for this machine's before it had
    // it would send to its maker's for ever, unless the change is announced.
    fs::write("/proc/sys/net/ipv4/conf/eth0/arp_notify", "1").map_err(context("arp_notify"))?;
    sys::default_route(network.gateway).map_err(context("default route"))?;
    let text = format!("nameserver {}\n", network.dns);
    fs::create_dir_all("/etc")?;
    let path = Path::new("/etc/resolv.conf");
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) {
        fs::remove_file(path)?;
    }
    fs::write(path, text).map_err(context("/etc/resolv.conf"))
}
