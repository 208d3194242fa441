//! The mapping table's journal: what a successor needs to rebuild the rows after the
//! daemon died. What is resident is not journalled: the kernel knows it better
//! ([`super::reconcile`]).
//!
//! A journal is a sequence of frames, each `length u32 | XXH3-64 of payload u64 |
//! payload` (little endian, payload JSON of one [`TableRecord`]). Appending whole frames is
//! the only way it grows; a torn or corrupt frame ends the replay, everything before it
//! counts and the rest is reported. It is cut by writing [`MappingTable::snapshot`] to a
//! new file and renaming that.
//!
//! Invariant: replaying a table's snapshot, or all its drained records, gives a table
//! with the same rows and pins.

use forelay_image::pages::PageSet;
use forelay_image::{Digest, Extent};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::names::{DeviceImage, Domain, ProfileName, SharedImage, VmName};

use super::{MappingTable, Phase, TableError};

/// Bytes before a frame's payload.
const HEADER_BYTES: usize = 12;

/// Largest payload that is believed, in bytes.
const MAX_PAYLOAD_BYTES: usize = 16 << 20;

/// One change of the table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "record")]
pub enum TableRecord {
    /// A VM was mapped.
    Mapped {
        /// The VM.
        vm: VmName,
        /// Its trust domain.
        domain: Domain,
        /// Its profile.
        profile: ProfileName,
        /// Its devices in order.
        devices: Vec<DeviceImage>,
        /// Whether it ran already.
        phase: Phase,
    },
    /// A VM's VMM was started.
    Started {
        /// The VM.
        vm: VmName,
    },
    /// A row mapped ahead went to a launched VM.
    Renamed {
        /// Its name before.
        from: VmName,
        /// Its name now.
        to: VmName,
    },
    /// A VM is gone.
    Unmapped {
        /// The VM.
        vm: VmName,
    },
    /// A device was attached.
    Attached {
        /// The VM.
        vm: VmName,
        /// The device.
        device: DeviceImage,
    },
    /// A device was detached.
    Detached {
        /// The VM.
        vm: VmName,
        /// The image it showed.
        image: Digest,
    },
    /// Pages were pinned.
    Pinned {
        /// Where.
        image: SharedImage,
        /// The image's size in bytes.
        image_bytes: u64,
        /// Which bytes.
        extent: Extent,
    },
    /// Pages were unpinned.
    Unpinned {
        /// Where.
        image: SharedImage,
        /// Which bytes.
        extent: Extent,
    },
}

/// What a replay found.
#[derive(Debug)]
pub struct Replay {
    /// The rebuilt table; nothing is resident in it yet.
    pub table: MappingTable,
    /// Records that were applied.
    pub applied: usize,
    /// Records that contradicted the table so far, with the reason.
    pub refused: Vec<(usize, TableError)>,
    /// Bytes of whole, intact frames: the length to cut the journal to.
    pub intact_bytes: usize,
    /// Bytes behind them that are torn or corrupt.
    pub dropped_bytes: usize,
}

/// Appends the frames of `records` to `journal`.
pub fn append(journal: &mut Vec<u8>, records: &[TableRecord]) {
    for record in records {
        let payload = serde_json::to_vec(record).expect("records always serialise");
        let length = u32::try_from(payload.len()).expect("a record is far below 4 GiB");
        journal.extend_from_slice(&length.to_le_bytes());
        journal.extend_from_slice(&XxHash3_64::oneshot(&payload).to_le_bytes());
        journal.extend_from_slice(&payload);
    }
}

/// The first frame's record and the frame's length, if the frame is whole and intact.
fn first_frame(bytes: &[u8]) -> Option<(TableRecord, usize)> {
    let (header, rest) = bytes.split_at_checked(HEADER_BYTES)?;
    let length = u32::from_le_bytes(header[..4].try_into().ok()?) as usize;
    let sum = u64::from_le_bytes(header[4..].try_into().ok()?);
    let payload = rest.get(..length).filter(|_| length <= MAX_PAYLOAD_BYTES)?;
    if XxHash3_64::oneshot(payload) != sum {
        return None;
    }
    let record = serde_json::from_slice(payload).ok()?;
    Some((record, HEADER_BYTES + length))
}

/// Rebuilds a table from a journal. Never fails: what cannot be used is reported.
pub fn replay(journal: &[u8]) -> Replay {
    let mut replay = Replay {
        table: MappingTable::new(),
        applied: 0,
        refused: Vec::new(),
        intact_bytes: 0,
        dropped_bytes: 0,
    };
    let mut number = 0;
    while let Some((record, frame_bytes)) = first_frame(&journal[replay.intact_bytes..]) {
        replay.intact_bytes += frame_bytes;
        match apply(&mut replay.table, record) {
            Ok(()) => replay.applied += 1,
            Err(cause) => replay.refused.push((number, cause)),
        }
        number += 1;
    }
    replay.dropped_bytes = journal.len() - replay.intact_bytes;
    replay
}

