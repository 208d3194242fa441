//! `bench memory`: what additional VMs cost, next to the same VMs on virtio-blk, and
//! whether the figures of the daemon are the kernel's.
//!
//! Twenty images of common runtimes; twelve of them run as real VMs, two hundred native
//! mappers of recorded touches stand in beyond that. Image content is what lies in the
//! host's memory of component images and map images; on virtio-blk it is the guests' page
//! caches and the host's cache of the backing files. Host memory is all of it: beside content,
//! guests' RAM and the VMMs' own memory.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::disks;
use super::images;
use super::launch::touch_list;
use super::statistics::median;
use crate::cgroup::MemoryCgroup;
use crate::frames::frames;
use crate::host::{Host, Settings};
use crate::process::{output, run, target_dir};

const IMAGES: usize = 20;
const VMS: usize = 12;
const MAPPERS: usize = 200;
/// Rounds of taking and giving back all of shared memory.
const ROUNDS: usize = 5;
const MEMORY_MIB: u64 = 192;
const LIMIT_BYTES: u64 = 10 << 30;
/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    let (programs, usual) = super::prepare("memory")?;
    let settings = Settings {
        latency_ms: 0,
        bandwidth_bytes_per_s: 0,
        budget_bytes: 4 << 30,
        prefetch: false,
        ..usual
    };
    let cgroup = MemoryCgroup::new(LIMIT_BYTES)?;
    let mut bench = MemoryBench {
        host: Host::new(&programs, &settings)?,
        cgroup,
        replay: super::build_example("forelay-memory", "replay")?,
        boot_disk: super::build_example("forelay-vm", "boot_disk")?,
    };
    let manifests = bench.manifests()?;
    bench.host.start_daemon_in(&bench.cgroup)?;
    let vms = bench.vms(&manifests)?;
    let composed = content_bytes(&bench.host, &vms)?;
    let composed_host = host_bytes(&bench.host, &vms)?;
    let accounts = bench.accounts(&vms)?;
    let mappers = bench.mappers()?;
    bench.host.stop_all()?;
    let dropped = bench.dropped(&manifests[0])?;
    bench.host.stop_daemon()?;
    let on_disk = bench.on_disk(&manifests[..VMS])?;
    let added = |vm: &&MeasuredVm| vm.added_bytes as f64 / vm.touched_bytes.max(1) as f64;
    let known: Vec<f64> = vms
        .iter()
        .filter(|vm| vm.known)
        .map(|vm| added(&vm))
        .collect();
    let further = &vms[1..];
    let sum = |of: fn(&MeasuredVm) -> u64| further.iter().map(of).sum::<u64>() as f64;
    let errors = [
        &accounts["error"],
        &dropped["error"],
        &dropped["mem_available_error"],
    ];
    let errors = errors.map(|one| one.as_f64().unwrap_or(1.0));
    let document = json!({
        "vms": VMS,
        "images": IMAGES,
        "native_mappers": MAPPERS,
        "added_per_vm_ratio": median(&known),
        "added_per_vm_ratio_max": known.iter().copied().fold(0.0, f64::max),
        "added_per_vm_ratio_with_new_components":
            sum(|vm| vm.added_bytes) / sum(|vm| vm.touched_bytes),
        "host_memory_bytes": composed_host,
        "host_memory_ratio_to_virtio_blk":
            composed_host as f64 / on_disk["host_memory_bytes"].as_f64().unwrap_or(0.0),
        "ratio_to_virtio_blk": composed as f64 / on_disk["content_bytes"].as_f64().unwrap_or(0.0),
        "accounting_error": errors.into_iter().fold(0.0, f64::max),
        "composed_content_bytes": composed,
        "virtio_blk": on_disk,
        "accounts": accounts,
        "dropped": dropped,
        "mappers": mappers,
        "launches": vms.iter().map(MeasuredVm::json).collect::<Vec<_>>(),
    });
    super::write(out, &document)
}

struct MemoryBench {
    // Dropped in this order: the cgroup can go only when it is empty.
    host: Host,
    cgroup: MemoryCgroup,
    replay: PathBuf,
    boot_disk: PathBuf,
}

/// One launched VM.
struct MeasuredVm {
    name: String,
    pid: u64,
    /// Every component of it was in use before.
    known: bool,
    touched_bytes: u64,
    added_bytes: u64,
    map_bytes: u64,
}

impl MeasuredVm {
    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "components_in_use_before": self.known,
            "touched_bytes": self.touched_bytes,
            "added_bytes": self.added_bytes,
            "map_image_bytes": self.map_bytes,
        })
    }
}

