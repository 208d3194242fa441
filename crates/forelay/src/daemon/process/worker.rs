//! The worker's process: serves first, opens the rest after that, ends when it is told to.
//!
//! ```text
//! configuration -> mounts (faults are answered) -> API -> ready -> VMs, history
//! ```
//! Invariant: nothing but a missing holder or a socket that is taken ends a worker in its
//! start; see [`super::health`]. A panic in any thread or task ends it at once: the next
//! worker serves on, while half a worker would let VMs wait for ever.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use forelay_memory::holder::Handover;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::health::{Dependency, Health};
use super::startup::{config_or_last_good, keep_config, load_config, make_directories, open_host};
use super::{heartbeat, takeover};
use crate::config::Config;
use crate::daemon::Host;
use crate::daemon::api::{access, connections, listeners};

/// Between attempts at what is missing.
const RETRY_EVERY: Duration = Duration::from_secs(5);
/// A repository that does not say within this time that it is there, is not.
const PROBE_LIMIT: Duration = Duration::from_secs(5);
/// Descriptors that a worker may have, if the system allows so many.
const DESCRIPTORS: u64 = 16_384;
/// How long a stop waits for a VMM that is being started for nobody.
const STANDBY_LIMIT: Duration = Duration::from_secs(5);
/// How long a stop waits for VMs that are still being found.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// The worker's process.
pub fn run_worker(path: Option<&Path>, runtime_dir: &Path) -> Result<()> {
    super::log();
    super::keep_private();
    abort_on_panic();
    raise_descriptors();
    let health = Health::default();
    let config = config_or_last_good(path, runtime_dir, &health)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let result = runtime.block_on(serve(config, path, health));
    runtime.shutdown_background();
    result
}

fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

/// Lets this process have as many descriptors as the system allows it, up to a bound: what
/// shells and service managers give at first is less than the clients that may watch.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit
        .maximum
        .map_or(DESCRIPTORS, |most| most.min(DESCRIPTORS));
    if limit.current.is_some_and(|current| current < wanted) {
        let raised = Rlimit {
            current: Some(wanted),
            ..limit
        };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%error, "few clients may watch: descriptors are limited");
        }
    }
}

/// What ends a worker.
enum End {
    Stop,
    Restart,
    /// Another holder has the mounts.
    HandedOver,
}

async fn serve(config: Config, path: Option<&Path>, health: Health) -> Result<()> {
    // The holder has looked whether another daemon answers on the socket. Here it would be
    // wrong to: a predecessor that was killed a moment ago may not have closed it yet.
    let socket = config.socket();
    make_directories(&config, &health);
    // From now on: a signal that comes while VMs are taken over must not end this process
    // before they can be stopped.
    let signals = StopSignals::install()?;
    let (host, journalled) = open_host(config, health).await?;
    let inherited = takeover::serve_mounts(&host, journalled).await?;
    let instances = takeover::list_vms(&host, &inherited);
    let listener = connections::listen(&socket)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    let (orphaned, handed_over) = oneshot::channel();
    host.domains.sessions().ready()?;
    let giving = Arc::clone(&host);
    heartbeat::start(&host, move || {
        if hand_over(&giving).is_ok() {
            // The worker may be ending already.
            let _ = orphaned.send(());
        }
    });
    tracing::info!(socket = %socket.display(), "ready");
    if !host.health.lacks(Dependency::Configuration) {
        keep_config(&host.config);
    }
    tokio::spawn(settle(Arc::clone(&host), inherited, instances));
    tokio::spawn(heal(Arc::clone(&host), path.map(Path::to_path_buf)));
    if let Some(group) = &host.config.group
        && let Err(error) = access::open_to_group(&socket, group)
    {
        tracing::error!(group, %error, "the API is root's alone");
    }
    let over_tcp = |served| {
        host.health.note(Dependency::Dashboard, served);
    };
    let end = tokio::select! {
        () = listeners::run(&host, listener, over_tcp) => End::Stop,
        end = signals.arrived() => end,
        Ok(()) = handed_over => End::HandedOver,
    };
    finish(&host, &socket, end).await
}

async fn finish(host: &Arc<Host>, socket: &Path, end: End) -> Result<()> {
    let _ = std::fs::remove_file(socket);
    // The VMs to be stopped, or to be learned from, are known only then.
    let _ = tokio::time::timeout(SETTLE_LIMIT, host.settled()).await;
    host.preparations.close().await;
    // What was being started to stand by is let go of as soon as it does.
    let standby = Arc::clone(&host.standby);
    let clearing = tokio::task::spawn_blocking(move || standby.blocking_lock().clear());
    if tokio::time::timeout(STANDBY_LIMIT, clearing).await.is_err() {
        tracing::warn!("a VMM that was started for nobody is left to the next daemon");
    }
    match end {
        End::Stop => {
            tracing::info!("stopping all VMs");
            tokio::join!(host.vms.stop_all(), host.launches.maker.close());
            host.finish_learning().await;
        }
        End::Restart => {
            tracing::info!("restarting; VMs go on");
            host.finish_learning().await;
            host.domains.sessions().restart()?;
        }
        End::HandedOver => {
            tracing::info!("another holder has the mounts; VMs go on");
            host.finish_learning().await;
        }
    }
    Ok(())
}

