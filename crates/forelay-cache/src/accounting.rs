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
use std::ops::Bound;

use forelay_image::PAGE_BYTES;
use forelay_image::pages::{PageSet, Pages};
use serde::Serialize;

use crate::mapping_table::{ImageRow, MappingTable, SharedTable, VmRow};
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

/// Words of touched pages that are looked at while the table is held once.
const WORDS_AT_A_TIME: usize = 100_000;

/// Sums up the table.
pub fn account(table: &MappingTable) -> Accounting {
    let mut account = Account::default();
    account.go_on(table, usize::MAX);
    account.sum_up()
}

/// Sums up a table that others use, again and again: images that have not changed since the last
/// account are not looked at again.
#[derive(Debug, Default)]
pub struct Accountant {
    known: BTreeMap<SharedImage, ImageShares>,
}

impl Accountant {
    /// Sums up `table`, the same one each time. It is held for a few images at a time: each image
    /// is accounted for as it was at one moment; a VM that comes or goes meanwhile is in what was
    /// looked at while it was there.
    pub fn account(&mut self, table: &SharedTable) -> Accounting {
        let mut account = Account {
            before: std::mem::take(&mut self.known),
            ..Account::default()
        };
        while !table.read(|table| account.go_on(table, WORDS_AT_A_TIME)) {}
        let accounting = account.sum_up();
        self.known = account.images;
        accounting
    }
}

/// An account that is being made.
#[derive(Default)]
struct Account {
    /// Images as they were in the account before.
    before: BTreeMap<SharedImage, ImageShares>,
    images: BTreeMap<SharedImage, ImageShares>,
    /// By the numbers of their rows.
    vms: BTreeMap<u64, VmAccount>,
}

/// An image's account, and who pays for it.
#[derive(Clone, Debug)]
struct ImageShares {
    /// [`ImageRow::changed`] when it was looked at.
    changed: u64,
    account: ImageAccount,
    charges: Vec<VmCharge>,
}

/// What a VM has of an image.
#[derive(Clone, Copy, Debug, Default)]
struct VmCharge {
    /// Number of its row.
    vm: u64,
    resident_bytes: u64,
    shared_bytes: u64,
    /// In fractions of a byte, until it is settled.
    charge: u128,
}

/// A VM's touched pages of one image.
struct Share<'a> {
    /// Number of its row.
    vm: u64,
    touched: &'a PageSet,
}

impl Account {
    /// Accounts for the images behind the last one: for those that have not changed, and for as
    /// many others as have `words` words of touched pages. True if that was all.
    fn go_on(&mut self, table: &MappingTable, mut words: usize) -> bool {
        for (name, row) in &table.vms {
            let known = self.vms.entry(row.number);
            known.or_insert_with(|| empty_account(name, row, table));
        }
        let after = match self.images.last_key_value() {
            Some((last, _)) => Bound::Excluded(last.clone()),
            None => Bound::Unbounded,
        };
        let mut due: Vec<&ImageRow> = Vec::new();
        // Which of the due an image is.
        let mut places: Vec<Option<usize>> = vec![None; table.images.len()];
        let mut all = true;
        for (key, &index) in table.by_key.range((after, Bound::Unbounded)) {
            let Some(row) = table.images[index as usize].as_ref() else {
                continue;
            };
            let known = self.before.remove(key);
            if let Some(known) = known.filter(|known| known.changed == row.changed) {
                self.images.insert(key.clone(), known);
                continue;
            }
            if words == 0 {
                all = false;
                break;
            }
            let of_image = row.whole().end.index().div_ceil(64) * (row.mapped_by as usize + 1);
            words = words.saturating_sub(of_image);
            places[index as usize] = Some(due.len());
            due.push(row);
        }
        let mut shares: Vec<Vec<Share>> = due.iter().map(|_| Vec::new()).collect();
        let rows = table.vms.values().filter(|_| !due.is_empty());
        for row in rows {
            for device in &row.devices {
                if let Some(at) = places[device.image as usize] {
                    let (vm, touched) = (row.number, &device.touched);
                    shares[at].push(Share { vm, touched });
                }
            }
        }
        for (row, shares) in due.into_iter().zip(shares) {
            let of_image = account_image(row, &shares);
            self.images.insert(row.key.clone(), of_image);
        }
        all
    }

