//! Waiting until the VM counts as ready.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use forelay_guest_protocol::config::{ReadyProbe, Run, VmConfig};

use crate::process::{self, Reaper};

/// Interval of cheap probes: short at first, since most of what starts fast is there soon.
const POLL: Duration = Duration::from_millis(20);
const FIRST_POLL: Duration = Duration::from_millis(2);
/// Interval of probes that start a process.
const EXEC_POLL: Duration = Duration::from_millis(250);

/// Longest time that one run of a probe may take.
const PROBE_LIMIT: Duration = Duration::from_secs(30);

/// Returns when the VM is ready (true), or as soon as `failed` says that it will not be.
pub fn wait(config: &VmConfig, reaper: &Reaper, failed: impl Fn() -> bool) -> bool {
    let succeeds = |argv: &[String]| process::succeeds(reaper, &config.env, argv, PROBE_LIMIT);
    match (&config.ready, &config.run) {
        (Some(ReadyProbe::Tcp(port)), _) => {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
            until(FIRST_POLL..POLL, failed, || {
                TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
            })
        }
        (Some(ReadyProbe::Path(path)), _) => {
            until(FIRST_POLL..POLL, failed, || Path::new(path).exists())
        }
        (Some(ReadyProbe::Exec(argv)), _) => until(EXEC_POLL..EXEC_POLL, failed, || succeeds(argv)),
        (None, Run::Init { .. }) => {
            let argv = ["systemctl", "is-active", "--quiet", "multi-user.target"];
            let argv: Vec<String> = argv.map(str::to_owned).into();
            until(FIRST_POLL..POLL, &failed, || {
                Path::new("/run/systemd/private").exists()
            }) && until(EXEC_POLL..EXEC_POLL, failed, || succeeds(&argv))
        }
        (None, Run::Entrypoint(_) | Run::AgentOnly) => true,
    }
}

fn until(
    interval: Range<Duration>,
    failed: impl Fn() -> bool,
    mut probe: impl FnMut() -> bool,
) -> bool {
    let mut pause = interval.start;
    loop {
        if probe() {
            return true;
        }
        if failed() {
            return false;
        }
        std::thread::sleep(pause);
        pause = interval.end.min(pause * 2);
    }
}
