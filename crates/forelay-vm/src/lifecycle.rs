//! The states of a VM as the host sees them.
//!
//! ```text
//!            agent speaks        probe succeeds
//! Starting ---------------> Mounted ----------> Ready
//!    |                         |                  |
//!    |        stop()           v                  |
//!    +--------------------> Stopping <------------+
//!    |                         |                  |
//!    +------ VMM exits ----> Ended <--- VMM exits-+
//! ```
//! Invariant: a phase never goes back, whatever the guest says; only the end of the VMM's
//! process makes a VM `Ended`.

use std::fmt;
use std::time::Duration;

use forelay_guest_protocol::messages::{BootSteps, ExitStatus, Mounted};
use forelay_guest_protocol::snapshot::Tier;
use serde::{Deserialize, Serialize};

/// Where a VM is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The VMM runs; nothing heard from the guest.
    #[default]
    Starting,
    /// The root is mounted and the agent answers.
    Mounted,
    /// The ready probe has succeeded.
    Ready,
    /// A stop was asked for.
    Stopping,
    /// The VMM's process is gone.
    Ended,
}

/// When something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Time since the VMM was started, by the host's clock. For what happened before a
    /// reattachment: when it became known.
    pub since_launch: Duration,
    /// Time since the guest's kernel started, by the guest's clock (not to be trusted).
    pub guest_uptime: Duration,
}

/// What is known of a VM's life.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// How the root came up.
    pub root: Option<Mounted>,
    /// When the guest reported its root.
    pub mounted: Option<Moment>,
    /// When the guest reported ready.
    pub ready: Option<Moment>,
    /// When the guest's steps before that were done: in order, none after it.
    pub steps: Option<BootSteps>,
    /// Where the guest is held for a snapshot.
    pub held: Option<Tier>,
    /// How the entrypoint ended.
    pub entrypoint: Option<ExitStatus>,
    /// The guest's own words on why its boot failed.
    pub failure: Option<String>,
    /// How the VM ended.
    pub ended: Option<Ended>,
}

impl Progress {
    /// Moves forward to `phase`; never back.
    pub fn advance(&mut self, phase: Phase) {
        self.phase = self.phase.max(phase);
    }
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Why.
    pub cause: Cause,
    /// Exit code of the VMM, if this process was its parent.
    pub exit_code: Option<i32>,
    /// Signal that killed the VMM, if this process was its parent.
    pub signal: Option<i32>,
}

/// Why a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The guest powered off.
    GuestPoweroff,
    /// The guest reset: a kernel panic or a reboot.
    GuestReset,
    /// The host told the VMM to quit.
    HostQuit,
    /// The VMM was killed or failed.
    VmmDied,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cause {
            Cause::GuestPoweroff => f.write_str("the guest powered off"),
            Cause::GuestReset => f.write_str("the guest reset (kernel panic or reboot)"),
            Cause::HostQuit => f.write_str("the VMM was told to quit"),
            Cause::VmmDied => match (self.signal, self.exit_code) {
                (Some(signal), _) => write!(f, "the VMM was killed by signal {signal}"),
                (None, Some(code)) => write!(f, "the VMM exited with code {code}"),
                (None, None) => f.write_str("the VMM's process is gone"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_never_go_back() {
        let mut progress = Progress::default();
        progress.advance(Phase::Ready);
        progress.advance(Phase::Mounted);
        assert_eq!(progress.phase, Phase::Ready);
        progress.advance(Phase::Ended);
        progress.advance(Phase::Stopping);
        assert_eq!(progress.phase, Phase::Ended);
    }
}
