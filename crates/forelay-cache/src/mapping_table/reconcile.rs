//! After the daemon died: the rebuilt rows against kernel truth (which VMMs run with
//! which files mapped, which pages are resident).
//!
//! The kernel is right; every difference is reported, so that "the two agree" is a
//! statement and not a hope. Invariant: after [`MappingTable::reconcile`] the table's
//! residency is the kernel's and nothing is being fetched.

use std::collections::BTreeMap;

use forelay_image::pages::{PageRun, PageSet};
use forelay_image::{Digest, Extent};
use serde::Serialize;

use crate::names::{DeviceImage, SharedImage, VmName};

use super::{MappingTable, Phase};

/// What the kernel says.
#[derive(Clone, Debug, Default)]
pub struct KernelTruth {
    /// Images with their size in bytes and resident extents.
    pub resident: BTreeMap<SharedImage, (u64, Vec<Extent>)>,
    /// VMMs that run, with the images that they have mapped.
    pub running: BTreeMap<VmName, Vec<Digest>>,
}

/// One difference between the table and the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "disagreement")]
pub enum Disagreement {
    /// The table says it runs, no VMM does; the row was removed.
    VmGone {
        /// The VM.
        vm: VmName,
    },
    /// A VMM runs that the table does not know.
    VmUnknown {
        /// The VM.
        vm: VmName,
    },
    /// The table thought a VM was not started yet; it is running now.
    VmStarted {
        /// The VM.
        vm: VmName,
    },
    /// A VM maps other images than its row says.
    Devices {
        /// The VM.
        vm: VmName,
        /// Mapped, but not in the row.
        kernel_only: Vec<Digest>,
        /// In the row, but not mapped.
        table_only: Vec<Digest>,
    },
    /// Residency differs.
    Residency {
        /// The image.
        image: SharedImage,
        /// Resident, but not in the table, in bytes.
        kernel_only_bytes: u64,
        /// In the table, but not resident, in bytes.
        table_only_bytes: u64,
    },
}

/// The outcome of a reconciliation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Reconciliation {
    /// Every difference found, VMs first.
    pub disagreements: Vec<Disagreement>,
    /// Bytes resident now.
    pub resident_bytes: u64,
    /// VMs that run now.
    pub running_vms: usize,
}

impl MappingTable {
    /// Takes over kernel truth and reports what differed.
    pub fn reconcile(&mut self, truth: &KernelTruth) -> Reconciliation {
        let mut disagreements = Vec::new();
        self.reconcile_vms(truth, &mut disagreements);
        let mut images: Vec<SharedImage> = self.known_images().cloned().collect();
        images.extend(truth.resident.keys().cloned());
        images.sort();
        images.dedup();
        for image in images {
            self.reconcile_image(&image, truth.resident.get(&image), &mut disagreements);
        }
        let running = |row: &&super::VmRow| row.phase == Phase::Running;
        Reconciliation {
            disagreements,
            resident_bytes: self.resident_bytes(),
            running_vms: self.vms.values().filter(running).count(),
        }
    }

    fn reconcile_vms(&mut self, truth: &KernelTruth, disagreements: &mut Vec<Disagreement>) {
        let known: Vec<(VmName, Phase)> = self
            .known_vms()
            .map(|(vm, phase)| (vm.clone(), phase))
            .collect();
        for (vm, phase) in &known {
            match truth.running.get(vm) {
                None if *phase == Phase::Running => {
                    // The name was read from the table just now.
                    let _ = self.unmap(vm);
                    disagreements.push(Disagreement::VmGone { vm: vm.clone() });
                }
                None => {}
                Some(mapped) => {
                    if *phase == Phase::Premapped {
                        let _ = self.start(vm);
                        disagreements.push(Disagreement::VmStarted { vm: vm.clone() });
                    }
                    let row: Vec<Digest> = self
                        .devices(vm.as_str())
                        .map(|device| device.image)
                        .collect();
                    let only = |these: &[Digest], others: &[Digest]| -> Vec<Digest> {
                        these
                            .iter()
                            .filter(|image| !others.contains(image))
                            .copied()
                            .collect()
                    };
                    let (kernel_only, table_only) = (only(mapped, &row), only(&row, mapped));
                    if !kernel_only.is_empty() || !table_only.is_empty() {
                        let vm = vm.clone();
                        disagreements.push(Disagreement::Devices {
                            vm,
                            kernel_only,
                            table_only,
                        });
                    }
                }
            }
        }
        let unknown = truth
            .running
            .keys()
            .filter(|vm| !self.vms.contains_key(*vm));
        disagreements.extend(unknown.map(|vm| Disagreement::VmUnknown { vm: vm.clone() }));
    }

