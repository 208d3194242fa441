//! Model-based test: the table against a naive map of pages, checked after every step.

use std::collections::{BTreeMap, BTreeSet};

use forelay_image::{Digest, Extent, PAGE_BYTES};
use proptest::prelude::*;

use super::{Absent, Arrival, MappingTable, PageState, Phase, TouchOutcome};
use crate::names::{DeviceImage, Domain, ProfileName, SharedImage, VmName};

const IMAGE_PAGES: u64 = 150;

#[derive(Clone, Debug)]
enum Op {
    Map(u8, Vec<u8>, bool),
    Unmap(u8),
    Attach(u8, u8),
    Detach(u8, u8),
    Touch(u8, u8, u64, u64),
    Add(u8),
    Begin(u8, u64, u64),
    Complete(u8, u64, u64, bool),
    Abort(u8, u64, u64),
    Evict(u8, u64, u64),
    Pin(u8, u64, u64),
    Unpin(u8, u64, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let span = || (0u8..3, 0..IMAGE_PAGES, 0u64..40);
    prop_oneof![
        (0u8..5, prop::collection::vec(0u8..3, 0..4), any::<bool>())
            .prop_map(|(vm, images, run)| Op::Map(vm, images, run)),
        (0u8..5).prop_map(Op::Unmap),
        (0u8..5, 0u8..3).prop_map(|(vm, image)| Op::Attach(vm, image)),
        (0u8..5, 0u8..3).prop_map(|(vm, image)| Op::Detach(vm, image)),
        (0u8..5, span()).prop_map(|(vm, (image, from, len))| Op::Touch(vm, image, from, len)),
        (0u8..3).prop_map(Op::Add),
        span().prop_map(|(image, from, len)| Op::Begin(image, from, len)),
        (span(), any::<bool>())
            .prop_map(|((image, from, len), demand)| Op::Complete(image, from, len, demand)),
        span().prop_map(|(image, from, len)| Op::Abort(image, from, len)),
        span().prop_map(|(image, from, len)| Op::Evict(image, from, len)),
        span().prop_map(|(image, from, len)| Op::Pin(image, from, len)),
        span().prop_map(|(image, from, len)| Op::Unpin(image, from, len)),
    ]
}

#[derive(Clone, Copy, Default)]
struct Page {
    resident: bool,
    fetching: bool,
    unused: bool,
    pins: u32,
}

/// Everything by the page, nothing clever.
#[derive(Default)]
struct Model {
    known: BTreeMap<u8, Vec<Page>>,
    vms: BTreeMap<u8, Vec<(u8, BTreeSet<u64>)>>,
}

impl Model {
    fn know(&mut self, image: u8) {
        let fresh = || vec![Page::default(); IMAGE_PAGES as usize];
        self.known.entry(image).or_insert_with(fresh);
    }

    fn mapped_by(&self, image: u8) -> u32 {
        let devices = self.vms.values().flatten();
        devices.filter(|device| device.0 == image).count() as u32
    }

    fn forget_unused(&mut self, image: u8) {
        let idle = |page: &Page| !page.resident && !page.fetching && page.pins == 0;
        let unused = self
            .known
            .get(&image)
            .is_some_and(|pages| pages.iter().all(idle));
        if unused && self.mapped_by(image) == 0 {
            self.known.remove(&image);
        }
    }

