//! A Forelay host of the tasks' own: a daemon with its configuration in a scratch
//! directory, driven through the real command line.
//!
//! Dropping a [`Host`] stops its VMs and its daemon, by their own ids.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cgroup::MemoryCgroup;
use crate::demo::{BANDWIDTH_BYTES_PER_S, LATENCY_MS};
use crate::process::{cargo, output, run, run_quiet, target_dir};

/// Programs the tasks run.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The `forelay` command.
    pub forelay: PathBuf,
    /// The static guest init.
    pub guest: PathBuf,
}

/// Builds the command (optimised) and the guest.
pub fn build() -> Result<Programs> {
    run(&mut cargo(&[
        "build",
        "--quiet",
        "--release",
        "--package",
        "forelay",
    ]))?;
    let guest = crate::guest::build()?;
    Ok(Programs {
        forelay: target_dir().join("release/forelay"),
        guest,
    })
}

/// What a host is configured with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Repository directory.
    pub repository: PathBuf,
    /// Another repository than the directory.
    pub url: Option<String>,
    /// Durable state: disk cache, history.
    pub state: PathBuf,
    /// Stands in for a remote repository.
    pub latency_ms: u64,
    /// Stands in for a remote repository.
    pub bandwidth_bytes_per_s: u64,
    /// Memory budget in bytes; 0 for adaptive.
    pub budget_bytes: u64,
    /// Prefetch at launches.
    pub prefetch: bool,
    /// Prefetch before launches are asked for.
    pub ahead: bool,
}

impl Settings {
    /// A repository at hand, memory as the host has it, all forecasting.
    pub fn local(repository: PathBuf, state: PathBuf) -> Self {
        Self {
            repository,
            url: None,
            state,
            latency_ms: 0,
            bandwidth_bytes_per_s: 0,
            budget_bytes: 0,
            prefetch: true,
            ahead: true,
        }
    }

    /// A repository behind the demo's line.
    pub fn throttled(repository: PathBuf, state: PathBuf) -> Self {
        Self {
            latency_ms: LATENCY_MS,
            bandwidth_bytes_per_s: BANDWIDTH_BYTES_PER_S,
            ..Self::local(repository, state)
        }
    }
}

/// A daemon and its command line.
pub struct Host {
    programs: Programs,
    config: PathBuf,
    scratch: PathBuf,
    daemon: Option<Child>,
}

