//! The whole suite, in the order in which a failure is cheapest to find.
//!
//! The last lines printed are nextest's own summary (or cargo's, where nextest is not
//! installed).

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::process::{cargo, run, target_dir, workspace_root};
use crate::{guest, prerequisites, tidy};

/// Runs everything; further arguments go to the test runner (a filter, for example).
pub fn run_all(filter: &[&str]) -> Result<()> {
    prerequisites::install()?;
    prerequisites::install_for_tests()?;
    run(&mut cargo(&["fmt", "--all", "--check"]))?;
    tidy::check()?;
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
    let mut environment = vec![
        ("FORELAY_GUEST", guest),
        ("FORELAY_TEST_CACHE", target_dir().join("test-cache")),
    ];
    environment.extend(traces().map(|dir| ("FORELAY_TRACES", dir)));
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

/// Recorded traces of launches, which are no part of the project: where they are absent,
/// the tests that read them are skipped.
fn traces() -> Option<PathBuf> {
    Some(workspace_root().join("../shared/traces")).filter(|dir| dir.is_dir())
}

fn has_nextest() -> bool {
    cargo(&["nextest", "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
}
