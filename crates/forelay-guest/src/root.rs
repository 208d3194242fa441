//! The VM's root: the image, an overlay over it, and the switch into it.
//!
//! ```text
//! /lower   EROFS over pmem (DAX) or a flat disk        read-only
//! /upper   tmpfs or the scratch disk (ext4)
//! /root    overlay of both; becomes /
//! ```
//! A `forelay.root=` disk is writable itself and becomes / without an overlay.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forelay_guest_protocol::config::VmConfig;
use forelay_guest_protocol::messages::{BootSteps, Mounted};
use forelay_guest_protocol::superblock;

use crate::boot::{Parameters, console, context};
use crate::{devices, sys};

const LOWER: &str = "/lower";
const UPPER: &str = "/upper";
const ROOT: &str = "/root";

/// Where container engines keep images: an overlay cannot be the upper of another, so these
/// lie beside the root's overlay, where its upper does. Only for an image with the engine,
/// and without data of its own there.
const ENGINES: [(&str, &str); 3] = [
    ("usr/sbin/dockerd", "var/lib/docker"),
    ("usr/bin/containerd", "var/lib/containerd"),
    ("usr/bin/podman", "var/lib/containers"),
];

/// How long the VM's own devices may take to appear, unless `forelay.device_wait_ms=` says
/// otherwise.
const DEVICE_LIMIT: Duration = Duration::from_secs(20);

fn device_limit(parameters: &Parameters) -> Duration {
    let given = parameters
        .get("forelay.device_wait_ms")
        .and_then(|text| text.parse().ok());
    given.map_or(DEVICE_LIMIT, Duration::from_millis)
}

/// The mounted image.
pub struct MountedRoot {
    kind: &'static str,
    dax: bool,
    devices: u16,
}

/// What the host is told.
pub fn report(source: &MountedRoot, steps: BootSteps, failures: Vec<String>) -> Mounted {
    Mounted {
        uptime_ms: sys::uptime_us() / 1000,
        dax: source.dax,
        source: source.kind.to_owned(),
        devices: source.devices,
        steps,
        failures,
    }
}

/// Mounts the image that the command line names; returns where its files are.
pub fn mount(parameters: &Parameters, steps: &mut BootSteps) -> io::Result<(MountedRoot, String)> {
    let get = |key: &str| parameters.get(key).map(String::as_str);
    let limit = device_limit(parameters);
    for directory in [LOWER, UPPER, ROOT] {
        fs::create_dir_all(directory)?;
    }
    if let Some(hex) = get("forelay.map") {
        let uuid = superblock::parse_uuid(hex).ok_or_else(|| {
            io::Error::other(format!("forelay.map={hex}: a UUID is 32 hex digits"))
        })?;
        Ok((mount_map(&uuid, limit, steps)?, LOWER.to_owned()))
    } else if get("forelay.flat") == Some("1") {
        let disk = wait_for_disk("forelay-flat", limit)?;
        steps.devices_us = sys::uptime_us();
        sys::mount(&disk, LOWER, "erofs", sys::MS_RDONLY, "")
            .map_err(context(format!("mount flat image {}", disk.display())))?;
        Ok((
            MountedRoot {
                kind: "flat",
                dax: false,
                devices: 0,
            },
            LOWER.to_owned(),
        ))
    } else if let Some(device) = get("forelay.root") {
        let disk = wait_for_root_disk(device, limit)?;
        steps.devices_us = sys::uptime_us();
        sys::mount(&disk, ROOT, "ext4", 0, "")
            .map_err(context(format!("mount root disk {}", disk.display())))?;
        Ok((
            MountedRoot {
                kind: "disk",
                dax: false,
                devices: 0,
            },
            ROOT.to_owned(),
        ))
    } else {
        Err(io::Error::other(
            "nothing to boot: the kernel command line has none of forelay.map, forelay.flat, \
             forelay.root",
        ))
    }
}

/// Mounts the map image with the components that its device slots name.
fn mount_map(uuid: &[u8; 16], limit: Duration, steps: &mut BootSteps) -> io::Result<MountedRoot> {
    let mut pmem = devices::PmemDevices::default();
    let (map, found) = devices::wait_for(limit, || pmem.find(uuid)).ok_or_else(|| {
        let uuid = superblock::format_uuid(uuid);
        io::Error::other(format!("no pmem device holds the map image {uuid}"))
    })?;
    let slots = devices::slot_uuids(&map, &found).map_err(context("device slots"))?;
    let mut options = String::new();
    for slot in &slots {
        let (device, _) = devices::wait_for(limit, || pmem.find(slot)).ok_or_else(|| {
            let slot = superblock::format_uuid(slot);
            io::Error::other(format!("no pmem device holds the component {slot}"))
        })?;
        options.push_str(&format!(",device={}", device.display()));
    }
    steps.devices_us = sys::uptime_us();
    let dax = mount_erofs(&map, Path::new(LOWER), &options)?;
    Ok(MountedRoot {
        kind: "pmem",
        dax,
        devices: found.devices,
    })
}

