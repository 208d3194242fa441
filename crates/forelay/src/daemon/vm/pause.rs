//! Pause: the CPUs of a VM stand still and go on, also under another daemon.
//!
//! Invariant: whether a VM is paused is what its VMM says. A daemon that finds one standing
//! still whose record does not say so has a predecessor that ended while it saved the VM, and
//! lets it go on.

use std::sync::Arc;
use std::time::Duration;

use forelay_guest_protocol::snapshot::ENTROPY_BYTES;
use forelay_vm::VmHandle;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::api::{Vm, VmState};
use crate::daemon::error::HostError;
use crate::daemon::vm::attach::running;
use crate::daemon::vm::instance::Instance;

/// Between tries to have a VM go on.
const RETRY_EVERY: Duration = Duration::from_secs(5);

/// Has a VM's CPUs stand still.
pub async fn pause(instance: &Instance) -> Result<Vm, HostError> {
    let _turn = instance.device_turn().await;
    let handle = running(instance)?;
    handle.pause().await.map_err(HostError::failed)?;
    instance.pause(true);
    if let Err(error) = instance.save() {
        // The next daemon would let it go on, and nobody would know why.
        instance.pause(false);
        let _ = handle.unpause().await;
        return Err(HostError::Failed(format!(
            "the record of VM {} cannot be written: {error}; it was not paused",
            instance.name()
        )));
    }
    Ok(instance.vm())
}

/// Has a paused VM go on.
pub async fn unpause(instance: &Instance) -> Result<Vm, HostError> {
    let _turn = instance.device_turn().await;
    let handle = instance
        .handle()
        .filter(|_| instance.state() == VmState::Paused);
    let handle = handle.ok_or_else(|| {
        let (name, state) = (instance.name(), instance.state());
        HostError::Busy(format!(
            "VM {name} is neither paused nor hibernated: it is {state:?}"
        ))
    })?;
    run_on(instance, &handle).await?;
    Ok(instance.vm())
}

/// The CPUs run from here on, whatever else fails.
async fn run_on(instance: &Instance, handle: &VmHandle) -> Result<(), HostError> {
    handle.unpause().await.map_err(HostError::failed)?;
    instance.pause(false);
    if let Err(error) = instance.save() {
        // The next daemon sees that it runs.
        tracing::warn!(vm = instance.name(), %error, "cannot save an instance's record");
    }
    // Its clock stood still with it.
    handle.tell_time().await;
    Ok(())
}

/// Brings a VM that was found in line with its record, and lets it go on if an earlier daemon held
/// it, or was about to: a guest that is being frozen does not say so.
pub async fn settle(instance: Arc<Instance>, handle: VmHandle) {
    if settle_cpus(&instance, &handle).await {
        keep_letting_go(Arc::clone(&instance), handle).await;
    }
    instance.may_be_held(false);
}

/// Lets a VM go on that may be held, again and again until it does or there is none.
pub async fn keep_letting_go(instance: Arc<Instance>, handle: VmHandle) {
    loop {
        let turn = instance.device_turn().await;
        if instance.state() == VmState::Paused || !handle.is_running() || handle.never_freezes() {
            return;
        }
        let Err(error) = go_on(&handle).await else {
            return;
        };
        drop(turn);
        let why = forelay_host::error_chain(&error);
        tracing::warn!(
            vm = instance.name(),
            why,
            "it may stand still; trying again"
        );
        tokio::time::sleep(RETRY_EVERY).await;
    }
}

/// True if its programs may be held.
async fn settle_cpus(instance: &Instance, handle: &VmHandle) -> bool {
    let _turn = instance.device_turn().await;
    let vm = instance.name();
    let stands = match handle.is_paused().await {
        Ok(stands) => stands,
        Err(error) => {
            tracing::warn!(vm, %error, "whether it is paused is not known");
            return true;
        }
    };
    let recorded = instance.read(|vm| vm.paused);
    let done = match (recorded, stands) {
        (true, true) => return false,
        (true, false) => {
            instance.pause(false);
            instance.save().map_err(HostError::failed)
        }
        (false, true) => handle.unpause().await.map_err(HostError::failed),
        (false, false) => Ok(()),
    };
    if let Err(error) = done {
        tracing::error!(vm, %error, "it may stand still");
    }
    true
}

/// Has a held VM go on as the machine that it was: its CPUs, and its programs.
pub async fn go_on(handle: &VmHandle) -> Result<(), HostError> {
    handle.unpause().await.map_err(HostError::failed)?;
    handle.release(entropy()?).await.map_err(HostError::failed)
}

fn entropy() -> Result<String, HostError> {
    let mut random = [0; ENTROPY_BYTES];
    let filled = getrandom(&mut random, GetRandomFlags::empty()).map_err(HostError::failed)?;
    match filled == random.len() {
        true => Ok(random.iter().map(|byte| format!("{byte:02x}")).collect()),
        false => Err(HostError::Failed(
            "the kernel gives no random bytes".to_owned(),
        )),
    }
}
