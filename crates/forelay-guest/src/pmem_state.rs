//! State of pmem devices, which their VMM does not save: noted before a VM is held, and set
//! again in a clone.
//!
//! QEMU has no saved state for virtio-pmem. In a clone its memory is there, but the device is
//! as after a reset, with no address for its registers and no queue, while the kernel thinks
//! that it runs: a flush would wait for ever, and the kernel flushes when it powers off or
//! lets a device go. Registers are reached through the device's configuration space, by the
//! window that virtio has for those who cannot map them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::boot::context;

/// How virtio calls pmem.
const PMEM: &str = "0x001b";

/// Places in the configuration space of a PCI device.
mod pci {
    pub const BYTES: usize = 256;
    pub const COMMAND: usize = 0x04;
    pub const FIRST_BAR: usize = 0x10;
    pub const BARS_END: usize = 0x28;
    pub const CAPABILITIES: usize = 0x34;
    pub const INTERRUPT_LINE: usize = 0x3c;
    pub const VENDOR_CAPABILITY: u8 = 9;
    pub const MOST_CAPABILITIES: usize = 48;
}

/// Places in a capability of virtio's, and its kinds.
mod capability {
    pub const KIND: usize = 3;
    pub const BAR: usize = 4;
    pub const OFFSET: usize = 8;
    pub const LENGTH: usize = 12;
    pub const DATA: usize = 16;
    pub const COMMON: u8 = 1;
    pub const WINDOW: u8 = 5;
}

/// Registers that all devices of virtio's have.
mod register {
    pub const FEATURE_SELECT: u32 = 8;
    pub const FEATURES: u32 = 12;
    pub const STATUS: u32 = 20;
    pub const QUEUE_SELECT: u32 = 22;
    pub const QUEUE_SIZE: u32 = 24;
    pub const QUEUE_ENABLE: u32 = 28;
    /// Addresses of the queue's three parts.
    pub const RINGS: [u32; 6] = [32, 36, 40, 44, 48, 52];
}

/// Bits of the status: known and driven; features agreed on; all of that and running.
const DRIVEN: u8 = 3;
const AGREED: u8 = 8;
const RUNNING: u8 = 4;

static NOTED: Mutex<Vec<Registers>> = Mutex::new(Vec::new());

/// What is set again.
struct Registers {
    path: PathBuf,
    /// Open, so that a clone need not look for it.
    device: PciDevice,
    features: [[u8; 4]; 2],
    queue_size: [u8; 2],
    rings: [[u8; 4]; 6],
    status: u8,
}

/// Notes the registers of all pmem devices.
pub fn note() -> io::Result<()> {
    let mut noted = NOTED.lock().unwrap_or_else(PoisonError::into_inner);
    noted.clear();
    for entry in fs::read_dir("/sys/bus/virtio/devices")? {
        let device = fs::canonicalize(entry?.path())?;
        if fs::read_to_string(device.join("device"))?.trim() == PMEM {
            let path = device.join("../config");
            let registers = Registers::of(&path).map_err(context(path.display()))?;
            noted.push(registers);
        }
    }
    Ok(())
}

/// Sets them in a clone.
pub fn set_again() -> io::Result<()> {
    let noted = NOTED.lock().unwrap_or_else(PoisonError::into_inner);
    for registers in &*noted {
        let path = registers.path.display();
        registers.set_again().map_err(context(path))?;
    }
    Ok(())
}

impl Registers {
    fn of(path: &Path) -> io::Result<Self> {
        let device = PciDevice::open(path)?;
        let mut features = [[0; 4]; 2];
        for (select, features) in (0_u32..).zip(&mut features) {
            device.write(register::FEATURE_SELECT, select.to_le_bytes())?;
            *features = device.read(register::FEATURES)?;
        }
        device.write(register::QUEUE_SELECT, [0, 0])?;
        let mut rings = [[0; 4]; 6];
        for (place, ring) in register::RINGS.into_iter().zip(&mut rings) {
            *ring = device.read(place)?;
        }
        Ok(Self {
            path: path.to_owned(),
            features,
            queue_size: device.read(register::QUEUE_SIZE)?,
            rings,
            status: device.status()?,
            device,
        })
    }

