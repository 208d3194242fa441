//! A memory cgroup of a task's own (version 1 or 2), removed when dropped.
//!
//! Processes are started in it and end before it is removed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

/// A memory cgroup with a limit.
pub struct MemoryCgroup {
    dir: PathBuf,
    v2: bool,
}

impl MemoryCgroup {
    /// Makes one with this limit; needs root.
    pub fn new(limit_bytes: u64) -> Result<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let v2 = !v1.join("memory.limit_in_bytes").exists();
        let parent = if v2 { Path::new("/sys/fs/cgroup") } else { v1 };
        let dir = parent.join(format!("forelay-bench-{}", std::process::id()));
        std::fs::create_dir(&dir).with_context(|| {
            format!(
                "cannot make the memory cgroup {}: run as root",
                dir.display()
            )
        })?;
        let cgroup = Self { dir, v2 };
        let file = if v2 {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        std::fs::write(cgroup.dir.join(file), limit_bytes.to_string())
            .context("cannot limit the cgroup's memory")?;
        Ok(cgroup)
    }

    /// The same command, run inside.
    pub fn inside(&self, command: &Command) -> Command {
        let mut wrapped = Command::new("sh");
        wrapped
            .args(["-c", r#"echo $$ > "$0" && exec "$@""#])
            .arg(self.dir.join("cgroup.procs"))
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            wrapped.env(name, value.unwrap_or(OsStr::new("")));
        }
        wrapped
    }

    /// Charged memory in bytes.
    pub fn usage_bytes(&self) -> Result<u64> {
        let file = if self.v2 {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        Ok(std::fs::read_to_string(self.dir.join(file))?
            .trim()
            .parse()?)
    }

    /// A figure of `memory.stat`.
    pub fn stat(&self, v1: &str, v2: &str) -> Result<u64> {
        self.field("memory.stat", if self.v2 { v2 } else { v1 })
    }

    /// Anonymous memory of everything outside this cgroup.
    pub fn others_bytes(&self) -> Result<u64> {
        let name = if self.v2 { "anon" } else { "total_rss" };
        let root = self.dir.parent().context("a cgroup has a parent")?;
        let all = field(root, "memory.stat", name)?;
        Ok(all.saturating_sub(self.field("memory.stat", name)?))
    }

    /// Processes that the kernel killed for want of memory.
    pub fn oom_kills(&self) -> Result<u64> {
        let file = if self.v2 {
            "memory.events"
        } else {
            "memory.oom_control"
        };
        self.field(file, "oom_kill")
    }

    fn field(&self, file: &str, name: &str) -> Result<u64> {
        field(&self.dir, file, name)
    }
}

fn field(dir: &Path, file: &str, name: &str) -> Result<u64> {
    let text = std::fs::read_to_string(dir.join(file))?;
    let mut lines = text.lines().map(|line| line.split_whitespace());
    let found = lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()));
    let value = found
        .flatten()
        .with_context(|| format!("{file} says nothing of {name}"))?;
    Ok(value.parse()?)
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        // The last process may take a moment to go.
        for _ in 0..50 {
            if std::fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        eprintln!("warning: {} is still in use", self.dir.display());
    }
}
