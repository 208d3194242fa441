//! Measures the data plane on this host: cold faults by readahead, first touches of pushed
//! pages, pushing, residency, observation, and huge pages against small ones. One JSON
//! line each; times are medians in nanoseconds unless named otherwise. Needs root.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use forelay_image::digest::Digest;
use forelay_image::extent::{Extent, total_bytes};
use forelay_memory::mapping::FileMapping;
use forelay_memory::observe::{self, FileIdentity};
use forelay_memory::{Config, Fault, FileKey, FileSpec, Session, SharedMemory};
use rand::{RngExt as _, SeedableRng as _, seq::SliceRandom as _};
use rand_chacha::ChaCha8Rng;

type Outcome = Result<(), Box<dyn std::error::Error>>;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
const IMAGE_BYTES: u64 = 512 * MIB;

fn main() -> Outcome {
    let dir = tempfile::tempdir()?;
    for readahead_kib in [4, 16, 64, 128, 256, 512, 1024] {
        cold_faults(dir.path(), readahead_kib)?;
    }
    pushed_pages(dir.path())?;
    huge_pages(dir.path())
}

fn start(
    dir: &Path,
    readahead_kib: u32,
) -> Result<(SharedMemory, FileKey), Box<dyn std::error::Error>> {
    let content = vec![0xab; MIB as usize];
    let handler = move |fault: Fault| {
        if let Err(error) = fault.reply.data(&content[..fault.len as usize]) {
            eprintln!("{error}");
        }
    };
    let mut config = Config::new(dir.join("mount"), Session::New);
    config.readahead_kib = readahead_kib;
    let memory = SharedMemory::start(config, Arc::new(handler))?;
    let key = Digest::of(&readahead_kib.to_ne_bytes());
    memory.add_file(key, FileSpec::padded(IMAGE_BYTES))?;
    Ok((memory, key))
}

fn map(path: &Path) -> std::io::Result<FileMapping> {
    FileMapping::new(File::open(path)?, IMAGE_BYTES)
}

fn median(mut samples: Vec<u64>) -> u64 {
    samples.sort_unstable();
    samples[samples.len() / 2]
}

fn touch(mapping: &FileMapping, offset: u64) -> u64 {
    let start = Instant::now();
    std::hint::black_box(mapping.byte_at(offset));
    start.elapsed().as_nanos() as u64
}

fn cold_faults(dir: &Path, readahead_kib: u32) -> Outcome {
    let (memory, key) = start(dir, readahead_kib)?;
    let mapping = map(&memory.path(&key))?;
    // Far apart, so that each is cold; below 100 of them, so that the kernel does not stop
    // reading around.
    let mut offsets: Vec<u64> = (0..90).map(|n| n * 2 * MIB + MIB).collect();
    offsets.shuffle(&mut ChaCha8Rng::seed_from_u64(1));
    let random = median(
        offsets
            .iter()
            .map(|&offset| touch(&mapping, offset))
            .collect(),
    );
    let counters = memory.counters();
    let bytes_per_fault = counters.demand_bytes / offsets.len() as u64;
    let start = Instant::now();
    let before = memory.counters().demand_faults;
    for offset in (200 * MIB..264 * MIB).step_by(PAGE as usize) {
        touch(&mapping, offset);
    }
    let mib_per_s = 64.0 / start.elapsed().as_secs_f64();
    let reads = memory.counters().demand_faults - before;
    println!(
        "{{\"what\":\"cold\",\"readahead_kib\":{readahead_kib},\"fault_ns\":{random},\
         \"bytes_per_fault\":{bytes_per_fault},\"sequential_mib_per_s\":{mib_per_s:.0},\
         \"sequential_reads\":{reads}}}"
    );
    Ok(())
}

