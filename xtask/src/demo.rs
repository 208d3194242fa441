//! The main job, shown: real Debian packages become components, VMs are composed from
//! them and boot, the second launch finds its bytes in shared memory, four VMs share one
//! copy, and a launch of which a snapshot was made resumes.
//!
//! Leaves its repository in `target/demo/repository`, so that a second run only boots; with
//! `--repository` a server gets a copy of it, which the hosts then use.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::backend::{self, Backend};
use crate::bench;
use crate::host::{self, Host, Programs, Settings};
use crate::pages::{self, Sharing};
use crate::prerequisites;
use crate::process::{run, target_dir, workspace_root};

/// A remote repository's stand-in: round trip and bandwidth.
pub const LATENCY_MS: u64 = 20;
/// See [`LATENCY_MS`].
pub const BANDWIDTH_BYTES_PER_S: u64 = 100_000_000;

/// The component that holds the guest's init.
const KERNEL: &str = "linux-cloud";

/// Components of the demo: what `forelay component build` is asked for, and the name
/// under which the repository then lists it.
const COMPONENTS: &[(&[&str], &str)] = &[
    (&["--base", "debian"], "debian"),
    (&["--kernel"], KERNEL),
    (&["--deb", "nginx"], "nginx"),
    (&["--deb", "redis"], "redis"),
    (&["--deb", "python3"], "python3"),
    (&["--deb", "nodejs"], "nodejs"),
];

/// The four VMs that run side by side: profile and host port.
const SIDE_BY_SIDE: [&str; 4] = ["web", "cache", "python", "node"];

