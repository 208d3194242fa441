//! Hot-plug and quit of a running QEMU, over its monitor.
//!
//! The state file is rewritten after each change, so that a successor knows which slots are
//! taken. One change at a time: a lock is held across each.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::sync::broadcast::error::RecvError;

use super::command_line::{self, FUNCTIONS, HotplugBus, PciPlace};
use super::{Qmp, QmpError, migration, saved};
use crate::confined::{self, Incoming};
use crate::driver::{AttachError, Detachment, VmControl};
use crate::lifecycle::Cause;
use crate::saved::SavedVm;
use crate::snapshot::SnapshotError;
use crate::spec::PmemDevice;
use crate::state::{Hotplugged, VmState};

/// How long the guest may take to let a device go.
const UNPLUG: Duration = Duration::from_secs(10);

/// Control of one QEMU.
pub struct QemuControl {
    qmp: Qmp,
    known: Mutex<ControlledVm>,
}

/// The VM that it is of.
struct ControlledVm {
    runtime_dir: PathBuf,
    state: VmState,
    /// Where a clone that inherited its sockets takes its state.
    incoming: Option<Incoming>,
}

impl QemuControl {
    /// Control over `qmp` of the VM with this state.
    pub fn new(qmp: Qmp, runtime_dir: PathBuf, state: VmState, incoming: Option<Incoming>) -> Self {
        let known = Mutex::new(ControlledVm {
            runtime_dir,
            state,
            incoming,
        });
        Self { qmp, known }
    }

    async fn plug(&self, device: &PmemDevice, place: PciPlace) -> Result<(), AttachError> {
        self.qmp
            .command("object-add", command_line::hotplug_backend(device))
            .await?;
        let arguments = command_line::hotplug_device(device, place);
        let added = self.qmp.command("device_add", arguments).await;
        if added.is_err() {
            let _ = self.delete_backend(&device.id).await;
        }
        added?;
        Ok(())
    }

    /// Plugs devices into one slot; the guest looks at it when its function 0 is there, so
    /// that comes last.
    async fn plug_slot(
        &self,
        devices: &[PmemDevice],
        bus: HotplugBus,
        slot: u8,
    ) -> Result<(), AttachError> {
        for (function, device) in (0..FUNCTIONS as u8).zip(devices).rev() {
            let place = PciPlace {
                bus,
                slot,
                function: Some(function),
            };
            self.plug(device, place).await?;
        }
        Ok(())
    }

    async fn delete_backend(&self, id: &str) -> Result<Value, QmpError> {
        self.qmp
            .command("object-del", json!({ "id": format!("m-{id}") }))
            .await
    }

    /// True if the device is gone; false if this QEMU cannot unplug it.
    async fn unplug(&self, id: &str) -> Result<bool, AttachError> {
        let device = format!("d-{id}");
        let mut events = self.qmp.events();
        match self
            .qmp
            .command("device_del", json!({ "id": device }))
            .await
        {
            Ok(_) => {}
            Err(QmpError::Refused { text, .. }) => {
                tracing::debug!(id, text, "QEMU cannot unplug the device");
                return Ok(false);
            }
            Err(error) => return Err(error.into()),
        }
        let gone = async {
            loop {
                match events.recv().await {
                    Ok(event) if event.name == "DEVICE_DELETED" => {
                        if event.data["device"] == device.as_str() {
                            return true;
                        }
                    }
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return false,
                }
            }
        };
        if !tokio::time::timeout(UNPLUG, gone).await.unwrap_or(false) {
            return Ok(false);
        }
        self.delete_backend(id).await?;
        Ok(true)
    }
}

#[async_trait]
impl VmControl for QemuControl {
    async fn attach_pmem(&self, device: &PmemDevice) -> Result<(), AttachError> {
        device.validate().map_err(AttachError::Device)?;
        let mut known = self.known.lock().await;
        let ControlledVm {
            runtime_dir, state, ..
        } = &mut *known;
        if state.pmem.iter().any(|known| known.id == device.id) {
            let text = format!("the VM was launched with device {}", device.id);
            return Err(AttachError::Device(text));
        }
        if let Some(known) = state
            .hotplugged
            .iter_mut()
            .find(|known| known.device.id == device.id)
        {
            if known.device != *device {
                let text = format!("device {} is another file", device.id);
                return Err(AttachError::Device(text));
            }
            known.retained = false;
        } else {
            let used = |slot: &u8| state.hotplugged.iter().any(|known| known.slot == *slot);
            let bus = state.hotplug_bus;
            let mut slots = bus.slots().skip(state.launch_slots.into());
            let slot = slots.find(|slot| !used(slot));
            let slot = slot.ok_or(AttachError::NoSlot {
                used: state.hotplugged.len(),
            })?;
            let place = PciPlace {
                bus,
                slot,
                function: None,
            };
            self.plug(device, place).await?;
            let device = device.clone();
            state.hotplugged.push(Hotplugged {
                device,
                slot,
                retained: false,
            });
        }
        if let Err(error) = state.write(runtime_dir) {
            // A successor would not know of it: it goes again, or is free for the next attach.
            let gone = self.unplug(&device.id).await.unwrap_or(false);
            let plugged = &mut state.hotplugged;
            plugged.retain(|known| !gone || known.device.id != device.id);
            for known in plugged.iter_mut() {
                known.retained |= known.device.id == device.id;
            }
            return Err(AttachError::State(error));
        }
        Ok(())
    }