fn pushed_pages(dir: &Path) -> Outcome {
    let (memory, key) = start(dir, 128)?;
    let content = vec![0xab; MIB as usize];
    for piece_kib in [4u64, 64, 1024] {
        let start = Instant::now();
        for offset in (0..256 * MIB).step_by((piece_kib << 10) as usize) {
            memory.push(&key, offset, &content[..(piece_kib << 10) as usize])?;
        }
        let gb_per_s = 256.0 * 1.048_576 / 1000.0 / start.elapsed().as_secs_f64();
        println!("{{\"what\":\"push\",\"piece_kib\":{piece_kib},\"gb_per_s\":{gb_per_s:.2}}}");
        memory.evict(&key, &[Extent::new(0, IMAGE_BYTES)])?;
    }
    // Every second page of 256 MiB: the worst case for residency.
    for offset in (0..256 * MIB).step_by(2 * PAGE as usize) {
        memory.push(&key, offset, &content[..PAGE as usize])?;
    }
    let start = Instant::now();
    let resident = memory.resident(&key)?;
    let fragmented_us = start.elapsed().as_micros();
    println!(
        "{{\"what\":\"resident\",\"extents\":{},\"resident_mib\":{},\"file_mib\":{},\"us\":{fragmented_us}}}",
        resident.len(),
        total_bytes(&resident) / MIB,
        IMAGE_BYTES / MIB
    );
    memory.evict(&key, &[Extent::new(0, IMAGE_BYTES)])?;
    for offset in (0..IMAGE_BYTES).step_by(MIB as usize) {
        memory.push(&key, offset, &content)?;
    }
    let path = memory.path(&key);
    let mapping = map(&path)?;
    let first = (0..1000).map(|n| touch(&mapping, n * 64 * 1024)).collect();
    println!(
        "{{\"what\":\"first_touch_pushed\",\"ns\":{}}}",
        median(first)
    );
    random_loads("small pages", &mapping);
    let start = Instant::now();
    let touched = observe::touched(std::process::id(), FileIdentity::of(&path)?)?;
    println!(
        "{{\"what\":\"observe\",\"touched_mib\":{},\"us\":{}}}",
        total_bytes(&touched) / MIB,
        start.elapsed().as_micros()
    );
    let start = Instant::now();
    let freed = memory.evict(&key, &[Extent::new(0, IMAGE_BYTES)])?;
    println!(
        "{{\"what\":\"evict_mapped\",\"freed_mib\":{},\"us\":{}}}",
        freed / MIB,
        start.elapsed().as_micros()
    );
    Ok(())
}

/// Dependent loads at random places: what a TLB miss costs.
fn random_loads(what: &str, mapping: &FileMapping) {
    const LOADS: u64 = 400_000;
    for offset in (0..IMAGE_BYTES).step_by(PAGE as usize) {
        std::hint::black_box(mapping.byte_at(offset));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let offsets: Vec<u64> = (0..LOADS)
        .map(|_| rng.random_range(0..IMAGE_BYTES - 256))
        .collect();
    let start = Instant::now();
    let mut last = 0u64;
    for offset in offsets {
        last = u64::from(mapping.byte_at(offset + (last & 1)));
    }
    std::hint::black_box(last);
    let ns = start.elapsed().as_nanos() as f64 / LOADS as f64;
    println!("{{\"what\":\"random_load\",\"pages\":\"{what}\",\"ns\":{ns:.1}}}");
}

/// What a copy of an image in a tmpfs of huge pages would give (see ARCHITECTURE.md on why
/// there is none).
fn huge_pages(dir: &Path) -> Outcome {
    let pool = dir.join("huge");
    std::fs::create_dir(&pool)?;
    let mut mount = Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", "huge=always", "forelay-bench"]);
    if !mount.arg(&pool).status()?.success() {
        return Err("cannot mount a tmpfs".into());
    }
    let measured = huge_file(&pool.join("image"));
    if !Command::new("umount").arg(&pool).status()?.success() {
        return Err("cannot unmount the tmpfs".into());
    }
    measured
}

fn huge_file(path: &Path) -> Outcome {
    let start = Instant::now();
    let mut file = File::create(path)?;
    let piece = vec![0xab; 2 * MIB as usize];
    for _ in 0..IMAGE_BYTES / (2 * MIB) {
        file.write_all(&piece)?;
    }
    let copy_ms = start.elapsed().as_millis();
    let mapping = map(path)?;
    let first = median(
        (0..200)
            .map(|n| touch(&mapping, n * 2 * MIB + 4096))
            .collect(),
    );
    println!("{{\"what\":\"first_touch_huge\",\"ns\":{first},\"copy_512_mib_ms\":{copy_ms}}}");
    random_loads("huge pages", &mapping);
    Ok(())
}
