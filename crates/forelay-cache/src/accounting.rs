//! Who pays for shared memory: proportional shares, exact to the byte.
//!
//! A resident page that n VMs have touched is charged 1/n to each, whoever was first;
//! resident pages that no VM has touched belong to the pool ("unclaimed"). The model is
//! the kernel's proportional set size, so that the two can be compared.
//!
//! Invariants (checked by [`Accounting::validate`]): charges of VMs plus unclaimed bytes
//! are exactly the resident bytes, for every image and the host; fractions of bytes go
//! to the largest remainders, so no VM is off by a byte or more for an image.

use std::collections::BTreeMap;

use forelay_image::PAGE_BYTES;
use forelay_image::pages::{PageSet, Pages};
use serde::Serialize;

use crate::mapping_table::{ImageRow, MappingTable};
use crate::names::{Domain, ProfileName, SharedImage, VmName};

/// Fractions of a byte are counted in units of 2^-32.
const FRACTION_BITS: u32 = 32;

/// One image's account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageAccount {
    /// Image and domain.
    pub image: SharedImage,
    /// VMs that can reach it, running or mapped ahead.
    pub mapped_by: u32,
    /// Its size times those: what they would take without sharing, in bytes.
    pub mapped_bytes: u64,
    /// In shared memory.
    pub resident_bytes: u64,
    /// Resident and touched by at least two VMs.
    pub shared_bytes: u64,
    /// Pinned and resident.
    pub pinned_bytes: u64,
    /// Prefetched and touched by no VM yet.
    pub prefetched_unused_bytes: u64,
    /// Resident and touched by no VM.
    pub unclaimed_bytes: u64,
}

/// One VM's account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmAccount {
    /// The VM.
    pub vm: VmName,
    /// Its trust domain.
    pub domain: Domain,
    /// Its profile.
    pub profile: ProfileName,
    /// Bytes of images that it can reach.
    pub mapped_bytes: u64,
    /// Resident bytes that it has touched.
    pub resident_bytes: u64,
    /// Of those, touched by another VM too.
    pub shared_bytes: u64,
    /// Its proportional share.
    pub charged_bytes: u64,
}

/// Sums over a domain or the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sums {
    /// What all VMs could reach, counted for each of them, in bytes.
    pub mapped_bytes: u64,
    /// In shared memory.
    pub resident_bytes: u64,
    /// Resident and touched by at least two VMs.
    pub shared_bytes: u64,
    /// Pinned and resident.
    pub pinned_bytes: u64,
    /// Prefetched and touched by no VM yet.
    pub prefetched_unused_bytes: u64,
    /// Resident and touched by no VM.
    pub unclaimed_bytes: u64,
    /// Charged to VMs.
    pub charged_bytes: u64,
}

/// The whole account.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Accounting {
    /// The host.
    pub host: Sums,
    /// Trust domains.
    pub domains: BTreeMap<Domain, Sums>,
    /// Images, in order.
    pub images: Vec<ImageAccount>,
    /// VMs, in order of names.
    pub vms: Vec<VmAccount>,
}

/// A VM's touched pages of one image.
struct Share<'a> {
    vm: usize,
    touched: &'a PageSet,
}

/// Sums up the table.
pub fn account(table: &MappingTable) -> Accounting {
    let mut shares: Vec<Vec<Share>> = Vec::new();
    shares.resize_with(table.images.len(), Vec::new);
    let mut vms = Vec::with_capacity(table.vms.len());
    for (vm, row) in &table.vms {
        let mut mapped_bytes = 0;
        for device in &row.devices {
            let image = table.images[device.image as usize].as_ref();
            mapped_bytes += image.map_or(0, |image| image.image_bytes);
            let touched = &device.touched;
            shares[device.image as usize].push(Share {
                vm: vms.len(),
                touched,
            });
        }
        vms.push(VmAccount {
            vm: vm.clone(),
            domain: row.domain.clone(),
            profile: row.profile.clone(),
            mapped_bytes,
            resident_bytes: 0,
            shared_bytes: 0,
            charged_bytes: 0,
        });
    }
    let mut images = Vec::with_capacity(table.by_key.len());
    for &index in table.by_key.values() {
        let Some(row) = table.images[index as usize].as_ref() else {
            continue;
        };
        images.push(account_image(row, &shares[index as usize], &mut vms));
    }
    let mut accounting = Accounting {
        images,
        vms,
        ..Accounting::default()
    };
    accounting.sum_up();
    accounting
}

