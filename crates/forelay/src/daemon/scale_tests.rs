//! What tells of the whole host at a size for which no test has VMs: a thousand, each with fifty
//! components. Table, registry and services are the real ones; the VMs are rows.
//!
//! Prints what it took; `cargo xtask bench table` measures the account alone, optimized.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use askama::Template as _;
use forelay_cache::mapping_table::{Arrival, Phase};
use forelay_cache::{DeviceImage, SharedImage, VmName};
use forelay_image::{Digest, Extent, PAGE_BYTES};

use super::api::accounts::MemoryAccounts;
use super::api::pages::{PageFrame, memory};
use super::launch::prepared::Preparations;
use super::order::DeviceRecord;
use super::spine_tests::{Spine, can_run, domain, walk};
use super::vm::instance::{self, Instance, VmData};
use super::vm::registry::VmRegistry;

const VMS: usize = 1_000;
const COMPONENTS: u32 = 50;
/// Pages of a component, of which each VM has touched some here and there.
const PAGES: u64 = 2_048;
const TOUCHES: u64 = 8;
/// Promised are 100 ms, optimized and on an idle machine.
const LIMIT: Duration = Duration::from_secs(3);

fn component(number: u32) -> DeviceImage {
    DeviceImage {
        image: Digest::of(&number.to_le_bytes()),
        image_bytes: PAGES * PAGE_BYTES,
    }
}

fn vm_name(number: usize) -> String {
    format!("vm-{number}")
}

/// Fills the table as if VMs had touched what they have.
fn fill(spine: &Spine) {
    let devices: Vec<DeviceImage> = (0..COMPONENTS).map(component).collect();
    let domain = domain();
    for number in 0..VMS {
        let name = VmName::from(vm_name(number));
        spine.memory.table().write(|table| {
            let profile = "scale".into();
            let mapped = table.map(&name, &domain, &profile, &devices, Phase::Running);
            mapped.unwrap();
            for device in &devices {
                for at in 0..TOUCHES {
                    let page = (number as u64 * 13 + at * 251) % (PAGES - 4);
                    let extent = Extent::new(page * PAGE_BYTES, 4 * PAGE_BYTES);
                    table.touch(&name, &device.image, extent).unwrap();
                }
            }
        });
    }
}

fn registry(spine: &Spine) -> VmRegistry {
    let registry = VmRegistry::default();
    let device = |number| {
        let device = component(number);
        DeviceRecord {
            image: device.image,
            image_bytes: device.image_bytes,
            device_bytes: device.image_bytes,
            path: "/nowhere".into(),
            component: format!("component-{number} 1.0"),
            members: Vec::new(),
            memory: false,
            holds: Vec::new(),
        }
    };
    let devices: Vec<DeviceRecord> = (0..COMPONENTS).map(device).collect();
    for number in 0..VMS {
        let name = vm_name(number);
        let data = VmData {
            devices: devices.clone(),
            ..instance::tests::data(&name, spine.dir.path())
        };
        let instance = Instance::launching(&name, data);
        instance.started(std::process::id());
        registry.insert(Arc::new(instance)).unwrap();
    }
    registry
}

#[test]
fn privileged_a_thousand_vms_are_told_of_at_once() {
    if can_run("privileged_a_thousand_vms_are_told_of_at_once") {
        walk(a_thousand_vms());
    }
}

async fn a_thousand_vms() {
    let spine = Spine::start().await;
    fill(&spine);
    let accounts = MemoryAccounts {
        store: spine.store.clone(),
        domains: Arc::clone(&spine.domains),
        memory: Arc::clone(&spine.memory),
        registry: Arc::new(registry(&spine)),
        preparations: Arc::new(Preparations::open(spine.dir.path().join("prepared"))),
        takeover: Arc::default(),
        accountant: Default::default(),
    };
    let (took, writes) = while_written_to(&spine, || drop(accounts.told_by_table()));
    println!("the first account took {took:?}; {writes} writes meanwhile");
    assert!(writes > 1, "the table was held for all of {took:?}");
    // What follows is what a scrape, `forelay memory` and the page take on a busy host.
    let key = SharedImage::new(domain(), component(7).image);
    let first_page = Extent::new(0, PAGE_BYTES);
    let changed = |arrival| {
        let table = spine.memory.table();
        table.write(|table| table.complete_fetch(&key, first_page, arrival).unwrap());
    };
    changed(Arrival::Prefetch);
    let begun = Instant::now();
    let report = accounts.told_by_table();
    let json = serde_json::to_string(&report).unwrap();
    let took = begun.elapsed();
    println!("report and JSON of {} bytes took {took:?}", json.len());
    assert!(took < LIMIT, "{took:?}");
    assert_eq!(report.vms.len(), VMS);
    let components = &report.domains[0].components;
    let mapped_by_all = components.iter().filter(|one| one.mapped_by == VMS);
    assert_eq!(mapped_by_all.count(), COMPONENTS as usize);
    let charged: u64 = report.vms.iter().map(|vm| vm.charged_bytes).sum();
    assert!(charged > 0 && charged == report.charged_bytes);
    let begun = Instant::now();
    let page = memory::page(PageFrame::of_test(), &accounts, &[], String::new());
    let page = page.render().unwrap();
    let took = begun.elapsed();
    println!("a page of {} bytes took {took:?}", page.len());
    assert!(took < LIMIT, "{took:?}");
    assert!(
        page.contains("and 900 more") && page.contains("996 more"),
        "{page}"
    );
}

/// How long `read` took, and how often the table could be written to meanwhile.
fn while_written_to(spine: &Spine, read: impl FnOnce()) -> (Duration, usize) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut writes = 0;
            while !done.load(Ordering::Relaxed) {
                spine.memory.table().write(|_| writes += 1);
                std::thread::sleep(Duration::from_millis(1));
            }
            writes
        });
        let begun = Instant::now();
        read();
        let took = begun.elapsed();
        done.store(true, Ordering::Relaxed);
        (took, writer.join().unwrap())
    })
}
