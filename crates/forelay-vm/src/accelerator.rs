//! KVM or TCG: found out by really booting the kernel under KVM.
//!
//! `/dev/kvm` being there proves little: nested and foreign hypervisors offer KVMs that stock
//! guest kernels hang or crash in. The probe boots the VM's kernel without any root under
//! KVM; it passes if the kernel gets as far as complaining about that, in time. The answer is
//! cached by kernel, VMM and host kernel.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use forelay_host::atomic_write;
use serde::{Deserialize, Serialize};

use crate::process::output_within;
use crate::qemu::command_line::MACHINE;

/// How long a KVM boot may take; without a root it is about a second.
const LIMIT: Duration = Duration::from_secs(8);

/// How guest code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accelerator {
    /// On the CPU.
    Kvm,
    /// Translated by QEMU.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// Which accelerator to use, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The answer.
    pub accelerator: Accelerator,
    /// Why, for a person.
    pub reason: String,
}

#[derive(Serialize, Deserialize)]
struct Cached {
    key: String,
    probe: Probe,
}

/// Finds out whether `qemu` can run `kernel` under KVM here; cached in `cache_dir`.
pub async fn probe_accelerator(qemu: &Path, kernel: &Path, cache_dir: &Path) -> Probe {
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        let reason = format!("/dev/kvm: {error}");
        return Probe {
            accelerator: Accelerator::Tcg,
            reason,
        };
    }
    let key = key(qemu, kernel);
    let file = cache_dir.join("accelerator.json");
    let cached = std::fs::read(&file).ok();
    let cached: Option<Cached> = cached.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if let Some(cached) = cached.filter(|cached| cached.key == key) {
        return cached.probe;
    }
    let probe = boot(qemu, kernel).await;
    tracing::info!(accelerator = %probe.accelerator, reason = probe.reason, "probed KVM");
    if let Err(error) = store(
        &file,
        &Cached {
            key,
            probe: probe.clone(),
        },
    ) {
        tracing::warn!(file = %file.display(), %error, "cannot cache the accelerator");
    }
    probe
}

fn store(file: &Path, cached: &Cached) -> std::io::Result<()> {
    if let Some(parent) = file.parent() {
        std::fs::create_dir_all(parent)?;
    }
    atomic_write(file, &serde_json::to_vec_pretty(cached)?).map(drop)
}

/// What the answer depends on.
fn key(qemu: &Path, kernel: &Path) -> String {
    let stamp = |path: &Path| {
        let found = std::fs::metadata(path).ok()?;
        let modified = found.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some(format!(
            "{}:{}:{}",
            path.display(),
            found.len(),
            modified.as_nanos()
        ))
    };
    let host = std::fs::read_to_string("/proc/version").unwrap_or_default();
    let qemu = in_path(qemu);
    let stamps = [stamp(&qemu), stamp(kernel)].map(Option::unwrap_or_default);
    format!(
        "{} | {} | {MACHINE} | {}",
        stamps[0],
        stamps[1],
        host.trim()
    )
}

/// The program as the shell would find it.
pub(crate) fn in_path(program: &Path) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
        .unwrap_or_else(|| program.to_owned())
}

async fn boot(qemu: &Path, kernel: &Path) -> Probe {
    let tcg = |reason: String| Probe {
        accelerator: Accelerator::Tcg,
        reason,
    };
    let mut command = tokio::process::Command::new(qemu);
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args([
            "-M", MACHINE, "-accel", "kvm", "-cpu", "host", "-m", "256M", "-serial", "stdio",
        ])
        .args([
            "-append",
            "console=ttyS0 panic=-1 root=/dev/none",
            "-kernel",
        ])
        .arg(kernel);
    match output_within(&mut command, LIMIT).await {
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => tcg(format!(
            "a stock kernel did not boot under KVM within {LIMIT:?}"
        )),
        Err(error) => tcg(format!("{}: {error}", qemu.display())),
        Ok(output) => judge(&output.stdout, &output.stderr).map_or_else(tcg, |reason| Probe {
            accelerator: Accelerator::Kvm,
            reason,
        }),
    }
}

/// Judges what a probe boot printed: the kernel's complaint about its root is success.
fn judge(console: &[u8], errors: &[u8]) -> Result<String, String> {
    let console = String::from_utf8_lossy(console);
    if console.contains("Unable to mount root fs") {
        return Ok("a stock kernel boots under KVM".to_owned());
    }
    let errors = String::from_utf8_lossy(errors);
    let mut lines = errors.lines().chain(console.lines());
    let last = lines.rfind(|line| !line.trim().is_empty());
    let last: String = last.unwrap_or("no output").chars().take(200).collect();
    Err(format!("a stock kernel does not boot under KVM: {last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_complaint_about_the_root_is_success() {
        assert!(judge(b"..\nKernel panic - VFS: Unable to mount root fs on", b"").is_ok());
        assert!(
            judge(b"Linux version 6.1", b"")
                .unwrap_err()
                .contains("Linux version")
        );
        assert!(
            judge(b"", b"qemu: Could not access KVM\n")
                .unwrap_err()
                .contains("Could not")
        );
        assert!(judge(b"", b"").unwrap_err().contains("no output"));
    }
}
