//! `forelay simulate`: a trace of launches against policies, on a virtual clock.

use anyhow::{Result, bail};

/// Arguments of `forelay simulate`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The trace (CSV, possibly gzip).
    pub trace: std::path::PathBuf,
}

/// `forelay simulate`.
pub fn run(arguments: Arguments) -> Result<()> {
    bail!("{} cannot be simulated yet", arguments.trace.display())
}
