//! Waiting until the VM counts as ready.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use forelay_guest_protocol::config::{ReadyProbe, Run, VmConfig};
use forelay_guest_protocol::messages::Exec;

use crate::process::{self, Reaper};

/// Interval of cheap probes.
const POLL: Duration = Duration::from_millis(20);
/// Interval of probes that start a process.
const EXEC_POLL: Duration = Duration::from_millis(250);

/// Returns when the VM is ready.
pub fn wait(config: &VmConfig, reaper: &Reaper) {
    match (&config.ready, &config.run) {
        (Some(ReadyProbe::Tcp(port)), _) => {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
            until(POLL, || {
                TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
            });
        }
        (Some(ReadyProbe::Path(path)), _) => until(POLL, || Path::new(path).exists()),
        (Some(ReadyProbe::Exec(argv)), _) => until(EXEC_POLL, || succeeds(config, reaper, argv)),
        (None, Run::Init { .. }) => {
            until(POLL, || Path::new("/run/systemd/private").exists());
            let argv = ["systemctl", "is-active", "--quiet", "multi-user.target"];
            let argv: Vec<String> = argv.map(str::to_owned).into();
            until(EXEC_POLL, || succeeds(config, reaper, &argv));
        }
        (None, Run::Entrypoint(_) | Run::AgentOnly) => {}
    }
}

fn until(interval: Duration, mut probe: impl FnMut() -> bool) {
    while !probe() {
        std::thread::sleep(interval);
    }
}

fn succeeds(config: &VmConfig, reaper: &Reaper, argv: &[String]) -> bool {
    let request = Exec {
        argv: argv.to_vec(),
        timeout_ms: 30_000,
        ..Exec::default()
    };
    process::run(reaper, &config.env, &request).is_ok_and(|result| result.status.success())
}
