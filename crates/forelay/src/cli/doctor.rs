//! `forelay doctor`: what this host lacks, what that costs, and the command that fixes it.
//!
//! Only looks; changes nothing. Exit code 1 if anything is missing that Forelay cannot
//! work without.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::Serialize;

use super::output;
use crate::api::{Degraded, Health, MemoryReport, NOT_PROBED, Snapshot, Takeover, Vm, WaitCulprit};
use crate::client::Client;
use crate::config::{Config, VmmConfig};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Grade {
    /// As it should be.
    Ok,
    /// Works in a reduced way, which the finding states.
    Reduced,
    /// Forelay cannot work without it.
    Missing,
}

/// One thing looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: &'static str,
    /// How it is.
    pub grade: Grade,
    /// What was seen, and what it means.
    pub seen: String,
    /// The command or setting that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, seen: impl Into<String>) -> Self {
        Self {
            what,
            grade: Grade::Ok,
            seen: seen.into(),
            fix: None,
        }
    }

    fn reduced(what: &'static str, seen: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            what,
            grade: Grade::Reduced,
            seen: seen.into(),
            fix: Some(fix.into()),
        }
    }

    fn missing(what: &'static str, seen: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            what,
            grade: Grade::Missing,
            seen: seen.into(),
            fix: Some(fix.into()),
        }
    }
}

/// Looks at everything.
pub fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = vec![root(), kernel(), fuse(), qemu(&config.vmm.qemu), kvm()];
    findings.extend([
        pressure_stall(),
        cgroups(),
        memory_lock(),
        confinement(&config.vmm),
        builder(),
        repository(config),
    ]);
    findings
}

/// `forelay doctor`.
pub async fn run(config: &Config, client: &Client, json: bool) -> Result<()> {
    let mut findings = examine(config);
    // Only a daemon that runs can tell.
    if let Ok(health) = client.get::<Health>("/v1/health").await {
        findings.extend(health.degraded.iter().map(degraded));
        if health.accelerator != NOT_PROBED {
            let seen = format!("VMs run under {}", health.accelerator);
            findings.push(Finding::ok("accelerator", seen));
        }
    }
    if let Ok(memory) = client.get::<MemoryReport>("/v1/memory").await {
        findings.extend(memory.takeover.as_ref().map(takeover));
    }
    if let Ok(vms) = client.get::<Vec<Vm>>("/v1/vms").await {
        findings.extend(vms.iter().filter_map(waiting));
    }
    if let Ok(snapshots) = client.get::<Vec<Snapshot>>("/v1/snapshots").await {
        findings.extend(snapshots.iter().filter_map(set_aside));
    }
    if json {
        output::json(&findings)?;
    } else {
        for finding in &findings {
            let mark = match finding.grade {
                Grade::Ok => "ok     ",
                Grade::Reduced => "reduced",
                Grade::Missing => "MISSING",
            };
            say!("{mark}  {:<16} {}", finding.what, finding.seen);
            if let Some(fix) = &finding.fix {
                say!("         {:<16} fix: {fix}", "");
            }
        }
    }
    let missing = findings
        .iter()
        .filter(|finding| finding.grade == Grade::Missing)
        .count();
    if missing > 0 {
        bail!("{missing} thing(s) are missing that Forelay cannot work without");
    }
    Ok(())
}

/// What the running daemon does without.
fn degraded(degraded: &Degraded) -> Finding {
    let fix = match degraded.what.as_str() {
        "configuration" => "mend the configuration, then SIGHUP to `forelay daemon`",
        "history" => "make room, or move the damaged file away: a new history is begun",
        "control groups" => {
            "let the daemon make control groups: on cgroup v2 with `Delegate=yes` and \
             `DelegateSubgroup=daemon` in its unit"
        }
        "repository" => "mount it, or set repository.url; `forelay component build` makes one",
        "mirror" => "see whether it can be reached and what it answers; it is tried again",
        "holder" => "forelay daemon (takes over; VMs go on)",
        _ => "look at the daemon's log",
    };
    let seen = format!("{}: {}", degraded.what, degraded.problem);
    Finding::reduced("daemon", seen, fix)
}