/// Prefix sums over the pages of one image.
struct Prefix {
    /// Charge of one sharer for all pages before this one, in fractions of a byte.
    charge: Vec<u128>,
    /// Resident pages before this one.
    resident: Vec<u32>,
    /// Resident pages with two or more sharers before this one.
    shared: Vec<u32>,
    unclaimed: Pages,
}

fn prefix(row: &ImageRow, shares: &[Share]) -> Prefix {
    let pages = row.whole().end.index();
    // Sharers change only where somebody's run begins or ends.
    let mut change = vec![0i32; pages + 1];
    for run in shares.iter().flat_map(|share| share.touched.runs()) {
        change[run.start.index()] += 1;
        change[run.end.index().min(pages)] -= 1;
    }
    let mut prefix = Prefix {
        charge: vec![0; pages + 1],
        resident: vec![0; pages + 1],
        shared: vec![0; pages + 1],
        unclaimed: Pages::NONE,
    };
    let mut sharers = 0i32;
    let mut resident = row.resident.runs().peekable();
    for (page, change) in change.into_iter().take(pages).enumerate() {
        sharers += change;
        while resident.peek().is_some_and(|run| run.end.index() <= page) {
            resident.next();
        }
        let inside = resident.peek().is_some_and(|run| run.start.index() <= page);
        let mut charge = 0;
        if inside && sharers > 0 {
            charge = (u128::from(PAGE_BYTES) << FRACTION_BITS) / sharers as u128;
        }
        prefix.unclaimed += Pages(u32::from(inside && sharers == 0));
        prefix.charge[page + 1] = prefix.charge[page] + charge;
        prefix.resident[page + 1] = prefix.resident[page] + u32::from(inside);
        prefix.shared[page + 1] = prefix.shared[page] + u32::from(inside && sharers > 1);
    }
    prefix
}

fn account_image(row: &ImageRow, shares: &[Share], vms: &mut [VmAccount]) -> ImageAccount {
    let prefix = prefix(row, shares);
    let pages = row.whole().end.index();
    let mut charges: BTreeMap<usize, u128> = BTreeMap::new();
    for share in shares {
        let account = &mut vms[share.vm];
        let charge = charges.entry(share.vm).or_default();
        for run in share.touched.runs() {
            let (from, to) = (run.start.index(), run.end.index().min(pages));
            *charge += prefix.charge[to] - prefix.charge[from];
            let within = |sums: &[u32]| Pages(sums[to] - sums[from]).bytes();
            account.resident_bytes += within(&prefix.resident);
            account.shared_bytes += within(&prefix.shared);
        }
    }
    let unclaimed_bytes = prefix.unclaimed.bytes();
    let claimed = row.resident.bytes() - unclaimed_bytes;
    let whole: u64 = charges
        .values()
        .map(|charge| (charge >> FRACTION_BITS) as u64)
        .sum();
    // Whole bytes first, then one more each for the largest remainders.
    let mut order: Vec<(u32, usize)> = charges
        .iter()
        .map(|(&vm, &charge)| (charge as u32, vm))
        .collect();
    order.sort_by_key(|&(remainder, vm)| (std::cmp::Reverse(remainder), vm));
    for (&vm, charge) in &charges {
        vms[vm].charged_bytes += (charge >> FRACTION_BITS) as u64;
    }
    for &(_, vm) in order.iter().take((claimed - whole) as usize) {
        vms[vm].charged_bytes += 1;
    }
    let pinned = row.pinned().map(|pinned| &row.resident & pinned);
    ImageAccount {
        image: row.key.clone(),
        mapped_by: row.mapped_by,
        mapped_bytes: row.image_bytes.saturating_mul(u64::from(row.mapped_by)),
        resident_bytes: row.resident.bytes(),
        shared_bytes: Pages(prefix.shared[pages]).bytes(),
        pinned_bytes: pinned.map_or(0, |pages| pages.bytes()),
        prefetched_unused_bytes: row.prefetched_unused.bytes(),
        unclaimed_bytes,
    }
}

impl Accounting {
    fn sum_up(&mut self) {
        for image in &self.images {
            let domain = self.domains.entry(image.image.domain.clone()).or_default();
            for sums in [domain, &mut self.host] {
                sums.mapped_bytes = sums.mapped_bytes.saturating_add(image.mapped_bytes);
                sums.resident_bytes += image.resident_bytes;
                sums.shared_bytes += image.shared_bytes;
                sums.pinned_bytes += image.pinned_bytes;
                sums.prefetched_unused_bytes += image.prefetched_unused_bytes;
                sums.unclaimed_bytes += image.unclaimed_bytes;
            }
        }
        for vm in &self.vms {
            self.domains
                .entry(vm.domain.clone())
                .or_default()
                .charged_bytes += vm.charged_bytes;
            self.host.charged_bytes += vm.charged_bytes;
        }
    }