fn resident(host: &Host) -> Result<u64> {
    let report = host.json(["memory"])?;
    report["resident_bytes"]
        .as_u64()
        .context("memory tells what is resident")
}

/// Bytes of files in the host's page cache, by util-linux's `fincore`.
pub(super) fn cached_bytes(files: &[PathBuf]) -> Result<u64> {
    let mut command = Command::new("fincore");
    let text = output(
        command
            .args(["--bytes", "--noheadings", "--output", "RES"])
            .args(files),
    )?;
    let text = String::from_utf8(text)?;
    let sizes: Result<Vec<u64>, _> = text.lines().map(|line| line.trim().parse()).collect();
    Ok(sizes?.into_iter().sum())
}

/// Distinct pages of component images behind some VMs, and their map images.
fn content_bytes(host: &Host, vms: &[MeasuredVm]) -> Result<u64> {
    let mut distinct = BTreeSet::new();
    for vm in vms {
        distinct.extend(frames(vm.pid, &host.scratch().join("run/memory"))?.into_values());
    }
    Ok(distinct.len() as u64 * 4096 + vms.iter().map(|vm| vm.map_bytes).sum::<u64>())
}

/// All that the VMs take of the host: their VMMs' own memory with the guests' RAM in it, all of
/// shared memory, and their map images.
fn host_bytes(host: &Host, vms: &[MeasuredVm]) -> Result<u64> {
    let mut bytes = resident(host)?;
    for vm in vms {
        bytes += private_bytes(vm.pid)? + vm.map_bytes;
    }
    Ok(bytes)
}

/// Anonymous memory of a process: of a VMM, its guest's RAM and what it needs itself.
fn private_bytes(pid: u64) -> Result<u64> {
    status_bytes(&format!("/proc/{pid}/status"), "RssAnon:")
}