/// Mounts an EROFS image with DAX if the device can; tells whether it could.
pub fn mount_erofs(device: &Path, target: &Path, options: &str) -> io::Result<bool> {
    let with_dax = format!("dax=always{options}");
    if let Err(error) = sys::mount(device, target, "erofs", sys::MS_RDONLY, &with_dax) {
        console(&format!(
            "mount {} with DAX: {error}; trying without",
            device.display()
        ));
        sys::mount(
            device,
            target,
            "erofs",
            sys::MS_RDONLY,
            options.trim_start_matches(','),
        )
        .map_err(context(format!("mount {}", device.display())))?;
        return Ok(false);
    }
    // The kernel turns DAX off by itself on devices that cannot do it.
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let target = target.to_string_lossy();
    Ok(mounts
        .lines()
        .filter(|line| line.split(' ').nth(1) == Some(target.as_ref()))
        .any(|line| {
            line.split(' ')
                .nth(3)
                .is_some_and(|options| options.contains("dax=always"))
        }))
}

fn wait_for_disk(serial: &str, limit: Duration) -> io::Result<PathBuf> {
    devices::wait_for(limit, || devices::disk_by_serial(serial))
        .ok_or_else(|| io::Error::other(format!("no disk has the serial {serial}")))
}

fn wait_for_root_disk(device: &str, limit: Duration) -> io::Result<PathBuf> {
    devices::wait_for(limit, || {
        devices::disk_by_serial("forelay-root")
            .or_else(|| Some(PathBuf::from(device)).filter(|path| path.exists()))
    })
    .ok_or_else(|| io::Error::other(format!("the root disk {device} did not appear")))
}

/// Puts the writable overlay over the image.
pub fn overlay(
    parameters: &Parameters,
    config: &VmConfig,
    lower: &str,
    source: &MountedRoot,
) -> io::Result<()> {
    if source.kind == "disk" {
        return Ok(());
    }
    if parameters.get("forelay.scratch").map(String::as_str) == Some("1") {
        let disk = wait_for_disk("forelay-scratch", device_limit(parameters))?;
        sys::mount(&disk, UPPER, "ext4", sys::MS_NODEV, "")
            .map_err(context(format!("mount scratch disk {}", disk.display())))?;
    } else {
        let size = match config.upper_size.as_str() {
            "" => String::new(),
            size => format!(",size={size}"),
        };
        sys::mount("tmpfs", UPPER, "tmpfs", 0, &format!("mode=0755{size}"))
            .map_err(context("mount tmpfs upper"))?;
    }
    for directory in ["data", "work"] {
        fs::create_dir_all(format!("{UPPER}/{directory}"))?;
    }
    // Without redirect_dir, a directory of the image cannot be renamed.
    let options =
        format!("lowerdir={lower},upperdir={UPPER}/data,workdir={UPPER}/work,redirect_dir=on");
    sys::mount("overlay", ROOT, "overlay", 0, &options).map_err(context("mount overlay root"))?;
    for (engine, directory) in ENGINES {
        if Path::new(ROOT).join(engine).exists()
            && let Err(error) = beside_overlay(directory)
        {
            console(&format!("/{directory}: {error}; it stays on the overlay"));
        }
    }
    Ok(())
}

/// Puts a directory of the root on the file system of the overlay's upper.
fn beside_overlay(directory: &str) -> io::Result<()> {
    let target = Path::new(ROOT).join(directory);
    if fs::read_dir(&target).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(io::Error::other("the image has files there"));
    }
    let source = Path::new(UPPER).join("beside").join(directory);
    fs::create_dir_all(&source)?;
    fs::create_dir_all(&target)?;
    sys::mount(&source, &target, "", sys::MS_BIND, "")
}

/// Moves the kernel's file systems into the root and makes it `/`.
pub fn switch(source: &MountedRoot) -> io::Result<()> {
    for name in ["dev", "proc", "sys"] {
        let target = format!("{ROOT}/{name}");
        fs::create_dir_all(&target).map_err(context(&target))?;
        sys::mount(format!("/{name}"), &target, "", sys::MS_MOVE, "")
            .map_err(context(format!("move /{name}")))?;
    }
    std::env::set_current_dir(ROOT)?;
    sys::mount(".", "/", "", sys::MS_MOVE, "")
        .map_err(context(format!("move the {} root", source.kind)))?;
    sys::chroot(".")?;
    std::env::set_current_dir("/")
}
