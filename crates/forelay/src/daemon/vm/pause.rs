//! Pause: the CPUs of a VM stand still and go on, also under another daemon.
//!
//! Invariant: whether a VM is paused is what its VMM says. A daemon that finds one standing
//! still whose record does not say so has a predecessor that ended while it saved the VM, and
//! lets it go on.

use std::sync::Arc;

use forelay_guest_protocol::snapshot::ENTROPY_BYTES;
use forelay_vm::VmHandle;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::api::{Vm, VmState};
use crate::daemon::error::HostError;
use crate::daemon::vm::attach::running;
use crate::daemon::vm::instance::Instance;

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
    go_on(instance, &handle).await?;
    Ok(instance.vm())
}

/// The CPUs run from here on, whatever else fails.
async fn go_on(instance: &Instance, handle: &VmHandle) -> Result<(), HostError> {
    handle.unpause().await.map_err(HostError::failed)?;
    instance.pause(false);
    if let Err(error) = instance.save() {
        // The next daemon sees that it runs.
        tracing::warn!(vm = instance.name(), %error, "cannot save an instance's record");
    }
    let (vm, handle) = (instance.name().to_owned(), handle.clone());
    tokio::spawn(async move {
        // Its clock stood still with it. One that boots, or whose agent is of an earlier version,
        // sets it itself or not at all.
        if let Err(error) = handle.release(String::new()).await {
            tracing::warn!(vm, %error, "its clock may be behind");
        }
    });
    Ok(())
}

/// Brings a VM that was found in line with its record, and lets it go on if an earlier daemon held
/// it.
pub async fn settle(instance: Arc<Instance>, handle: VmHandle) {
    let _turn = instance.device_turn().await;
    let vm = instance.name();
    let stands = match handle.is_paused().await {
        Ok(stands) => stands,
        Err(error) => return tracing::warn!(vm, %error, "whether it is paused is not known"),
    };
    let recorded = instance.read(|vm| vm.paused);
    let done = match (recorded, stands) {
        (true, true) => return,
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
    let held = match handle.status().await {
        Ok(status) => status.held.is_some(),
        // It boots, or hangs: either way nobody holds it.
        Err(_) => false,
    };
    if held && let Err(error) = release(&handle).await {
        tracing::error!(vm, %error, "its programs stand still");
    }
}

/// Has a held guest go on as the machine that it was.
pub async fn release(handle: &VmHandle) -> Result<(), HostError> {
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
