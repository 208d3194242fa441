//! Benchmarks. Each measures in one run, interleaved, and reports ratios; each writes
//! `target/bench/NAME.json`.

mod attach;
mod boot;
mod burst;
mod day;
mod disks;
mod draw;
mod far_line;
mod images;
mod launch;
mod memory;
mod packages;
mod peers;
mod policy;
mod premap;
mod pressure;
mod repository;
mod restores;
mod snapshot;
mod snapshot_cases;
mod snapshot_storage;
mod statistics;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::demo;
use crate::host::{self, Programs, Settings};
use crate::process::{cargo, run, target_dir};

/// All benchmarks.
pub const NAMES: [&str; 18] = [
    "launch",
    "boot",
    "peers",
    "compose",
    "forecast",
    "policy",
    "table",
    "plan",
    "memory",
    "pressure",
    "burst",
    "attach",
    "premap",
    "day",
    "packages",
    "snapshot",
    "repository",
    "restores",
];

/// Runs one benchmark.
pub fn run_named(name: &str, arguments: &[&str]) -> Result<()> {
    let out = target_dir().join("bench").join(format!("{name}.json"));
    std::fs::create_dir_all(out.parent().context("the output has a directory")?)?;
    match name {
        "launch" => launch::run_bench(&out)?,
        "boot" => boot::run_boot(&out)?,
        "peers" => peers::run_bench(&out)?,
        "memory" => memory::run_bench(&out)?,
        "snapshot" => snapshot::run_bench(&out)?,
        "pressure" => pressure::run_bench(&out)?,
        "repository" => repository::run_bench(&out)?,
        "restores" => restores::run_bench(&out, arguments)?,
        "burst" => burst::run_bench(&out)?,
        "attach" => attach::run_bench(&out)?,
        "premap" => premap::run_bench(&out)?,
        "day" => day::run_bench(&out, arguments)?,
        "packages" => packages::run_bench(&out, arguments)?,
        "policy" => policy::run_bench(&out, arguments)?,
        "table" => example("forelay-cache", "bench_table", &out, arguments)?,
        "plan" => example("forelay-cache", "bench_plan", &out, arguments)?,
        "compose" => example("forelay-image", "bench_compose", &out, arguments)?,
        "forecast" => example("forelay-sim", "bench_forecast", &out, arguments)?,
        _ => bail!(
            "no benchmark is called {name:?}; there are: {}",
            NAMES.join(", ")
        ),
    }
    println!("\n{}", std::fs::read_to_string(&out)?);
    println!("written to {}", out.display());
    Ok(())
}

/// What most benchmarks start from: built programs, the demo's components behind the demo's
/// throttle, and no state from earlier runs. Nothing is loaded ahead of a request.
fn prepare(name: &str) -> Result<(Programs, Settings)> {
    crate::prerequisites::install()?;
    let programs = host::build()?;
    let repository = target_dir().join("demo/repository");
    demo::build_components(&programs, &repository)?;
    let state = target_dir().join("bench").join(format!("{name}-state"));
    let _ = std::fs::remove_dir_all(&state);
    let settings = Settings {
        ahead: false,
        ..Settings::throttled(repository, state)
    };
    Ok((programs, settings))
}

/// Runs an example of a crate, optimised; it writes its figures to `out`.
fn example(package: &str, name: &str, out: &Path, arguments: &[&str]) -> Result<()> {
    crate::prerequisites::install()?;
    let program = build_example(package, name)?;
    run(Command::new(program).arg(out).args(arguments))
}

/// Builds an example of a crate, optimised, and returns its path.
fn build_example(package: &str, name: &str) -> Result<PathBuf> {
    run(&mut cargo(&[
        "build",
        "--quiet",
        "--release",
        "--package",
        package,
        "--example",
        name,
    ]))?;
    Ok(target_dir().join("release/examples").join(name))
}

/// Removes a file, or a directory with all that is in it, if it is there.
pub fn remove_all(path: &Path) -> Result<()> {
    let removed = match path.is_dir() {
        true => std::fs::remove_dir_all(path),
        false => std::fs::remove_file(path),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| path.display().to_string())
        }
        _ => Ok(()),
    }
}

fn write(out: &Path, document: &Value) -> Result<()> {
    std::fs::write(out, serde_json::to_vec_pretty(document)?)
        .with_context(|| format!("cannot write {}", out.display()))
}