impl Host {
    /// Writes the configuration; starts nothing.
    pub fn new(programs: &Programs, settings: &Settings) -> Result<Self> {
        // Sockets need short paths, so the runtime directory is not under target/.
        let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let name = format!("forelay-{}-{:x}", std::process::id(), stamp.subsec_nanos());
        let scratch = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&scratch)?;
        std::fs::create_dir_all(&settings.state)?;
        let config = scratch.join("forelay.toml");
        let place = match &settings.url {
            Some(url) => format!("url = {url:?}"),
            None => format!("path = {:?}", settings.repository),
        };
        let text = format!(
            "state_dir = {:?}\nruntime_dir = {:?}\n\n[repository]\n{}\nlatency_ms = {}\n\
             bandwidth_bytes_per_s = {}\n\n[memory]\nbudget_bytes = {}\n\n\
             [forecast]\nprefetch = {}\nahead = {}\n\n[snapshots]\nmake = false\ncpu_stall = 100.0\n",
            settings.state,
            scratch.join("run"),
            place,
            settings.latency_ms,
            settings.bandwidth_bytes_per_s,
            settings.budget_bytes,
            settings.prefetch,
            settings.ahead,
        );
        std::fs::write(&config, text)?;
        Ok(Self {
            programs: programs.clone(),
            config,
            scratch,
            daemon: None,
        })
    }

    /// Where manifests and the like of this host may be written.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// The `forelay` command with this host's configuration.
    pub fn forelay<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(&self.programs.forelay);
        command.arg("--config").arg(&self.config).args(arguments);
        command.env("FORELAY_GUEST", &self.programs.guest);
        command
    }

    /// Runs a reading command with `--json` and returns what it printed.
    pub fn json<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Result<Value> {
        let text = output(
            self.forelay(arguments)
                .arg("--json")
                .stderr(Stdio::inherit()),
        )?;
        serde_json::from_slice(&text).context("the command printed no JSON")
    }

    /// Adds lines to a section of the configuration.
    pub fn configure(&self, section: &str, lines: &str) -> Result<()> {
        let mut text = std::fs::read_to_string(&self.config)?;
        let heading = format!("[{section}]\n");
        if !text.contains(&heading) {
            text.push_str(&format!("\n{heading}"));
        }
        let text = text.replace(&heading, &format!("{heading}{lines}\n"));
        Ok(std::fs::write(&self.config, text)?)
    }

    /// Starts the daemon and waits until it answers.
    pub fn start_daemon(&mut self) -> Result<()> {
        self.start(self.forelay(["daemon"]))
    }

    /// Like [`Host::start_daemon`], with the daemon and all it starts in a cgroup.
    pub fn start_daemon_in(&mut self, cgroup: &MemoryCgroup) -> Result<()> {
        self.start(cgroup.inside(&self.forelay(["daemon"])))
    }

    fn start(&mut self, mut daemon: Command) -> Result<()> {
        let log = std::fs::File::create(self.scratch.join("daemon.log"))?;
        let child = daemon.stdout(log.try_clone()?).stderr(log).spawn()?;
        self.daemon = Some(child);
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let answer = self
                .forelay(["ps"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            if answer?.success() {
                return Ok(());
            }
            let ended = self
                .daemon
                .as_mut()
                .and_then(|child| child.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > deadline {
                bail!("the daemon did not start:\n{}", self.daemon_log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// CPU seconds that the daemon's processes have used.
    pub fn cpu_s(&self) -> f64 {
        let daemon = self.daemon.as_ref();
        daemon.map_or(0.0, |daemon| crate::cpu::of_family(u64::from(daemon.id())))
    }

    /// The daemon's processes.
    pub fn pids(&self) -> Vec<u64> {
        let daemon = self.daemon.as_ref();
        daemon.map_or_else(Vec::new, |daemon| {
            crate::cpu::family(u64::from(daemon.id()))
        })
    }

    /// What the daemon logged.
    pub fn daemon_log(&self) -> String {
        std::fs::read_to_string(self.scratch.join("daemon.log")).unwrap_or_default()
    }

    /// Ends the daemon and with it its mounts and all shared memory.
    pub fn stop_daemon(&mut self) -> Result<()> {
        let Some(mut child) = self.daemon.take() else {
            return Ok(());
        };
        let pid = child.id().to_string();
        run_quiet(Command::new("kill").args(["-TERM", &pid]))?;
        let deadline = Instant::now() + Duration::from_secs(20);
        while child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                child.kill()?;
                child.wait()?;
                bail!("the daemon did not end within 20 s:\n{}", self.daemon_log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Waits until the daemon has the repository's kernel ready and knows what VMs run under:
    /// work of its start, which no launch is to be charged with.
    pub fn wait_for_kernel(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            // It fails where this host lacks something; it says so all the same.
            let report = self.forelay(["doctor", "--json"]).output()?;
            let findings: Value = serde_json::from_slice(&report.stdout)?;
            let mut findings = findings.as_array().into_iter().flatten();
            if findings.any(|one| one["what"] == "accelerator") {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("no kernel was ready in 60 s:\n{}", self.daemon_log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Launches a VM and waits until it is ready; returns its description.
    pub fn launch(&self, manifest: &Path, name: &str, further: &[&str]) -> Result<Value> {
        let mut command = self.forelay(["run", "--detach", "--name", name]);
        command
            .arg("--json")
            .args(further)
            .arg(manifest)
            .stderr(Stdio::inherit());
        let text = output(&mut command).with_context(|| {
            format!("launch of {name}; the daemon said:\n{}", self.daemon_log())
        })?;
        serde_json::from_slice(&text).context("`forelay run` printed no JSON")
    }

    /// Stops VMs.
    pub fn stop(&self, names: &[&str]) -> Result<()> {
        run_quiet(self.forelay(["stop"]).args(names))
    }

    /// Stops every VM that still runs.
    pub fn stop_all(&self) -> Result<()> {
        let vms = self.json(["ps"])?;
        let names = vms
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|vm| vm["name"].as_str());
        let names: Vec<&str> = names.collect();
        if names.is_empty() {
            Ok(())
        } else {
            self.stop(&names)
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.daemon.is_some() {
            let _ = self.stop_all();
            if let Err(error) = self.stop_daemon() {
                eprintln!("warning: {error:#}");
            }
        }
        let _ = std::fs::remove_dir_all(&self.scratch);
    }
}
