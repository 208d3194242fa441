//! Resuming: a VM that goes on from a snapshot instead of booting.
//!
//! ```text
//! VMM waits -> state of the devices -> (tier kernel: all devices plugged) -> told who it is -> runs on
//!                                   -> stands by for its launch (standby.rs) -> ...
//! ```
//! Refuses to know which snapshot is best and what becomes of a launch that cannot use it.
//! Invariant: a step that fails or takes too long leaves a VMM that nobody may go on with.

use std::time::Duration;

use forelay_guest_protocol::snapshot::{ENTROPY_BYTES, Resume, Tier};
use forelay_memory::command_hints::Hints;
use forelay_vm::snapshot::SnapshotError;
use forelay_vm::{Boot, GuestMemory, Upper, VmSpec};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::daemon::error::HostError;
use crate::daemon::launch::start::{StartedVmm, wrapped};
use crate::daemon::snapshot::kept::NotResumed;
use crate::daemon::snapshot::service::Resumable;

/// Host name in the map image of a snapshot; a clone is told its own.
pub const HOSTNAME: &str = "forelay";

/// How long each step may take, the guest's last one with the hooks of its image: longer than the
/// guest gives them.
const RESTORE_LIMIT: Duration = Duration::from_secs(10);
const PLUG_LIMIT: Duration = Duration::from_secs(10);
const RESUME_LIMIT: Duration = Duration::from_secs(45);

/// Gives a clone's VMM what the snapshot holds.
pub async fn take_state(vmm: &StartedVmm, from: &Resumable) -> Result<(), NotResumed> {
    let handle = vmm.handle();
    let restoring = async {
        match handle.restore(&from.state).await {
            Err(error @ SnapshotError::Refused(_)) => {
                Ok(Err(NotResumed::Snapshot(HostError::failed(error))))
            }
            other => other.map(Ok),
        }
    };
    within(RESTORE_LIMIT, "take the state of its devices", restoring).await?
}

/// Gives a clone of tier `kernel` its devices; later ones have them.
pub async fn plug(vmm: &StartedVmm, spec: &VmSpec, from: &Resumable) -> Result<(), HostError> {
    if from.tier() > Tier::Kernel {
        return Ok(());
    }
    let scratch = match &spec.upper {
        Upper::Scratch { path, .. } => Some(path.as_path()),
        Upper::Tmpfs => None,
    };
    let plugging = vmm.handle().plug_all(&spec.pmem, scratch);
    within(PLUG_LIMIT, "take its devices", plugging).await
}

/// Tells the guest who it is; from then on it runs. What it could not be given is returned.
pub async fn resume(
    vmm: &StartedVmm,
    spec: &VmSpec,
    hostname: &str,
    from: &Resumable,
) -> Result<Vec<String>, HostError> {
    let map = match &spec.boot {
        Boot::Map { uuid } if from.tier() == Tier::Kernel => Some(uuid.clone()),
        _ => None,
    };
    let identity = identity(spec, hostname, map)?;
    let resuming = vmm.handle().resume(identity);
    let resumed = within(RESUME_LIMIT, "go on", resuming).await?;
    Ok(resumed.failures)
}

/// A step that is given up when it takes longer than this.
pub async fn within<T, E: std::error::Error>(
    limit: Duration,
    what: &str,
    step: impl Future<Output = Result<T, E>>,
) -> Result<T, HostError> {
    match tokio::time::timeout(limit, step).await {
        Ok(done) => done.map_err(HostError::failed),
        Err(_) => Err(HostError::Failed(format!(
            "its VM did not {what} within {limit:?}"
        ))),
    }
}

/// The VM that the snapshot's was, with its memory copied on write.
pub fn clone_of(spec: &VmSpec, from: &Resumable) -> VmSpec {
    let mut spec = spec.clone();
    spec.hold = Some(from.tier());
    spec.memory = GuestMemory::Snapshot {
        path: from.memory.path.clone(),
    };
    if from.tier() == Tier::Kernel {
        spec.pmem.clear();
    }
    spec.wrap = Some(wrapped(Hints {
        copies_memory: true,
        ..Hints::default()
    }));
    spec
}

/// What makes the clone a machine of its own.
pub(super) fn identity(
    spec: &VmSpec,
    hostname: &str,
    map: Option<String>,
) -> Result<Resume, HostError> {
    let mut random = [0; ENTROPY_BYTES + 16 + 3];
    let filled = getrandom(&mut random, GetRandomFlags::empty()).map_err(HostError::failed)?;
    if filled != random.len() {
        return Err(HostError::Failed(
            "the kernel gives no random bytes".to_owned(),
        ));
    }
    let hex = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let (entropy, rest) = random.split_at(ENTROPY_BYTES);
    let (machine_id, mac) = rest.split_at(16);
    Ok(Resume {
        hostname: hostname.to_owned(),
        machine_id: hex(machine_id),
        // QEMU's prefix, as every guest has it.
        mac: Some(format!(
            "52:54:00:{:02x}:{:02x}:{:02x}",
            mac[0], mac[1], mac[2]
        )),
        entropy: hex(entropy),
        scratch: map.is_some() && matches!(spec.upper, Upper::Scratch { .. }),
        map,
        ..Resume::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::launch::start;
    use crate::daemon::order::tests::order;
    use crate::recipe::KernelFiles;

    fn spec(further: &str) -> VmSpec {
        let kernel = KernelFiles {
            kernel: "kernel".into(),
            initrd: "initrd".into(),
        };
        let place = ("web", std::path::Path::new("/dir"));
        start::spec(&order("web", further, "base"), place, &[], None, kernel)
    }

    #[test]
    fn each_clone_is_told_that_it_is_another_machine() {
        let told = || identity(&spec(""), "web-2", None).unwrap();
        let (one, two) = (told(), told());
        for told in [&one, &two] {
            assert_eq!(told.validate(), Ok(()));
            assert_eq!((told.hostname.as_str(), &told.map), ("web-2", &None));
        }
        assert_ne!(one.entropy, two.entropy);
        assert_ne!(one.machine_id, two.machine_id);
        assert_ne!(one.mac, two.mac);

        // A scratch disk is told to those alone that have no root yet.
        let scratch = spec("[vm]\nscratch = \"64M\"\n");
        let told = |spec, map: Option<&str>| {
            let told = identity(spec, "web", map.map(str::to_owned)).unwrap();
            assert_eq!(told.validate(), Ok(()));
            (told.map.is_some(), told.scratch)
        };
        let map = "0f".repeat(16);
        assert_eq!(told(&scratch, Some(&map)), (true, true));
        assert_eq!(told(&scratch, None), (false, false));
        assert_eq!(told(&spec(""), Some(&map)), (true, false));
    }

    #[tokio::test]
    async fn a_step_that_takes_too_long_or_fails_is_named() {
        let never = std::future::pending::<Result<(), std::io::Error>>();
        let error = within(Duration::ZERO, "go on", never).await.unwrap_err();
        assert_eq!(error.to_string(), "its VM did not go on within 0ns");
        let failing = async { Err::<(), _>(std::io::Error::other("no")) };
        let error = within(RESTORE_LIMIT, "go on", failing).await.unwrap_err();
        assert!(error.to_string().contains("no"), "{error}");
    }
}