    fn sum_up(&mut self) -> Accounting {
        for charge in self.images.values().flat_map(|one| &one.charges) {
            // Whom an image is charged to was there when it was looked at.
            if let Some(vm) = self.vms.get_mut(&charge.vm) {
                vm.resident_bytes += charge.resident_bytes;
                vm.shared_bytes += charge.shared_bytes;
                vm.charged_bytes += charge.charge as u64;
            }
        }
        let mut vms: BTreeMap<VmName, VmAccount> = BTreeMap::new();
        for vm in std::mem::take(&mut self.vms).into_values() {
            match vms.get_mut(&vm.vm) {
                // One that went, and one that came and has its name.
                Some(known) => {
                    known.resident_bytes += vm.resident_bytes;
                    known.shared_bytes += vm.shared_bytes;
                    known.charged_bytes += vm.charged_bytes;
                }
                None => drop(vms.insert(vm.vm.clone(), vm)),
            }
        }
        let images = self.images.values().map(|one| one.account.clone());
        let mut accounting = Accounting {
            images: images.collect(),
            vms: vms.into_values().collect(),
            ..Accounting::default()
        };
        accounting.sum_up();
        accounting
    }
}

/// The account of a VM before anything is charged to it.
fn empty_account(vm: &VmName, row: &VmRow, table: &MappingTable) -> VmAccount {
    let images = row.devices.iter();
    let images = images.filter_map(|device| table.images[device.image as usize].as_ref());
    VmAccount {
        vm: vm.clone(),
        domain: row.domain.clone(),
        profile: row.profile.clone(),
        mapped_bytes: images.map(|image| image.image_bytes).sum(),
        resident_bytes: 0,
        shared_bytes: 0,
        charged_bytes: 0,
    }
}

/// What 64 pages of an image cost those who touch them.
struct Column {
    resident: u64,
    /// Resident, and touched by two VMs or more.
    shared: u64,
    cost: Cost,
    /// The touched pages that were charged last, and for how much: VMs of one profile touch
    /// much the same.
    last: (u64, u64),
}

/// Charge of one sharer, in fractions of a byte.
enum Cost {
    /// All pages that somebody touched cost the same.
    Same(u64),
    /// For each byte of the word the cost of each choice of its eight pages.
    Choices(Box<[[u64; 256]; 8]>),
}

impl Column {
    fn new(resident: u64, sharers: &[u32; 64]) -> Self {
        let cost_of = |page: usize| match sharers[page] {
            0 => 0,
            sharers => (PAGE_BYTES << FRACTION_BITS) / u64::from(sharers),
        };
        let (mut shared, mut claimed) = (0, 0);
        let (mut least, mut most) = (u64::MAX, 0);
        for page in (0..64).filter(|page| resident >> page & 1 == 1 && sharers[*page] > 0) {
            claimed |= 1u64 << page;
            shared |= u64::from(sharers[page] > 1) << page;
            (least, most) = (least.min(cost_of(page)), most.max(cost_of(page)));
        }
        let cost = if claimed == 0 || least == most {
            Cost::Same(most)
        } else {
            let mut choices = Box::new([[0; 256]; 8]);
            for (byte, choices) in choices.iter_mut().enumerate() {
                for choice in 1..256usize {
                    let page = byte * 8 + choice.trailing_zeros() as usize;
                    let own = if claimed >> page & 1 == 1 {
                        cost_of(page)
                    } else {
                        0
                    };
                    choices[choice] = choices[choice & (choice - 1)] + own;
                }
            }
            Cost::Choices(choices)
        };
        Self {
            resident,
            shared,
            cost,
            last: (0, 0),
        }
    }

    /// What one VM pays for the pages that it touched, in fractions of a byte.
    fn charge(&mut self, touched: u64) -> u64 {
        if self.last.0 == touched {
            return self.last.1;
        }
        let charge = match &self.cost {
            Cost::Same(cost) => cost * u64::from((touched & self.resident).count_ones()),
            Cost::Choices(choices) => {
                let bytes = touched.to_le_bytes().into_iter().zip(choices.iter());
                bytes
                    .map(|(byte, choices)| choices[usize::from(byte)])
                    .sum()
            }
        };
        self.last = (touched, charge);
        charge
    }
}