/// Runs the demo.
pub fn run_all(backend: Backend) -> Result<()> {
    let started = Instant::now();
    prerequisites::install()?;
    let programs = host::build()?;
    let dir = target_dir().join("demo");
    let repository = dir.join("repository");
    build_components(&programs, &repository)?;
    println!(
        "\ncomponents are there after {:.0} s\n",
        started.elapsed().as_secs_f64()
    );

    let state = dir.join("state");
    bench::remove_all(&state)?;
    let mut settings = Settings::throttled(repository, state);
    let server = backend.start()?;
    if let Some(server) = &server {
        let url = backend.url(server);
        backend::fill(&programs, &settings.repository, &url)?;
        println!("\nhosts use {url}\n");
        settings.url = Some(url);
    }
    let mut host = Host::new(&programs, &settings)?;
    let mut launches = Vec::new();
    twice(&mut host, &mut launches)?;
    let (sharing, checks) = side_by_side(&mut host, &mut launches)?;
    resumed(&mut host, &mut launches)?;
    report(&launches, &sharing, &checks)?;
    println!("\ndemo took {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

/// Builds the demo's components that the repository lacks.
pub fn build_components(programs: &Programs, repository: &Path) -> Result<()> {
    build_lacking(programs, repository, COMPONENTS)
}

/// Builds those of the components that the repository lacks: what `forelay component build` is
/// asked for, and the name under which the repository then lists it. Kernels with another guest's
/// init go first: launches might get them.
pub fn build_lacking(
    programs: &Programs,
    repository: &Path,
    components: &[(&[&str], &str)],
) -> Result<()> {
    let settings = Settings::local(repository.to_path_buf(), target_dir().join("build-state"));
    let host = Host::new(programs, &settings)?;
    let present = if repository.exists() {
        host.json(["component", "list"])?
    } else {
        Value::Array(Vec::new())
    };
    let mut names: Vec<&str> = present
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|c| c["name"].as_str())
        .collect();
    let stamp = repository.with_extension("guest");
    let guest = std::fs::read(&programs.guest)?;
    if std::fs::read(&stamp).ok().as_ref() != Some(&guest) {
        // Each has the same name and version.
        for _ in names.iter().filter(|name| **name == KERNEL) {
            run(&mut host.forelay(["component", "remove", KERNEL]))?;
        }
        names.retain(|name| *name != KERNEL);
        if let Some(dir) = stamp.parent() {
            std::fs::create_dir_all(dir)?;
        }
        std::fs::write(&stamp, &guest)?;
    }
    for (arguments, name) in components {
        if names.contains(name) {
            println!("component {name} is there from an earlier run");
            continue;
        }
        run(host.forelay(["component", "build"]).args(*arguments))?;
    }
    Ok(())
}

/// The path of one of the manifests in `examples/`.
pub fn manifest(profile: &str) -> PathBuf {
    workspace_root()
        .join("examples")
        .join(format!("{profile}.toml"))
}

fn launch(host: &Host, profile: &str, launches: &mut Vec<Value>) -> Result<Value> {
    let vm = host.launch(&manifest(profile), profile, &[])?;
    let figures = &vm["launch"];
    let resumed = figures["resumed"].as_str();
    println!(
        "{profile}: {} launch{}, ready after {:.2} s, {} demand fetches, stalled {:.3} s",
        figures["mode"].as_str().unwrap_or("?"),
        resumed.map_or_else(String::new, |tier| format!(" from snapshot at {tier}")),
        figures["ready_s"].as_f64().unwrap_or(f64::NAN),
        figures["demand_fetches"],
        figures["stall_s"].as_f64().unwrap_or(f64::NAN),
    );
    launches.push(json!({
        "profile": profile,
        "mode": figures["mode"],
        "resumed": resumed,
        "ready_s": figures["ready_s"],
        "demand_fetches": figures["demand_fetches"],
        "stall_s": figures["stall_s"],
        "repository_bytes": figures["repository_bytes"],
        "image_bytes": figures["image_bytes"],
    }));
    Ok(vm)
}

/// `web` cold; then, after a restart of the daemon that loses all shared memory, predicted.
fn twice(host: &mut Host, launches: &mut Vec<Value>) -> Result<()> {
    host.start_daemon()?;
    host.wait_for_kernel()?;
    launch(host, "web", launches)?;
    wait_for_working_set(host, "web")?;
    host.stop_all()?;
    host.stop_daemon()?;
    println!("daemon restarted: shared memory is empty, history is kept");
    host.start_daemon()?;
    host.wait_for_kernel()?;
    launch(host, "web", launches)?;
    host.stop_all()
}

/// The working set is written when its window ends; the VM may stop afterwards.
pub fn wait_for_working_set(host: &Host, profile: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let history = host.json(["history", profile])?;
        if history[0]["working_set_bytes"].as_u64().unwrap_or(0) > 0 {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "no working set of {profile} was recorded in 60 s"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn side_by_side(host: &mut Host, launches: &mut Vec<Value>) -> Result<(Sharing, Value)> {
    println!("four VMs side by side:");
    let mut pids = Vec::new();
    for profile in SIDE_BY_SIDE {
        let vm = launch(host, profile, launches)?;
        pids.push(vm["pid"].as_u64().context("a running VM has a pid")?);
    }
    let page = http_get(8080, "/")?;
    let nginx_page = page.contains("hello from a composed VM");
    println!("nginx says: {:?}", page.lines().last().unwrap_or_default());
    let redis_key = redis_round_trip(6380)?;
    println!("redis gives back the key: {redis_key}");
    let sharing = pages::sharing(&pids, &host.scratch().join("run"))?;
    host.stop_all()?;
    host.stop_daemon()?;
    ensure!(nginx_page, "nginx did not serve the page of the manifest");
    ensure!(redis_key, "redis did not give the key back");
    Ok((
        sharing,
        json!({ "nginx_page": nginx_page, "redis_key": redis_key }),
    ))
}

/// `web` from a snapshot of its composed image: nothing boots.
fn resumed(host: &mut Host, launches: &mut Vec<Value>) -> Result<()> {
    host.start_daemon()?;
    host.wait_for_kernel()?;
    let path = manifest("web").display().to_string();
    host.json(["snapshot", "create", &path])?;
    // The first one finds out what a clone touches.
    for _ in 0..2 {
        let vm = launch(host, "web", launches)?;
        let tier = &vm["launch"]["resumed"];
        ensure!(tier == "composed", "web did not resume: {}", vm["launch"]);
        let page = http_get(8080, "/")?;
        ensure!(
            page.contains("hello from a composed VM"),
            "a clone's page: {page}"
        );
        host.stop_all()?;
    }
    host.stop_daemon()
}

fn talk(port: u16, request: &[u8]) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.write_all(request)?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if !answer.is_empty() => eprintln!("note: {error} after a full answer"),
        Err(error) => return Err(error).context(format!("no answer on port {port}")),
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The body and headers of a page from a guest.
pub fn http_get(port: u16, path: &str) -> Result<String> {
    talk(
        port,
        format!("GET {path} HTTP/1.0\r\nHost: guest\r\n\r\n").as_bytes(),
    )
}

fn redis_round_trip(port: u16) -> Result<bool> {
    let answer = talk(port, b"SET forelay composed\r\nGET forelay\r\nQUIT\r\n")?;
    Ok(answer.contains("composed"))
}

fn report(launches: &[Value], sharing: &Sharing, checks: &Value) -> Result<()> {
    println!();
    println!(
        "{:<8} {:<10} {:>9} {:>8} {:>9} {:>14} {:>12}",
        "PROFILE", "MODE", "READY", "DEMAND", "STALL", "FROM REPOSITORY", "IMAGE"
    );
    let mib = |value: &Value| value.as_f64().unwrap_or(0.0) / 1048576.0;
    for launch in launches {
        let mode = launch["resumed"].as_str().or(launch["mode"].as_str());
        println!(
            "{:<8} {:<10} {:>7.2} s {:>8} {:>7.3} s {:>11.1} MiB {:>8.1} MiB",
            launch["profile"].as_str().unwrap_or("?"),
            mode.unwrap_or("?"),
            launch["ready_s"].as_f64().unwrap_or(f64::NAN),
            launch["demand_fetches"].as_u64().unwrap_or(0),
            launch["stall_s"].as_f64().unwrap_or(f64::NAN),
            mib(&launch["repository_bytes"]),
            mib(&launch["image_bytes"]),
        );
    }
    println!(
        "\n{} VMs map {:.1} MiB of components in {:.1} MiB of host memory ({:.3} x one copy); \
         shared pages are the same page frames: {}",
        sharing.vms,
        sharing.mapped_sum_bytes as f64 / 1048576.0,
        sharing.host_bytes as f64 / 1048576.0,
        sharing.ratio,
        sharing.same_page_frames,
    );
    let document = json!({ "launches": launches, "sharing": sharing, "checks": checks });
    let path = target_dir().join("demo.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&document)?)?;
    println!("written to {}", path.display());
    if !sharing.same_page_frames || sharing.ratio > 1.05 {
        bail!("sharing is not real: {sharing:?}");
    }
    Ok(())
}
