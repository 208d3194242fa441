//! `forelay-guest`: init of the initramfs, and the agent inside the running VM.
//!
//! As PID 1 it boots the VM (`boot.rs`) and, container style, stays as the agent. Beside an
//! image's own init it is started again as `@forelay-guest agent`; the `@` tells systemd not
//! to kill it at shutdown before the root is gone.
//!
//! It knows the guest only: devices, mounts, processes and the guest channel. What a
//! component is, where it came from and which VM this is are the host's business.

mod accounts;
mod agent;
mod boot;
mod devices;
mod exec;
mod freezer;
mod graft;
mod hold;
mod identity;
mod network;
mod pmem_state;
mod process;
mod ready;
mod root;
mod sys;
mod terminal;

fn main() {
    if std::process::id() == 1 {
        let _ = boot::run();
        let error = sys::power_off();
        boot::console(&format!("power off: {error}"));
        loop {
            std::thread::park();
        }
    }
    if std::env::args().nth(1).as_deref() == Some("agent") {
        match agent::run_from_environment() {
            Ok(never) => match never {},
            Err(error) => boot::console(&format!("agent: {error}")),
        }
    } else {
        eprintln!(
            "forelay-guest {}: init and agent of a Forelay guest; it runs as PID 1 of the \
             guest's initramfs",
            env!("CARGO_PKG_VERSION")
        );
    }
    std::process::exit(1);
}