/// How the mapping table that the daemon took over compared with the kernel.
fn takeover(takeover: &Takeover) -> Finding {
    let Takeover {
        running_vms,
        disagreements,
        refused_records,
        dropped_bytes,
        ..
    } = takeover;
    if disagreements.is_empty() && *refused_records == 0 && *dropped_bytes == 0 {
        let seen = format!("taken over with {running_vms} VMs: its journal and the kernel agree");
        return Finding::ok("mapping table", seen);
    }
    Finding::reduced(
        "mapping table",
        format!(
            "taken over with {running_vms} VMs: {} differences from the kernel (which is right), \
             {refused_records} contradicting records, {dropped_bytes} torn bytes",
            disagreements.len()
        ),
        "look at `takeover` in `forelay memory --json` and at the daemon's log",
    )
}

/// A VM that waits for bytes.
fn waiting(vm: &Vm) -> Option<Finding> {
    let wait = vm.waiting.as_ref()?;
    let fix = match wait.culprit {
        WaitCulprit::Repository => "make the repository reachable again; the VM then goes on",
        WaitCulprit::Content => "forelay verify, then build the component again",
        WaitCulprit::DiskCache => "look at the disk below `state_dir`",
        WaitCulprit::Other => "look at the daemon's log",
    };
    Some(Finding::reduced(
        "waiting VM",
        format!("{} {wait}", vm.name),
        fix,
    ))
}

/// A snapshot that does not restore.
fn set_aside(snapshot: &Snapshot) -> Option<Finding> {
    let problem = snapshot.problem.as_ref()?;
    let Snapshot {
        id, tier, made_of, ..
    } = snapshot;
    Some(Finding::reduced(
        "snapshot",
        format!("{} of {made_of} is set aside: {problem}", tier.name()),
        format!(
            "forelay snapshot remove {}, then create it again",
            id.short()
        ),
    ))
}

fn root() -> Finding {
    if rustix::process::geteuid().is_root() {
        return Finding::ok("root", "running as root");
    }
    Finding::missing(
        "root",
        "not root: mounting and pinning need it",
        "run as root (sudo)",
    )
}

/// The running kernel's version as (major, minor).
fn kernel_version() -> Option<(u32, u32)> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut parts = release.trim().split(['.', '-']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn kernel() -> Finding {
    let Some((major, minor)) = kernel_version() else {
        return Finding::missing(
            "kernel",
            "cannot tell the version",
            "run on Linux 5.14 or later",
        );
    };
    let seen = format!("Linux {major}.{minor}");
    let upgrade = "upgrade the host kernel to 6.9 or later";
    match (major, minor) {
        v if v >= (6, 9) => Finding::ok("kernel", seen),
        v if v >= (6, 7) => Finding::reduced(
            "kernel",
            format!("{seen}: no RESEND, so faults in flight when the daemon dies are lost"),
            upgrade,
        ),
        v if v >= (5, 14) => Finding::reduced(
            "kernel",
            format!("{seen}: no PAGEMAP_SCAN (slower observation), no RESEND (no takeover)"),
            upgrade,
        ),
        _ => Finding::missing("kernel", format!("{seen} is too old"), upgrade),
    }
}

fn fuse() -> Finding {
    if Path::new("/dev/fuse").exists() {
        return Finding::ok("/dev/fuse", "present");
    }
    Finding::missing(
        "/dev/fuse",
        "absent: shared memory needs it",
        "modprobe fuse",
    )
}

fn find_program(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_path_buf());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file())
}

fn qemu(program: &Path) -> Finding {
    let fix = "apt-get install qemu-system-x86 (or set vmm.qemu in the configuration)";
    let Some(path) = find_program(program) else {
        let seen = format!("{} is not on the PATH", program.display());
        return Finding::missing("qemu", seen, fix);
    };
    match std::process::Command::new(&path).arg("--version").output() {
        Ok(out) if out.status.success() => {
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            Finding::ok("qemu", text.lines().next().unwrap_or_default())
        }
        _ => Finding::missing("qemu", format!("{} does not run", path.display()), fix),
    }
}

fn kvm() -> Finding {
    let fix = "enable virtualisation in the firmware or the outer host, then `modprobe kvm`";
    match std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(_) => Finding::ok(
            "kvm",
            "/dev/kvm opens (the daemon finds out whether a kernel boots)",
        ),
        Err(error) => Finding::reduced(
            "kvm",
            format!("/dev/kvm: {error}; VMs run under slow TCG"),
            fix,
        ),
    }
}