    async fn detach_pmem(&self, id: &str) -> Result<Detachment, AttachError> {
        let mut known = self.known.lock().await;
        let ControlledVm {
            runtime_dir, state, ..
        } = &mut *known;
        let index = state
            .hotplugged
            .iter()
            .position(|known| known.device.id == id)
            .ok_or_else(|| AttachError::Unknown(id.to_owned()))?;
        let detachment = if self.unplug(id).await? {
            state.hotplugged.remove(index);
            Detachment::Removed
        } else {
            state.hotplugged[index].retained = true;
            Detachment::Retained
        };
        state.write(runtime_dir).map_err(AttachError::State)?;
        Ok(detachment)
    }

    async fn hotplugged(&self) -> Vec<String> {
        let known = self.known.lock().await;
        known
            .state
            .hotplugged
            .iter()
            .map(|known| known.device.id.clone())
            .collect()
    }

    async fn save(&self) -> Result<Vec<u8>, SnapshotError> {
        // No change meanwhile.
        let known = self.known.lock().await;
        migration::save(&self.qmp, &known.runtime_dir, known.state.user).await
    }

    async fn restore(&self, state: &[u8]) -> Result<(), SnapshotError> {
        let mut known = self.known.lock().await;
        let incoming = known.incoming.take();
        migration::load(&self.qmp, &known.runtime_dir, incoming, state, false).await?;
        self.qmp.command("cont", Value::Null).await?;
        Ok(())
    }

    async fn pause(&self) -> Result<(), AttachError> {
        self.qmp.command("stop", Value::Null).await?;
        Ok(())
    }

    async fn run_on(&self) -> Result<(), AttachError> {
        self.qmp.command("cont", Value::Null).await?;
        Ok(())
    }

    async fn rename(&self, state: VmState, runtime_dir: &Path) -> Result<(), AttachError> {
        let mut known = self.known.lock().await;
        for forward in &state.forwards {
            let line = command_line::add_forward(forward);
            let arguments = json!({ "command-line": line });
            let said = self.qmp.command("human-monitor-command", arguments).await?;
            // This monitor answers in words, and with none if all went well.
            let text = said.as_str().unwrap_or_default().trim();
            if !text.is_empty() {
                return Err(AttachError::Forward {
                    port: forward.host,
                    text: text.to_owned(),
                });
            }
        }
        *known = ControlledVm {
            runtime_dir: runtime_dir.to_owned(),
            state,
            incoming: None,
        };
        let written = known.state.write(&known.runtime_dir);
        written.map_err(AttachError::State)
    }

    async fn is_paused(&self) -> Result<bool, QmpError> {
        let found = self.qmp.command("query-status", Value::Null).await?;
        Ok(found["running"] == false)
    }

    async fn save_whole(&self) -> Result<SavedVm, SnapshotError> {
        let known = self.known.lock().await;
        let state = &known.state;
        if !state.can_be_saved || state.hotplug_bus != HotplugBus::Bridge {
            let text = "save a VM that an earlier version launched: stop it and launch it again";
            return Err(SnapshotError::Failed(text.to_owned()));
        }
        saved::save(&self.qmp, &known.runtime_dir, state).await
    }

    async fn restore_whole(&self, state: &[u8]) -> Result<(), SnapshotError> {
        let mut known = self.known.lock().await;
        let incoming = known.incoming.take();
        migration::load(&self.qmp, &known.runtime_dir, incoming, state, true).await
    }

    async fn plug_all(
        &self,
        devices: &[PmemDevice],
        scratch: Option<&Path>,
    ) -> Result<(), AttachError> {
        let mut known = self.known.lock().await;
        let ControlledVm {
            runtime_dir, state, ..
        } = &mut *known;
        for (index, device) in devices.iter().enumerate() {
            device.validate().map_err(AttachError::Device)?;
            let earlier = state.pmem.iter().chain(&devices[..index]);
            if earlier.into_iter().any(|known| known.id == device.id) {
                let text = format!("the VM has a device {} already", device.id);
                return Err(AttachError::Device(text));
            }
        }
        if let Some(user) = state.user {
            for device in devices {
                confined::lend_file(&device.path, user).map_err(AttachError::State)?;
            }
        }
        let mut slots = state.hotplug_bus.slots().skip(state.launch_slots.into());
        for group in devices.chunks(FUNCTIONS) {
            let slot = slots.next().ok_or(AttachError::NoSlot {
                used: state.pmem.len(),
            })?;
            self.plug_slot(group, state.hotplug_bus, slot).await?;
            state.launch_slots = slot;
            state.pmem.extend_from_slice(group);
        }
        if let Some(path) = scratch {
            let slot = slots.next().ok_or(AttachError::NoSlot {
                used: state.pmem.len(),
            })?;
            let place = PciPlace {
                bus: state.hotplug_bus,
                slot,
                function: None,
            };
            let backend = command_line::scratch_backend(path);
            self.qmp.command("blockdev-add", backend).await?;
            let device = command_line::scratch_device(place);
            self.qmp.command("device_add", device).await?;
            state.launch_slots = slot;
        }
        state.write(runtime_dir).map_err(AttachError::State)
    }

    async fn quit(&self) -> Result<(), AttachError> {
        self.qmp.command("quit", Value::Null).await?;
        Ok(())
    }

    async fn last_words(&self) -> Option<Cause> {
        self.qmp.last_words().await
    }
}
