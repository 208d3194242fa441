//! `bench restores`: as many restores in a row as asked, and `kill -9` of the daemon's worker at
//! random moments of making, restoring, hibernating and forking; after each, what there was must
//! be whole.
//!
//! ```text
//! cargo xtask bench restores [--count N] [--minutes N] [--kills N] [--seed N] [--release]
//!                          [--program FORELAY]
//! ```
//! Not a measurement: VMs are small, and the programs are built as for tests unless told
//! otherwise, or taken as they were built before.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::draw::Draw;
use super::statistics::median;
use super::write;
use crate::demo;
use crate::host::{self, Host, Programs, Settings};
use crate::process::{cargo, run, run_quiet, target_dir};

/// What the VMs are made of.
const COMPONENTS: &[(&[&str], &str)] = &[
    (&["--base", "debian"], "debian"),
    (&["--kernel"], "linux-cloud"),
];
const MANIFEST: &str = "name = \"small\"\nowner = \"bench\"\nbase = \"debian\"\n\
    entrypoint = [\"sleep\", \"infinity\"]\n\n[vm]\nmemory_mib = 160\n";
/// A program that has a word in its memory alone.
const KEEPS_A_WORD: &str = "word=$(cat /proc/sys/kernel/random/uuid); echo $word > /root/word; \
    export word; setsid sh -c 'while :; do echo $word > /run/said; sleep 0.1; done' \
    > /dev/null 2>&1 < /dev/null &";
/// Whether it still has it.
const HAS_IT: &str = "rm -f /run/said; until cmp -s /run/said /root/word; do sleep 0.05; done";
/// How long anything may take until it counts as lost.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a worker is killed in the middle of.
const DEEDS: [&str; 4] = ["make", "restore", "hibernate", "fork"];

const ARGUMENTS: &str =
    "arguments are --count N, --minutes N, --kills N, --seed N, --release and --program FORELAY";

struct Asked {
    /// Restores in a row, as far as they are done in so many minutes.
    count: u32,
    minutes: u64,
    /// Kills, as many in the middle of each deed.
    kills: u32,
    seed: u64,
    release: bool,
    /// A `forelay` that was built before.
    program: Option<PathBuf>,
}

impl Asked {
    fn of(arguments: &[&str]) -> Result<Self> {
        let mut asked = Self {
            count: 1000,
            minutes: 60,
            kills: 40,
            seed: 1,
            release: false,
            program: None,
        };
        let mut rest = arguments;
        loop {
            rest = match *rest {
                [] => return Ok(asked),
                ["--release", ref rest @ ..] => {
                    asked.release = true;
                    rest
                }
                [word, number, ref rest @ ..] => {
                    match word {
                        "--count" => asked.count = number.parse()?,
                        "--minutes" => asked.minutes = number.parse()?,
                        "--kills" => asked.kills = number.parse()?,
                        "--seed" => asked.seed = number.parse()?,
                        "--program" => asked.program = Some(number.into()),
                        _ => bail!("{word}: {ARGUMENTS}"),
                    }
                    rest
                }
                [word] => bail!("{word}: {ARGUMENTS}"),
            }
        }
    }
}

struct RestoresBench {
    host: Host,
    program: PathBuf,
    manifest: PathBuf,
    /// Failures by what was being done.
    failures: BTreeMap<String, Vec<String>>,
}

/// Runs it and writes its figures to `out`.
pub fn run_bench(out: &Path, arguments: &[&str]) -> Result<()> {
    let asked = Asked::of(arguments)?;
    let mut bench = RestoresBench::new(&asked)?;
    bench.make()?;
    let (tried, seconds) = bench.restores(&asked);
    let killed = bench.kills(&asked)?;
    let failed: usize = bench.failures.values().map(Vec::len).sum();
    println!(
        "{tried} restores, median {:.2} s; {} kills; {failed} failures",
        median(&seconds),
        asked.kills
    );
    for (what, causes) in &bench.failures {
        causes
            .iter()
            .for_each(|cause| println!("  {what}: {cause}"));
    }
    bench.host.stop_all()?;
    bench.host.stop_daemon()?;
    let document = json!({
        "program": bench.program,
        "asked": asked.count,
        "restores": tried,
        "restored": seconds.len(),
        "ready_s": median(&seconds),
        "kills": asked.kills,
        "seed": asked.seed,
        "killed_in": killed,
        "failed": failed,
        "failures": bench.failures,
    });
    write(out, &document)?;
    ensure!(failed == 0, "{failed} failures");
    Ok(())
}