    fn set_again(&self) -> io::Result<()> {
        let device = &self.device;
        device.open_window()?;
        // Otherwise the VMM has restored it, or nothing drove it.
        if device.status()? != 0 || self.status & RUNNING == 0 {
            return Ok(());
        }
        for place in (pci::FIRST_BAR..pci::BARS_END).step_by(4) {
            device.put(place, &device.space[place..place + 4])?;
        }
        device.put(pci::INTERRUPT_LINE, &[device.space[pci::INTERRUPT_LINE]])?;
        let command = &device.space[pci::COMMAND..pci::COMMAND + 2];
        device.put(pci::COMMAND, command)?;
        device.write(register::STATUS, [DRIVEN])?;
        for (select, features) in (0_u32..).zip(self.features) {
            device.write(register::FEATURE_SELECT, select.to_le_bytes())?;
            device.write(register::FEATURES, features)?;
        }
        device.write(register::STATUS, [DRIVEN | AGREED])?;
        device.write(register::QUEUE_SELECT, [0, 0])?;
        device.write(register::QUEUE_SIZE, self.queue_size)?;
        for (place, ring) in register::RINGS.into_iter().zip(self.rings) {
            device.write(place, ring)?;
        }
        device.write(register::QUEUE_ENABLE, [1, 0])?;
        device.write(register::STATUS, [self.status])?;
        match device.status()? {
            status if status == self.status => Ok(()),
            status => Err(io::Error::other(format!(
                "its status is {status:#x}, not {:#x}",
                self.status
            ))),
        }
    }
}

/// A device's configuration space, and the window in it.
struct PciDevice {
    file: File,
    space: [u8; pci::BYTES],
    window: usize,
    /// Which of its regions has the common registers, and where they begin.
    bar: u8,
    common: u32,
}

impl PciDevice {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        let mut space = [0; pci::BYTES];
        file.read_exact_at(&mut space, 0)?;
        let find = |kind| {
            capability(&space, kind).ok_or_else(|| io::Error::other("it is no device of virtio's"))
        };
        let (common, window) = (find(capability::COMMON)?, find(capability::WINDOW)?);
        let offset = common + capability::OFFSET;
        let bar = space[common + capability::BAR];
        let common = u32::from_le_bytes(std::array::from_fn(|byte| space[offset + byte]));
        let device = Self {
            file,
            space,
            window,
            bar,
            common,
        };
        device.open_window()?;
        Ok(device)
    }

    /// Has the window show the registers: a device forgets that in a clone.
    fn open_window(&self) -> io::Result<()> {
        self.put(self.window + capability::BAR, &[self.bar])
    }

    fn put(&self, place: usize, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, place as u64)
    }

    /// Directs the window at so many bytes of a register.
    fn aim(&self, register: u32, bytes: usize) -> io::Result<()> {
        let offset = self.common + register;
        self.put(self.window + capability::OFFSET, &offset.to_le_bytes())?;
        let length = (bytes as u32).to_le_bytes();
        self.put(self.window + capability::LENGTH, &length)
    }

    fn read<const BYTES: usize>(&self, register: u32) -> io::Result<[u8; BYTES]> {
        self.aim(register, BYTES)?;
        let mut value = [0; BYTES];
        let place = (self.window + capability::DATA) as u64;
        self.file.read_exact_at(&mut value, place)?;
        Ok(value)
    }

    fn write<const BYTES: usize>(&self, register: u32, value: [u8; BYTES]) -> io::Result<()> {
        self.aim(register, BYTES)?;
        self.put(self.window + capability::DATA, &value)
    }

    fn status(&self) -> io::Result<u8> {
        self.read(register::STATUS).map(|[status]| status)
    }
}

/// Where the configuration space has virtio's capability of a kind.
fn capability(space: &[u8; pci::BYTES], kind: u8) -> Option<usize> {
    let mut place = usize::from(space[pci::CAPABILITIES]);
    for _ in 0..pci::MOST_CAPABILITIES {
        if place < 0x40 || place + capability::DATA + 4 > pci::BYTES {
            return None;
        }
        if space[place] == pci::VENDOR_CAPABILITY && space[place + capability::KIND] == kind {
            return Some(place);
        }
        place = usize::from(space[place + 1]);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_capabilities_is_followed_to_its_end_and_not_in_circles() {
        let mut space = [0; pci::BYTES];
        assert_eq!(capability(&space, capability::COMMON), None);
        space[pci::CAPABILITIES] = 0x98;
        space[0x98..0x9c].copy_from_slice(&[pci::VENDOR_CAPABILITY, 0x40, 16, capability::WINDOW]);
        space[0x40..0x44].copy_from_slice(&[pci::VENDOR_CAPABILITY, 0x98, 16, capability::COMMON]);
        assert_eq!(capability(&space, capability::COMMON), Some(0x40));
        assert_eq!(capability(&space, capability::WINDOW), Some(0x98));
        assert_eq!(capability(&space, 2), None);
        space[pci::CAPABILITIES] = 0xff;
        assert_eq!(capability(&space, capability::COMMON), None);
    }
}
