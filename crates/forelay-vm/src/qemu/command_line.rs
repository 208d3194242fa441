//! QEMU's command line for a [`VmSpec`]: a pure function.
//!
//! Machine `q35`: it routes interrupts to the I/O APIC directly, where `pc` goes through ACPI
//! link devices, which costs the guest 0.1 s for each device. Its root bus has no hot-plug, so
//! one conventional PCI bridge takes what is plugged in later; the guest finds it by ACPI.
//! (The bridge has a standard hot-plug controller only because the firmware leaves no address
//! space behind one without.) PCI slots:
//!
//! ```text
//! 1        bridge; behind it, slots 1..=31: one hot-plugged device each
//! 2        guest channel, random numbers, network,     one slot, many functions
//!          free-page reports
//! 3..=13   pmem of the launch, 8 functions each        up to 88 devices
//! 14       disks, 8 functions
//! 31       chipset
//! ```

use std::ffi::{OsStr, OsString};
use std::ops::RangeInclusive;
use std::os::fd::RawFd;
use std::path::Path;

use forelay_guest_protocol::snapshot::{HOLD_WORD, Tier};
use serde::{Deserialize, Serialize};

use super::saved::NO_CONFIGURATION;
use crate::accelerator::Accelerator;
use crate::saved::SavedMachine;
use crate::spec::{Boot, Disk, DiskFormat, Forward, GuestMemory, PmemDevice, Reach, Upper, VmSpec};

/// The bridge for hot-plugged devices, and the name of the bus behind it.
const HOTPLUG_BRIDGE: &str = "hotplug";

/// Where a VM takes devices while it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HotplugBus {
    /// The root bus of machine `pc`: VMs that an earlier version launched.
    #[default]
    Root,
    /// Behind the bridge.
    Bridge,
}

impl HotplugBus {
    /// Its name, and its slots for hot-plugged devices; slot 0 of a bridge is its controller's.
    const fn bus_and_slots(self) -> (&'static str, RangeInclusive<u8>) {
        match self {
            Self::Root => ("pci.0", 16..=31),
            Self::Bridge => (HOTPLUG_BRIDGE, 1..=31),
        }
    }

    /// Slots for hot-plugged devices.
    pub const fn slots(self) -> RangeInclusive<u8> {
        self.bus_and_slots().1
    }
}

/// Most pmem devices at launch.
pub const MAX_PMEM: usize = 88;
/// Most disks.
pub const MAX_DISKS: usize = 8;

/// Functions of a slot.
pub const FUNCTIONS: usize = 8;

/// Name of the guest's network.
const NETWORK: &str = "network";

/// Name of the guest's memory.
const RAM: &str = "ram";

const FIRST_PMEM_SLOT: usize = 3;
const DISK_SLOT: usize = 14;

/// Monitor socket in the runtime directory.
pub const MONITOR_SOCKET: &str = "monitor.sock";
/// Guest channel socket in the runtime directory.
pub const CHANNEL_SOCKET: &str = "channel.sock";
/// Console socket in the runtime directory.
pub const CONSOLE_SOCKET: &str = "console.sock";