impl MemoryBench {
    fn manifests(&self) -> Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for number in 0..IMAGES {
            let text = images::manifest(number, MEMORY_MIB);
            let path = self.host.scratch().join(format!("image{number}.toml"));
            std::fs::write(&path, text)?;
            paths.push(path);
        }
        Ok(paths)
    }

    fn vms(&self, manifests: &[PathBuf]) -> Result<Vec<MeasuredVm>> {
        let mut vms: Vec<MeasuredVm> = Vec::new();
        let mut seen = BTreeSet::new();
        for (number, manifest) in manifests.iter().take(VMS).enumerate() {
            let name = format!("image{number}");
            let before = resident(&self.host)?;
            let launched = self.host.launch(manifest, &name, &[])?;
            let pid = launched["pid"].as_u64().context("a running VM has a pid")?;
            let run = self.host.scratch().join("run");
            let map_bytes = cached_bytes(&[run.join("vms").join(&name).join("map.img")])?;
            let vm = MeasuredVm {
                known: images::runtimes(number)
                    .iter()
                    .all(|one| seen.contains(one)),
                touched_bytes: frames(pid, &run)?.len() as u64 * 4096,
                added_bytes: resident(&self.host)?.saturating_sub(before) + map_bytes,
                map_bytes,
                name,
                pid,
            };
            seen.extend(images::runtimes(number));
            println!(
                "{}: touched {} KiB, added {} KiB",
                vm.name,
                vm.touched_bytes >> 10,
                vm.added_bytes >> 10
            );
            vms.push(vm);
        }
        Ok(vms)
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(self.host.scratch().join("run/memory/demo"))?;
        entries.map(|entry| Ok(entry?.path())).collect()
    }

    /// The daemon's figures beside the kernel's: residency, and each VM's share.
    fn accounts(&self, vms: &[MeasuredVm]) -> Result<Value> {
        let report = self.host.json(["memory"])?;
        let own = |name: &str| report[name].as_u64().unwrap_or(0);
        let kernel = cached_bytes(&self.files()?)?;
        let mut pss = 0;
        for vm in vms {
            pss += proportional_bytes(vm.pid, &self.host.scratch().join("run/memory"))?;
        }
        let (resident, charged) = (own("resident_bytes"), own("charged_bytes"));
        let off = |own: u64, kernel: u64| (own as f64 - kernel as f64).abs() / kernel.max(1) as f64;
        Ok(json!({
            "resident_bytes": resident,
            "resident_by_fincore_bytes": kernel,
            "charged_bytes": charged,
            "charged_by_pss_bytes": pss,
            "unclaimed_bytes": own("unclaimed_bytes"),
            "error": off(resident, kernel).max(off(charged, pss)),
        }))
    }

    /// Native mappers of what the first VM touched.
    fn mappers(&self) -> Result<Value> {
        let map = self.host.json(["map", "image0"])?;
        let none = Vec::new();
        let devices = map["devices"].as_array().unwrap_or(&none);
        let components = devices.get(1..).context("a VM has devices")?;
        let touches = map["touches"].as_array().unwrap_or(&none);
        let list = self.host.scratch().join("touches");
        std::fs::write(&list, touch_list(touches, components)?)?;
        let before = resident(&self.host)?;
        let mut mappers = Mappers(Vec::new());
        let mut touched_bytes = 0;
        for _ in 0..MAPPERS {
            let input = std::fs::File::open(&list)?;
            let mut command = Command::new(&self.replay);
            let mut child = command
                .arg("--hold")
                .stdin(input)
                .stdout(Stdio::piped())
                .spawn()?;
            let answers = child.stdout.take();
            mappers.0.push(child);
            let mut line = String::new();
            BufReader::new(answers.context("a mapper has an output")?).read_line(&mut line)?;
            let answer: Value = serde_json::from_str(&line)?;
            touched_bytes = answer["touched_bytes"].as_u64().unwrap_or(0);
        }
        let added = resident(&self.host)?.saturating_sub(before);
        Ok(json!({
            "count": MAPPERS,
            "touched_bytes_each": touched_bytes,
            "added_bytes_all": added,
            "added_per_mapper_ratio": added as f64 / (MAPPERS as u64 * touched_bytes).max(1) as f64,
        }))
    }

    /// Fills shared memory and gives it back, and looks how much each way of counting says
    /// that was. MemAvailable counts clean page cache as available, so the pages are locked
    /// while it is looked at: then it counts them as taken. What the rest of the machine
    /// did meanwhile is known from its cgroups and taken off; pages that were freed but lie
    /// in the processors' own lists (hundreds of MiB since Linux 6.6) count as free.
    fn dropped(&self, manifest: &Path) -> Result<Value> {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            rounds.push(self.drop_once(manifest)?);
        }
        let names = [
            "own_bytes",
            "cgroup_bytes",
            "mem_available_bytes",
            "mem_free_bytes",
        ];
        let medians = names.map(|name| {
            let all: Vec<f64> = rounds.iter().filter_map(|one| one[name].as_f64()).collect();
            median(&all)
        });
        let [own, cgroup, available, _] = medians;
        let off = |a: f64, b: f64| (a - b).abs() / b.max(1.0);
        let pairs = names.iter().zip(medians);
        let mut document: serde_json::Map<String, Value> = pairs
            .map(|(name, median)| ((*name).to_owned(), median.into()))
            .collect();
        document.insert("error".to_owned(), off(own, cgroup).into());
        document.insert("mem_available_error".to_owned(), off(available, own).into());
        document.insert("rounds".to_owned(), rounds.into());
        Ok(document.into())
    }

    fn drop_once(&self, manifest: &Path) -> Result<Value> {
        let mut command = ["prefetch", "--wait", "--mode", "everything"]
            .map(AsRef::as_ref)
            .to_vec();
        command.push(manifest.as_os_str());
        let answer = self.host.json(command)?;
        let list = self.host.scratch().join("lock");
        let mut text = String::new();
        for device in answer["devices"].as_array().into_iter().flatten() {
            let (bytes, path) = (&device["image_bytes"], device["path"].as_str());
            text.push_str(&format!(
                "file {bytes} {}\n",
                path.context("a device has a path")?
            ));
        }
        std::fs::write(&list, text)?;
        let mut command = Command::new(&self.replay);
        command
            .args(["--lock", "--hold"])
            .stdin(std::fs::File::open(&list)?);
        let mut locker = Mappers(vec![command.stdout(Stdio::piped()).spawn()?]);
        let answers = locker.0[0]
            .stdout
            .take()
            .context("a locker has an output")?;
        BufReader::new(answers).read_line(&mut String::new())?;
        let look = || -> Result<[i64; 5]> {
            let cgroup = self.cgroup.stat("total_cache", "file")?;
            Ok([
                resident(&self.host)? as i64,
                cgroup as i64,
                (meminfo("MemAvailable:")? + processor_lists_bytes()?) as i64,
                (meminfo("MemFree:")? + processor_lists_bytes()?) as i64,
                self.cgroup.others_bytes()? as i64,
            ])
        };
        let before = look()?;
        drop(locker);
        output(&mut self.host.forelay(["memory", "--drop-idle"]))?;
        let after = look()?;
        let others = after[4] - before[4];
        Ok(json!({
            "own_bytes": before[0] - after[0],
            "cgroup_bytes": before[1] - after[1],
            "mem_available_bytes": after[2] - before[2] + others,
            "mem_free_bytes": after[3] - before[3] + others,
            "others_bytes": others,
        }))
    }

    /// The same images as qcow2 overlays over ext4, all running at once.
    fn on_disk(&self, manifests: &[PathBuf]) -> Result<Value> {
        let dir = target_dir().join("bench/memory-disks");
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        let mut disks = Mappers(Vec::new());
        let (mut guests, mut files, mut pids) = (0, Vec::new(), Vec::new());
        for (number, manifest) in manifests.iter().enumerate() {
            let [layout, backing, overlay] = ["layout", "backing.qcow2", "overlay.qcow2"]
                .map(|name| dir.join(format!("{number}.{name}")));
            disks::compose(&self.host, manifest, &layout)?;
            disks::make_qcow2(&layout, &backing)?;
            disks::make_overlay(&backing, &overlay)?;
            // What making the file left in the page cache is not the VM's.
            run(Command::new("dd")
                .arg(format!("of={}", backing.display()))
                .args([
                    "oflag=nocache",
                    "conv=notrunc,fdatasync",
                    "count=0",
                    "status=none",
                ]))?;
            let mut command = Command::new(&self.boot_disk);
            command
                .arg(layout.join("vmlinuz"))
                .arg(layout.join("initrd"))
                .arg(&overlay);
            command.arg(MEMORY_MIB.to_string()).arg("--hold");
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let answers = child.stdout.take();
            disks.0.push(child);
            let mut line = String::new();
            BufReader::new(answers.context("boot_disk has an output")?).read_line(&mut line)?;
            let answer: Value = serde_json::from_str(&line).context("boot_disk printed no JSON")?;
            let cached = answer["guest_cached_bytes"]
                .as_u64()
                .context("the guest tells its cache")?;
            println!(
                "virtio-blk VM {number}: guest page cache {} KiB",
                cached >> 10
            );
            guests += cached;
            pids.push(answer["pid"].as_u64().context("the VMM has a pid")?);
            files.extend([backing, overlay]);
        }
        let host_bytes = cached_bytes(&files)?;
        let private: Result<Vec<u64>> = pids.into_iter().map(private_bytes).collect();
        let private: u64 = private?.into_iter().sum();
        disks.let_go();
        let _ = std::fs::remove_dir_all(&dir);
        ensure!(guests > 0, "the guests cache nothing");
        Ok(json!({
            "vms": manifests.len(),
            "guest_cache_bytes": guests,
            "host_cache_bytes": host_bytes,
            "content_bytes": guests + host_bytes,
            "host_memory_bytes": private + host_bytes,
        }))
    }
}