impl RestoresBench {
    fn new(asked: &Asked) -> Result<Self> {
        crate::prerequisites::install()?;
        let programs = match &asked.program {
            Some(program) => Programs {
                forelay: program.clone(),
                guest: crate::guest::build()?,
            },
            None if asked.release => host::build()?,
            None => {
                // As the tests build it.
                run(&mut cargo(&["build", "--quiet", "--workspace", "--bins"]))?;
                Programs {
                    forelay: target_dir().join("debug/forelay"),
                    guest: crate::guest::build()?,
                }
            }
        };
        let dir = target_dir().join("bench/restores");
        let repository = dir.join("repository");
        demo::build_lacking(&programs, &repository, COMPONENTS)?;
        let state = dir.join("state");
        super::remove_all(&state)?;
        let mut host = Host::new(&programs, &Settings::local(repository, state))?;
        // Each launch restores, and no VMM is there that no VM has.
        host.configure("snapshots", "standby = 0")?;
        let manifest = host.scratch().join("small.toml");
        std::fs::write(&manifest, MANIFEST)?;
        host.start_daemon()?;
        Ok(Self {
            host,
            program: programs.forelay,
            manifest,
            failures: BTreeMap::new(),
        })
    }

    fn make(&self) -> Result<Value> {
        let words = [
            "snapshot".as_ref(),
            "create".as_ref(),
            self.manifest.as_os_str(),
        ];
        self.host.json(words)
    }

    fn fail(&mut self, what: &str, error: &anyhow::Error) {
        let text = format!("{error:#}");
        println!("FAILED {what}: {text}");
        self.failures.entry(what.to_owned()).or_default().push(text);
    }

    /// How many were tried, and the seconds until ready of those that did not fail.
    fn restores(&mut self, asked: &Asked) -> (u32, Vec<f64>) {
        let deadline = Instant::now() + Duration::from_secs(60 * asked.minutes);
        let mut seconds = Vec::new();
        for number in 1..=asked.count {
            if Instant::now() > deadline {
                return (number - 1, seconds);
            }
            match self.restore("one") {
                Ok(ready_s) => seconds.push(ready_s),
                Err(error) => self.fail("restore", &error),
            }
            if number % 10 == 0 {
                println!("{number} restores, {} of them well", seconds.len());
            }
        }
        (asked.count, seconds)
    }

    fn restore(&self, name: &str) -> Result<f64> {
        let vm = self.host.launch(&self.manifest, name, &[])?;
        let launch = &vm["launch"];
        ensure!(
            launch["resumed"] == "composed",
            "it booted: {}",
            launch["snapshot_problems"]
        );
        ensure!(
            vm["state"] == "ready",
            "it is {}: {}",
            vm["state"],
            vm["error"]
        );
        self.host.stop(&[name])?;
        launch["ready_s"]
            .as_f64()
            .context("a VM that is ready says when it was")
    }

