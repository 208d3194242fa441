//! A VM that is saved, and one that is made from what was saved.
//!
//! ```text
//! maker: launch (GuestMemory::Shared, hold) -> wait_held -> save -> its memory file, a state
//! clone: launch (GuestMemory::Snapshot)     -> restore(state) [-> plug_all] -> resume
//!        ... -> restore(state) -> stand_by, any time, launch_as -> [plug_all] -> resume
//! ```
//! Both were verified before a clone is launched; what the guest in it says is not trusted. A
//! step that fails leaves a VMM that is of no use: it is to be killed.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use forelay_guest_protocol::messages::{GuestCommand, Reply};
use forelay_guest_protocol::snapshot::{Resume, Resumed, Tier};

use crate::RUNTIME_FILES;
use crate::channel::{ChannelError, bounded_failures};
use crate::driver::AttachError;
use crate::handle::{VmError, VmHandle};
use crate::lifecycle::Progress;
use crate::qemu::QmpError;
use crate::spec::{PmemDevice, VmSpec};
use crate::state::VmState;

/// Largest state of devices, memory aside; some 100 KiB is usual.
pub const MAX_STATE_BYTES: usize = 16 << 20;
/// How far off a clone's clock may be that is not set again.
const CLOCK_TOLERANCE_US: u64 = 20_000;
/// How long a clone may take to be a machine of its own, hooks of its image included.
const RESUME: Duration = Duration::from_secs(120);

/// Why a VM could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The VMM refused or did not answer.
    #[error("the VMM's monitor")]
    Monitor(#[from] QmpError),
    /// The state could not be read from the VMM or written to it.
    #[error("the VMM's state")]
    State(#[source] std::io::Error),
    /// More than a state can be.
    #[error("the VMM's state has more than {MAX_STATE_BYTES} bytes")]
    TooLong,
    /// The VMM says that it cannot use the state that it was given.
    #[error("the VMM refuses the state: {0}")]
    Refused(String),
    /// The VMM says that it failed.
    #[error("the VMM could not {0}")]
    Failed(String),
    /// The VMM did not come to an end.
    #[error("the VMM was not done within {0:?}")]
    TimedOut(Duration),
    /// The guest did not do its part.
    #[error(transparent)]
    Guest(#[from] VmError),
    /// The VMM did not become that of a launch.
    #[error(transparent)]
    Change(#[from] AttachError),
    /// What the guest was to be told makes no sense.
    #[error("{0}")]
    Resume(String),
}

pub(crate) fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
}

fn answers(progress: &Progress) -> bool {
    progress.held.is_some() || progress.mounted.is_some()
}

impl VmHandle {
    /// Waits until the guest is held for a snapshot where the launch wanted it.
    pub async fn wait_held(&self, limit: Duration) -> Result<Tier, VmError> {
        let wanted = self.state().hold;
        // An agent that knows of no snapshots boots on.
        let passed = |progress: &Progress| progress.mounted.is_some() && wanted < Some(Tier::Ready);
        let over = |progress: &Progress| progress.held.is_some() || passed(progress);
        let held = self.wait("held", limit, over).await?.held;
        let unexpected = || self.channel_error(ChannelError::Unexpected);
        held.filter(|tier| Some(*tier) == wanted)
            .ok_or_else(unexpected)
    }

    /// Stops the guest for good and returns the state of its devices.
    pub async fn save(&self) -> Result<Vec<u8>, SnapshotError> {
        self.control().save().await
    }

    /// Gives a clone's VMM the state of its devices and lets the guest run.
    pub async fn restore(&self, state: &[u8]) -> Result<(), SnapshotError> {
        self.control().restore(state).await
    }

    /// Hot-plugs all devices of a launch into a clone of tier `kernel`.
    pub async fn plug_all(
        &self,
        devices: &[PmemDevice],
        scratch: Option<&Path>,
    ) -> Result<(), AttachError> {
        self.control().plug_all(devices, scratch).await
    }

    /// Has a clone that was restored wait for its launch: until its guest answers, and then
    /// without using a CPU.
    pub async fn stand_by(&self) -> Result<(), SnapshotError> {
        self.channel().tell(GuestCommand::Status).await;
        self.wait("restored", RESUME, answers).await?;
        Ok(self.control().pause().await?)
    }

    /// Has a clone that stands by run on as the VM of a launch: in its directory, with its ports.
    /// What it was launched with else is the same.
    pub async fn launch_as(&self, spec: &VmSpec) -> Result<Self, SnapshotError> {
        let from = self.runtime_dir();
        // Its state first: by it alone a successor finds the VMM there.
        for file in RUNTIME_FILES {
            match std::fs::rename(from.join(file), spec.runtime_dir.join(file)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(SnapshotError::State(error));
                }
                _ => {}
            }
        }
        let state = VmState {
            name: spec.name.clone(),
            console_log: spec.console_log.clone(),
            pmem: spec.pmem.clone(),
            forwards: spec.forwards.clone(),
            ..self.state().clone()
        };
        let renamed = self.renamed(state, &spec.runtime_dir).await?;
        renamed.control().run_on().await?;
        Ok(renamed)
    }

    /// Makes a clone a machine of its own and lets it go on; what it could not be given is
    /// in the answer. The time that it is told is that of this call, or of the answer if the guest
    /// took long to hear of it.
    pub async fn resume(&self, mut resume: Resume) -> Result<Resumed, SnapshotError> {
        resume.unix_time_us = now_us();
        resume.validate().map_err(SnapshotError::Resume)?;
        let command = GuestCommand::Resume(resume);
        match self.channel().request(command, RESUME).await {
            Ok(Reply::Resumed(resumed)) => {
                self.note(|progress| progress.held = None);
                let unix_time_us = now_us();
                let off_us = unix_time_us.abs_diff(resumed.unix_time_us);
                if resumed.unix_time_us > 0 && off_us > CLOCK_TOLERANCE_US {
                    let clock = GuestCommand::Clock { unix_time_us };
                    self.channel().tell(clock).await;
                }
                let failures = bounded_failures(resumed.failures);
                Ok(Resumed {
                    failures,
                    unix_time_us: resumed.unix_time_us,
                })
            }
            Ok(_) => Err(self.channel_error(ChannelError::Unexpected).into()),
            Err(error) => Err(self.channel_error(error).into()),
        }
    }
}