/// How many VMs touched each page: sums in binary, a bit of all 64 sums to a word, so that
/// adding a VM's pages costs about as much for one page as for 64.
struct Sharers {
    /// Words for each 64 pages.
    digits: usize,
    sums: Vec<u64>,
}

impl Sharers {
    fn of(shares: &[Share], words: usize) -> Self {
        let digits = (usize::BITS - shares.len().leading_zeros()) as usize;
        let mut sharers = Self {
            digits,
            sums: vec![0; words * digits],
        };
        for share in shares {
            share.touched.each_word(|word, bits| {
                let Some(sums) = sharers.sums.get_mut(word * digits..(word + 1) * digits) else {
                    return;
                };
                let mut carry = bits;
                for sum in sums {
                    (*sum, carry) = (*sum ^ carry, *sum & carry);
                    if carry == 0 {
                        break;
                    }
                }
            });
        }
        sharers
    }

    /// Of the pages of a word.
    fn of_word(&self, word: usize) -> [u32; 64] {
        let sums = &self.sums[word * self.digits..(word + 1) * self.digits];
        std::array::from_fn(|page| {
            let digits = sums.iter().enumerate();
            digits
                .map(|(digit, sum)| ((sum >> page & 1) as u32) << digit)
                .sum()
        })
    }
}

fn account_image(row: &ImageRow, shares: &[Share]) -> ImageShares {
    let words = row.whole().end.index().div_ceil(64);
    let sharers = Sharers::of(shares, words);
    let mut resident = vec![0; words];
    row.resident.each_word(|word, bits| resident[word] |= bits);
    let columns = resident.into_iter().enumerate();
    let mut columns: Vec<Column> = columns
        .map(|(word, resident)| Column::new(resident, &sharers.of_word(word)))
        .collect();
    let mut charges: Vec<VmCharge> = Vec::with_capacity(shares.len());
    for share in shares {
        let (mut charge, mut resident, mut shared) = (0, 0, 0);
        share.touched.each_word(|word, bits| {
            let Some(column) = columns.get_mut(word) else {
                return;
            };
            charge += u128::from(column.charge(bits));
            resident += (bits & column.resident).count_ones();
            shared += (bits & column.shared).count_ones();
        });
        // A VM that has it twice is one.
        if charges.last().is_none_or(|last| last.vm != share.vm) {
            charges.push(VmCharge {
                vm: share.vm,
                ..VmCharge::default()
            });
        }
        if let Some(of_vm) = charges.last_mut() {
            of_vm.charge += charge;
            of_vm.resident_bytes += Pages(resident).bytes();
            of_vm.shared_bytes += Pages(shared).bytes();
        }
    }
    let touched = (0..words).map(|word| {
        let sums = &sharers.sums[word * sharers.digits..(word + 1) * sharers.digits];
        sums.iter().fold(0, |any, sum| any | sum)
    });
    let unclaimed = columns.iter().zip(touched);
    let unclaimed = unclaimed.map(|(column, touched)| (column.resident & !touched).count_ones());
    let unclaimed_bytes = Pages(unclaimed.sum()).bytes();
    let shared = columns.iter().map(|column| column.shared.count_ones());
    let shared_bytes = Pages(shared.sum()).bytes();
    settle(&mut charges, row.resident.bytes() - unclaimed_bytes);
    let pinned = row.pinned().map(|pinned| &row.resident & pinned);
    let account = ImageAccount {
        image: row.key.clone(),
        mapped_by: row.mapped_by,
        mapped_bytes: row.image_bytes.saturating_mul(u64::from(row.mapped_by)),
        resident_bytes: row.resident.bytes(),
        shared_bytes,
        pinned_bytes: pinned.map_or(0, |pages| pages.bytes()),
        prefetched_unused_bytes: row.prefetched_unused.bytes(),
        unclaimed_bytes,
    };
    ImageShares {
        changed: row.changed,
        account,
        charges,
    }
}