/// The arguments, without the program.
pub fn arguments(spec: &VmSpec, accelerator: Accelerator) -> Result<Vec<OsString>, String> {
    spec.validate()?;
    let mut line = Line::default();
    line.plain(&[
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    line.option("-name", &[("guest=", OsStr::new(&spec.name))]);
    line.plain(&["-M", &format!("{MACHINE},memory-backend={RAM}")]);
    guest_memory(&mut line, spec);
    match accelerator {
        Accelerator::Kvm => line.plain(&["-accel", "kvm", "-cpu", "host"]),
        Accelerator::Tcg => line.plain(&["-accel", "tcg,thread=multi", "-cpu", TCG_CPU]),
    }
    line.plain(&["-smp", &spec.cpus.to_string()]);
    line.plain(&["-m", &memory(spec)]);
    if let GuestMemory::Snapshot { .. } | GuestMemory::Saved { .. } = spec.memory {
        // The kernel is in the memory; reading it again would take longer than all else.
        line.plain(&["-S", "-incoming", "defer"]);
        if saved(spec).is_some() {
            line.plain(&["-global", NO_CONFIGURATION]);
        }
    } else {
        line.path("-kernel", &spec.kernel);
        line.path("-initrd", &spec.initrd);
        line.plain(&["-append", &kernel_command_line(spec, accelerator)]);
    }
    line.device(&format!(
        "pci-bridge,id={HOTPLUG_BRIDGE},chassis_nr=1,addr=0x1"
    ));
    sockets(&mut line, spec);
    network(&mut line, spec)?;
    pmem(&mut line, spec)?;
    disks(&mut line, spec)?;
    Ok(line.arguments)
}

/// The machine; no device that a VM without a screen does not need: each takes the guest time to find.
pub(crate) const MACHINE: &str = "q35,usb=off,vmport=off,hpet=off,i8042=off,sata=off,smbus=off";

/// The CPU under TCG: x86-64-v2 as far as TCG has it, from AMD: with `max`, saving AVX state makes every task
/// switch slower, and a kernel on an old Intel CPU switches page tables at each system call.
const TCG_CPU: &str = "qemu64,ssse3=on,sse4.1=on,sse4.2=on,popcnt=on,lahf-lm=on,rdrand=on";

/// On a loaded host the kernel's check of its timer panics (`IO-APIC + timer doesn't work`).
/// Self-tests of ciphers and work-arounds for speculation are of no use on an emulated CPU,
/// and TCG is no security boundary to begin with. Patching locks out of the kernel, for one
/// CPU alone, costs more than the locks do. The time-stamp counter is the host's, and on a
/// loaded host the kernel would judge it unstable and read a slow timer instead.
const TCG_KERNEL_WORDS: [&str; 5] = [
    "no_timer_check",
    "cryptomgr.notests",
    "mitigations=off",
    "noreplace-smp",
    "tsc=reliable",
];

/// The guest's memory: called the same in all VMs, since a state refers to it by name.
fn guest_memory(line: &mut Line, spec: &VmSpec) {
    let size = spec.memory_mib;
    // Without a word of ours QEMU offers it to all.
    let merge = if spec.mergeable { "on" } else { "off" };
    let common = format!("id={RAM},size={size}M,merge={merge}");
    let file = |options: &str| format!("memory-backend-file,{common},{options}");
    let (backend, path) = match &spec.memory {
        GuestMemory::Private => (format!("memory-backend-ram,{common}"), OsString::new()),
        GuestMemory::Shared { path } => (file("share=on,mem-path="), escape(path.as_os_str())),
        // Opened for writing, though no byte is written: QEMU before 8.2 maps no other file
        // privately, and later ones do not give back what a guest frees of a read-only one.
        GuestMemory::Snapshot { path } | GuestMemory::Saved { path, .. } => {
            (file("share=off,mem-path="), escape(path.as_os_str()))
        }
    };
    line.raw("-object", &[OsStr::new(&backend), &path]);
}

fn saved(spec: &VmSpec) -> Option<&SavedMachine> {
    match &spec.memory {
        GuestMemory::Saved { machine, .. } => Some(machine),
        _ => None,
    }
}

fn memory(spec: &VmSpec) -> String {
    // A clone that was held before it had devices was started without any.
    let pmem = match spec.hold {
        Some(Tier::Kernel) => &[][..],
        _ => &spec.pmem,
    };
    if pmem.is_empty() && spec.hotplug_bytes == 0 {
        return format!("{}M", spec.memory_mib);
    }
    let devices = pmem.len() as u64;
    let pmem: u64 = pmem.iter().map(|device| device.bytes).sum();
    // Every device may need alignment, so leave room beside the sizes.
    let room = pmem + (devices + 16) * (1 << 30) / 16 + spec.hotplug_bytes;
    let most_mib = u64::from(spec.memory_mib) + room.div_ceil(1 << 20);
    format!("{}M,slots=1,maxmem={most_mib}M", spec.memory_mib)
}

/// What of the command line a guest that is held there could notice, the image's devices aside:
/// a state fits no other machine. Names and paths are none of it.
pub fn held_machine(
    held: Tier,
    cpus: u32,
    memory_mib: u32,
    accelerator: Accelerator,
) -> Result<String, String> {
    let boot = Boot::Map {
        uuid: "0".repeat(32),
    };
    let mut spec = VmSpec::new("held", "/kernel".into(), "/initrd".into(), boot);
    (spec.cpus, spec.memory_mib) = (cpus, memory_mib);
    spec.memory = GuestMemory::Shared {
        path: "/memory".into(),
    };
    spec.hold = Some(held);
    if held > Tier::Kernel {
        spec.pmem.push(PmemDevice {
            id: "map".to_owned(),
            path: "/map".into(),
            bytes: crate::spec::PMEM_ALIGN_BYTES,
        });
    }
    let words = arguments(&spec, accelerator)?;
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    Ok(words.join(" "))
}

/// The kernel's command line.
pub fn kernel_command_line(spec: &VmSpec, accelerator: Accelerator) -> String {
    let mut words: Vec<String> = [
        "console=ttyS0",
        "quiet",
        "panic=-1",
        "net.ifnames=0",
        "random.trust_cpu=on",
        // No device here has a limit on its addresses, but since memory may be plugged in
        // beyond 4 GiB the kernel would set 64 MiB of bounce buffers aside.
        "swiotlb=noforce",
    ]
    .map(str::to_owned)
    .into();
    if accelerator == Accelerator::Tcg {
        words.extend(TCG_KERNEL_WORDS.map(str::to_owned));
    }
    if let Some(tier) = spec.hold {
        words.push(format!("{HOLD_WORD}={}", tier.name()));
    }
    // One that is held before there is an image is told of it when it is resumed.
    if spec.hold != Some(Tier::Kernel) {
        words.push(match &spec.boot {
            Boot::Map { uuid } => format!("forelay.map={uuid}"),
            Boot::Flat { .. } => "forelay.flat=1".to_owned(),
            Boot::Root(_) => "forelay.root=/dev/vda".to_owned(),
        });
        if matches!(spec.upper, Upper::Scratch { .. }) {
            words.push("forelay.scratch=1".to_owned());
        }
    }
    words.extend(spec.append.iter().cloned());
    words.join(" ")
}

fn sockets(line: &mut Line, spec: &VmSpec) {
    let address = |name: &str, inherited: Option<RawFd>| match inherited {
        Some(fd) => OsString::from(format!("fd={fd}")),
        None => {
            let mut address = OsString::from("path=");
            address.push(escape(spec.runtime_dir.join(name).as_os_str()));
            address
        }
    };
    let server = OsStr::new(",server=on,wait=off");
    let inherited = spec.listening;
    let monitor = address(MONITOR_SOCKET, inherited.map(|sockets| sockets.monitor));
    let channel = address(CHANNEL_SOCKET, inherited.map(|sockets| sockets.channel));
    for (id, address) in [("monitor", monitor), ("channel", channel)] {
        let prefix = format!("socket,id={id},");
        line.raw("-chardev", &[OsStr::new(&prefix), &address, server]);
    }
    let console = address(CONSOLE_SOCKET, inherited.map(|sockets| sockets.console));
    let log = escape(spec.console_log.as_os_str());
    let parts = [
        OsStr::new("socket,id=console,"),
        &console,
        server,
        OsStr::new(",logappend=on,logfile="),
        &log,
    ];
    line.raw("-chardev", &parts);
    line.plain(&["-mon", "chardev=monitor,mode=control"]);
    line.plain(&["-serial", "chardev:console"]);
    line.device("virtio-serial-pci,id=serial,max_ports=2,addr=0x2.0,multifunction=on");
    let name = forelay_guest_protocol::messages::PORT_NAME;
    line.device(&format!(
        "virtserialport,bus=serial.0,nr=1,chardev=channel,name={name}"
    ));
    line.device("virtio-rng-pci,addr=0x2.1,multifunction=on");
    // Never inflated: the guest reports what it frees, and the host has it back. In a VM that
    // goes on from a snapshot, as any may one day, what was given back is not zero but what the
    // snapshot has there: a guest that wants zeros, or a pattern, must not report.
    line.device(
        "virtio-balloon-pci,free-page-reporting=on,page-poison=off,addr=0x2.3,multifunction=on",
    );
    if spec.hold.is_some() {
        // Tells a kernel that knows the device that it is a clone.
        line.device("vmgenid,guid=auto");
    }
}

fn network(line: &mut Line, spec: &VmSpec) -> Result<(), String> {
    if !spec.network {
        if spec.forwards.is_empty() {
            return Ok(());
        }
        return Err("ports are forwarded, but the VM has no network".to_owned());
    }
    let mut user = format!("user,id={NETWORK},ipv6=off");
    if spec.reach == Reach::Nothing {
        user.push_str(",restrict=on");
    }
    for forward in &spec.forwards {
        user.push_str(&format!(",hostfwd={}", forward_rule(forward)));
    }
    line.plain(&["-netdev", &user]);
    line.device(&format!(
        "virtio-net-pci,netdev={NETWORK},romfile=,guest_announce=off,addr=0x2.2,multifunction=on"
    ));
    Ok(())
}

fn forward_rule(forward: &Forward) -> String {
    let protocol = if forward.udp { "udp" } else { "tcp" };
    let (host, guest) = (forward.host, forward.guest);
    format!("{protocol}:127.0.0.1:{host}-:{guest}")
}

/// The command of the monitor for people that leads a port into a VM that runs; there is no other.
pub(crate) fn add_forward(forward: &Forward) -> String {
    format!("hostfwd_add {NETWORK} {}", forward_rule(forward))
}

fn pmem(line: &mut Line, spec: &VmSpec) -> Result<(), String> {
    if spec.pmem.len() > MAX_PMEM {
        return Err(format!(
            "{} pmem devices, but {MAX_PMEM} is the most: put small components into a bundle",
            spec.pmem.len()
        ));
    }
    // What was plugged into a VM's bridge before it was saved is there from the start.
    let on_bridge = spec.hold == Some(Tier::Kernel);
    let slots = usize::from(*HotplugBus::Bridge.slots().start());
    for (index, device) in spec.pmem.iter().enumerate() {
        let (group, function) = (index / FUNCTIONS, index % FUNCTIONS);
        let place = match on_bridge {
            true => format!("bus={HOTPLUG_BRIDGE},addr={:#x}", slots + group),
            false => format!("addr={:#x}", FIRST_PMEM_SLOT + group),
        };
        pmem_device(
            line,
            spec,
            device,
            &format!("{place}.{function},multifunction=on"),
        );
    }
    for one in saved(spec).into_iter().flat_map(|saved| &saved.hotplugged) {
        let place = format!("bus={HOTPLUG_BRIDGE},addr={:#x}", one.slot);
        pmem_device(line, spec, &one.device, &place);
    }
    Ok(())
}

fn pmem_device(line: &mut Line, spec: &VmSpec, device: &PmemDevice, place: &str) {
    let PmemDevice { id, path, bytes } = device;
    let prefix = format!("memory-backend-file,id=m-{id},size={bytes}");
    let path = escape(path.as_os_str());
    let backend = ",share=on,readonly=on,align=2M,mem-path=";
    line.raw(
        "-object",
        &[OsStr::new(&prefix), OsStr::new(backend), &path],
    );
    let address = saved(spec).and_then(|saved| saved.addresses.get(id));
    let address = address.map_or_else(String::new, |address| format!(",memaddr={address}"));
    line.device(&format!(
        "virtio-pmem-pci,id=d-{id},memdev=m-{id}{address},{place}"
    ));
}

fn disks(line: &mut Line, spec: &VmSpec) -> Result<(), String> {
    let mut all: Vec<(&str, Disk)> = Vec::new();
    match &spec.boot {
        Boot::Map { .. } => {}
        Boot::Flat { path } => {
            all.push(("forelay-flat", raw_disk(path, true)));
        }
        Boot::Root(disk) => all.push(("forelay-root", disk.clone())),
    }
    let scratch_on_bridge = spec.hold == Some(Tier::Kernel);
    if let Upper::Scratch { path, .. } = &spec.upper
        && (!scratch_on_bridge || saved(spec).is_some())
    {
        all.push(("forelay-scratch", raw_disk(path, false)));
    }
    all.extend(spec.disks.iter().map(|disk| ("", disk.clone())));
    if all.len() > MAX_DISKS {
        return Err(format!("{} disks, but {MAX_DISKS} is the most", all.len()));
    }
    let (discard, features) = discards(spec);
    for (index, (serial, disk)) in all.iter().enumerate() {
        let format = match disk.format {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        };
        let read_only = if disk.read_only { "on" } else { "off" };
        let prefix = format!(
            "if=none,id=disk{index},format={format},readonly={read_only},discard={discard},file="
        );
        let path = escape(disk.path.as_os_str());
        line.raw("-drive", &[OsStr::new(&prefix), &path]);
        let place = match saved(spec) {
            Some(saved) if scratch_on_bridge => {
                format!("bus={HOTPLUG_BRIDGE},addr={:#x}", saved.launch_slots)
            }
            _ => format!("addr={DISK_SLOT:#x}.{index},multifunction=on"),
        };
        line.device(&format!(
            "virtio-blk-pci,drive=disk{index},serial={serial},{place}{features}"
        ));
    }
    Ok(())
}

/// Whether disks take discards, and what their devices say of it. Not where a snapshot is
/// made: the host lets no clone's VMM punch holes, since it would do so in the snapshot. One
/// that was saved while it ran has agreed on discards with its guest and ignores them; zeros,
/// which it could not, none is asked for.
fn discards(spec: &VmSpec) -> (&'static str, &'static str) {
    match spec.hold {
        None if saved(spec).is_some() => ("ignore", ",write-zeroes=off"),
        None => ("unmap", ",write-zeroes=off"),
        Some(_) => ("ignore", ",discard=off,write-zeroes=off"),
    }
}

fn raw_disk(path: &Path, read_only: bool) -> Disk {
    Disk {
        path: path.to_owned(),
        format: DiskFormat::Raw,
        read_only,
    }
}

/// QMP arguments of the backend of a hot-plugged device.
pub fn hotplug_backend(device: &PmemDevice) -> serde_json::Value {
    serde_json::json!({
        "qom-type": "memory-backend-file",
        "id": format!("m-{}", device.id),
        "mem-path": device.path.to_string_lossy(),
        "size": device.bytes,
        "share": true,
        "readonly": true,
        "align": crate::spec::PMEM_ALIGN_BYTES,
    })
}

/// Where a hot-plugged device goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciPlace {
    /// The bus.
    pub bus: HotplugBus,
    /// Slot on it.
    pub slot: u8,
    /// Function of the slot, of many; 0 is told to the guest with all others in its slot.
    pub function: Option<u8>,
}

impl PciPlace {
    fn put(self, mut device: serde_json::Value) -> serde_json::Value {
        device["bus"] = self.bus.bus_and_slots().0.into();
        device["addr"] = match self.function {
            Some(function) => format!("{:#x}.{function}", self.slot),
            None => format!("{:#x}", self.slot),
        }
        .into();
        device["multifunction"] = self.function.is_some().into();
        device
    }
}

/// QMP arguments of a hot-plugged pmem device.
pub fn hotplug_device(device: &PmemDevice, place: PciPlace) -> serde_json::Value {
    place.put(serde_json::json!({
        "driver": "virtio-pmem-pci",
        "id": format!("d-{}", device.id),
        "memdev": format!("m-{}", device.id),
    }))
}

/// QMP arguments of the backend of a hot-plugged scratch disk.
pub fn scratch_backend(path: &Path) -> serde_json::Value {
    serde_json::json!({
        "driver": "raw",
        "node-name": "scratch",
        "file": { "driver": "file", "filename": path.to_string_lossy() },
    })
}

/// QMP arguments of a hot-plugged scratch disk.
pub fn scratch_device(place: PciPlace) -> serde_json::Value {
    place.put(serde_json::json!({
        "driver": "virtio-blk-pci",
        "id": "d-scratch",
        "drive": "scratch",
        "serial": "forelay-scratch",
        "discard": false,
        "write-zeroes": false,
    }))
}

/// QEMU's option syntax takes a comma in a value doubled.
fn escape(text: &OsStr) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut out = Vec::with_capacity(text.len());
    for &byte in text.as_bytes() {
        out.push(byte);
        if byte == b',' {
            out.push(byte);
        }
    }
    OsString::from_vec(out)
}

