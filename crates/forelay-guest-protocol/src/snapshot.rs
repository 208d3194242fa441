//! Snapshots as guest and host agree on them: where a boot is held, and what a clone is told.
//!
//! ```text
//! host                                guest (kernel word forelay.hold=TIER)
//!   | <------- Held{tier} -------------  |   nothing of it changes until it is resumed
//!   |   ... saved; restored as a clone   |
//!   | -- GuestRequest{id, Resume} ---->  |
//!   | <------- Reply{id, Resumed} -----  |   it is a machine of its own now
//!   | <------- Mounted, Ready, ... ----  |   as after a boot; its times count from the resume
//!
//! host                                guest (that runs)
//!   | -- GuestRequest{id, Freeze} ---->  |
//!   | <------- Reply{id, Frozen} ------  |   held from here on
//!   |   ... saved                        |
//!   | -- GuestRequest{id, Release} --->  |   the same VM, now or restored later
//!   | -- or GuestRequest{id, Resume} ->  |   a clone of it
//! ```

use serde::{Deserialize, Serialize};

use crate::superblock;

/// Kernel word that names the tier at which a boot is held.
pub const HOLD_WORD: &str = "forelay.hold";
/// Bytes of entropy that a clone is given.
pub const ENTROPY_BYTES: usize = 64;
/// Where machine ids are; the second is often a link to the first.
pub const MACHINE_IDS: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];
/// Most failures of a clone's that are told.
pub const MAX_FAILURES: usize = 32;
/// Longest host name.
const MAX_HOSTNAME_BYTES: usize = 64;

/// How far the VM had come from which a snapshot was made; more is later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// The kernel has booted; there is no image.
    Kernel,
    /// The image is mounted; nothing of it has run.
    Composed,
    /// The entrypoint runs and was ready.
    Ready,
}

impl Tier {
    /// All of them, the earliest first.
    pub const ALL: [Self; 3] = [Self::Kernel, Self::Composed, Self::Ready];

    /// The name in manifests and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Composed => "composed",
            Self::Ready => "ready",
        }
    }

    /// The tier of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tier| tier.name() == name)
    }
}

/// Whether a clone would replace the file at this path by one of its own.
pub fn is_identity(path: &str) -> bool {
    MACHINE_IDS.contains(&path) || is_host_key(path)
}

/// Whether the file at this path is a private key of the SSH server.
pub fn is_host_key(path: &str) -> bool {
    let name = path.strip_prefix("/etc/ssh/ssh_host_");
    let kind = name.and_then(|name| name.strip_suffix("_key"));
    kind.is_some_and(|kind| !kind.contains('/'))
}

/// What makes a clone a machine of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resume {
    /// Its host name.
    pub hostname: String,
    /// Its machine id, 32 hex digits.
    pub machine_id: String,
    /// MAC address of its `eth0`, as `02:00:00:00:00:01`.
    pub mac: Option<String>,
    /// Entropy: [`ENTROPY_BYTES`] in hex.
    pub entropy: String,
    /// Wall clock: microseconds since the epoch.
    pub unix_time_us: u64,
    /// UUID of the map image to boot from (tier `kernel`).
    pub map: Option<String>,
    /// The overlay's upper is on the scratch disk (tier `kernel`).
    pub scratch: bool,
}

impl Resume {
    /// Checks it; the error says what is wrong.
    pub fn validate(&self) -> Result<(), String> {
        let hostname = self.hostname.as_bytes();
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._".contains(byte);
        if hostname.is_empty() || hostname.len() > MAX_HOSTNAME_BYTES || !hostname.iter().all(plain)
        {
            return Err(format!("{:?} is no host name", self.hostname));
        }
        if superblock::parse_uuid(&self.machine_id).is_none() {
            return Err("a machine id is 32 hex digits".to_owned());
        }
        if self.mac.is_some() && self.mac_address().is_none() {
            return Err("a MAC address is six bytes in hex, not that of a group".to_owned());
        }
        if self.entropy_bytes().is_none() {
            return Err(format!("entropy is {ENTROPY_BYTES} bytes in hex"));
        }
        if let Some(map) = &self.map
            && superblock::parse_uuid(map).is_none()
        {
            return Err("a UUID is 32 hex digits".to_owned());
        }
        Ok(())
    }