fn meminfo(name: &str) -> Result<u64> {
    status_bytes("/proc/meminfo", name)
}

/// A line of a file whose lines are `NAME KIB kB`.
pub(super) fn status_bytes(path: &str, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(path).context(path.to_owned())?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next())
        .with_context(|| format!("{path} lacks {name}"))?
        .parse()?;
    Ok(kib * 1024)
}

/// Free pages that lie in lists of single processors, which MemFree leaves out.
fn processor_lists_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/zoneinfo")?;
    let counts = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("count:"));
    let pages: Result<Vec<u64>, _> = counts.map(|count| count.trim().parse()).collect();
    Ok(pages?.into_iter().sum::<u64>() * 4096)
}

/// The kernel's proportional set size of the pages of files below `dir` that a process maps;
/// what it has copied of them on writing is its own.
pub(super) fn proportional_bytes(pid: u64, dir: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut inside, mut bytes) = (false, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if !first.ends_with(':') {
            inside = words
                .nth(4)
                .is_some_and(|path| Path::new(path).starts_with(dir));
        } else if inside && ["Pss:", "Anonymous:"].contains(&first) {
            let kib: u64 = words.next().context("malformed line in smaps")?.parse()?;
            match first {
                "Pss:" => bytes += kib * 1024,
                _ => bytes = bytes.saturating_sub(kib * 1024),
            }
        }
    }
    Ok(bytes)
}

/// Processes that end with this.
struct Mappers(Vec<Child>);

impl Mappers {
    /// Ends those that wait for their input's end by that.
    fn let_go(&mut self) {
        for child in &mut self.0 {
            if let Some(mut input) = child.stdin.take() {
                let _ = input.flush();
                drop(input);
                let _ = child.wait();
            }
        }
    }
}

impl Drop for Mappers {
    fn drop(&mut self) {
        self.let_go();
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
