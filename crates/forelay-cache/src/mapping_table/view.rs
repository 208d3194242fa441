//! `forelay map VM`: guest file -> component image -> where its bytes are now.
//!
//! The caller brings the files (from the map image's reader) and component names; this
//! module brings states, sums and a picture. It refuses to know paths' meaning.

use forelay_image::{Digest, Extent, PAGE_BYTES};
use serde::Serialize;

use crate::names::{DeviceImage, SharedImage};
use crate::page_set::PageRun;

use super::{ImageRow, MappingTable, PageState, Phase};

/// A guest file and the component bytes it is made of.
#[derive(Clone, Debug)]
pub struct GuestFile {
    /// Path in the guest.
    pub path: String,
    /// Its bytes in order: image and extent.
    pub parts: Vec<(Digest, Extent)>,
}

/// Bytes by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StateBytes {
    /// All of them.
    pub total: u64,
    /// In shared memory.
    pub resident: u64,
    /// On their way.
    pub fetching: u64,
    /// Mapped, but not in memory.
    pub reserved: u64,
    /// Touched by this VM.
    pub touched: u64,
    /// Pinned in memory.
    pub pinned: u64,
}

/// One file as `forelay map` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileView {
    /// Path in the guest.
    pub path: String,
    /// Component image that its first byte lies in; nothing for an empty file.
    pub image: Option<Digest>,
    /// Where its bytes are.
    pub bytes: StateBytes,
    /// A picture of them, see [`picture`].
    pub picture: String,
}

/// One device as `forelay map` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceView {
    /// Device number.
    pub device: usize,
    /// Component image.
    pub image: Digest,
    /// VMs that can reach it.
    pub references: u32,
    /// Where its bytes are.
    pub bytes: StateBytes,
    /// A picture of them, see [`picture`].
    pub picture: String,
}

/// A VM as `forelay map` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmView {
    /// The VM.
    pub vm: String,
    /// Its trust domain.
    pub domain: String,
    /// Its profile.
    pub profile: String,
    /// Whether it runs.
    pub phase: Phase,
    /// Its devices in order.
    pub devices: Vec<DeviceView>,
    /// The files asked for, in the order given.
    pub files: Vec<FileView>,
}

fn page_runs(extent: Extent) -> PageRun {
    PageRun::covering(extent)
}

/// States of `run`, counted.
fn count(row: &ImageRow, touched: &crate::page_set::PageSet, run: PageRun) -> StateBytes {
    let run = run.intersection(row.whole());
    let bytes = |pages: u32| u64::from(pages) * PAGE_BYTES;
    let resident = row.resident.count_within(run);
    let fetching = row.fetching.count_within(run);
    StateBytes {
        total: bytes(run.pages()),
        resident: bytes(resident),
        fetching: bytes(fetching),
        reserved: bytes(run.pages() - resident - fetching),
        touched: bytes(touched.count_within(run)),
        pinned: bytes(row.pinned().map_or(0, |pinned| pinned.count_within(run))),
    }
}

/// One character for bytes in one cell: `█▓▒░` by how much is resident (all, half, some
/// at all ...), `»` something is on its way, `·` mapped but not in memory.
pub fn cell(bytes: &StateBytes) -> char {
    if bytes.total == 0 {
        return ' ';
    }
    match bytes.resident * 4 / bytes.total {
        4 => '█',
        _ if bytes.fetching > 0 => '»',
        2 | 3 => '▓',
        1 => '▒',
        _ if bytes.resident > 0 => '░',
        _ => '·',
    }
}

/// The picture of `run` in at most `cells` characters.
fn picture(row: &ImageRow, touched: &crate::page_set::PageSet, run: PageRun, cells: u32) -> String {
    let run = run.intersection(row.whole());
    let cells = cells.min(run.pages());
    let border = |cell: u32| {
        let pages = u64::from(run.pages()) * u64::from(cell) / u64::from(cells.max(1));
        run.start + pages as u32
    };
    let one = |at: u32| {
        cell(&count(
            row,
            touched,
            PageRun::new(border(at), border(at + 1)),
        ))
    };
    (0..cells).map(one).collect()
}

impl std::ops::AddAssign for StateBytes {
    fn add_assign(&mut self, other: Self) {
        self.total += other.total;
        self.resident += other.resident;
        self.fetching += other.fetching;
        self.reserved += other.reserved;
        self.touched += other.touched;
        self.pinned += other.pinned;
    }
}

