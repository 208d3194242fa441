//! The mapping table at 1,000 VMs x 50 components, every extent fully fragmented: time of
//! each operation (p50, p99, worst) and memory.
//!
//! `cargo run --release -p forelay-cache --example bench_table -- [OUT.json]`
//!
//! Components have 20 MiB on average (1 GiB a VM). "Fully fragmented" is the worst case
//! of any range compression: every second page is resident, and every VM has touched
//! every second page of every component.

mod report;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use forelay_cache::accounting::{Accountant, account};
use forelay_cache::mapping_table::{Arrival, MappingTable, Phase, SharedTable};
use forelay_cache::{DeviceImage, Domain, SharedImage, VmName};
use forelay_image::{Digest, Extent, PAGE_BYTES};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

const VMS: usize = 1_000;
const COMPONENTS: usize = 50;
const OPERATIONS: usize = 20_000;

fn pages_of(component: usize) -> u64 {
    // 10 to 30 MiB, 20 MiB on average.
    2560 + (component as u64 * 5120) / COMPONENTS as u64
}

fn every_second_page(pages: u64) -> impl Iterator<Item = Extent> {
    (0..pages)
        .step_by(2)
        .map(|page| Extent::new(page * PAGE_BYTES, PAGE_BYTES))
}

fn build(devices: &[DeviceImage], domain: &Domain, vms: &[VmName]) -> MappingTable {
    let mut table = MappingTable::new();
    for vm in vms {
        table
            .map(vm, domain, &"p".into(), devices, Phase::Running)
            .expect("a new VM");
    }
    for (at, device) in devices.iter().enumerate() {
        let image = SharedImage::new(domain.clone(), device.image);
        for extent in every_second_page(pages_of(at)) {
            table
                .complete_fetch(&image, extent, Arrival::Prefetch)
                .expect("within the image");
        }
        for vm in vms {
            for extent in every_second_page(pages_of(at)) {
                table
                    .touch(vm, &device.image, extent)
                    .expect("within the image");
            }
        }
    }
    table.compact();
    table
}

/// Times `OPERATIONS` runs of `operation` and prints and returns quantiles.
fn measure(
    name: &str,
    worst_p99_us: &mut f64,
    mut operation: impl FnMut(usize),
) -> (String, Value) {
    let mut took_ns: Vec<u64> = (0..OPERATIONS)
        .map(|at| {
            let begun = Instant::now();
            operation(at);
            begun.elapsed().as_nanos() as u64
        })
        .collect();
    took_ns.sort_unstable();
    let us = |share: f64| took_ns[((OPERATIONS - 1) as f64 * share) as usize] as f64 / 1e3;
    let (p50_us, p99_us, max_us) = (us(0.5), us(0.99), us(1.0));
    *worst_p99_us = worst_p99_us.max(p99_us);
    println!("{name:16} p50 {p50_us:8.2} us   p99 {p99_us:8.2} us   max {max_us:9.2} us");
    (
        name.to_owned(),
        json!({ "p50_us": p50_us, "p99_us": p99_us, "max_us": max_us }),
    )
}

/// The account of a table that somebody wants to write to all the while, and how long the
/// writer waits.
fn measure_shared(table: MappingTable, images: &[SharedImage]) -> Value {
    let table = SharedTable::new(table);
    let done = AtomicBool::new(false);
    let first_page = Extent::new(0, PAGE_BYTES);
    let (mut took_ms, mut again_ms, mut waited_ms) = (Vec::new(), Vec::new(), 0.0f64);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut longest_ms = 0.0f64;
            while !done.load(Ordering::Relaxed) {
                let begun = Instant::now();
                table.write(|_| ());
                longest_ms = longest_ms.max(begun.elapsed().as_secs_f64() * 1e3);
                std::thread::yield_now();
            }
            longest_ms
        });
        let mut accountant = Accountant::default();
        let time = |took_ms: &mut Vec<f64>, accountant: &mut Accountant| {
            let begun = Instant::now();
            let accounting = accountant.account(&table);
            took_ms.push(begun.elapsed().as_secs_f64() * 1e3);
            accounting.validate().expect("charges add up");
        };
        for _ in 0..10 {
            accountant = Accountant::default();
            time(&mut took_ms, &mut accountant);
        }
        for image in images.iter().take(10) {
            // One of all images has changed since, as between two scrapes of a busy host.
            table.write(|table| table.evict(image, first_page).expect("known"));
            time(&mut again_ms, &mut accountant);
        }
        done.store(true, Ordering::Relaxed);
        waited_ms = writer.join().expect("the writer ends");
    });
    took_ms.sort_by(f64::total_cmp);
    again_ms.sort_by(f64::total_cmp);
    let (best_ms, median_ms, again_ms) = (took_ms[0], took_ms[5], again_ms[5]);
    println!(
        "account while written to {median_ms:.0} ms, best {best_ms:.0}, again {again_ms:.1}; a writer waits {waited_ms:.1} ms at most"
    );
    json!({
        "median_ms": median_ms,
        "best_ms": best_ms,
        "again_ms": again_ms,
        "writer_waits_ms": waited_ms,
    })
}

