//! All of a running QEMU but the guest's memory.
//!
//! A migration would leave out that memory only where it is a shared file. QEMU's command for
//! Xen, whose hypervisor keeps the memory, writes the devices alone into a file in the same
//! format, less two things: the section that says which machine it is, which the QEMU that is
//! restored is told not to expect ([`NO_CONFIGURATION`]), and the description at the end, of
//! which [`save`] adds an empty one.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde_json::{Value, json};

use super::Qmp;
use crate::saved::{SavedMachine, SavedVm};
use crate::snapshot::{MAX_STATE_BYTES, SnapshotError};
use crate::state::VmState;

/// The file into which QEMU writes, in the runtime directory.
pub const DEVICES_FILE: &str = "devices.state";
/// Has a QEMU take a state without the section that names the machine.
pub const NO_CONFIGURATION: &str = "migration.send-configuration=off";
/// A description of a state with nothing in it.
const NO_DESCRIPTION: [u8; 5] = [6, 0, 0, 0, 0];
/// An address of the guest's that is memory on every machine.
const MEMORY: u64 = 1 << 20;

/// Stops the guest and returns what it takes to go on, its memory aside.
pub async fn save(
    qmp: &Qmp,
    runtime_dir: &Path,
    state: &VmState,
) -> Result<SavedVm, SnapshotError> {
    qmp.command("stop", Value::Null).await?;
    let ram_address = ram_address(qmp).await?;
    let machine = SavedMachine {
        hold: state.hold,
        pmem: state.pmem.clone(),
        launch_slots: state.launch_slots,
        hotplugged: state.hotplugged.clone(),
        addresses: addresses(qmp).await?,
    };
    let file = runtime_dir.join(DEVICES_FILE);
    // One that a predecessor left is no more than in the way.
    let _ = std::fs::remove_file(&file);
    if let Some(user) = state.user {
        make_for(&file, user).map_err(SnapshotError::State)?;
    }
    let name = file.to_str();
    let name = name.ok_or_else(|| SnapshotError::State(io::ErrorKind::InvalidInput.into()))?;
    let arguments = json!({ "filename": name, "live": false });
    let saved = qmp.command("xen-save-devices-state", arguments).await;
    let read = saved.map(|_| read_up_to(&file, MAX_STATE_BYTES));
    let _ = std::fs::remove_file(&file);
    let mut state = read?.map_err(SnapshotError::State)?;
    if state.len() > MAX_STATE_BYTES - NO_DESCRIPTION.len() {
        return Err(SnapshotError::TooLong);
    }
    state.extend(NO_DESCRIPTION);
    Ok(SavedVm {
        state,
        ram_address,
        machine,
    })
}

/// Makes an empty file that a confined VMM may write: it can make none itself.
fn make_for(file: &Path, user: u32) -> io::Result<()> {
    let mut options = File::options();
    options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)?;
    std::os::unix::fs::lchown(file, Some(user), Some(user))
}

/// What a VMM wrote, and one byte more if it is longer.
fn read_up_to(file: &Path, limit_bytes: usize) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    let limit = limit_bytes as u64 + 1;
    File::open(file)?.take(limit).read_to_end(&mut read)?;
    Ok(read)
}

/// Where QEMU has the guest's memory, all of which is one piece.
async fn ram_address(qmp: &Qmp) -> Result<u64, SnapshotError> {
    let line = format!("gpa2hva {MEMORY:#x}");
    let arguments = json!({ "command-line": line });
    let said = qmp.command("human-monitor-command", arguments).await?;
    let said = said.as_str().unwrap_or_default();
    let address = parse_address(said);
    address.ok_or_else(|| SnapshotError::Failed(format!("say where the memory is: {said:?}")))
}

/// `Host virtual address for 0x100000 (ram) is 0x7f0000100000`
fn parse_address(said: &str) -> Option<u64> {
    let (what, address) = said.trim().rsplit_once(" is 0x")?;
    let address = u64::from_str_radix(address, 16).ok()?;
    what.ends_with("(ram)")
        .then(|| address.checked_sub(MEMORY))?
}

/// Where the memory of pmem devices is in the guest's, by the devices' ids.
async fn addresses(qmp: &Qmp) -> Result<BTreeMap<String, u64>, SnapshotError> {
    let listed = qmp.command("query-memory-devices", Value::Null).await?;
    let all = listed.as_array().into_iter().flatten();
    let address = |one: &Value| {
        let data = &one["data"];
        let id = data["id"].as_str()?.strip_prefix("d-")?;
        Some((id.to_owned(), data["memaddr"].as_u64()?))
    };
    Ok(all.filter_map(address).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_of_the_guests_memory_is_taken() {
        let said = |region: &str, address: &str| {
            parse_address(&format!(
                "Host virtual address for 0x100000 ({region}) is {address}\r\n"
            ))
        };
        assert_eq!(said("ram", "0x7f0000100000"), Some(0x7f00_0000_0000));
        for bad in [
            said("pc.bios", "0x7f0000100000"),
            said("ram", "0x1000"),
            said("ram", "nowhere"),
            parse_address("unknown command: 'gpa2hva'"),
        ] {
            assert_eq!(bad, None);
        }
    }
}
