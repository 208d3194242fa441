//! Builds the static guest init that goes into kernel components.

use std::path::PathBuf;

use anyhow::Result;

use crate::process::{cargo, run, target_dir};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds the guest binary and returns its path.
pub fn build() -> Result<PathBuf> {
    let dir = target_dir().join("guest");
    run(cargo(&[
        "build",
        "--quiet",
        "--package",
        "forelay-guest",
        "--bin",
        "forelay-guest",
    ])
    .args(["--profile", "guest", "--target", TARGET, "--target-dir"])
    .arg(&dir)
    .env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    Ok(dir.join(TARGET).join("guest").join("forelay-guest"))
}
