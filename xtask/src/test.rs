//! The whole suite, in the order in which a failure is cheapest to find.
//!
//! The last lines printed are nextest's own summary (or cargo's, where nextest is not
//! installed).

use std::process::Command;

use anyhow::{Context, Result};

use crate::process::{cargo, run, target_dir, workspace_root};
use crate::{guest, prerequisites, tidy};

/// Runs everything; further arguments go to the test runner (a filter, for example).
pub fn run_all(filter: &[&str]) -> Result<()> {
    prerequisites::install()?;
    run(&mut cargo(&["fmt", "--all", "--check"]))?;
    tidy::run()?;
    let clippy = [
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    run(&mut cargo(&clippy))?;
    let guest = guest::build()?;
    let environment = [
        ("FORELAY_GUEST", guest),
        ("FORELAY_TEST_CACHE", target_dir().join("test-cache")),
        ("FORELAY_TRACES", traces()),
    ];
    let with_environment = |mut command: Command| {
        for (name, value) in &environment {
            if std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        command
    };
    run(&mut with_environment(cargo(&[
        "test",
        "--quiet",
        "--workspace",
        "--doc",
    ])))?;
    run(&mut with_environment(cargo(&[
        "build",
        "--quiet",
        "--workspace",
        "--bins",
    ])))?;
    let mut tests = if has_nextest() {
        with_environment(cargo(&["nextest", "run", "--workspace"]))
    } else {
        eprintln!("cargo-nextest is not installed; using cargo test, one test at a time");
        with_environment(cargo(&[
            "test",
            "--workspace",
            "--bins",
            "--lib",
            "--tests",
        ]))
    };
    tests.args(filter);
    if !has_nextest() {
        tests.args(["--", "--test-threads=1"]);
    }
    run(&mut tests).context("the test suite failed")
}

fn traces() -> std::path::PathBuf {
    workspace_root().join("../shared/traces")
}

fn has_nextest() -> bool {
    cargo(&["nextest", "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
}
