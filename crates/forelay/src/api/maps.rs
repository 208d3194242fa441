//! The mapping table of one VM.

use std::path::PathBuf;

use forelay_image::Digest;
use serde::{Deserialize, Serialize};

/// A touched extent of a component image.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Touch {
    /// Component image.
    pub image: Digest,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// First seen touched, milliseconds after the launch was asked for.
    pub first_touch_ms: u64,
}

/// The mapping table of one VM: guest file -> component -> where its bytes are now.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmMap {
    /// Instance.
    pub vm: String,
    /// Devices in slot order; the first is the map image.
    pub devices: Vec<MapDevice>,
    /// Files with data in a component, by guest path.
    pub files: Vec<MapFile>,
    /// Extents touched so far, in first-touch order.
    pub touches: Vec<Touch>,
}

/// One pmem device of a VM.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapDevice {
    /// Slot; 0 is the map image.
    pub slot: usize,
    /// Component name and version, or `map image`.
    pub component: String,
    /// Image digest.
    pub image: Digest,
    /// Host path that the VMM maps.
    pub path: PathBuf,
    /// Size of the image.
    pub image_bytes: u64,
    /// Bytes in shared memory.
    pub resident_bytes: u64,
    /// Bytes that this VM touched.
    pub touched_bytes: u64,
    /// Residency of the device in equal parts, from 0 (none) to 8 (all).
    pub bar: Vec<u8>,
}

/// One guest file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MapFile {
    /// Path in the guest.
    pub path: String,
    /// Device slot.
    pub slot: usize,
    /// First byte in the component image.
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// Bytes of it in shared memory.
    pub resident_bytes: u64,
    /// Bytes of it that this VM touched.
    pub touched_bytes: u64,
}
