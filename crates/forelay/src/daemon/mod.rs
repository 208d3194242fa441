//! The host daemon: everything that runs VMs from shared memory, behind one API.
//!
//! ```text
//! forelay daemon = holder (FUSE sessions) -> pinner (locks)
//!                                         -> worker: this module
//! worker:  server (API) -> Host -> launch -> recipe, domains, planner, VMM
//!          faults -> domains -> disk cache, repository
//!          observer -> learning -> plan of the next launch -> planner -> prefetcher
//! ```
//! The worker may die at any time: the holder starts another, which finds the instances'
//! records, serves the same mounts and reattaches the VMs.
//!
//! Invariants: no VM ever sees an error for a page; what a client is told to have
//! happened is on disk or in the kernel.

mod api;
mod forecast;
mod launch;
mod memory;
mod process;
mod vm;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forelay_image::Digest;
use forelay_store::Store;
use forelay_vm::VmHandle;
use forelay_vm::qemu::QemuDriver;
use parking_lot::Mutex;

use crate::api::{ExecRequest, ExecResult, Vm};
use crate::config::Config;
use crate::recipe::Recipe;
use forecast::learning::Learner;
use forecast::lessons::Lessons;
use memory::domains::Domains;
use memory::planner::PlannerHandle;
use vm::registry::{Instance, Instances};

pub use forecast::learning::HISTORY_FILE;
pub use process::worker::{open_store, run_holder, run_pinner, run_worker};

/// How long a guest may take to power itself off.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long learning may take that the daemon's end cuts short.
const LEARN_GRACE: Duration = Duration::from_secs(5);
/// Longest command in a guest if the client names no limit.
const EXEC_LIMIT: Duration = Duration::from_secs(3600);
/// Recipes of recent locks that are kept.
const KEEP_RECIPES: usize = 64;

/// Why the daemon did not do as asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HostError {
    /// No instance of this name.
    #[error("no VM is called {0:?}: `forelay ps --all` lists them")]
    NoSuchVm(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The thing is in use, or not in a state for this.
    #[error("{0}")]
    Busy(String),
    /// Something did not work.
    #[error("{0}")]
    Failed(String),
}

impl HostError {
    /// A failure with all its causes.
    pub fn failed(error: impl std::error::Error) -> Self {
        Self::Failed(chain(&error))
    }

    /// A refusal with all its causes.
    pub fn invalid(error: impl std::error::Error) -> Self {
        Self::Invalid(chain(&error))
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        // Transparent wrappers repeat their cause.
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}

/// Everything the daemon has.
pub struct Host {
    config: Config,
    started: Instant,
    store: Store,
    domains: Arc<Domains>,
    memory: PlannerHandle,
    learner: Learner,
    lessons: Lessons,
    last_launches: forecast::last_launches::LastLaunches,
    demand: memory::samples::ForecastDemand,
    instances: Instances,
    handles: Mutex<HashMap<String, VmHandle>>,
    observers: Mutex<BTreeMap<String, Arc<Mutex<vm::supervise::Observed>>>>,
    driver: QemuDriver,
    accelerator: Mutex<Option<String>>,
    takeover: Mutex<Option<crate::api::Takeover>>,
    premaps: launch::prepared::Premaps,
    recipes: Mutex<HashMap<Digest, Arc<Recipe>>>,
    next_port: Mutex<u16>,
}

impl Host {
    /// Time since this daemon started.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// What VMs run under, once one was launched.
    pub fn accelerator(&self) -> String {
        self.accelerator
            .lock()
            .clone()
            .unwrap_or_else(|| "not probed yet".to_owned())
    }

    /// All instances.
    pub fn vms(&self) -> Vec<Vm> {
        let all = self.instances.all();
        let mut vms: Vec<Vm> = all.iter().map(|one| self.with_waits(one.vm())).collect();
        vms.sort_by(|a, b| (a.launched_ms, &a.name).cmp(&(b.launched_ms, &b.name)));
        vms
    }

    /// A VM with what it waited for until now.
    fn with_waits(&self, mut vm: Vm) -> Vm {
        let running = vm
            .pid
            .and_then(|pid| self.domains.attribution().figures(pid));
        if let Some(waits) = running {
            vm.waits = waits.into();
        }
        vm
    }

