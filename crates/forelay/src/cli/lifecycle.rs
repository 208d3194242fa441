//! Commands that have VMs stand still and go on, sleep and wake, and become several.

use std::time::Duration;

use anyhow::Result;

use super::output;
use super::vms::{spinner, wait_ready};
use crate::api::{ForkRequest, Forked, Vm, VmState};
use crate::client::{Client, vm_path};

/// Does one thing to each of several VMs; the first failure ends it.
pub async fn each(client: &Client, verb: &str, names: &[String], json: bool) -> Result<()> {
    let mut done = Vec::new();
    let spinner = spinner(json);
    for name in names {
        let path = vm_path(name, &format!("/{verb}"))?;
        spinner.set_message(format!("{verb} {name}"));
        let vm: Vm = client.post(&path, &()).await?;
        if !json {
            say!("{name} is {}", vm.state.name());
        }
        done.push(vm);
    }
    if json { output::json(&done) } else { Ok(()) }
}

/// Arguments of `forelay fork`.
#[derive(Debug, clap::Args)]
pub struct ForkArguments {
    /// The VM.
    pub vm: String,
    /// How many clones to make.
    #[arg(long, default_value_t = 1)]
    pub count: u32,
    /// Name of the clone, with a number behind it if there are several; made from the VM's own
    /// if absent.
    #[arg(long)]
    pub name: Option<String>,
    /// Give up waiting for a clone to be ready after this many seconds.
    #[arg(long, default_value_t = 300)]
    pub timeout: u64,
    #[arg(long)]
    pub json: bool,
}

/// `forelay fork`: returns 1 if not all clones were made.
pub async fn fork(client: &Client, arguments: ForkArguments) -> Result<i32> {
    let request = ForkRequest {
        count: arguments.count,
        name: arguments.name,
    };
    let spinner = spinner(arguments.json);
    spinner.set_message(format!("forking {}", arguments.vm));
    let path = vm_path(&arguments.vm, "/fork")?;
    let mut forked: Forked = client.post(&path, &request).await?;
    let limit = Duration::from_secs(arguments.timeout);
    for vm in &mut forked.vms {
        *vm = wait_ready(client, &vm.name, limit, &spinner).await?;
    }
    spinner.finish_and_clear();
    let failed = |vm: &Vm| {
        let why = vm.error.clone().unwrap_or_default();
        (vm.state == VmState::Failed).then(|| format!("{}: {why}", vm.name))
    };
    let not_made = forked.vms.iter().filter_map(failed);
    let not_made: Vec<String> = forked.failed.iter().cloned().chain(not_made).collect();
    if arguments.json {
        output::json(&forked)?;
    } else {
        for vm in &forked.vms {
            say!("{} is {}", vm.name, vm.state.name());
            for note in &vm.launch.notes {
                complain!("note: {note}");
            }
        }
        let held = output::seconds(forked.held_s);
        say!("  {} stood still for {held}", arguments.vm);
    }
    for why in &not_made {
        complain!("error: {why}");
    }
    Ok(i32::from(!not_made.is_empty()))
}
