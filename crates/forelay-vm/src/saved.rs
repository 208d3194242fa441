//! A VM that is paused, and one that is held while it runs, saved whole and gone on with.
//!
//! ```text
//! running: freeze -> save_whole -> unpause, release        the same VM goes on
//! saved:   launch (GuestMemory::Saved) -> restore_whole -> unpause -> release (the same VM)
//!                                                                  or resume (a clone)
//! ```
//! Other than in [`crate::snapshot`] the guest's memory is nobody's file: it is read out of the
//! VMM's address space, which [`SavedVm::ram_address`] is for, between `save_whole` and
//! `unpause`.

use std::collections::BTreeMap;
use std::time::Duration;

use forelay_guest_protocol::messages::{GuestCommand, Reply};
use forelay_guest_protocol::snapshot::{Freeze, Frozen, Release, Tier};
use serde::{Deserialize, Serialize};

use crate::channel::ChannelError;
use crate::driver::AttachError;
use crate::handle::{VmError, VmHandle};
use crate::qemu::QmpError;
use crate::snapshot::{SnapshotError, now_us};
use crate::spec::PmemDevice;
use crate::state::Hotplugged;

/// First version of the protocol with guests that can be frozen.
const FREEZES_SINCE: u32 = 4;
/// How long a guest may take to stop its programs and to write out what they wrote.
const FREEZE: Duration = Duration::from_secs(60);
/// How long it may take to let them go on.
const RELEASE: Duration = Duration::from_secs(60);

/// The machine of a VM that was saved while it ran: what is restored must have the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedMachine {
    /// Where its boot was held, if it was a clone.
    pub hold: Option<Tier>,
    /// pmem devices of its launch in slot order.
    pub pmem: Vec<PmemDevice>,
    /// Last slot for devices that are plugged in which its launch took.
    pub launch_slots: u8,
    /// What was plugged in since, with what is plugged in and no longer used.
    pub hotplugged: Vec<Hotplugged>,
    /// Where the devices' memory is in the guest's, by device id.
    pub addresses: BTreeMap<String, u64>,
}

/// A VM as it was saved, its memory aside.
#[derive(Clone, Debug)]
pub struct SavedVm {
    /// State of the devices.
    pub state: Vec<u8>,
    /// Where the guest's memory begins in the VMM's address space.
    pub ram_address: u64,
    /// What it is restored into.
    pub machine: SavedMachine,
}

impl VmHandle {
    /// Stops the guest's CPUs.
    pub async fn pause(&self) -> Result<(), AttachError> {
        self.control().pause().await
    }

    /// Lets the guest's CPUs run.
    pub async fn unpause(&self) -> Result<(), AttachError> {
        self.control().run_on().await
    }

    /// Whether the guest's CPUs stand still.
    pub async fn is_paused(&self) -> Result<bool, QmpError> {
        self.control().is_paused().await
    }

    /// Stops what the image runs, for a save. A guest that fails to is to be released.
    pub async fn freeze(&self, give_back: bool) -> Result<Frozen, VmError> {
        let known = self.channel().require(FREEZES_SINCE, FREEZE).await;
        known.map_err(|error| self.channel_error(error))?;
        let command = GuestCommand::Freeze(Freeze { give_back });
        match self.channel().request(command, FREEZE).await {
            Ok(Reply::Frozen(frozen)) => Ok(frozen),
            Ok(_) => Err(self.channel_error(ChannelError::Unexpected)),
            Err(error) => Err(self.channel_error(error)),
        }
    }

    /// Has a guest that stood still go on as the machine that it was: with the time of this call,
    /// and `entropy` (hex), as it may be one of several that were made of what was saved. One that
    /// is being frozen does that first; one that is not frozen is told the time alone.
    pub async fn release(&self, entropy: String) -> Result<(), VmError> {
        let known = self.channel().require(FREEZES_SINCE, RELEASE).await;
        known.map_err(|error| self.channel_error(error))?;
        let release = Release {
            entropy,
            unix_time_us: now_us(),
        };
        let command = GuestCommand::Release(release);
        match self.channel().request(command, RELEASE).await {
            Ok(Reply::Released) => {
                self.note(|progress| progress.held = None);
                Ok(())
            }
            Ok(_) => Err(self.channel_error(ChannelError::Unexpected)),
            Err(error) => Err(self.channel_error(error)),
        }
    }

    /// Tells a guest that stood still what time it is. Unlike [`Self::release`] it lets no program
    /// go on, and one that boots or whose agent is of an earlier version may not hear of it.
    pub async fn tell_time(&self) {
        let unix_time_us = now_us();
        let clock = GuestCommand::Clock { unix_time_us };
        self.channel().tell(clock).await;
    }

    /// Whether the guest's agent is known to be of a version that cannot be frozen.
    pub fn never_freezes(&self) -> bool {
        self.channel()
            .version()
            .is_some_and(|it| it < FREEZES_SINCE)
    }

    /// Stops the guest's CPUs and returns all of the VM but its memory.
    pub async fn save_whole(&self) -> Result<SavedVm, SnapshotError> {
        self.control().save_whole().await
    }

    /// Gives a VMM with [`crate::GuestMemory::Saved`] the state of its devices; the guest's CPUs
    /// stand still.
    pub async fn restore_whole(&self, state: &[u8]) -> Result<(), SnapshotError> {
        self.control().restore_whole(state).await
    }
}