    fn instance(&self, name: &str) -> Result<Arc<Instance>, HostError> {
        self.instances
            .get(name)
            .ok_or_else(|| HostError::NoSuchVm(name.to_owned()))
    }

    fn handle(&self, name: &str) -> Result<VmHandle, HostError> {
        let state = self.instance(name)?.vm().state;
        let handle = self.handles.lock().get(name).cloned();
        handle.ok_or_else(|| {
            HostError::Busy(format!("VM {name} has no VMM to talk to: it is {state:?}"))
        })
    }

    /// One instance; waits up to `patience` for its state to change.
    pub async fn vm(&self, name: &str, patience: Duration) -> Result<Vm, HostError> {
        let instance = self.instance(name)?;
        let mut watch = instance.watch();
        let before = watch.borrow_and_update().state;
        let changed = async {
            while watch.changed().await.is_ok() {
                if watch.borrow_and_update().state != before {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(patience, changed).await;
        Ok(instance.vm())
    }

    /// Stops an instance; one that has ended already is left as it is.
    pub async fn stop(&self, name: &str) -> Result<Vm, HostError> {
        let instance = self.instance(name)?;
        if instance.vm().state.is_live() {
            let handle = self.wait_for_handle(&instance).await?;
            self.scan_now(&instance).await;
            handle.stop(STOP_GRACE).await.map_err(HostError::failed)?;
            self.wait_until_ended(&instance).await;
        }
        Ok(instance.vm())
    }

    /// A VM that is just being launched gets its VMM in a moment.
    async fn wait_for_handle(&self, instance: &Instance) -> Result<VmHandle, HostError> {
        let name = instance.vm().name;
        let mut watch = instance.watch();
        loop {
            if let Some(handle) = self.handles.lock().get(&name).cloned() {
                return Ok(handle);
            }
            if !watch.borrow_and_update().state.is_live() {
                return self.handle(&name);
            }
            let _ = tokio::time::timeout(Duration::from_millis(200), watch.changed()).await;
        }
    }

    async fn wait_until_ended(&self, instance: &Instance) {
        let mut watch = instance.watch();
        while watch.borrow_and_update().state.is_live() {
            if watch.changed().await.is_err() {
                return;
            }
        }
    }

    /// Stops all instances.
    pub async fn stop_all(&self) {
        let live = self.instances.live();
        let names: Vec<String> = live.iter().map(|instance| instance.vm().name).collect();
        let stops = names.iter().map(|name| self.stop(name));
        for result in futures_util::future::join_all(stops).await {
            if let Err(error) = result {
                tracing::error!(%error, "a VM did not stop");
            }
        }
    }

    /// Finishes what is being learned; this daemon ends.
    pub async fn finish_learning(&self) {
        if !self.lessons.finish(LEARN_GRACE).await {
            tracing::error!("some of what was touched lately is not learned: it took too long");
        }
    }

    /// Runs a command in a guest.
    pub async fn exec(&self, name: &str, request: ExecRequest) -> Result<ExecResult, HostError> {
        if request.command.is_empty() {
            return Err(HostError::Invalid("no command was given".to_owned()));
        }
        let limit = match request.timeout_s {
            Some(seconds) => Duration::try_from_secs_f64(seconds)
                .map_err(|_| HostError::Invalid(format!("{seconds} s is no time limit")))?,
            None => EXEC_LIMIT,
        };
        let argv: Vec<&str> = request.command.iter().map(String::as_str).collect();
        let handle = self.handle(name)?;
        let result = handle.exec(&argv, limit).await.map_err(HostError::failed)?;
        use forelay_guest_protocol::messages::ExitStatus;
        let status = match result.status {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => 128 + signal,
            ExitStatus::TimedOut => 124,
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(ExecResult {
            status,
            stdout: text(&result.stdout.0),
            stderr: text(&result.stderr.0),
        })
    }

    /// What is known of profiles' past.
    pub async fn history(
        &self,
        profile: Option<&str>,
    ) -> Result<Vec<crate::api::HistoryEntry>, HostError> {
        self.learner.entries(profile).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_with_its_causes_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer")]
        struct Outer(#[source] std::io::Error);
        let inner = std::io::Error::other("inner");
        assert_eq!(chain(&Outer(inner)), "outer: inner");
    }
}
