//! What clients ask of VMs that exist: to be listed, watched and stopped.
//!
//! Refuses to know how a VM is launched or taken over.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forelay_vm::process::Process;
use forelay_vm::state::VmState as VmmState;

use crate::api::{Vm, VmState};
use crate::daemon::error::HostError;
use crate::daemon::memory::domains::Domains;
use crate::daemon::memory::waiting::{PendingWait, longest_waits};
use crate::daemon::vm::instance::{Instance, VmEnd};
use crate::daemon::vm::registry::VmRegistry;
use crate::daemon::vm::supervise::Supervisor;

/// How long a guest may take to power itself off.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long a VMM that was killed may take to be seen gone.
const KILL_LIMIT: Duration = Duration::from_secs(20);
/// How long all VMs may take to stop when the daemon ends.
const STOP_ALL: Duration = Duration::from_secs(30);

/// Lists and stops VMs.
pub struct VmService {
    pub registry: Arc<VmRegistry>,
    pub domains: Arc<Domains>,
    pub supervisor: Arc<Supervisor>,
}

impl VmService {
    /// All instances.
    pub fn list(&self) -> Vec<Vm> {
        let all = self.registry.all();
        let waiting = self.waiting();
        let shown = all.iter().map(|one| self.with_waits(one, &waiting));
        let mut vms: Vec<Vm> = shown.collect();
        vms.sort_by(|a, b| (a.launched_ms, &a.name).cmp(&(b.launched_ms, &b.name)));
        vms
    }

    /// A VM with what it waited for until now, and what it waits for.
    fn with_waits(&self, instance: &Instance, waiting: &BTreeMap<u32, PendingWait>) -> Vm {
        let mut vm = instance.vm();
        if let Some(pid) = vm.pid {
            if let Some(waits) = self.domains.attribution().figures(pid) {
                vm.waits = waits.into();
            }
            vm.waiting = waiting.get(&pid).map(|wait| {
                let mut devices = instance.devices().into_iter();
                let device = devices.find(|device| device.image == wait.image());
                wait.view(device.map(|device| device.component))
            });
        }
        vm
    }

    /// VMs that wait for bytes for longer than a fetch takes, by the VMM's process id.
    pub fn waiting(&self) -> BTreeMap<u32, PendingWait> {
        longest_waits(&self.domains)
    }

    /// The instance of this name.
    pub fn instance(&self, name: &str) -> Result<Arc<Instance>, HostError> {
        self.registry
            .get(name)
            .ok_or_else(|| HostError::NoSuchVm(name.to_owned()))
    }

    /// One instance; waits up to `patience` for its state to change.
    pub async fn show(&self, name: &str, patience: Duration) -> Result<Vm, HostError> {
        let instance = self.instance(name)?;
        let _ = tokio::time::timeout(patience, instance.state_changed()).await;
        Ok(self.with_waits(&instance, &self.waiting()))
    }

    /// Stops an instance; one that has ended already is left as it is, and one that is
    /// being launched is cancelled.
    pub async fn stop(&self, name: &str) -> Result<Vm, HostError> {
        let instance = self.instance(name)?;
        self.stop_instance(&instance).await?;
        Ok(instance.vm())
    }

    async fn stop_instance(&self, instance: &Instance) -> Result<(), HostError> {
        instance.cancel();
        let vm = instance.vm();
        if vm.state == VmState::Hibernated {
            return self.delete(instance).await;
        }
        if vm.state == VmState::Unreachable {
            // It cannot be asked.
            let killed = kill_recorded(&vm.runtime_dir);
            let ended = tokio::time::timeout(KILL_LIMIT, instance.ended()).await;
            return ended.map_err(|_| not_ended(&vm, killed.err()));
        }
        // A launch that was handed over a moment ago cannot be cancelled any more.
        if let Some(handle) = instance.launched().await {
            if vm.state == VmState::Paused && handle.unpause().await.is_ok() {
                // It cannot end by itself while it stands still.
                instance.pause(false);
            }
            let stopping = async {
                self.supervisor.scan_now(instance).await;
                handle.stop(STOP_GRACE).await.map_err(HostError::failed)?;
                instance.ended_or_hibernated().await;
                // It was being saved all the while.
                match instance.state() {
                    VmState::Hibernated => self.delete(instance).await,
                    _ => Ok(()),
                }
            };
            let stopped = tokio::time::timeout(STOP_GRACE + 2 * KILL_LIMIT, stopping).await;
            return stopped.unwrap_or_else(|_| Err(not_ended(&vm, None)));
        }
        Ok(())
    }

    /// Deletes a VM that hibernates; what it was saved as is for who keeps snapshots to remove.
    async fn delete(&self, instance: &Instance) -> Result<(), HostError> {
        let _turn = instance.device_turn().await;
        if instance.state() != VmState::Hibernated {
            let text = format!("VM {} goes on at this moment: try again", instance.name());
            return Err(HostError::Busy(text));
        }
        instance.end(VmEnd::Stopped {
            note: Some("it hibernated".to_owned()),
        });
        if let Ok(dir) = instance.dir() {
            dir.clear();
        }
        Ok(())
    }

    /// Stops all instances, and lets no further one start. What has not stopped by itself
    /// after [`STOP_ALL`] is killed.
    pub async fn stop_all(&self) {
        let live = self.registry.close();
        let stops = live.iter().map(|instance| self.stop_instance(instance));
        let stops = futures_util::future::join_all(stops);
        let Ok(stopped) = tokio::time::timeout(STOP_ALL, stops).await else {
            for instance in live.iter().filter(|instance| instance.is_live()) {
                tracing::error!(vm = instance.name(), "a VM did not stop in time: killed");
                if let Some(Err(error)) = instance.handle().map(|handle| handle.kill()) {
                    tracing::error!(vm = instance.name(), %error, "it lives on");
                }
            }
            return;
        };
        for error in stopped.into_iter().filter_map(Result::err) {
            tracing::error!(%error, "a VM did not stop");
        }
    }
}

/// Kills the VMM of a VM: the one that its state file names or, if that cannot be read,
/// whatever bears its mark. No error if it is gone.
pub fn kill_recorded(runtime_dir: &Path) -> std::io::Result<()> {
    match VmmState::read(runtime_dir) {
        Ok(state) => Process::hold(state.process)?.map_or(Ok(()), |process| process.kill()),
        Err(_) => forelay_vm::stray::end_all(runtime_dir).map(drop),
    }
}

/// Why a VM lives on that was to be killed, and what is left to do.
fn not_ended(vm: &Vm, error: Option<std::io::Error>) -> HostError {
    let why = error.map_or_else(
        || "was killed and has not ended, so it hangs in the kernel".to_owned(),
        |error| format!("cannot be killed: {error}"),
    );
    let pid = vm.pid.map_or("PID".to_owned(), |pid| pid.to_string());
    HostError::Failed(format!(
        "the VMM of {} {why}: `cat /proc/{pid}/stack` tells what it waits for, and `grep -l {} \
         /proc/*/environ` which process it is",
        vm.name,
        vm.runtime_dir.display()
    ))
}