/// After the mounts are served: finds the VMs and reads the history.
async fn settle(
    host: Arc<Host>,
    inherited: takeover::Inherited,
    instances: Vec<Arc<crate::daemon::vm::instance::Instance>>,
) {
    // Before anything is looked for that the worker before may have started. It looks at every
    // process, and waits for those that wait for a page.
    match tokio::task::spawn_blocking(forelay_vm::stray::end_unexecuted).await {
        Ok(Ok(0)) => {}
        Ok(Ok(ended)) => tracing::warn!(ended, "ended what was about to become VMMs of nobody's"),
        Ok(Err(error)) => tracing::error!(%error, "a VMM that nobody knows may be starting"),
        Err(error) => tracing::error!(%error, "a VMM that nobody knows may be starting"),
    }
    let finding = takeover::find_vms(Arc::clone(&host), inherited, instances);
    let opening = async {
        host.health
            .note(Dependency::History, host.forecasts.open_history().await)
    };
    // As above.
    let launches = Arc::clone(&host.launches);
    let clearing = tokio::task::spawn_blocking(move || launches.maker.clear());
    let (_, _, cleared) = tokio::join!(finding, opening, clearing);
    if let Err(error) = cleared {
        tracing::error!(%error, "a maker's VM of before may live on");
    }
    host.settled.send_replace(true);
    host.start_background();
}

/// Tries again what is missing, for as long as the worker lives.
async fn heal(host: Arc<Host>, path: Option<std::path::PathBuf>) {
    host.settled().await;
    let mut listed = false;
    loop {
        if probe_repository(&host).await && !std::mem::replace(&mut listed, true) {
            // So that launches find the components' metadata on this host, and a kernel that
            // is ready. If it cannot be had now, the one who needs it says so.
            let host = Arc::clone(&host);
            tokio::spawn(async move {
                if let Ok(listed) = host.store.components().await {
                    host.launches.prepare_kernels(&listed).await;
                }
            });
        }
        if host.health.lacks(Dependency::History) {
            host.health
                .note(Dependency::History, host.forecasts.open_history().await);
        }
        if host.health.lacks(Dependency::Directory) {
            host.health.has(Dependency::Directory);
            make_directories(&host.config, &host.health);
        }
        let runtime_dir = &host.config.runtime_dir;
        if host.health.lacks(Dependency::Configuration)
            && let Ok(now) = load_config(path.as_deref(), runtime_dir)
        {
            if now == host.config {
                host.health.has(Dependency::Configuration);
            } else {
                let problem = "it is valid again: SIGHUP to the daemon puts it into use";
                host.health.lack(Dependency::Configuration, problem);
            }
        }
        tokio::time::sleep(RETRY_EVERY).await;
    }
}

/// True if it is there.
async fn probe_repository(host: &Host) -> bool {
    let aside = host.store.set_aside();
    let told = aside
        .iter()
        .map(|one| format!("{} is set aside: {}", one.location, one.problem));
    match told.reduce(|all, one| format!("{all}; {one}")) {
        Some(problem) => host.health.lack(Dependency::Mirror, problem),
        None => host.health.has(Dependency::Mirror),
    }
    match tokio::time::timeout(PROBE_LIMIT, host.store.probe()).await {
        Ok(probed) => host.health.note(Dependency::Repository, probed).is_some(),
        Err(_) => {
            let problem = format!("it has not answered for {PROBE_LIMIT:?}");
            host.health.lack(Dependency::Repository, problem);
            false
        }
    }
}

/// Gives the mounts to the next holder that comes.
fn hand_over(host: &Host) -> std::io::Result<()> {
    let path = host.config.handover_socket();
    let waiting = Handover::listen(&path).inspect_err(|error| {
        tracing::error!(%error, "no other holder can take the mounts over");
    })?;
    waiting.hand_over(&|| {
        let domains = host.domains.all().into_iter();
        let held = domains.map(|memory| {
            let session = memory.shared.session().as_fd().try_clone_to_owned()?;
            Ok(forelay_memory::holder::Domain {
                name: memory.domain.as_str().to_owned(),
                mountpoint: memory.shared.mountpoint().to_owned(),
                fuse: session,
            })
        });
        held.collect()
    })
}

/// Signals that end this process.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl StopSignals {
    fn install() -> std::io::Result<Self> {
        #[cfg(debug_assertions)]
        panic_on_signal()?;
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for SIGTERM or SIGINT, or for SIGHUP.
    async fn arrived(mut self) -> End {
        tokio::select! {
            _ = self.terminate.recv() => End::Stop,
            _ = self.interrupt.recv() => End::Stop,
            _ = self.hangup.recv() => End::Restart,
        }
    }
}

/// For tests, in debug builds alone: SIGUSR2 makes a background task panic.
#[cfg(debug_assertions)]
fn panic_on_signal() -> std::io::Result<()> {
    let mut planted = signal(SignalKind::user_defined2())?;
    tokio::spawn(async move {
        planted.recv().await;
        panic!("a panic that was planted");
    });
    Ok(())
}
