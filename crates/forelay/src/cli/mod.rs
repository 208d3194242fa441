//! The `forelay` command line: parsing and dispatch. Each family of commands has a file.
//!
//! Commands on VMs and memory speak to the daemon; commands on components, manifests and
//! traces work on their own. Exit code 0 is success, 1 a failure told on standard error,
//! 2 wrong usage; `exec` passes on the guest command's, `run` the entrypoint's.

// What is printed goes through `output`: it may come from a guest, and nobody may read it.
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
mod output;

mod components;
mod copy;
mod doctor;
#[cfg(test)]
mod documented;
mod events;
mod exec;
mod history;
mod images;
mod inspect;
mod layers;
mod lifecycle;
mod manifests;
mod simulate;
mod snapshots;
mod top;
mod vms;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::client::Client;
use crate::config::Config;
use crate::daemon;

/// Composes VM images from shared components and has them in memory before they are needed.
#[derive(Debug, Parser)]
#[command(name = "forelay", version, max_term_width = 100)]
struct Arguments {
    /// Host configuration (TOML).
    #[arg(long, global = true, env = "FORELAY_CONFIG")]
    config: Option<PathBuf>,
    /// The daemon's socket.
    #[arg(long, global = true, env = "FORELAY_SOCKET")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the host daemon: API, shared memory, forecaster.
    Daemon {
        /// If the history is corrupt, set it aside (nothing is deleted) and start again.
        #[arg(long)]
        history_reset: bool,
    },
    /// Build, list and show components.
    #[command(subcommand)]
    Component(components::ComponentCommand),
    /// Make, list and remove what launches resume from instead of booting.
    #[command(subcommand)]
    Snapshot(snapshots::SnapshotCommand),
    /// Resolve a manifest into a digest-pinned lock.
    Lock(manifests::LockArguments),
    /// Compose a manifest's image and print how to start a VMM with it.
    Compose(manifests::ComposeArguments),
    /// Launch a VM.
    Run(vms::RunArguments),
    /// Map a manifest's devices and load what a launch of it is expected to touch.
    Prefetch(vms::PrefetchArguments),
    /// List VMs.
    Ps {
        /// Also those that ended.
        #[arg(long, short)]
        all: bool,
        #[arg(long)]
        json: bool,
    },
    /// Stop VMs.
    Stop {
        #[arg(required = true)]
        names: Vec<String>,
        #[arg(long)]
        json: bool,
    },
    /// Have VMs stand still.
    Pause {
        #[arg(required = true)]
        names: Vec<String>,
        #[arg(long)]
        json: bool,
    },
    /// Keep VMs as snapshots of their own, which take no memory.
    Hibernate {
        #[arg(required = true)]
        names: Vec<String>,
        #[arg(long)]
        json: bool,
    },
    /// Make clones of a running VM, each a machine of its own.
    Fork(lifecycle::ForkArguments),
    /// Have VMs go on that are paused or hibernate.
    Resume {
        #[arg(required = true)]
        names: Vec<String>,
        #[arg(long)]
        json: bool,
    },
    /// Run a command in a VM.
    Exec(exec::ExecArguments),
    /// Attach a component to a running VM.
    Attach {
        name: String,
        component: String,
        #[arg(long)]
        json: bool,
    },
    /// Detach a component from a running VM; refused while in use.
    Detach {
        name: String,
        component: String,
        #[arg(long)]
        json: bool,
    },
    /// Print a VM's console log.
    Logs {
        name: String,
        /// Go on until the VM ends.
        #[arg(long, short)]
        follow: bool,
    },
    /// Connect to a VM's serial console.
    Console { name: String },
    /// What components take in memory, and who pays.
    Memory {
        /// First drop all that no VM maps.
        #[arg(long)]
        drop_idle: bool,
        #[arg(long)]
        json: bool,
    },
    /// A VM's mapping table: guest file, component, where it is now.
    Map {
        name: String,
        #[arg(long)]
        json: bool,
    },
    /// What happened on this host lately: launches, waits, evictions, snapshots, what is missing.
    Events {
        /// Go on with what happens.
        #[arg(long, short)]
        follow: bool,
        /// With `--follow`, one object a line.
        #[arg(long)]
        json: bool,
    },
    /// VMs, components, forecasts and events at a terminal, kept up to date: q ends it, 1 to 5 and
    /// Tab choose what is shown, arrows and PageDown go through it.
    Top {
        /// Print it once and end.
        #[arg(long)]
        once: bool,
    },
    /// Print the address of the dashboard, with its token.
    Dashboard {
        #[arg(long)]
        json: bool,
    },
    /// What is expected to be needed next, and why.
    Forecast {
        profile: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// What is known of profiles' past.
    #[command(args_conflicts_with_subcommands = true)]
    History {
        profile: Option<String>,
        #[arg(long)]
        json: bool,
        #[command(subcommand)]
        command: Option<history::HistoryCommand>,
    },
    /// Replay a trace of launches against policies.
    Simulate(simulate::Arguments),
    /// Remove what no component references from the repository.
    Gc {
        /// Only tell what would be done, and how much nothing refers to.
        #[arg(long)]
        dry_run: bool,
        #[arg(long)]
        json: bool,
    },
    /// Read the whole repository and check every digest.
    Verify {
        #[arg(long)]
        json: bool,
    },
    /// What this host lacks, and the command that fixes it.
    Doctor {
        #[arg(long)]
        json: bool,
    },
    /// Print a shell's completion script.
    Completions { shell: clap_complete::Shell },
    /// The daemon's worker, started by `forelay daemon`.
    #[command(hide = true)]
    InternalWorker {
        #[arg(long)]
        runtime_dir: PathBuf,
    },
    /// Whether a worker could start, asked by `forelay daemon` before it replaces one.
    #[command(hide = true)]
    InternalCheck {
        #[arg(long)]
        runtime_dir: PathBuf,
        #[arg(long)]
        protocol: u32,
    },
    /// The pinner, started by `forelay daemon`.
    #[command(hide = true)]
    InternalPinner,
}

/// Entry point of the `forelay` program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            complain!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    if let Command::Completions { shell } = &arguments.command {
        let mut command = Arguments::command();
        let mut script = Vec::new();
        clap_complete::generate(*shell, &mut command, "forelay", &mut script);
        output::raw(&script);
        return Ok(ExitCode::SUCCESS);
    }
    let path = arguments.config.as_deref();
    match &arguments.command {
        // These have their own ways with a configuration that is not valid.
        Command::InternalWorker { runtime_dir } => {
            daemon::run_worker(path, runtime_dir)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::InternalCheck {
            runtime_dir,
            protocol,
        } => {
            daemon::run_check(path, runtime_dir, *protocol)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::InternalPinner => {
            daemon::run_pinner()?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let config = Config::load(path)?;
    match arguments.command {
        Command::Daemon { history_reset } => {
            if history_reset {
                history::reset(&config)?;
            }
            daemon::run_holder(config, arguments.config.as_deref())?;
        }
        Command::Simulate(arguments) => simulate::run(arguments)?,
        command => {
            let client = Client::new(arguments.socket.unwrap_or_else(|| config.socket()));
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()
                .context("cannot start the runtime")?;
            let status = runtime.block_on(run_async(command, &config, &client));
            // A thread that hangs in a repository keeps nobody.
            runtime.shutdown_background();
            let status = status?;
            return Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Commands that wait for the network, the daemon or the repository.
async fn run_async(command: Command, config: &Config, client: &Client) -> Result<i32> {
    match command {
        Command::Doctor { json } => doctor::run(config, client, json).await?,
        Command::Component(command) => components::run(command, config).await?,
        Command::Snapshot(command) => snapshots::run(command, client).await?,
        Command::Lock(arguments) => manifests::lock(arguments, config).await?,
        Command::Compose(arguments) => manifests::compose(arguments, config).await?,
        Command::Run(arguments) => return vms::run(client, arguments, config).await,
        Command::Prefetch(arguments) => vms::prefetch(client, arguments).await?,
        Command::Ps { all, json } => vms::ps(client, all, json).await?,
        Command::Stop { names, json } => vms::stop(client, &names, json).await?,
        Command::Pause { names, json } => lifecycle::each(client, "pause", &names, json).await?,
        Command::Resume { names, json } => lifecycle::each(client, "resume", &names, json).await?,
        Command::Hibernate { names, json } => {
            lifecycle::each(client, "hibernate", &names, json).await?;
        }
        Command::Fork(arguments) => return lifecycle::fork(client, arguments).await,
        Command::Exec(arguments) => return exec::run(client, arguments).await,
        Command::Attach {
            name,
            component,
            json,
        } => {
            vms::attach(client, &name, component, false, json).await?;
        }
        Command::Detach {
            name,
            component,
            json,
        } => {
            vms::attach(client, &name, component, true, json).await?;
        }
        Command::Logs { name, follow } => vms::logs(client, &name, follow).await?,
        Command::Console { name } => vms::console(client, &name).await?,
        Command::Memory { drop_idle, json } => inspect::memory(client, drop_idle, json).await?,
        Command::Map { name, json } => inspect::map(client, &name, json).await?,
        Command::Events { follow, json } => events::run(client, follow, json).await?,
        Command::Top { once } => top::run(client, once).await?,
        Command::Dashboard { json } => inspect::dashboard(client, config, json).await?,
        Command::Forecast { profile, json } => {
            inspect::forecast(client, profile.as_deref(), json).await?;
        }
        Command::History {
            command: Some(command),
            ..
        } => history::run(command, config).await?,
        Command::History { profile, json, .. } => {
            inspect::history(client, profile.as_deref(), json).await?;
        }
        Command::Gc { dry_run, json } => components::gc(config, dry_run, json).await?,
        Command::Verify { json } => components::verify(config, json).await?,
        Command::Daemon { .. }
        | Command::InternalWorker { .. }
        | Command::InternalCheck { .. }
        | Command::InternalPinner
        | Command::Simulate(_)
        | Command::Completions { .. } => unreachable!("handled by `run`"),
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
