//! A line to a far server: nbdkit with the demo's latency and bandwidth, and a count of what
//! went over it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::demo;

/// A file served over the line until this is dropped.
pub struct ThrottledLine {
    server: Child,
    socket: PathBuf,
    statistics: PathBuf,
}

impl ThrottledLine {
    /// Serves `file`; `scratch` is for its socket and its figures.
    pub fn to(file: &Path, scratch: &Path) -> Result<Self> {
        let socket = scratch.join("line.sock");
        let statistics = scratch.join("line.statistics");
        for path in [&socket, &statistics] {
            let _ = std::fs::remove_file(path);
        }
        let server = Command::new("nbdkit")
            .args(["--foreground", "--readonly", "--unix"])
            .arg(&socket)
            .args(["--filter=stats", "--filter=delay", "--filter=rate", "file"])
            .arg(file)
            .arg(format!("statsfile={}", statistics.display()))
            .arg(format!("rdelay={}ms", demo::LATENCY_MS))
            .arg(format!("rate={}", demo::BANDWIDTH_BYTES_PER_S * 8))
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start nbdkit")?;
        let line = Self {
            server,
            socket,
            statistics,
        };
        let started = Instant::now();
        while !line.socket.exists() {
            ensure!(
                started.elapsed() < Duration::from_secs(10),
                "nbdkit does not serve"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(line)
    }

    /// The address for QEMU.
    pub fn address(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    /// Ends it; returns bytes and requests that went over it.
    pub fn end(mut self) -> Result<(u64, u64)> {
        terminate(&mut self.server)?;
        let text = std::fs::read_to_string(&self.statistics).unwrap_or_default();
        Ok(reads(&text))
    }
}

impl Drop for ThrottledLine {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Ends a process in order.
pub fn terminate(child: &mut Child) -> Result<()> {
    let pid = child.id().to_string();
    crate::process::run_quiet(Command::new("kill").args(["-TERM", &pid]))?;
    child.wait().map(drop).context("a process does not end")
}

/// Bytes and requests of reads in nbdkit's statistics: `read: 93 ops, 1.2 s, 6.03 MiB, ...`.
fn reads(text: &str) -> (u64, u64) {
    let line = text.lines().find_map(|line| line.strip_prefix("read: "));
    let mut fields = line.unwrap_or_default().split(", ");
    let mut number = |suffixes: &[(&str, f64)]| {
        fields.find_map(|field| {
            let (value, unit) = field.trim().split_once(' ')?;
            let (_, factor) = suffixes.iter().find(|(suffix, _)| *suffix == unit)?;
            Some((value.parse::<f64>().ok()? * factor) as u64)
        })
    };
    let requests = number(&[("ops", 1.0)]).unwrap_or(0);
    let units = [
        ("bytes", 1.0),
        ("KiB", 1024.0),
        ("MiB", 1048576.0),
        ("GiB", 1073741824.0),
    ];
    (number(&units).unwrap_or(0), requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_requests_of_reads_are_found() {
        let text = "total: 5 ops, 2.5 s, 1.00 MiB, 409.60 KiB/s\n\
                    read: 93 ops, 1.234567 s, 2.50 MiB, 5.00 MiB/s op, 1.00 MiB/s total\n";
        assert_eq!(reads(text), (2621440, 93));
        assert_eq!(reads(""), (0, 0));
    }
}