fn main() {
    let domain = Domain::from("tenant");
    let device = |at: usize| DeviceImage {
        image: Digest::of(&at.to_le_bytes()),
        image_bytes: pages_of(at) * PAGE_BYTES,
    };
    let devices: Vec<DeviceImage> = (0..COMPONENTS).map(device).collect();
    let images: Vec<SharedImage> = devices
        .iter()
        .map(|device| SharedImage::new(domain.clone(), device.image))
        .collect();
    let vms: Vec<VmName> = (0..VMS)
        .map(|vm| VmName::from(format!("vm-{vm:04}")))
        .collect();
    let begun = Instant::now();
    let mut table = build(&devices, &domain, &vms);
    println!("built in {:.1} s", begun.elapsed().as_secs_f64());
    let heap_bytes = table.heap_bytes();
    println!("table {:.1} MiB", heap_bytes as f64 / (1 << 20) as f64);

    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut draw = move || {
        let component = random.random_range(0..COMPONENTS);
        let page = random.random_range(0..pages_of(component) - 8);
        let extent = Extent::new(page * PAGE_BYTES, random.random_range(1..=8) * PAGE_BYTES);
        (random.random_range(0..VMS), component, extent)
    };
    let picks: Vec<_> = (0..OPERATIONS).map(|_| draw()).collect();
    let mut worst_us = 0.0f64;
    let worst = &mut worst_us;
    let mut operations = serde_json::Map::new();
    operations.extend([measure("lookup", worst, |at| {
        let (vm, component, extent) = picks[at];
        let entry = table.lookup(vms[vm].as_str(), &devices[component].image, extent.offset);
        assert!(std::hint::black_box(entry).is_some());
    })]);
    operations.extend([measure("touch", worst, |at| {
        let (vm, component, extent) = picks[at];
        table
            .touch(&vms[vm], &devices[component].image, extent)
            .expect("known");
    })]);
    operations.extend([measure("evict", worst, |at| {
        let (_, component, extent) = picks[at];
        table.evict(&images[component], extent).expect("known");
    })]);
    operations.extend([measure("begin_fetch", worst, |at| {
        let (_, component, extent) = picks[at];
        table
            .begin_fetch(&images[component], extent)
            .expect("known");
    })]);
    operations.extend([measure("complete_fetch", worst, |at| {
        let (_, component, extent) = picks[at];
        table
            .complete_fetch(&images[component], extent, Arrival::Demand)
            .expect("known");
    })]);
    operations.extend([measure("pin", worst, |at| {
        let (_, component, extent) = picks[at];
        table.pin(&images[component], extent).expect("known");
    })]);
    operations.extend([measure("unpin", worst, |at| {
        let (_, component, extent) = picks[at];
        table.unpin(&images[component], extent).expect("known");
    })]);
    let other = DeviceImage {
        image: Digest::of(b"hot"),
        image_bytes: 1 << 20,
    };
    operations.extend([measure("attach", worst, |at| {
        table.attach(&vms[picks[at].0], &other).expect("known");
    })]);
    operations.extend([measure("detach", worst, |at| {
        table
            .detach(&vms[picks[at].0], &other.image)
            .expect("attached before");
    })]);
    let extra: Vec<VmName> = (0..OPERATIONS)
        .map(|vm| VmName::from(format!("new-{vm}")))
        .collect();
    operations.extend([measure("map 50 devices", worst, |at| {
        if at > 0 {
            table.unmap(&extra[at - 1]).expect("mapped before");
        }
        table
            .map(&extra[at], &domain, &"p".into(), &devices, Phase::Premapped)
            .expect("new");
    })]);
    let begun = Instant::now();
    let accounting = account(&table);
    accounting.validate().expect("charges add up");
    let account_ms = begun.elapsed().as_secs_f64() * 1e3;
    println!("account of everything {account_ms:.0} ms; worst p99 {worst_us:.1} us");
    table.validate().expect("valid after all operations");
    let shared = measure_shared(table, &images);
    report::write(&json!({
        "vms": VMS,
        "components": COMPONENTS,
        "mapped_bytes_per_vm": devices.iter().map(|device| device.image_bytes).sum::<u64>(),
        "table_bytes": heap_bytes,
        "table_mib": heap_bytes as f64 / (1 << 20) as f64,
        "worst_p99_us": worst_us,
        "account_ms": account_ms,
        "account_shared": shared,
        "operations": operations,
    }));
}
