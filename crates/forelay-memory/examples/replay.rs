//! Replays recorded touches natively: maps files, reads one byte of each recorded page in
//! the recorded order, and tells how long that took. What a VM does to shared memory,
//! without the VM.
//!
//! Standard input, one a line:
//! ```text
//! file BYTES PATH      maps a file; the first is number 0
//! touch FILE PAGE      reads a byte of that page
//! ```
//! Output: one JSON line with `touches`, `touched_bytes`, `total_ns`, `longest_ns` and
//! `slow` (touches of 20 us and more, mostly those that had to wait for an answer).
//! With `--hold` it then stays until killed, so that its page tables can be observed; with
//! `--lock` it first brings in and locks the files' bytes.

use std::fs::File;
use std::io::BufRead as _;
use std::time::{Duration, Instant};

use forelay_image::extent::Extent;
use forelay_memory::mapping::FileMapping;

const PAGE_BYTES: u64 = 4096;
const SLOW: Duration = Duration::from_micros(20);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut mappings = Vec::new();
    let mut touches = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut fields = line.splitn(3, ' ');
        let malformed = || format!("not `file BYTES PATH` or `touch FILE PAGE`: {line:?}");
        let (kind, first, second) = (fields.next(), fields.next(), fields.next());
        let number: u64 = first.ok_or_else(malformed)?.parse()?;
        match (kind, second) {
            (Some("file"), Some(path)) => {
                mappings.push(FileMapping::new(File::open(path)?, number)?);
            }
            (Some("touch"), Some(page)) => {
                let mapping = mappings.get(number as usize).ok_or_else(malformed)?;
                let offset = page.parse::<u64>()? * PAGE_BYTES;
                if offset >= mapping.len() {
                    return Err(malformed().into());
                }
                touches.push((number as usize, offset as usize));
            }
            _ => return Err(malformed().into()),
        }
    }
    if std::env::args().any(|arg| arg == "--lock") {
        for mapping in &mappings {
            mapping.lock(Extent::new(0, mapping.len()))?;
        }
    }
    let (mut longest, mut slow, mut sum) = (Duration::ZERO, 0u64, 0u64);
    let start = Instant::now();
    let mut last = start;
    for &(file, offset) in &touches {
        let byte = mappings[file].byte_at(offset as u64);
        sum += u64::from(std::hint::black_box(byte));
        let now = Instant::now();
        let took = now - last;
        last = now;
        longest = longest.max(took);
        slow += u64::from(took >= SLOW);
    }
    let total = last - start;
    std::hint::black_box(sum);
    println!(
        "{{\"touches\":{},\"touched_bytes\":{},\"total_ns\":{},\"longest_ns\":{},\"slow\":{slow}}}",
        touches.len(),
        touches.len() as u64 * PAGE_BYTES,
        total.as_nanos(),
        longest.as_nanos(),
    );
    while std::env::args().any(|arg| arg == "--hold") {
        std::thread::park();
    }
    Ok(())
}
