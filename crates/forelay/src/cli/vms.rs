//! Commands on instances: run, ps, stop, attach, detach, logs, console.

use std::io::{IsTerminal as _, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use forelay_guest_protocol::snapshot::Tier;
use forelay_vm::Forward;
use forelay_vm::logs::kept_from;
use indicatif::{ProgressBar, ProgressStyle};

use super::images::{self, ImageArguments};
use super::output;
use crate::api::{
    AttachRequest, Degraded, Health, LaunchRequest, PrefetchMode, PrefetchRequest, Prefetched, Vm,
    VmComponent, VmState,
};
use crate::client::{Client, vm_path};
use crate::config::Config;

/// A log is shown in parts of this size.
const LOG_PART_BYTES: usize = 64 << 10;

/// Arguments of `forelay run`.
#[derive(Debug, clap::Args)]
pub struct RunArguments {
    /// The manifest (TOML); resolved again unless --lock is given. With --image the command
    /// to run in place of the image's; words that start with `-` follow a `--`.
    #[arg(value_name = "MANIFEST", required_unless_present = "image")]
    pub words: Vec<String>,
    #[command(flatten)]
    pub image: ImageArguments,
    /// Name of the instance; made from the profile if absent.
    #[arg(long)]
    pub name: Option<String>,
    /// Launch exactly what this lock pins.
    #[arg(long)]
    pub lock: Option<PathBuf>,
    /// Return when the VM is ready (without it: follow its console until its entrypoint ends,
    /// stop it and return the entrypoint's status).
    #[arg(long, short)]
    pub detach: bool,
    /// What to have in shared memory before the launch.
    #[arg(long, value_enum, default_value = "forecast")]
    pub prefetch: Prefetch,
    /// Give up waiting for `ready` after this many seconds.
    #[arg(long, default_value_t = 300)]
    pub timeout: u64,
    /// Tell where the time until `ready` went.
    #[arg(long)]
    pub timings: bool,
    /// Print the instance as JSON when it is ready.
    #[arg(long)]
    pub json: bool,
}

/// How a launch fills shared memory; see [`PrefetchMode`].
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Prefetch {
    /// The forecast working set, beside the launch.
    Forecast,
    /// The forecast working set, before the VMM starts.
    ForecastFirst,
    /// Nothing.
    None,
    /// All bytes of all components, before the VMM starts.
    Everything,
}

impl From<Prefetch> for PrefetchMode {
    fn from(prefetch: Prefetch) -> Self {
        match prefetch {
            Prefetch::Forecast => Self::Forecast,
            Prefetch::ForecastFirst => Self::ForecastFirst,
            Prefetch::None => Self::None,
            Prefetch::Everything => Self::Everything,
        }
    }
}

/// Arguments of `forelay prefetch`.
#[derive(Debug, clap::Args)]
pub struct PrefetchArguments {
    /// The manifest (TOML).
    pub manifest: PathBuf,
    /// Load what this lock pins.
    #[arg(long)]
    pub lock: Option<PathBuf>,
    /// What to load; `none` only maps the devices.
    #[arg(long, value_enum, default_value = "forecast")]
    pub mode: Prefetch,
    /// Return when it is loaded.
    #[arg(long)]
    pub wait: bool,
    #[arg(long)]
    pub json: bool,
}

/// `forelay prefetch`.
pub async fn prefetch(client: &Client, arguments: PrefetchArguments) -> Result<()> {
    let request = PrefetchRequest {
        manifest: read(&arguments.manifest)?,
        lock: arguments.lock.as_deref().map(read).transpose()?,
        mode: arguments.mode.into(),
        wait: arguments.wait,
    };
    let done: Prefetched = client.post("/v1/prefetch", &request).await?;
    if arguments.json {
        return output::json(&done);
    }
    say!(
        "{}: {} devices mapped, {} planned, after {}",
        done.profile,
        done.devices.len(),
        output::bytes(done.planned_bytes),
        output::seconds(done.took_s)
    );
    Ok(())
}

/// `forelay run`: returns the entrypoint's status if it was waited for.
pub async fn run(client: &Client, arguments: RunArguments, config: &Config) -> Result<i32> {
    let manifest = match (&arguments.image.image, &arguments.words[..]) {
        (Some(image), command) => {
            let (image, command) = (image.as_str(), command.to_vec());
            let given = &arguments.image;
            images::manifest(image, given, command, arguments.detach, config).await?
        }
        (None, [manifest]) => read(manifest)?,
        (None, _) => bail!("one manifest at a time; a command goes with --image"),
    };
    let lock = arguments.lock.as_deref().map(read).transpose()?;
    let request = LaunchRequest {
        manifest,
        lock,
        name: arguments.name,
        prefetch: arguments.prefetch.into(),
    };
    let spinner = spinner(arguments.json);
    spinner.set_message("launching");
    let vm: Vm = client.post("/v1/vms", &request).await?;
    let vm = wait_ready(
        client,
        &vm.name,
        Duration::from_secs(arguments.timeout),
        &spinner,
    )
    .await;
    spinner.finish_and_clear();
    let vm = vm?;
    let follows = !arguments.detach && !arguments.json;
    if vm.state == VmState::Failed {
        let why = vm.error.as_deref().unwrap_or("no reason given");
        let name = &vm.name;
        let text = format!("VM {name} failed: {why}\nits console is in `forelay logs {name}`");
        complain!("error: {text}");
        let status = vm.exit_status.filter(|status| follows && *status != 0);
        return Ok(status.unwrap_or(1));
    }
    if arguments.json {
        output::json(&vm)?;
    } else {
        print_ready(&vm);
        if arguments.timings {
            print_timings(&vm);
        }
    }
    if follows {
        return follow(client, &vm, true).await;
    }
    Ok(0)
}

fn print_ready(vm: &Vm) {
    for note in vm.launch.notes.iter().chain(&vm.launch.snapshot_problems) {
        complain!("note: {note}");
    }
    let resumed = vm.launch.resumed;
    say!(
        "{} is {:?}, pid {}{}",
        vm.name,
        vm.state,
        output::optional(vm.pid, |p| p.to_string()),
        resumed.map_or_else(String::new, |tier| format!(
            ", resumed from {}{}",
            tier.name(),
            if vm.launch.stood_by {
                " by a VMM that stood by"
            } else {
                ""
            }
        ))
    );
    say!(
        "  ready after {}, {} demand fetches ({} stalled), {} prefetched, {} from the repository",
        output::optional(vm.launch.ready_s, output::seconds),
        vm.launch.demand_fetches,
        output::seconds(vm.launch.stall_s),
        output::bytes(vm.launch.prefetched_bytes),
        output::bytes(vm.launch.repository_bytes),
    );
    for Forward { host, guest, udp } in &vm.forwards {
        let protocol = if *udp { "UDP" } else { "TCP" };
        say!("  127.0.0.1:{host} -> guest port {guest} ({protocol})");
    }
}

fn print_timings(vm: &Vm) {
    output::table(
        &vm.launch.timings.steps(),
        &[
            ("step", |(name, _): &(&str, f64)| (*name).to_owned()),
            ("took", |(_, took_s)| output::seconds(*took_s)),
        ],
    );
}

/// Shows that something goes on, to a person.
pub fn spinner(quiet: bool) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// Waits until a VM is ready, or will not be.
pub async fn wait_ready(
    client: &Client,
    name: &str,
    timeout: Duration,
    spinner: &ProgressBar,
) -> Result<Vm> {
    let deadline = tokio::time::Instant::now() + timeout;
    loop {
        let vm: Vm = client.get(&vm_path(name, "?wait_ms=500")?).await?;
        match vm.state {
            VmState::Ready
            | VmState::Paused
            | VmState::Hibernated
            | VmState::Stopped
            | VmState::Failed => return Ok(vm),
            _ if vm.waiting.is_some() => {
                let wait = output::optional(vm.waiting, |wait| wait.to_string());
                spinner.set_message(format!("{name} {wait}"));
            }
            VmState::Launching | VmState::Booting | VmState::Mounted | VmState::Unreachable => {
                spinner.set_message(format!(
                    "{name}: {:?}, {} prefetched, {} demand fetches",
                    vm.state,
                    output::bytes(vm.launch.prefetched_bytes),
                    vm.launch.demand_fetches
                ));
            }
        }
        if tokio::time::Instant::now() >= deadline {
            bail!(
                "VM {name} was not ready after {} s; it still runs: see `forelay logs {name}`, \
                 end it with `forelay stop {name}`",
                timeout.as_secs()
            );
        }
    }
}

fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// `forelay ps`.
pub async fn ps(client: &Client, all: bool, json: bool) -> Result<()> {
    let mut vms: Vec<Vm> = client.get("/v1/vms").await?;
    vms.retain(|vm| all || !vm.state.has_ended());
    if json {
        return output::json(&vms);
    }
    output::table(
        &vms,
        &[
            ("name", |vm: &Vm| vm.name.clone()),
            ("profile", |vm| vm.profile.clone()),
            ("state", state),
            ("pid", |vm| output::optional(vm.pid, |pid| pid.to_string())),
            ("ready", |vm| {
                output::optional(vm.launch.ready_s, output::seconds)
            }),
            ("from", from),
            ("demand", |vm| vm.launch.demand_fetches.to_string()),
            ("stall", |vm| output::seconds(vm.launch.stall_s)),
            ("ports", forwards),
        ],
    );
    for vm in &vms {
        if let Some(wait) = &vm.waiting {
            say!("{} {wait}", vm.name);
        }
        for problem in &vm.launch.snapshot_problems {
            say!("{}: {problem}", vm.name);
        }
    }
    let health: Health = client.get("/v1/health").await?;
    for Degraded { what, problem, .. } in health.degraded {
        complain!("degraded: {what}: {problem}");
    }
    Ok(())
}

fn state(vm: &Vm) -> String {
    match vm.waiting {
        Some(_) => "waiting".to_owned(),
        None => vm.state.name().to_owned(),
    }
}

/// What a VM began with.
fn from(vm: &Vm) -> String {
    let from = match vm.forked_from {
        Some(_) => "fork",
        None => vm.launch.resumed.map_or("boot", Tier::name),
    };
    let stood_by = if vm.launch.stood_by { ", stood by" } else { "" };
    format!("{from}{stood_by}")
}

fn forwards(vm: &Vm) -> String {
    let pairs = vm.forwards.iter().map(|one| {
        format!(
            "{}->{}{}",
            one.host,
            one.guest,
            if one.udp { "/udp" } else { "" }
        )
    });
    pairs.collect::<Vec<_>>().join(" ")
}

/// `forelay stop`.
pub async fn stop(client: &Client, names: &[String], json: bool) -> Result<()> {
    let mut stopped = Vec::new();
    for name in names {
        let vm: Vm = client.delete(&vm_path(name, "")?).await?;
        if !json {
            say!("{name} stopped");
        }
        stopped.push(vm);
    }
    if json { output::json(&stopped) } else { Ok(()) }
}

/// `forelay attach` and `forelay detach`.
pub async fn attach(
    client: &Client,
    name: &str,
    component: String,
    detach: bool,
    json: bool,
) -> Result<()> {
    let verb = if detach { "detach" } else { "attach" };
    let request = AttachRequest {
        component: component.clone(),
    };
    let before: Vm = client.get(&vm_path(name, "")?).await?;
    let vm: Vm = client
        .post(&vm_path(name, &format!("/{verb}"))?, &request)
        .await?;
    if json {
        return output::json(&vm);
    }
    say!(
        "{component} {verb}ed {} {name}",
        if detach { "from" } else { "to" }
    );
    let is_new = |one: &&VmComponent| before.components.iter().all(|old| old.id != one.id);
    for one in vm.components.iter().filter(is_new) {
        for file in &one.left_out {
            complain!("note: left out of {}: {file}", one.name);
        }
    }
    Ok(())
}

/// `forelay logs`.
pub async fn logs(client: &Client, name: &str, follow_on: bool) -> Result<()> {
    let vm: Vm = client.get(&vm_path(name, "")?).await?;
    if follow_on {
        return follow(client, &vm, false).await.map(drop);
    }
    let path = console_log(&vm);
    let mut file =
        std::fs::File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut part = vec![0; LOG_PART_BYTES];
    skip_gone(&mut file, 0)?;
    loop {
        match file.read(&mut part)? {
            0 => return Ok(()),
            len => output::raw(&part[..len]),
        }
    }
}

fn console_log(vm: &Vm) -> PathBuf {
    vm.runtime_dir.join("console.log")
}

/// Moves to the first line from `at` on that is kept, saying so where others were before it.
/// Returns where that is.
fn skip_gone(file: &mut std::fs::File, at: u64) -> Result<u64> {
    let kept = kept_from(file, at)?;
    file.seek(std::io::SeekFrom::Start(kept))?;
    if kept <= at {
        return Ok(at);
    }
    complain!(
        "older lines are gone: `log_bytes` in [vmm] of the configuration says how much is kept"
    );
    let mut part = vec![0; LOG_PART_BYTES];
    let read = file.read(&mut part)?;
    // What is left of a line whose beginning is gone.
    let cut = part[..read].iter().position(|byte| *byte == b'\n');
    let first = kept + cut.map_or(0, |cut| cut as u64 + 1);
    Ok(file.seek(std::io::SeekFrom::Start(first))?)
}

/// Prints the console from its start until the VM ends; with `stop`, until its entrypoint
/// does, and stops the VM then. Returns the entrypoint's status, 0 if there was none.
async fn follow(client: &Client, vm: &Vm, stop: bool) -> Result<i32> {
    let path = console_log(vm);
    let mut file =
        std::fs::File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut buffer = Vec::new();
    let mut at = 0;
    loop {
        let now: Vm = client.get(&vm_path(&vm.name, "")?).await?;
        at = skip_gone(&mut file, at)?;
        buffer.clear();
        at += file.read_to_end(&mut buffer)? as u64;
        output::raw(&buffer);
        let status = now.exit_status;
        match (now.state, status) {
            (VmState::Failed, _) => {
                let error = now.error.unwrap_or_else(|| "no reason given".into());
                bail!("VM {} failed: {error}", vm.name);
            }
            (VmState::Stopped, _) => return Ok(status.unwrap_or(0)),
            (_, Some(status)) if stop => {
                let _: Vm = client.delete(&vm_path(&vm.name, "")?).await?;
                return Ok(status);
            }
            _ => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// `forelay console`: both directions until end of input or of the VM.
pub async fn console(client: &Client, name: &str) -> Result<()> {
    let vm: Vm = client.get(&vm_path(name, "")?).await?;
    if !vm.state.is_live() {
        bail!("VM {name} does not run; its console's past is in `forelay logs {name}`");
    }
    let path = vm.runtime_dir.join("console.sock");
    let stream = tokio::net::UnixStream::connect(&path)
        .await
        .with_context(|| format!("cannot connect to the console {}", path.display()))?;
    complain!("connected to {name}; end with Ctrl-C (the VM goes on)");
    let (mut from_vm, mut to_vm) = stream.into_split();
    let output = async { tokio::io::copy(&mut from_vm, &mut tokio::io::stdout()).await };
    let input = async { tokio::io::copy(&mut tokio::io::stdin(), &mut to_vm).await };
    tokio::select! {
        done = output => { done?; }
        done = async { input.await?; std::future::pending::<std::io::Result<u64>>().await } => {
            done?;
        }
        _ = tokio::signal::ctrl_c() => {}
    }
    Ok(())
}