fn apply(table: &mut MappingTable, record: TableRecord) -> Result<(), TableError> {
    match record {
        TableRecord::Mapped {
            vm,
            domain,
            profile,
            devices,
            phase,
        } => table.map(&vm, &domain, &profile, &devices, phase),
        TableRecord::Started { vm } => table.start(&vm),
        TableRecord::Renamed { from, to } => table.rename(&from, &to),
        TableRecord::Unmapped { vm } => table.unmap(&vm),
        TableRecord::Attached { vm, device } => table.attach(&vm, &device),
        TableRecord::Detached { vm, image } => table.detach(&vm, &image),
        TableRecord::Pinned {
            image,
            image_bytes,
            extent,
        } => {
            let device = DeviceImage {
                image: image.image,
                image_bytes,
            };
            table.add_image(&image.domain, &device)?;
            table.pin(&image, extent)
        }
        TableRecord::Unpinned { image, extent } => table.unpin(&image, extent).map(drop),
    }
}

impl MappingTable {
    /// The fewest records that rebuild this table's rows and pins.
    pub fn snapshot(&self) -> Vec<TableRecord> {
        let mut records = Vec::new();
        for (vm, row) in &self.vms {
            records.push(TableRecord::Mapped {
                vm: vm.clone(),
                domain: row.domain.clone(),
                profile: row.profile.clone(),
                devices: self.devices(vm.as_str()).collect(),
                phase: row.phase,
            });
        }
        for image in self.by_key.keys() {
            let Some(row) = self.image_row(image) else {
                continue;
            };
            let image_bytes = row.image_bytes;
            for extent in row.pins.iter().flat_map(PageSet::extents) {
                let image = image.clone();
                records.push(TableRecord::Pinned {
                    image,
                    image_bytes,
                    extent,
                });
            }
        }
        records
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> MappingTable {
        let mut table = MappingTable::new();
        table.start_journal();
        let (domain, profile) = (Domain::from("d"), ProfileName::from("web"));
        let device = |name: &[u8]| DeviceImage {
            image: Digest::of(name),
            image_bytes: 1 << 20,
        };
        let (a, b) = (VmName::from("a"), VmName::from("b"));
        let both = [device(b"base"), device(b"nginx")];
        table
            .map(&a, &domain, &profile, &both, Phase::Running)
            .unwrap();
        table
            .map(&"~".into(), &domain, &profile, &both[..1], Phase::Premapped)
            .unwrap();
        table.rename(&"~".into(), &b).unwrap();
        table.start(&b).unwrap();
        table.attach(&b, &device(b"redis")).unwrap();
        table.detach(&b, &Digest::of(b"base")).unwrap();
        let nginx = SharedImage::new(domain, Digest::of(b"nginx"));
        table.pin(&nginx, Extent::new(0, 65536)).unwrap();
        table.pin(&nginx, Extent::new(4096, 4096)).unwrap();
        table.unpin(&nginx, Extent::new(8192, 4096)).unwrap();
        table
    }

    #[test]
    fn journal_and_snapshot_rebuild_the_same_rows() {
        let mut table = table();
        let mut journal = Vec::new();
        append(&mut journal, &table.drain_records());
        let replayed = replay(&journal);
        assert_eq!((replayed.refused.len(), replayed.dropped_bytes), (0, 0));
        assert_eq!(replayed.table.snapshot(), table.snapshot());
        replayed.table.validate().unwrap();
        let mut compact = Vec::new();
        append(&mut compact, &table.snapshot());
        assert!(compact.len() < journal.len());
        assert_eq!(replay(&compact).table.snapshot(), table.snapshot());
        assert!(table.drain_records().is_empty());
    }

    #[test]
    fn any_torn_or_flipped_byte_keeps_what_came_before_it() {
        let mut table = table();
        let records = table.drain_records();
        let mut journal = Vec::new();
        append(&mut journal, &records);
        for cut in 0..journal.len() {
            let replayed = replay(&journal[..cut]);
            assert_eq!(replayed.intact_bytes + replayed.dropped_bytes, cut);
            assert!(replayed.refused.is_empty() && replayed.applied < records.len());
            replayed.table.validate().unwrap();
        }
        for at in 0..journal.len() {
            let mut flipped = journal.clone();
            flipped[at] ^= 0x20;
            let replayed = replay(&flipped);
            assert!(replayed.intact_bytes <= at && replayed.dropped_bytes > 0);
            replayed.table.validate().unwrap();
        }
    }
}
