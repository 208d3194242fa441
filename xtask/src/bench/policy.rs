//! `bench policy`: eviction policies on real launches with the sizes of components built here.
//!
//! Builds the components into `target/bench/components` (kept for the next run), then leaves the
//! rest to forelay-sim's `bench_policy`. With `--repository DIR` that one's components are used.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::process::target_dir;
use crate::{demo, host, prerequisites};

/// Debian packages that people run in VMs, alone or as part of an image.
const PACKAGES: &str = "\
    nginx redis python3 nodejs git curl php-cli php-fpm postgresql memcached haproxy \
    sqlite3 apache2 imagemagick make gcc g++ golang cargo mariadb-server rsync \
    openssh-server jq tcpdump lua5.4 pandoc varnish prometheus ghostscript tmux \
    python3-numpy python3-django python3-flask nginx-extras";

/// Fewer would say little.
const LEAST_BUILT: usize = 20;

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path, arguments: &[&str]) -> Result<()> {
    if arguments.contains(&"--repository") {
        return super::example("forelay-sim", "bench_policy", out, arguments);
    }
    let repository = target_dir().join("bench/components");
    if !repository.exists() {
        build_components(&repository)?;
    }
    let path = repository.to_string_lossy();
    let arguments = [&["--repository", &*path], arguments].concat();
    super::example("forelay-sim", "bench_policy", out, &arguments)
}

/// Builds the components; a package that cannot be built is left out, loudly.
fn build_components(repository: &Path) -> Result<()> {
    prerequisites::install()?;
    let programs = host::build()?;
    // Under this name until it is complete.
    let partial = repository.with_extension("partial");
    let build =
        |arguments: &[&str], name| demo::build_lacking(&programs, &partial, &[(arguments, name)]);
    build(&["--base", "debian"], "debian")?;
    let mut built = 0;
    for package in PACKAGES.split(' ') {
        println!("component {package}");
        match build(&["--deb", package], package) {
            Ok(()) => built += 1,
            Err(error) => eprintln!("LEFT OUT {package}: {error:#}"),
        }
    }
    ensure!(
        built >= LEAST_BUILT,
        "only {built} components could be built"
    );
    Ok(std::fs::rename(partial, repository)?)
}