/// Charges whole bytes first, then one more each for the largest remainders, `claimed` in all.
fn settle(charges: &mut [VmCharge], claimed: u64) {
    let mut left = claimed;
    let mut order: Vec<(u32, usize)> = Vec::with_capacity(charges.len());
    for (at, one) in charges.iter_mut().enumerate() {
        order.push((one.charge as u32, at));
        one.charge >>= FRACTION_BITS;
        left -= one.charge as u64;
    }
    order.sort_unstable_by_key(|&(remainder, at)| (std::cmp::Reverse(remainder), at));
    for &(_, at) in order.iter().take(left as usize) {
        charges[at].charge += 1;
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

    /// In parts as in one, whatever there is to look at while the table is held.
    #[test]
    fn an_account_made_in_parts_is_the_account() {
        let (mut table, image) = table(5);
        let domain = image.domain.clone();
        let more = (0..4u8).map(|n| DeviceImage {
            image: Digest::of(&[n]),
            image_bytes: (u64::from(n) * 64 + 1) * PAGE_BYTES,
        });
        for (at, device) in more.enumerate() {
            let vm = VmName::from(format!("vm{at:03}"));
            table.attach(&vm, &device).unwrap();
            let touched = Extent::new(0, device.image_bytes.min(70 * PAGE_BYTES));
            table.touch(&vm, &device.image, touched).unwrap();
            let key = SharedImage::new(domain.clone(), device.image);
            table.pin(&key, Extent::new(0, PAGE_BYTES)).unwrap();
        }
        table
            .touch(
                &"vm002".into(),
                &image.image,
                Extent::new(0, 66 * PAGE_BYTES),
            )
            .unwrap();
        let whole = account(&table);
        whole.validate().unwrap();
        assert_eq!(whole.images.len(), 5);
        for words in [1, 3, 20] {
            let mut parts = Account::default();
            let mut looks = 1;
            while !parts.go_on(&table, words) {
                looks += 1;
            }
            assert_eq!(
                (parts.sum_up(), looks > 1),
                (whole.clone(), true),
                "{words}"
            );
        }
        let shared = SharedTable::new(table);
        assert_eq!(Accountant::default().account(&shared), whole);
    }

    /// One operation on the table by numbers: whatever they are, it does something or is refused.
    fn change(
        table: &mut MappingTable,
        domain: &Domain,
        (kind, vm, image, from): (u8, u8, u8, u64),
    ) {
        let name = VmName::from(format!("vm{vm}"));
        let device = DeviceImage {
            image: Digest::of(&[image]),
            image_bytes: (u64::from(image) * 40 + 30) * PAGE_BYTES,
        };
        let key = SharedImage::new(domain.clone(), device.image);
        let extent = Extent::new(from * PAGE_BYTES, 9 * PAGE_BYTES);
        let profile = ProfileName::from("p");
        // What is refused changes nothing.
        let _ = match kind {
            0 => table.map(&name, domain, &profile, &[device], Phase::Running),
            1 => table.unmap(&name),
            2 => table.attach(&name, &device),
            3 => table.detach(&name, &device.image),
            4 => table.rename(&name, &VmName::from(format!("other{vm}"))),
            5 => table.pin(&key, extent),
            6 => table.unpin(&key, extent).map(drop),
            7 => table.evict(&key, extent).map(drop),
            8 => table
                .complete_fetch(&key, extent, Arrival::Prefetch)
                .map(drop),
            9 => table.add_image(domain, &device),
            _ => table.touch(&name, &device.image, extent).map(drop),
        };
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        /// Whatever happened since the account before, the next is what one from nothing is.
        #[test]
        fn an_account_that_knows_the_one_before_is_the_account(
            steps in prop::collection::vec(
                prop::collection::vec((0u8..16, 0u8..4, 0u8..4, 0u64..40), 0..12),
                1..12,
            ),
        ) {
            let domain = Domain::from("d");
            let table = SharedTable::default();
            let mut accountant = Accountant::default();
            for changes in steps {
                for one in changes {
                    table.write(|table| change(table, &domain, one));
                }
                let told = accountant.account(&table);
                told.validate().map_err(TestCaseError::fail)?;
                prop_assert_eq!(told, table.read(account));
            }
        }

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