#[derive(Default)]
struct Line {
    arguments: Vec<OsString>,
}

impl Line {
    fn plain(&mut self, words: &[&str]) {
        self.arguments.extend(words.iter().map(OsString::from));
    }

    fn path(&mut self, option: &str, path: &Path) {
        self.arguments.push(option.into());
        self.arguments.push(path.into());
    }

    fn device(&mut self, text: &str) {
        self.plain(&["-device", text]);
    }

    /// An option whose values are escaped.
    fn option(&mut self, option: &str, pairs: &[(&str, &OsStr)]) {
        let mut value = OsString::new();
        for (key, text) in pairs {
            value.push(key);
            value.push(escape(text));
        }
        self.arguments.push(option.into());
        self.arguments.push(value);
    }

    /// An option made of parts that are escaped already.
    fn raw(&mut self, option: &str, parts: &[&OsStr]) {
        let mut value = OsString::new();
        parts.iter().for_each(|part| value.push(part));
        self.arguments.push(option.into());
        self.arguments.push(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Forward, PMEM_ALIGN_BYTES};
    use crate::state::Hotplugged;

    fn spec(devices: usize) -> VmSpec {
        let boot = Boot::Map {
            uuid: "ab".repeat(16),
        };
        let mut spec = VmSpec::new("vm", "/k".into(), "/i".into(), boot);
        for index in 0..devices {
            spec.pmem.push(PmemDevice {
                id: format!("c{index}"),
                path: format!("/f,{index}").into(),
                bytes: PMEM_ALIGN_BYTES,
            });
        }
        spec
    }

    fn text(spec: &VmSpec) -> String {
        let words = arguments(spec, Accelerator::Tcg).unwrap();
        words
            .iter()
            .map(|word| word.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn forty_devices_and_the_hotplug_bridge_get_addresses_of_their_own() {
        let text = text(&spec(40));
        let mut addresses: Vec<&str> = text
            .split("addr=")
            .skip(1)
            .map(|rest| rest.split([',', ' ']).next().unwrap())
            .collect();
        let count = addresses.len();
        assert_eq!(count, 45);
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), count);
        assert!(text.contains("mem-path=/f,,39"), "commas are doubled");
        assert!(
            arguments(&spec(MAX_PMEM + 1), Accelerator::Tcg)
                .unwrap_err()
                .contains("bundle")
        );
    }

    #[test]
    fn ports_disks_and_kernel_words_appear() {
        let mut spec = spec(1);
        spec.forwards = vec![Forward {
            host: 8080,
            guest: 80,
            udp: false,
        }];
        spec.upper = Upper::Scratch {
            path: "/s".into(),
            bytes: 1 << 30,
        };
        spec.append = vec!["systemd.log_level=debug".into()];
        let text = text(&spec);
        assert!(text.contains("hostfwd=tcp:127.0.0.1:8080-:80") && !text.contains("restrict"));
        assert!(text.contains("serial=forelay-scratch"));
        assert!(text.contains("forelay.scratch=1 systemd.log_level=debug"));
        spec.network = false;
        assert!(arguments(&spec, Accelerator::Tcg).is_err());
    }

    #[test]
    fn a_clone_has_its_makers_devices_and_a_private_copy_of_its_memory() {
        let mut maker = spec(2);
        maker.hold = Some(Tier::Ready);
        maker.memory = GuestMemory::Shared {
            path: "/t/a,b".into(),
        };
        let mut clone = maker.clone();
        clone.name = "other".into();
        clone.memory = GuestMemory::Snapshot { path: "/s".into() };
        let (maker, clone) = (text(&maker), text(&clone));
        let memory = "memory-backend-file,id=ram,size=512M,merge=off,share";
        assert!(maker.contains(&format!("{memory}=on,mem-path=/t/a,,b ")));
        assert!(clone.contains(&format!("{memory}=off,mem-path=/s ")));
        assert!(maker.contains("forelay.hold=ready"));
        assert!(!clone.contains("-kernel") && clone.contains("-incoming defer"));
        let devices = |text: &str| {
            let words = text.split(" -").filter(|word| word.starts_with("device "));
            words.map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(devices(&maker), devices(&clone));
        assert!(maker.contains("vmgenid") && !text(&spec(2)).contains("vmgenid"));
    }

    #[test]
    fn one_that_was_saved_while_it_ran_has_all_its_devices_where_they_were() {
        let mut saved = spec(9);
        saved.hold = Some(Tier::Kernel);
        saved.upper = Upper::Scratch {
            path: "/s".into(),
            bytes: 1 << 30,
        };
        let attached = Hotplugged {
            device: PmemDevice {
                id: "later".into(),
                path: "/l".into(),
                bytes: PMEM_ALIGN_BYTES,
            },
            slot: 5,
            retained: true,
        };
        let machine = SavedMachine {
            hold: saved.hold,
            pmem: saved.pmem.clone(),
            launch_slots: 3,
            hotplugged: vec![attached],
            addresses: [("later".to_owned(), 4096)].into(),
        };
        saved.memory = GuestMemory::Saved {
            path: "/m".into(),
            machine: Box::new(machine),
        };
        let text = text(&saved);
        for word in [
            "id=d-c0,memdev=m-c0,bus=hotplug,addr=0x1.0,multifunction=on",
            "id=d-c8,memdev=m-c8,bus=hotplug,addr=0x2.0,multifunction=on",
            "id=d-later,memdev=m-later,memaddr=4096,bus=hotplug,addr=0x5 ",
            "serial=forelay-scratch,bus=hotplug,addr=0x3,discard=off",
            "share=off,mem-path=/m ",
            "-incoming defer -global migration.send-configuration=off",
        ] {
            assert!(text.contains(word), "{word}: {text}");
        }
        // As it was when it was started without devices.
        let mut empty = spec(0);
        empty.hold = Some(Tier::Kernel);
        assert_eq!(memory(&saved), memory(&empty));
        // One that booted keeps what its guest was told of its disk.
        saved.hold = None;
        assert!(arguments(&saved, Accelerator::Tcg).is_err());
        if let GuestMemory::Saved { machine, .. } = &mut saved.memory {
            machine.hold = None;
        }
        let booted = super::tests::text(&saved);
        assert!(booted.contains("discard=ignore") && !booted.contains("discard=off"));
    }

    #[test]
    fn a_vm_that_is_held_without_an_image_names_none() {
        let mut held = spec(0);
        held.hold = Some(Tier::Kernel);
        held.upper = Upper::Scratch {
            path: "/s".into(),
            bytes: 1 << 30,
        };
        let text = text(&held);
        assert!(text.contains("forelay.hold=kernel"));
        for word in ["forelay.map", "scratch", "virtio-blk"] {
            assert!(!text.contains(word), "{word}");
        }
    }
}
