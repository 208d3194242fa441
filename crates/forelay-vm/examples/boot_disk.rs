//! Boots a VM from a disk with the same kernel, guest init and VMM settings that composed
//! VMs get, and tells how long it took: what composed VMs are compared with.
//!
//! Usage: `boot_disk KERNEL INITRD DISK.qcow2 [MEMORY_MIB] [--hold] [--forward PORT]`. Prints
//! one JSON line with `ready_s`, `cpu_s`, `guest_cached_bytes` and `pid`; the VM is stopped, with
//! `--hold` when standard input ends, and its runtime directory removed. `--forward` leads a port
//! of the host to port 80 of the guest.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use forelay_vm::qemu::QemuDriver;
use forelay_vm::{Boot, Disk, DiskFormat, Forward, VmSpec, VmmDriver as _};

const LIMIT: Duration = Duration::from_secs(300);

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, disk, rest @ ..] = arguments.as_slice() else {
        return Err("usage: boot_disk KERNEL INITRD DISK.qcow2 [MEMORY_MIB]".into());
    };
    let runtime_dir = std::env::temp_dir().join(format!("boot-disk-{}", std::process::id()));
    let disk = Disk {
        path: PathBuf::from(disk),
        format: DiskFormat::Qcow2,
        read_only: false,
    };
    let mut spec = VmSpec::new("boot-disk", kernel.into(), initrd.into(), Boot::Root(disk));
    // Nothing is plugged in later.
    spec.hotplug_bytes = 0;
    spec.memory_mib = rest.first().map_or(Ok(256), |text| text.parse())?;
    spec.console_log = runtime_dir.join("console.log");
    spec.runtime_dir.clone_from(&runtime_dir);
    let hold = rest.iter().any(|argument| argument == "--hold");
    let mut forward = rest.iter().skip_while(|argument| *argument != "--forward");
    if let Some(port) = forward.nth(1) {
        spec.forwards = vec![Forward {
            host: port.parse()?,
            guest: 80,
            udp: false,
        }];
    }
    let asked = Instant::now();
    let handle = QemuDriver::new(std::env::temp_dir()).launch(&spec).await?;
    let ready = handle.wait_ready(LIMIT).await;
    let ready_s = asked.elapsed().as_secs_f64();
    let cpu_s = cpu_s(handle.pid())?;
    let meminfo = handle.exec(&["cat", "/proc/meminfo"], LIMIT).await;
    if ready.is_ok() {
        let cached = meminfo.map_or(0, |result| cached_bytes(&result.stdout));
        println!(
            "{{\"ready_s\": {ready_s}, \"cpu_s\": {cpu_s}, \"demand_fetches\": 0, \
             \"stall_s\": 0, \"guest_cached_bytes\": {cached}, \"pid\": {pid}}}",
            pid = handle.pid()
        );
    }
    if hold {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    }
    handle.stop(Duration::from_secs(5)).await?;
    std::fs::remove_dir_all(&runtime_dir)?;
    ready?;
    Ok(())
}

/// CPU seconds of a process: fields 14 and 15 of proc(5)'s `stat`, in ticks of 1/100 s.
fn cpu_s(pid: u32) -> Result<f64, Box<dyn std::error::Error>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').ok_or("no stat")?;
    let ticks = fields.split_whitespace().skip(11).take(2);
    let ticks = ticks
        .map(str::parse::<u64>)
        .collect::<Result<Vec<_>, _>>()?;
    Ok(ticks.iter().sum::<u64>() as f64 / 100.0)
}

/// Page cache of files on disk: `Cached` without what lies in tmpfs.
fn cached_bytes(meminfo: &[u8]) -> u64 {
    let text = String::from_utf8_lossy(meminfo);
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    (kib("Cached:").saturating_sub(kib("Shmem:")) + kib("Buffers:")) * 1024
}