    /// How often the worker was killed in the middle of what.
    fn kills(&mut self, asked: &Asked) -> Result<BTreeMap<&'static str, u32>> {
        let mut killed = BTreeMap::new();
        if asked.kills == 0 {
            return Ok(killed);
        }
        let mut draw = Draw(asked.seed);
        // It boots: what it resumed from could not be removed, and so not made again.
        self.remove_made()?;
        self.host.launch(&self.manifest, "keeper", &[])?;
        self.make()?;
        self.sh("keeper", KEEPS_A_WORD)?;
        let usual = self.usual()?;
        for number in 0..asked.kills {
            let deed = DEEDS[number as usize % DEEDS.len()];
            let after = usual[deed].mul_f64(f64::from(draw.below(1100)) / 1000.0);
            println!(
                "kill {} of {}: {deed}, after {after:.2?}",
                number + 1,
                asked.kills
            );
            if let Err(error) = self.kill_in(deed, after) {
                self.fail(&format!("kill in {deed}"), &error);
            }
            *killed.entry(deed).or_default() += 1;
        }
        Ok(killed)
    }

    /// How long each deed takes if nobody is killed.
    fn usual(&self) -> Result<BTreeMap<&'static str, Duration>> {
        let mut usual = BTreeMap::new();
        for deed in DEEDS {
            self.prepare(deed)?;
            let begun = Instant::now();
            let done = self.command(deed).output()?;
            let said = String::from_utf8_lossy(&done.stderr);
            ensure!(done.status.success(), "{deed}: {said}");
            usual.insert(deed, begun.elapsed());
            self.settle(deed)?;
        }
        Ok(usual)
    }

    /// Makes a deed possible, and needed.
    fn prepare(&self, deed: &str) -> Result<()> {
        match deed {
            "make" => self.remove_made(),
            _ => Ok(()),
        }
    }

    fn remove_made(&self) -> Result<()> {
        // Refused while a VMM is being started from one, ahead of a launch.
        self.until("nothing is left to resume from", || {
            for snapshot in self.made()? {
                let id = snapshot["id"].as_str().context("a snapshot has an id")?;
                run_quiet(&mut self.host.forelay(["snapshot", "remove", id]))?;
            }
            Ok(true)
        })
    }

    fn command(&self, deed: &str) -> Command {
        let mut command = match deed {
            "make" => self.host.forelay(["snapshot", "create"]),
            "restore" => self.host.forelay(["run", "--detach", "--name", "one"]),
            "hibernate" => self.host.forelay(["hibernate", "keeper"]),
            _ => self
                .host
                .forelay(["fork", "keeper", "--count", "2", "--name", "fork"]),
        };
        if matches!(deed, "make" | "restore") {
            command.arg(&self.manifest);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn kill_in(&self, deed: &str, after: Duration) -> Result<()> {
        self.prepare(deed)?;
        let mut doing = self.command(deed).stderr(Stdio::null()).spawn()?;
        std::thread::sleep(after);
        let worker = self.worker()?;
        run_quiet(Command::new("kill").args(["-KILL", &worker.to_string()]))?;
        doing.wait()?;
        self.until("another worker answers", || {
            Ok(self.worker()? != worker && self.host.json(["forecast"]).is_ok())
        })?;
        self.settle(deed)
    }

    /// What must be, whether a deed was done or not.
    fn settle(&self, deed: &str) -> Result<()> {
        match deed {
            "make" => {
                self.make()?;
                let made = self.made()?;
                ensure!(made.len() == 1 && made[0]["problem"].is_null(), "{made:?}");
            }
            "restore" => {
                if let Some(state) = self.state("one")? {
                    ensure!(state != "unreachable", "one is unreachable");
                    self.host.stop(&["one"])?;
                }
                self.until("it is verified again", || {
                    Ok(self.made()?.iter().all(|one| one["verified"] == true))
                })?;
                self.restore("one")?;
            }
            "hibernate" => {
                let state = self.state("keeper")?.context("the VM is gone")?;
                if state == "hibernated" {
                    run_quiet(&mut self.host.forelay(["resume", "keeper"]))?;
                }
            }
            _ => {
                for fork in ["fork-1", "fork-2"] {
                    if self.state(fork)?.is_some() {
                        self.sh(fork, HAS_IT).with_context(|| fork.to_owned())?;
                        self.host.stop(&[fork])?;
                    }
                }
            }
        }
        self.until("the VM is ready again", || {
            Ok(self.state("keeper")?.as_deref() == Some("ready"))
        })?;
        self.sh("keeper", HAS_IT).context("the VM that is kept")?;
        self.until("nothing else is left", || {
            let all = self.host.json(["snapshot", "list"])?;
            let of_vms = all.as_array().into_iter().flatten();
            let of_vms = of_vms.filter(|one| !one["origin"]["vm"].is_null());
            Ok(of_vms.count() <= 1 && self.vmms()? == 1)
        })
    }

    /// Snapshots that launches resume from.
    fn made(&self) -> Result<Vec<Value>> {
        let all = self.host.json(["snapshot", "list"])?;
        let all = all.as_array().into_iter().flatten();
        let made = all.filter(|one| one["origin"]["vm"].is_null());
        Ok(made.cloned().collect())
    }

    /// The state of a VM that has not ended.
    fn state(&self, name: &str) -> Result<Option<String>> {
        let vms = self.host.json(["ps"])?;
        let mut vms = vms.as_array().into_iter().flatten();
        let found = vms.find(|vm| vm["name"] == name);
        Ok(found.and_then(|vm| vm["state"].as_str().map(str::to_owned)))
    }

    fn sh(&self, vm: &str, script: &str) -> Result<()> {
        let mut command = self.host.forelay(["exec", "--timeout", "60", vm, "--"]);
        run_quiet(command.args(["sh", "-c", script]))
    }

    fn worker(&self) -> Result<u64> {
        let find = || {
            let mut all = self.host.pids().into_iter();
            all.find(|pid| command_line(*pid).contains("internal-worker"))
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(worker) = find() {
                return Ok(worker);
            }
            ensure!(Instant::now() < deadline, "no worker");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// VMMs of this host, a maker's among them.
    fn vmms(&self) -> Result<usize> {
        let dir = self.host.scratch().to_string_lossy().into_owned();
        let pids = std::fs::read_dir("/proc")?.flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
        let words = pids.map(command_line);
        Ok(words
            .filter(|words| words.contains("qemu-system") && words.contains(&dir))
            .count())
    }

    fn until(&self, what: &str, done: impl Fn() -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = done();
            if matches!(found, Ok(true)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let why = found.err().map(|error| format!(" ({error:#})"));
                bail!("waited in vain until {what}{}", why.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A process's command line in one line; empty if it is gone.
fn command_line(pid: u64) -> String {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ")
}