fn pressure_stall() -> Finding {
    match std::fs::read_to_string("/proc/pressure/memory") {
        Ok(text) if text.starts_with("some") => Finding::ok("pressure stall", "/proc/pressure"),
        _ => Finding::reduced(
            "pressure stall",
            "no /proc/pressure/memory: pressure is seen from MemAvailable alone",
            "boot the host with psi=1",
        ),
    }
}

fn cgroups() -> Finding {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Finding::ok("cgroups", "version 2");
    }
    if Path::new("/sys/fs/cgroup/memory/memory.usage_in_bytes").exists() {
        return Finding::ok("cgroups", "version 1 with the memory controller");
    }
    Finding::reduced(
        "cgroups",
        "no memory controller: figures come from page counts alone",
        "mount cgroup2 on /sys/fs/cgroup",
    )
}

fn memory_lock() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    match limit.current {
        _ if rustix::process::geteuid().is_root() => {
            Finding::ok("memory lock", "root may pin without a limit")
        }
        None => Finding::ok("memory lock", "unlimited"),
        Some(bytes) => Finding::reduced(
            "memory lock",
            format!("limit is {}: little can be pinned", output::bytes(bytes)),
            "raise LimitMEMLOCK of the daemon's unit",
        ),
    }
}

/// How far VMMs are kept from the host and from each other.
fn confinement(vmm: &VmmConfig) -> Finding {
    let what = "confinement";
    if !vmm.confine {
        return Finding::reduced(
            what,
            "off: every VMM is the host's root, and so is what breaks out of a VM",
            "vmm.confine = true in the configuration",
        );
    }
    match forelay_memory::confine::landlock_version() {
        0 => Finding::reduced(
            what,
            "user, namespaces, system call filter; no Landlock, so VMMs of one trust domain are \
             kept apart by namespaces alone",
            "boot with `lsm=landlock,...` (Linux 5.13 or later with CONFIG_SECURITY_LANDLOCK)",
        ),
        version @ ..6 => Finding::reduced(
            what,
            format!(
                "user, namespaces, system call filter, Landlock {version}: abstract sockets of \
                 the host can be reached (Landlock 6 closes them)"
            ),
            "boot Linux 6.12 or later",
        ),
        version => Finding::ok(
            what,
            format!("user, namespaces, system call filter, Landlock {version}"),
        ),
    }
}

fn builder() -> Finding {
    match find_program(Path::new("mmdebstrap")) {
        Some(_) => Finding::ok("mmdebstrap", "present"),
        None => Finding::reduced(
            "mmdebstrap",
            "absent: no Debian base can be built here (running VMs needs none)",
            "apt-get install mmdebstrap",
        ),
    }
}

fn repository(config: &Config) -> Finding {
    let (first, mirrors) = match config.repository_urls() {
        Ok(urls) => urls,
        Err(error) => {
            let fix = "set repository.url in the configuration";
            return Finding::missing("repository", error.to_string(), fix);
        }
    };
    let Some(path) = first.as_directory() else {
        // Whether it answers, the daemon tells.
        let all = std::iter::once(&first)
            .chain(&mirrors)
            .map(ToString::to_string);
        let all: Vec<String> = all.collect();
        return Finding::ok("repository", all.join(", then "));
    };
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Finding::ok("repository", path.display().to_string()),
        Ok(_) => Finding::missing(
            "repository",
            format!("{} is not a directory", path.display()),
            "set repository.url in the configuration",
        ),
        Err(_) => Finding::reduced(
            "repository",
            format!("{} does not exist yet", path.display()),
            "forelay component build --base debian (creates it)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_vmm_is_found_with_a_fix() {
        let mut config = Config::default();
        config.vmm.qemu = "/nonexistent/qemu".into();
        let findings = examine(&config);
        let qemu = findings
            .iter()
            .find(|finding| finding.what == "qemu")
            .unwrap();
        assert_eq!(qemu.grade, Grade::Missing);
        assert!(qemu.fix.is_some());
        let client = Client::new("/nonexistent/socket");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        assert!(runtime.block_on(run(&config, &client, true)).is_err());
    }

    #[test]
    fn a_takeover_with_differences_is_told() {
        let mut told = Takeover {
            running_vms: 2,
            ..Takeover::default()
        };
        assert_eq!(takeover(&told).grade, Grade::Ok);
        told.disagreements.push("vm_gone".to_owned());
        let finding = takeover(&told);
        assert_eq!(finding.grade, Grade::Reduced);
        assert!(finding.seen.contains("1 difference"), "{}", finding.seen);
    }
}