    fn reconcile_image(
        &mut self,
        image: &SharedImage,
        truth: Option<&(u64, Vec<Extent>)>,
        disagreements: &mut Vec<Disagreement>,
    ) {
        let (image_bytes, extents) = match truth {
            Some((image_bytes, extents)) => (*image_bytes, extents.as_slice()),
            None => (0, &[][..]),
        };
        if !self.by_key.contains_key(image) {
            let device = DeviceImage {
                image: image.image,
                image_bytes,
            };
            if extents.is_empty() || self.add_image(&image.domain, &device).is_err() {
                return;
            }
        }
        let Some(&index) = self.by_key.get(image) else {
            return;
        };
        let row = self.row_mut(index);
        let whole = row.whole();
        let runs = extents
            .iter()
            .map(|&extent| PageRun::covering(extent).intersection(whole));
        let kernel: PageSet = runs.collect();
        let kernel_only_bytes = (&kernel - &row.resident).bytes();
        let table_only_bytes = (&row.resident - &kernel).bytes();
        row.prefetched_unused = &row.prefetched_unused & &kernel;
        let (resident, fetching) = (row.resident.bytes(), row.fetching.bytes());
        row.fetching = PageSet::new();
        let now = kernel.bytes();
        row.resident = kernel;
        self.resident_bytes = self.resident_bytes - resident + now;
        self.fetching_bytes -= fetching;
        self.drop_if_unused(index);
        if kernel_only_bytes > 0 || table_only_bytes > 0 {
            disagreements.push(Disagreement::Residency {
                image: image.clone(),
                kernel_only_bytes,
                table_only_bytes,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping_table::{Arrival, PageState};
    use crate::names::Domain;

    const MIB: u64 = 1 << 20;

    fn device(name: &[u8]) -> DeviceImage {
        DeviceImage {
            image: Digest::of(name),
            image_bytes: MIB,
        }
    }

    #[test]
    fn kernel_truth_wins_and_every_difference_is_named() {
        let domain = Domain::from("d");
        let mut table = MappingTable::new();
        let devices = [device(b"base"), device(b"nginx")];
        for vm in ["alive", "dead", "ahead"] {
            let phase = if vm == "ahead" {
                Phase::Premapped
            } else {
                Phase::Running
            };
            table
                .map(&vm.into(), &domain, &"p".into(), &devices, phase)
                .unwrap();
        }
        let base = SharedImage::new(domain.clone(), devices[0].image);
        let other = SharedImage::new(domain, Digest::of(b"left over"));
        table
            .complete_fetch(&base, Extent::new(0, 65536), Arrival::Prefetch)
            .unwrap();
        table
            .begin_fetch(&base, Extent::new(131_072, 4096))
            .unwrap();
        let mut truth = KernelTruth::default();
        truth.running.insert("alive".into(), vec![devices[0].image]);
        truth.running.insert("stranger".into(), vec![]);
        truth
            .resident
            .insert(base.clone(), (MIB, vec![Extent::new(4096, 65536)]));
        truth
            .resident
            .insert(other.clone(), (8192, vec![Extent::new(0, 8192)]));
        let report = table.reconcile(&truth);
        table.validate().unwrap();
        assert!(
            report
                .disagreements
                .contains(&Disagreement::VmGone { vm: "dead".into() })
        );
        assert!(report.disagreements.contains(&Disagreement::VmUnknown {
            vm: "stranger".into()
        }));
        assert!(report.disagreements.contains(&Disagreement::Devices {
            vm: "alive".into(),
            kernel_only: vec![],
            table_only: vec![devices[1].image],
        }));
        assert!(report.disagreements.contains(&Disagreement::Residency {
            image: base.clone(),
            kernel_only_bytes: 4096,
            table_only_bytes: 4096,
        }));
        assert_eq!(report.disagreements.len(), 5);
        assert_eq!(
            (report.resident_bytes, report.running_vms),
            (65536 + 8192, 1)
        );
        assert_eq!(table.state(&base, 0), PageState::Reserved);
        assert_eq!(table.state(&base, 131_072), PageState::Reserved);
        assert_eq!(table.state(&other, 4096), PageState::Resident);
        truth.running.remove("stranger");
        truth
            .running
            .insert("alive".into(), devices.map(|device| device.image).to_vec());
        assert_eq!(table.reconcile(&truth).disagreements, []);
    }
}
