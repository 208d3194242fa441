//! The per-VM configuration: `/.forelay/vm.json` in the map image (or in the root disk).
//!
//! Written by the host at compose time, read once by the guest's init. Unknown fields are
//! ignored and every field has a default, so that an older guest boots with a newer host.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Path of the file inside the VM's root.
pub const VM_CONFIG_PATH: &str = "/.forelay/vm.json";

/// What the guest does after its root is mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// Host name; empty leaves the kernel's.
    pub hostname: String,
    /// What runs in the VM.
    pub run: Run,
    /// Environment of the entrypoint, of commands and of probes.
    pub env: BTreeMap<String, String>,
    /// When the VM counts as ready; `None` means when the entrypoint has been started, or,
    /// with an init, when `multi-user.target` is reached.
    pub ready: Option<ReadyProbe>,
    /// Static address of `eth0`; `None` leaves the network down.
    pub network: Option<Network>,
    /// Size of the tmpfs upper as a mount option (`50%`, `256m`); empty is the kernel's 50%.
    pub upper_size: String,
    /// Program on the serial console (respawned when it ends); empty for none.
    pub console: Vec<String>,
    /// Files of the manifest's that say who the VM is ([`snapshot::is_identity`]): a clone
    /// keeps them.
    ///
    /// [`snapshot::is_identity`]: crate::snapshot::is_identity
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keeps: Vec<String>,
}

/// What runs in the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Run {
    /// Container style: the agent stays PID 1 and runs one program.
    Entrypoint(Entrypoint),
    /// The image's own init becomes PID 1; the agent runs beside it.
    Init {
        /// Path of the init program, usually `/sbin/init`.
        path: String,
    },
    /// Nothing but the agent: commands come through the guest channel.
    #[default]
    AgentOnly,
}

/// The program of a container-style VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Entrypoint {
    /// Program and arguments; the program is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Working directory; empty is `/`.
    pub cwd: String,
    /// `user`, `user:group`, `uid` or `uid:gid`; empty is root.
    pub user: String,
    /// Power the VM off when the entrypoint ends.
    pub poweroff_on_exit: bool,
    /// Signal that asks the entrypoint to end; 0 is SIGTERM.
    pub stop_signal: i32,
}

/// Readiness probe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadyProbe {
    /// A TCP port on 127.0.0.1 accepts.
    Tcp(u16),
    /// A command exits with 0.
    Exec(Vec<String>),
    /// A path exists.
    Path(String),
}

/// Static IPv4 configuration of `eth0`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Address.
    pub address: std::net::Ipv4Addr,
    /// Prefix length, at most 32.
    pub prefix: u8,
    /// Default gateway.
    pub gateway: std::net::Ipv4Addr,
    /// Name server for `/etc/resolv.conf`.
    pub dns: std::net::Ipv4Addr,
}

impl Default for Network {
    /// QEMU's user network.
    fn default() -> Self {
        Self {
            address: [10, 0, 2, 15].into(),
            prefix: 24,
            gateway: [10, 0, 2, 2].into(),
            dns: [10, 0, 2, 3].into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_object_and_unknown_fields_are_accepted() {
        let config: VmConfig = serde_json::from_str("{\"from_the_future\": 1}").unwrap();
        assert_eq!(config, VmConfig::default());
    }

    #[test]
    fn the_json_form_is_stable() {
        let config = VmConfig {
            hostname: "web".into(),
            run: Run::Entrypoint(Entrypoint {
                argv: vec!["nginx".into(), "-g".into(), "daemon off;".into()],
                ..Entrypoint::default()
            }),
            ready: Some(ReadyProbe::Tcp(80)),
            network: Some(Network::default()),
            ..VmConfig::default()
        };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(
            text,
            "{\"hostname\":\"web\",\"run\":{\"entrypoint\":{\"argv\":[\"nginx\",\"-g\",\
             \"daemon off;\"],\"cwd\":\"\",\"user\":\"\",\"poweroff_on_exit\":false,\
             \"stop_signal\":0}},\
             \"env\":{},\"ready\":{\"tcp\":80},\"network\":{\"address\":\"10.0.2.15\",\
             \"prefix\":24,\"gateway\":\"10.0.2.2\",\"dns\":\"10.0.2.3\"},\
             \"upper_size\":\"\",\"console\":[]}"
        );
        assert_eq!(serde_json::from_str::<VmConfig>(&text).unwrap(), config);
    }
}
