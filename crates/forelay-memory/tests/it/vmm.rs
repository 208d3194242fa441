//! Stock QEMU on the mount: what one cold fault costs with and without the launch hints.
//! The guest never runs; its monitor reads guest-physical memory, which faults in the same
//! mapping at the same place as a guest would.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use forelay_memory::command_hints::Hints;
use forelay_memory::observe::{self, FileIdentity};

use crate::support::{MIB, TestImage, TestMount, eventually, skipped};
use crate::takeover::{FIRST_IMAGE, Holder, signal};

const RAM_MIB: u64 = 96;
/// Where q35 puts the first memory device of a guest with so little RAM.
const PMEM_ADDRESS: u64 = 1 << 32;

struct Qemu {
    process: Child,
}

impl Qemu {
    fn start(pmem: &Path, bytes: u64, hints: Option<Hints>) -> Self {
        let mut command = Command::new("qemu-system-x86_64");
        let backend = format!(
            "memory-backend-file,id=m0,mem-path={},size={bytes},share=on,readonly=on",
            pmem.display()
        );
        command
            .args([
                "-M",
                "q35,accel=tcg",
                "-display",
                "none",
                "-nodefaults",
                "-S",
            ])
            .args(["-m", &format!("{RAM_MIB}M,slots=2,maxmem=1G")])
            .args(["-monitor", "stdio", "-object", &backend])
            .args(["-device", "virtio-pmem-pci,id=p0,memdev=m0"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        if let Some(hints) = hints {
            hints.apply(&mut command);
        }
        let process = command.spawn().unwrap();
        Self { process }
    }

    /// Reads 8 bytes of pmem at each offset, as the monitor prints them, then quits; counts
    /// meanwhile what was read.
    fn read_words(mut self, offsets: &[u64], read: &AtomicUsize) -> Vec<u64> {
        let mut stdin = self.process.stdin.take().unwrap();
        for offset in offsets {
            writeln!(stdin, "xp /1xg {:#x}", PMEM_ADDRESS + offset).unwrap();
        }
        writeln!(stdin, "quit").unwrap();
        let stdout = BufReader::new(self.process.stdout.take().unwrap());
        let lines = stdout.lines().map_while(Result::ok);
        lines
            .filter_map(|line| {
                let (address, value) = line.trim().split_once(": 0x")?;
                address
                    .bytes()
                    .all(|byte| byte.is_ascii_hexdigit())
                    .then_some(())?;
                let word = u64::from_str_radix(value, 16).ok()?;
                read.fetch_add(1, Ordering::Relaxed);
                Some(word)
            })
            .collect()
    }

    /// Whether the guest's RAM may get huge pages.
    fn ram_is_huge(&self) -> bool {
        let Ok(smaps) = std::fs::read_to_string(format!("/proc/{}/smaps", self.process.id()))
        else {
            return false;
        };
        let ram = format!("Size:{:>19} kB", RAM_MIB * 1024);
        let entry = smaps.lines().skip_while(|line| **line != ram);
        let flags = entry
            .into_iter()
            .find_map(|line| line.strip_prefix("VmFlags:"));
        flags.is_some_and(|flags| flags.split_ascii_whitespace().any(|flag| flag == "hg"))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn is_there(test: &str) -> bool {
    let version = Command::new("qemu-system-x86_64").arg("--version").output();
    let there = version.is_ok_and(|output| output.status.success());
    if !there {
        eprintln!("SKIPPED {test}: no qemu-system-x86_64");
    }
    there
}

#[test]
fn privileged_a_hinted_vmm_faults_in_small_pieces() {
    let test = "privileged_a_hinted_vmm_faults_in_small_pieces";
    if skipped(test) || !is_there(test) {
        return;
    }
    let image = TestImage::new(3, 64 * MIB);
    let offsets: Vec<u64> = (0..8).map(|n| (4 + 7 * n) * MIB + 65536).collect();
    let wanted: Vec<u64> = offsets
        .iter()
        .map(|&offset| u64::from_ne_bytes(image.content(offset, 8).try_into().unwrap()))
        .collect();
    let demand_bytes = |hints: Option<Hints>| {
        let mount = TestMount::new(&[image]);
        let path = mount.memory.path(&image.key());
        let identity = FileIdentity::of(&path).unwrap();
        let qemu = Qemu::start(&path, image.spec().device_bytes, hints.clone());
        eventually("QEMU maps the image", || {
            observe::mappings(qemu.process.id(), identity).is_ok_and(|ranges| !ranges.is_empty())
        });
        if hints.is_some() {
            eventually("guest RAM keeps its huge pages", || qemu.ram_is_huge());
        }
        let before = mount.memory.counters().demand_bytes;
        assert_eq!(qemu.read_words(&offsets, &AtomicUsize::new(0)), wanted);
        mount.memory.counters().demand_bytes - before
    };
    let hinted = demand_bytes(Some(Hints {
        guest_ram_bytes: Some(RAM_MIB * MIB),
        ..Hints::default()
    }));
    let plain = demand_bytes(None);
    println!("8 cold faults: {hinted} bytes read with hints, {plain} without");
    assert!(hinted <= 8 * 128 * 1024, "{hinted} bytes for 8 faults");
    assert!(
        plain >= 4 * hinted,
        "{plain} bytes without, {hinted} with hints"
    );
}

#[test]
fn privileged_a_vmm_reads_right_bytes_while_daemons_are_killed() {
    let test = "privileged_a_vmm_reads_right_bytes_while_daemons_are_killed";
    if skipped(test) || !is_there(test) {
        return;
    }
    let holder = Holder::start();
    let mut daemon = holder.next_daemon();
    let path = holder
        .mountpoint()
        .join(format!("{}.img", FIRST_IMAGE.key().hex()));
    let qemu = Qemu::start(
        &path,
        FIRST_IMAGE.spec().device_bytes,
        Some(Hints::default()),
    );
    let pid = qemu.process.id();
    // Every page, in an order that jumps about.
    let pages = FIRST_IMAGE.bytes / 4096;
    let offsets: Vec<u64> = (0..pages).map(|n| n * 1021 % pages * 4096).collect();
    let read = Arc::new(AtomicUsize::new(0));
    let reader = std::thread::spawn({
        let (offsets, read) = (offsets.clone(), Arc::clone(&read));
        move || qemu.read_words(&offsets, &read)
    });
    for kills in 1..=4 {
        // Each daemon serves some of it.
        eventually("QEMU has read on", || {
            read.load(Ordering::Relaxed) > offsets.len() * kills / 8 || reader.is_finished()
        });
        signal(daemon, "KILL");
        daemon = holder.next_daemon();
    }
    let words = reader.join().unwrap();
    assert_eq!(words.len(), offsets.len(), "QEMU {pid} ended early");
    for (word, &offset) in words.iter().zip(&offsets) {
        let wanted = FIRST_IMAGE.content(offset, 8);
        assert_eq!(word.to_ne_bytes(), wanted[..], "at {offset}");
    }
}