    fn pages(&mut self, image: u8, from: u64, len: u64) -> Option<&mut [Page]> {
        let end = from + len;
        let pages = self.known.get_mut(&image)?;
        (end <= IMAGE_PAGES).then(|| &mut pages[from as usize..end as usize])
    }
}

fn domain() -> Domain {
    Domain::from("d")
}

fn device(image: u8) -> DeviceImage {
    DeviceImage {
        image: Digest::of(&[image]),
        image_bytes: IMAGE_PAGES * PAGE_BYTES,
    }
}

fn key(image: u8) -> SharedImage {
    SharedImage::new(domain(), device(image).image)
}

fn vm_name(vm: u8) -> VmName {
    VmName::from(format!("vm{vm}"))
}

fn extent(from: u64, len: u64) -> Extent {
    Extent::new(from * PAGE_BYTES, len * PAGE_BYTES)
}

fn bytes(pages: usize) -> u64 {
    pages as u64 * PAGE_BYTES
}

/// Applies `op` to both; `Some` answers must be equal, `None` means "refused".
fn apply_to_vms(
    table: &mut MappingTable,
    model: &mut Model,
    op: &Op,
) -> (Option<u64>, Option<u64>) {
    match op {
        Op::Map(vm, images, run) => {
            let devices: Vec<_> = images.iter().map(|&image| device(image)).collect();
            let phase = if *run {
                Phase::Running
            } else {
                Phase::Premapped
            };
            let profile = ProfileName::from("p");
            let got = table.map(&vm_name(*vm), &domain(), &profile, &devices, phase);
            let expected = (!model.vms.contains_key(vm)).then(|| {
                images.iter().for_each(|&image| model.know(image));
                let rows = images.iter().map(|&image| (image, BTreeSet::new()));
                model.vms.insert(*vm, rows.collect());
                0
            });
            (got.ok().map(|()| 0), expected)
        }
        Op::Unmap(vm) => {
            let got = table.unmap(&vm_name(*vm));
            let expected = model.vms.remove(vm).map(|devices| {
                devices
                    .iter()
                    .for_each(|device| model.forget_unused(device.0));
                0
            });
            (got.ok().map(|()| 0), expected)
        }
        Op::Attach(vm, image) => {
            let got = table.attach(&vm_name(*vm), &device(*image));
            let expected = model.vms.contains_key(vm).then(|| {
                model.know(*image);
                let devices = model.vms.get_mut(vm).unwrap();
                devices.push((*image, BTreeSet::new()));
                0
            });
            (got.ok().map(|()| 0), expected)
        }
        Op::Detach(vm, image) => {
            let got = table.detach(&vm_name(*vm), &device(*image).image);
            let at = model
                .vms
                .get(vm)
                .and_then(|d| d.iter().rposition(|d| d.0 == *image));
            let expected = at.map(|at| {
                model.vms.get_mut(vm).unwrap().remove(at);
                model.forget_unused(*image);
                0
            });
            (got.ok().map(|()| 0), expected)
        }
        Op::Touch(vm, image, from, len) => {
            let got = table.touch(&vm_name(*vm), &device(*image).image, extent(*from, *len));
            let device = model.vms.get_mut(vm);
            let device = device.and_then(|d| d.iter_mut().rfind(|device| device.0 == *image));
            let within = from + len <= IMAGE_PAGES;
            let expected = device.filter(|_| within).map(|device| {
                let before = device.1.len();
                device.1.extend(*from..from + len);
                bytes(device.1.len() - before)
            });
            let expected = expected.map(|first| {
                let pages = model.pages(*image, *from, *len).unwrap();
                let learned = pages.iter().filter(|page| !page.resident).count();
                for page in pages {
                    (page.resident, page.fetching, page.unused) = (true, false, false);
                }
                bytes(learned) << 32 | first
            });
            let both = |touch: TouchOutcome| touch.learned_bytes << 32 | touch.first_touch_bytes;
            (got.ok().map(both), expected)
        }
        _ => unreachable!("page operations are applied elsewhere"),
    }
}

fn apply_to_pages(
    table: &mut MappingTable,
    model: &mut Model,
    op: &Op,
) -> (Option<u64>, Option<u64>) {
    let count = |pages: &[Page], which: fn(&Page) -> bool| {
        bytes(pages.iter().filter(|page| which(page)).count())
    };
    match *op {
        Op::Add(image) => {
            model.know(image);
            (
                table.add_image(&domain(), &device(image)).ok().map(|()| 0),
                Some(0),
            )
        }
        Op::Begin(image, from, len) => {
            let got = table.begin_fetch(&key(image), extent(from, len));
            let expected = model.pages(image, from, len).map(|pages| {
                let missing = count(pages, |page| !page.resident && !page.fetching);
                let idle = pages.iter_mut().filter(|page| !page.resident);
                idle.for_each(|page| page.fetching = true);
                missing
            });
            (
                got.ok().map(|got| got.iter().map(|e| e.len).sum()),
                expected,
            )
        }
        Op::Complete(image, from, len, demand) => {
            let how = if demand {
                Arrival::Demand
            } else {
                Arrival::Prefetch
            };
            let got = table.complete_fetch(&key(image), extent(from, len), how);
            let expected = model.pages(image, from, len).map(|pages| {
                let new = count(pages, |page| !page.resident);
                for page in pages {
                    page.unused |= !page.resident && !demand;
                    (page.resident, page.fetching) = (true, false);
                }
                new
            });
            (got.ok(), expected)
        }
        Op::Abort(image, from, len) => {
            let got = table.abort_fetch(&key(image), extent(from, len));
            let expected = model.pages(image, from, len).map(|pages| {
                let stopped = count(pages, |page| page.fetching);
                pages.iter_mut().for_each(|page| page.fetching = false);
                stopped
            });
            model.forget_if(expected.is_some(), image);
            (got.ok(), expected)
        }
        Op::Evict(image, from, len) => {
            let got = table.evict(&key(image), extent(from, len));
            let expected = model.pages(image, from, len).map(|pages| {
                let freed = count(pages, |page| page.resident && page.pins == 0);
                for page in pages.iter_mut().filter(|page| page.pins == 0) {
                    (page.resident, page.unused) = (false, false);
                }
                freed
            });
            model.forget_if(expected.is_some(), image);
            (got.ok(), expected)
        }
        Op::Pin(image, from, len) => {
            let got = table.pin(&key(image), extent(from, len));
            let expected = model.pages(image, from, len).map(|pages| {
                pages.iter_mut().for_each(|page| page.pins += 1);
                0
            });
            (got.ok().map(|()| 0), expected)
        }
        Op::Unpin(image, from, len) => {
            let got = table.unpin(&key(image), extent(from, len));
            let expected = model.pages(image, from, len).map(|pages| {
                let unpinned = count(pages, |page| page.pins > 0);
                pages
                    .iter_mut()
                    .for_each(|page| page.pins = page.pins.saturating_sub(1));
                unpinned
            });
            model.forget_if(expected.is_some(), image);
            (got.ok(), expected)
        }
        _ => unreachable!("VM operations are applied elsewhere"),
    }
}

impl Model {
    fn forget_if(&mut self, happened: bool, image: u8) {
        if happened {
            self.forget_unused(image);
        }
    }

