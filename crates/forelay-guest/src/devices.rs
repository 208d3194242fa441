//! Finding the devices of the VM: pmem and disks by EROFS UUID, disks by serial number.
//!
//! Devices appear some time after their drivers are loaded, so every search polls until a
//! deadline. Device order means nothing; identity is the superblock's UUID or the serial.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use forelay_guest_protocol::superblock::{self, Superblock};

/// Interval of polls for devices.
pub const POLL: Duration = Duration::from_millis(5);

/// Calls `find` until it gives something or `limit` has passed.
pub fn wait_for<T>(limit: Duration, mut find: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        let found = find();
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(POLL);
    }
}

/// Names of block devices that start with `prefix`, sorted by length and name.
fn block_devices(prefix: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    names.sort_by_key(|name| (name.len(), name.clone()));
    names
}

/// Reads the EROFS superblock of a device.
pub fn read_superblock(device: &Path) -> Option<Superblock> {
    let mut block = [0; superblock::SUPERBLOCK_BYTES];
    File::open(device)
        .ok()?
        .read_exact_at(&mut block, superblock::SUPERBLOCK_OFFSET)
        .ok()?;
    superblock::parse(&block)
}

/// The UUIDs that a map image's device slots ask for, in slot order.
pub fn slot_uuids(device: &Path, superblock: &Superblock) -> io::Result<Vec<[u8; 16]>> {
    let file = File::open(device)?;
    let mut slot = [0; superblock::SLOT_BYTES];
    (0..u64::from(superblock.devices))
        .map(|index| {
            let offset = superblock.slots_offset + index * superblock::SLOT_BYTES as u64;
            file.read_exact_at(&mut slot, offset)?;
            superblock::slot_uuid(&slot).ok_or_else(|| {
                io::Error::other(format!("device slot {index} has no digest as its tag"))
            })
        })
        .collect()
}

/// All pmem devices with an EROFS image, seen so far; each is read once.
#[derive(Default)]
pub struct PmemDevices {
    known: Vec<(String, Superblock)>,
}

impl PmemDevices {
    /// Looks for devices that are new, then for `uuid` among all.
    pub fn find(&mut self, uuid: &[u8; 16]) -> Option<(PathBuf, Superblock)> {
        if let Some(found) = self.lookup(uuid) {
            return Some(found);
        }
        for name in block_devices("pmem") {
            if self.known.iter().any(|(known, _)| *known == name) {
                continue;
            }
            if let Some(superblock) = read_superblock(&Path::new("/dev").join(&name)) {
                self.known.push((name, superblock));
            }
        }
        self.lookup(uuid)
    }

    fn lookup(&self, uuid: &[u8; 16]) -> Option<(PathBuf, Superblock)> {
        let (name, superblock) = self.known.iter().find(|(_, found)| found.uuid == *uuid)?;
        Some((Path::new("/dev").join(name), *superblock))
    }
}

/// The virtio-blk disk with this serial number.
pub fn disk_by_serial(serial: &str) -> Option<PathBuf> {
    block_devices("vd")
        .into_iter()
        .find(|name| {
            fs::read_to_string(format!("/sys/block/{name}/serial"))
                .is_ok_and(|found| found.trim() == serial)
        })
        .map(|name| Path::new("/dev").join(name))
}

/// The character device of the guest channel.
pub fn channel_port() -> Option<PathBuf> {
    fs::read_dir("/sys/class/virtio-ports")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let name = fs::read_to_string(entry.path().join("name")).ok()?;
            (name.trim() == forelay_guest_protocol::messages::PORT_NAME)
                .then(|| Path::new("/dev").join(entry.file_name()))
        })
}