    /// Checks the invariants named in the module's header; the error says which broke.
    pub fn validate(&self) -> Result<(), String> {
        for (name, sums) in self.domains.iter().map(|(d, s)| (d.as_str(), s)) {
            if sums.charged_bytes + sums.unclaimed_bytes != sums.resident_bytes {
                return Err(format!("charges of domain {name} do not add up: {sums:?}"));
            }
        }
        let host = &self.host;
        if host.charged_bytes + host.unclaimed_bytes != host.resident_bytes {
            return Err(format!("charges of the host do not add up: {host:?}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::{Digest, Extent};
    use proptest::prelude::*;

    use super::*;
    use crate::mapping_table::{Arrival, Phase};
    use crate::names::DeviceImage;

    const PAGES: u64 = 97;

    fn device() -> DeviceImage {
        DeviceImage {
            image: Digest::of(b"base"),
            image_bytes: PAGES * PAGE_BYTES,
        }
    }

    fn table(vms: u32) -> (MappingTable, SharedImage) {
        let domain = Domain::from("d");
        let mut table = MappingTable::new();
        for vm in 0..vms {
            let name = VmName::from(format!("vm{vm:03}"));
            let devices = [device()];
            table
                .map(&name, &domain, &"p".into(), &devices, Phase::Running)
                .unwrap();
        }
        (table, SharedImage::new(domain, device().image))
    }

    #[test]
    fn the_first_vm_pays_no_more_than_the_hundredth() {
        let (mut table, image) = table(100);
        let all = Extent::new(0, PAGES * PAGE_BYTES);
        table
            .complete_fetch(&image, all, Arrival::Prefetch)
            .unwrap();
        let unclaimed = account(&table);
        assert_eq!(unclaimed.host.prefetched_unused_bytes, all.len);
        assert_eq!(
            (unclaimed.host.charged_bytes, unclaimed.host.unclaimed_bytes),
            (0, all.len)
        );
        let names: Vec<VmName> = table.known_vms().map(|vm| vm.0.clone()).collect();
        for (so_far, vm) in names.iter().enumerate() {
            table.touch(vm, &image.image, all).unwrap();
            let accounting = account(&table);
            accounting.validate().unwrap();
            let charged = accounting.vms.iter().map(|vm| vm.charged_bytes);
            let charged: Vec<u64> = charged.filter(|&bytes| bytes > 0).collect();
            assert_eq!(charged.len(), so_far + 1);
            let spread = charged.iter().max().unwrap() - charged.iter().min().unwrap();
            assert!(spread <= 1, "{charged:?}");
        }
        assert_eq!(account(&table).host.shared_bytes, all.len);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn charges_are_exact_and_fair(
            touches in prop::collection::vec((0u32..7, 0..PAGES, 1u64..40), 0..40),
            evicted in prop::collection::vec((0..PAGES, 1u64..30), 0..4),
        ) {
            let (mut table, image) = table(7);
            let extent = |from: u64, len: u64| {
                Extent::new(from * PAGE_BYTES, len.min(PAGES - from) * PAGE_BYTES)
            };
            let mut sharers = vec![std::collections::BTreeSet::new(); PAGES as usize];
            for (vm, from, len) in touches {
                let name = VmName::from(format!("vm{vm:03}"));
                table.touch(&name, &image.image, extent(from, len)).unwrap();
                for page in from..(from + len).min(PAGES) {
                    sharers[page as usize].insert(vm);
                }
            }
            let mut resident: Vec<bool> = sharers.iter().map(|s| !s.is_empty()).collect();
            for (from, len) in evicted {
                table.evict(&image, extent(from, len)).unwrap();
                resident[from as usize..(from + len).min(PAGES) as usize].fill(false);
            }
            let accounting = account(&table);
            accounting.validate().map_err(TestCaseError::fail)?;
            for vm in 0..7u32 {
                let pages = sharers.iter().zip(&resident);
                let exact: f64 = pages
                    .filter(|(sharers, resident)| **resident && sharers.contains(&vm))
                    .map(|(sharers, _)| 4096.0 / sharers.len() as f64)
                    .sum();
                let charged = accounting.vms[vm as usize].charged_bytes as f64;
                prop_assert!((charged - exact).abs() < 1.0, "{} for {}", charged, exact);
            }
        }
    }
}