    fn state(&self, image: u8, page: u64) -> PageState {
        match self.known.get(&image).map(|pages| pages[page as usize]) {
            Some(page) if page.resident => PageState::Resident,
            Some(page) if page.fetching => PageState::Fetching,
            Some(_) if self.mapped_by(image) > 0 => PageState::Reserved,
            _ => PageState::Absent,
        }
    }
}

fn compare(table: &MappingTable, model: &Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(table.known_images().count(), model.known.len());
    for image in 0..3 {
        for page in 0..IMAGE_PAGES {
            let state = table.state(&key(image), page * PAGE_BYTES);
            prop_assert_eq!(state, model.state(image, page));
        }
        let absent = table.absent(&key(image), extent(0, IMAGE_PAGES));
        let state_of = |part: &Absent, page: u64| match part.fetching {
            true => model.state(image, page) == PageState::Fetching,
            false => model.state(image, page) < PageState::Fetching,
        };
        let mut pages = Vec::new();
        for part in &absent {
            let (from, to) = (
                part.extent.offset / PAGE_BYTES,
                part.extent.end() / PAGE_BYTES,
            );
            prop_assert!((from..to).all(|page| state_of(part, page)), "{:?}", part);
            pages.extend(from..to);
        }
        let expected = (0..IMAGE_PAGES).filter(|p| model.state(image, *p) < PageState::Resident);
        prop_assert_eq!(pages, expected.collect::<Vec<_>>());
        let joined = |pair: &[Absent]| {
            pair[0].extent.end() == pair[1].extent.offset && pair[0].fetching == pair[1].fetching
        };
        prop_assert!(!absent.windows(2).any(joined), "{:?}", absent);
    }
    for (&vm, devices) in &model.vms {
        for (at, (image, touched)) in devices.iter().enumerate() {
            if devices[..at].iter().any(|(earlier, _)| earlier == image) {
                // An image mapped twice is found at its first device.
                continue;
            }
            for page in (0..IMAGE_PAGES).step_by(7) {
                let name = vm_name(vm);
                let entry = table.lookup(name.as_str(), &device(*image).image, page * PAGE_BYTES);
                let entry = entry.expect("the model has this device");
                let model_page = model.known[image][page as usize];
                prop_assert_eq!(entry.state, model.state(*image, page));
                prop_assert_eq!(entry.pins, model_page.pins);
                prop_assert_eq!(entry.references, model.mapped_by(*image));
                prop_assert_eq!(entry.touched, touched.contains(&page));
                let same = |p: u64| model.state(*image, p) == entry.state;
                let (first, end) = (
                    entry.extent.offset / PAGE_BYTES,
                    entry.extent.end() / PAGE_BYTES,
                );
                prop_assert!((first..end).contains(&page) && (first..end).all(same));
                prop_assert!(first == 0 || !same(first - 1));
                prop_assert!(end == IMAGE_PAGES || !same(end));
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn every_transition_agrees_with_a_naive_page_model(ops in prop::collection::vec(op(), 1..60)) {
        let mut table = MappingTable::new();
        let mut model = Model::default();
        for op in &ops {
            let (got, expected) = match op {
                Op::Map(..) | Op::Unmap(_) | Op::Attach(..) | Op::Detach(..) | Op::Touch(..) => {
                    apply_to_vms(&mut table, &mut model, op)
                }
                _ => apply_to_pages(&mut table, &mut model, op),
            };
            prop_assert_eq!(got, expected, "{:?}", op);
            table.validate().map_err(TestCaseError::fail)?;
        }
        compare(&table, &model)?;
    }
}