    /// The MAC address, if there is one that an interface can have.
    pub fn mac_address(&self) -> Option<[u8; 6]> {
        let mut bytes = self.mac.as_deref()?.split(':');
        let mut address = [0; 6];
        for byte in &mut address {
            let hex = bytes.next().filter(|hex| hex.len() == 2)?;
            *byte = u8::from_str_radix(hex, 16).ok()?;
        }
        let is_whole = bytes.next().is_none();
        (is_whole && address[0] & 1 == 0 && address != [0; 6]).then_some(address)
    }

    /// The entropy's bytes.
    pub fn entropy_bytes(&self) -> Option<[u8; ENTROPY_BYTES]> {
        entropy_bytes(&self.entropy)
    }
}

fn entropy_bytes(hex: &str) -> Option<[u8; ENTROPY_BYTES]> {
    let hex = hex.as_bytes();
    if hex.len() != 2 * ENTROPY_BYTES {
        return None;
    }
    let mut bytes = [0; ENTROPY_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(bytes)
}

/// How a VM that runs is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Freeze {
    /// Memory that it can do without is given back first, which takes seconds.
    pub give_back: bool,
}

/// What a VM says that is held now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Frozen {
    /// Nothing of the image runs; else the image's own init does.
    pub all: bool,
}

/// What a held VM is told that goes on as the machine that it was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Release {
    /// Entropy: [`ENTROPY_BYTES`] in hex, or nothing.
    pub entropy: String,
    /// Wall clock: microseconds since the epoch.
    pub unix_time_us: u64,
}

impl Release {
    /// The entropy's bytes, if there is any.
    pub fn entropy_bytes(&self) -> Option<[u8; ENTROPY_BYTES]> {
        entropy_bytes(&self.entropy)
    }
}

/// What a clone says of its resume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resumed {
    /// What of its own identity it could not be given, hooks that failed among it.
    pub failures: Vec<String>,
    /// What its clock shows when it says so, in microseconds since the epoch; 0 from agents that do
    /// not say. What it was told is older: the first message takes a clone's guest a while.
    pub unix_time_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resume() -> Resume {
        Resume {
            hostname: "web-1".into(),
            machine_id: "0f".repeat(16),
            mac: Some("52:54:00:12:34:5f".into()),
            entropy: "a5".repeat(ENTROPY_BYTES),
            unix_time_us: 1,
            map: Some("ab".repeat(16)),
            scratch: false,
        }
    }

    #[test]
    fn what_a_clone_is_told_is_checked() {
        assert_eq!(resume().validate(), Ok(()));
        assert_eq!(resume().entropy_bytes(), Some([0xa5; ENTROPY_BYTES]));
        assert_eq!(
            resume().mac_address(),
            Some([0x52, 0x54, 0, 0x12, 0x34, 0x5f])
        );
        let cases: [fn(&mut Resume); 10] = [
            |resume| resume.hostname.clear(),
            |resume| resume.hostname = "a\nb".into(),
            |resume| resume.hostname = "x".repeat(65),
            |resume| resume.machine_id = "é".repeat(16),
            |resume| resume.mac = Some("52:54:00:12:34".into()),
            |resume| resume.mac = Some("53:54:00:12:34:56".into()),
            |resume| resume.mac = Some("52:54:00:12:34:56:78".into()),
            |resume| resume.entropy.truncate(126),
            |resume| resume.entropy = "+5".repeat(ENTROPY_BYTES),
            |resume| resume.map = Some("x".repeat(32)),
        ];
        for (index, spoil) in cases.into_iter().enumerate() {
            let mut bad = resume();
            spoil(&mut bad);
            assert!(bad.validate().is_err(), "{index}: {bad:?}");
        }
    }

    #[test]
    fn what_a_clone_replaces_is_told_from_other_files() {
        let all = [
            "/etc/machine-id",
            "/var/lib/dbus/machine-id",
            "/etc/ssh/ssh_host_ed25519_key",
        ];
        assert!(all.into_iter().all(is_identity));
        let others = [
            "/etc/hostname",
            "/etc/ssh/sshd_config",
            "/etc/ssh/ssh_host_ed25519_key.pub",
            "/etc/ssh/ssh_host_/x_key",
            "/root/ssh_host_rsa_key",
        ];
        assert!(!others.into_iter().any(is_identity));
    }

    #[test]
    fn tiers_have_one_name_everywhere() {
        for tier in Tier::ALL {
            assert_eq!(Tier::named(tier.name()), Some(tier));
            let text = serde_json::to_string(&tier).unwrap();
            assert_eq!(text, format!("{:?}", tier.name()));
        }
        assert!(Tier::Kernel < Tier::Composed && Tier::Composed < Tier::Ready);
    }
}
