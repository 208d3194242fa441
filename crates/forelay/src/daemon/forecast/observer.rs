//! Observation of one VM from outside: which pages of its devices it has touched, when.
//!
//! Scans the VMM's page tables at short intervals while the launch is young, rarely
//! later. What a scan finds new was touched since the scan before it.
//!
//! Invariant: a page is reported once for each VM, with the time of the scan that found
//! it; within one scan, extents are in image order.

use std::path::Path;

use forelay_image::pages::PageSet;
use forelay_image::{Digest, Extent};
use forelay_memory::observe::{self, FileIdentity};

/// One device of a VM, and what is known of it.
#[derive(Debug)]
struct Watched {
    image: Digest,
    file: FileIdentity,
    touched: PageSet,
}

/// Pages of one image that a scan found touched for the first time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTouches {
    /// Component image.
    pub image: Digest,
    /// The pages.
    pub extents: Vec<Extent>,
}

/// Watches one VMM.
#[derive(Debug)]
pub struct Observer {
    pid: u32,
    devices: Vec<Watched>,
}

impl Observer {
    /// Watches the VMM `pid`.
    pub const fn new(pid: u32) -> Self {
        Self {
            pid,
            devices: Vec::new(),
        }
    }

    /// Watches another device, the file `path`. May stat the file: not on async threads.
    pub fn watch(&mut self, image: Digest, path: &Path) -> std::io::Result<()> {
        let file = FileIdentity::of(path)?;
        self.devices.push(Watched {
            image,
            file,
            touched: PageSet::new(),
        });
        Ok(())
    }

    /// Stops watching the devices of an image.
    pub fn unwatch(&mut self, image: &Digest) {
        self.devices.retain(|device| device.image != *image);
    }

    /// Scans all devices. A VMM that ends meanwhile shows nothing new.
    pub fn scan(&mut self) -> Vec<NewTouches> {
        let mut found = Vec::new();
        for device in &mut self.devices {
            let Ok(touched) = observe::touched(self.pid, device.file) else {
                continue;
            };
            let touched: PageSet = touched.into_iter().collect();
            let new = &touched - &device.touched;
            if !new.is_empty() {
                device.touched |= &new;
                found.push(NewTouches {
                    image: device.image,
                    extents: new.extents().collect(),
                });
            }
        }
        found
    }

    /// Bytes touched over all devices.
    pub fn touched_bytes(&self) -> u64 {
        self.devices
            .iter()
            .map(|device| device.touched.bytes())
            .sum()
    }
}