impl MappingTable {
    /// What `forelay map VM` shows, with pictures of at most `cells` characters.
    pub fn view(&self, vm: &str, files: &[GuestFile], cells: u32) -> Option<VmView> {
        let (name, row) = self.vms.get_key_value(vm)?;
        let mut devices = Vec::new();
        for (device, device_row) in row.devices.iter().enumerate() {
            let image = self.images[device_row.image as usize].as_ref()?;
            let touched = &device_row.touched;
            devices.push(DeviceView {
                device,
                image: image.key.image,
                references: image.mapped_by,
                bytes: count(image, touched, image.whole()),
                picture: picture(image, touched, image.whole(), cells),
            });
        }
        let files = files
            .iter()
            .map(|file| self.view_file(row, file, cells))
            .collect();
        Some(VmView {
            vm: name.to_string(),
            domain: row.domain.to_string(),
            profile: row.profile.to_string(),
            phase: row.phase,
            devices,
            files,
        })
    }

    fn view_file(&self, vm: &super::VmRow, file: &GuestFile, cells: u32) -> FileView {
        let mut bytes = StateBytes::default();
        let mut drawn = String::new();
        let all: u64 = file.parts.iter().map(|(_, extent)| extent.len).sum();
        for (image, extent) in &file.parts {
            let find = |device: &&super::DeviceRow| {
                let row = self.images[device.image as usize].as_ref();
                row.is_some_and(|row| row.key.image == *image)
            };
            let Some(device) = vm.devices.iter().find(find) else {
                continue;
            };
            let Some(row) = self.images[device.image as usize].as_ref() else {
                continue;
            };
            let run = page_runs(*extent);
            bytes += count(row, &device.touched, run);
            let share = u64::from(cells) * extent.len / all.max(1);
            let share = u32::try_from(share).unwrap_or(cells).max(1);
            drawn.push_str(&picture(row, &device.touched, run, share));
        }
        FileView {
            path: file.path.clone(),
            image: file.parts.first().map(|part| part.0),
            bytes,
            picture: drawn,
        }
    }

    /// State of every page run of an image within `extent`, for a finer table.
    pub fn states(&self, image: &SharedImage, extent: Extent) -> Vec<(Extent, PageState)> {
        let Some(row) = self.image_row(image) else {
            return vec![(extent.page_aligned(), PageState::Absent)];
        };
        let window = page_runs(extent).intersection(row.whole());
        let mut states = Vec::new();
        let mut page = window.start;
        while page < window.end {
            let run = row.run_around(page).intersection(window);
            states.push((run.extent(), row.state(page)));
            page = run.end;
        }
        states
    }

    /// Devices of a VM as manifests order them, for callers that name components.
    pub fn device_images(&self, vm: &str) -> Vec<DeviceImage> {
        self.devices(vm).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping_table::Arrival;
    use crate::names::Domain;

    #[test]
    fn a_file_is_shown_where_its_bytes_are() {
        let domain = Domain::from("d");
        let device = |name: &[u8]| DeviceImage {
            image: Digest::of(name),
            image_bytes: 16 * 4096,
        };
        let devices = [device(b"base"), device(b"nginx")];
        let mut table = MappingTable::new();
        table
            .map(
                &"web".into(),
                &domain,
                &"p".into(),
                &devices,
                Phase::Running,
            )
            .unwrap();
        let nginx = SharedImage::new(domain, devices[1].image);
        table
            .complete_fetch(&nginx, Extent::new(0, 8 * 4096), Arrival::Demand)
            .unwrap();
        table
            .begin_fetch(&nginx, Extent::new(8 * 4096, 4 * 4096))
            .unwrap();
        table
            .touch(&"web".into(), &devices[1].image, Extent::new(0, 4096))
            .unwrap();
        let files = [GuestFile {
            path: "/usr/sbin/nginx".into(),
            parts: vec![(devices[1].image, Extent::new(4 * 4096, 12 * 4096))],
        }];
        let view = table.view("web", &files, 12).unwrap();
        assert_eq!(view.devices[0].picture, "············");
        let file = &view.files[0];
        assert_eq!(file.picture, "████»»»»····");
        let expected = StateBytes {
            total: 12 * 4096,
            resident: 4 * 4096,
            fetching: 4 * 4096,
            reserved: 4 * 4096,
            touched: 0,
            pinned: 0,
        };
        assert_eq!(file.bytes, expected);
        let states: Vec<_> = table.states(&nginx, Extent::new(0, 16 * 4096));
        let states: Vec<_> = states
            .iter()
            .map(|(e, state)| (e.len / 4096, *state))
            .collect();
        let expected = [
            (8, PageState::Resident),
            (4, PageState::Fetching),
            (4, PageState::Reserved),
        ];
        assert_eq!(states, expected);
        assert_eq!(table.view("nobody", &files, 12), None);
    }
}
