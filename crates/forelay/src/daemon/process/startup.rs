//! A worker's start up to the point at which it can answer faults: configuration, store,
//! planner, host. Nothing here waits for the repository, the history or a VMM.
//!
//! Invariant: what is missing makes the worker degraded (see [`super::health`]), not end: VMs
//! that run wait for it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use forelay_cache::Planner;
use forelay_cache::budget::BudgetConfig;
use forelay_cache::mapping_table::{MappingTable, SharedTable};
use forelay_cache::plan::PlanConfig;
use forelay_image::Digest;
use forelay_memory::pressure;
use forelay_store::{
    DirectoryRepository, FetchConfig, Limited, Mirrored, Repository, RepositoryUrl, Store,
    StoreConfig, Throttled,
};
use forelay_vm::Accelerator;
use forelay_vm::qemu::QemuDriver;
use tokio::sync::mpsc;

use super::health::{Dependency, Health};
use crate::config::{Config, RepositoryConfig, VmmConfig};
use crate::daemon::forecast::clock::ForecastClock;
use crate::daemon::forecast::last_launches::LastLaunches;
use crate::daemon::forecast::learning::Learner;
use crate::daemon::launch::prepared::Preparations;
use crate::daemon::memory::domains::Domains;
use crate::daemon::memory::executors::Executors;
use crate::daemon::memory::journal::{Journal, JournalWriter, Replayed};
use crate::daemon::memory::planner::{PlannerHandle, PlannerParts, planner_channel};
use crate::daemon::memory::samples::{Sampler, total_bytes};
use crate::daemon::memory::sessions::Sessions;
use crate::daemon::memory::users::DomainUsers;
use crate::daemon::vm::registry::VmRegistry;
use crate::daemon::vm::vmm_groups::VmmGroups;
use crate::daemon::{Host, Parts};

/// Share of the host's memory that an adaptive budget may take at most.
const ADAPTIVE_SHARE: f64 = 0.5;
/// Cap of a disk cache that had to be put into the runtime directory, which is memory.
const MAKESHIFT_CACHE_BYTES: u64 = 256 << 20;
/// Cap of the disk cache of a repository that is only copied from or to.
const OTHER_CACHE_BYTES: u64 = 64 << 20;

/// The configuration of a worker below a holder that has `runtime_dir`.
pub fn load_config(path: Option<&Path>, runtime_dir: &Path) -> Result<Config> {
    let config = Config::load(path)?;
    if config.runtime_dir != runtime_dir {
        bail!(
            "runtime_dir is {} now, and the daemon runs in {}: stop it before you change that",
            config.runtime_dir.display(),
            runtime_dir.display()
        );
    }
    Ok(config)
}

/// The configuration, or the one that a worker was last ready with if it is not valid.
pub fn config_or_last_good(
    path: Option<&Path>,
    runtime_dir: &Path,
    health: &Health,
) -> Result<Config> {
    let error = match load_config(path, runtime_dir) {
        Ok(config) => return Ok(config),
        Err(error) => error,
    };
    let last_good = Config::last_good_path(runtime_dir);
    let Ok(config) = Config::load(Some(&last_good)) else {
        return Err(error);
    };
    health.lack(
        Dependency::Configuration,
        format!("{error:#}; the one of before is in use"),
    );
    Ok(config)
}

/// Keeps the configuration for a worker that finds an invalid one.
pub fn keep_config(config: &Config) {
    let path = Config::last_good_path(&config.runtime_dir);
    let keep = || -> Result<()> {
        let unfinished = path.with_extension("new");
        std::fs::write(&unfinished, toml::to_string(config)?)?;
        Ok(std::fs::rename(&unfinished, &path)?)
    };
    if let Err(error) = keep() {
        tracing::warn!(%error, "the configuration is not kept for a worker that needs it");
    }
}

/// The store as configured, for who reads. Never makes a repository.
pub async fn open_store(config: &Config) -> Result<Store> {
    let cache = (config.cache_path(), config.cache.cap_bytes);
    store(repository(config, true)?, cache).await
}

/// As [`open_store`], without the mirrors: for who changes the repository or judges it.
pub async fn open_first_store(config: &Config) -> Result<Store> {
    let cache = (config.cache_path(), config.cache.cap_bytes);
    store(repository(config, false)?, cache).await
}

/// As [`open_first_store`], with a repository made if there is none.
pub async fn create_store(config: &Config) -> Result<Store> {
    let (first, _) = config.repository_urls()?;
    make_directory(&first)?;
    let store = open_first_store(config).await?;
    store.initialise().await?;
    Ok(store)
}

/// A store of another repository than the configured one, made if `make` and there is none.
pub async fn open_other_store(config: &Config, url: &RepositoryUrl, make: bool) -> Result<Store> {
    if make {
        make_directory(url)?;
    }
    // Where chunks are differs from repository to repository, so what is known of that, too.
    let name = Digest::of(url.to_string().as_bytes()).short();
    let cache_dir = config.cache_path().join("repositories").join(name);
    let cache = (cache_dir, OTHER_CACHE_BYTES);
    let store = store(opened(config, url), cache).await?;
    if make {
        store.initialise().await?;
    }
    Ok(store)
}

fn make_directory(url: &RepositoryUrl) -> Result<()> {
    if let Some(path) = url.as_directory() {
        DirectoryRepository::create(path)
            .with_context(|| format!("cannot make the repository {}", path.display()))?;
    }
    Ok(())
}

/// A repository that fails for now when it takes too long.
fn opened(config: &Config, url: &RepositoryUrl) -> Arc<dyn Repository> {
    let limit = config.repository.timeout();
    Arc::new(Limited::new(url.open(), limit))
}

/// The configured repository, on the line that it stands in for.
fn repository(config: &Config, with_mirrors: bool) -> Result<Arc<dyn Repository>> {
    let (first, mirrors) = config.repository_urls()?;
    let first = opened(config, &first);
    let repository: Arc<dyn Repository> = match with_mirrors && !mirrors.is_empty() {
        true => {
            let mirrors = mirrors.iter().map(|url| opened(config, url));
            Arc::new(Mirrored::new(first, mirrors.collect()))
        }
        false => first,
    };
    let RepositoryConfig {
        latency_ms,
        bandwidth_bytes_per_s,
        ..
    } = config.repository;
    if latency_ms == 0 && bandwidth_bytes_per_s == 0 {
        return Ok(repository);
    }
    let latency = Duration::from_millis(latency_ms);
    let bandwidth = (bandwidth_bytes_per_s > 0).then_some(bandwidth_bytes_per_s);
    Ok(Arc::new(Throttled::new(repository, latency, bandwidth)))
}

async fn store(
    repository: Arc<dyn Repository>,
    (cache_dir, cache_cap_bytes): (std::path::PathBuf, u64),
) -> Result<Store> {
    Ok(Store::open(StoreConfig {
        repository,
        cache_dir,
        cache_cap_bytes,
        fetch: FetchConfig::default(),
    })
    .await?)
}

/// The store with its disk cache as configured, or else where there is room for a small one.
async fn store_or_makeshift(config: &Config, health: &Health) -> Result<Store> {
    let error = match open_store(config).await {
        Ok(store) => return Ok(store),
        Err(error) => error,
    };
    let makeshift = config.runtime_dir.join("cache");
    health.lack(
        Dependency::DiskCache,
        format!("{error:#}; in {} until a restart", makeshift.display()),
    );
    store(
        repository(config, true)?,
        (makeshift, MAKESHIFT_CACHE_BYTES),
    )
    .await
}

/// Makes the daemon's directories as far as it can.
pub fn make_directories(config: &Config, health: &Health) {
    for dir in [
        &config.state_dir,
        &config.runtime_dir,
        &config.vms_dir(),
        &config.mounts_dir(),
    ] {
        if let Err(error) = private_dir(dir) {
            health.lack(Dependency::Directory, format!("{}: {error}", dir.display()));
        }
    }
}

/// Makes a directory of ours, or takes from others what they may do in one that is there.
fn private_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
}

/// Everything but what serving VMs can do without; that is opened later.
pub async fn open_host(config: Config, health: Health) -> Result<(Arc<Host>, Replayed)> {
    let store = store_or_makeshift(&config, &health).await?;
    store.accept_last_listing();
    let scheduler = store.scheduler().clone();
    let (sender, inbox) = planner_channel();
    let (users, groups) = confinement(&config, &health).unzip();
    let domains = Arc::new(Domains::new(
        &config.mounts_dir(),
        users,
        scheduler.clone(),
        sender.clone(),
        Sessions::connect()?,
        health.events().clone(),
    ));
    let (plan, budget) = memory_settings(&config);
    let journal = Journal::open(config.runtime_dir.join("mapping-table.journal"));
    let (journal, table, journalled) = match health.note(Dependency::Journal, journal) {
        Some((journal, table, journalled)) => (Some(journal), table, journalled),
        None => (None, MappingTable::new(), Replayed::default()),
    };
    let table = Arc::new(SharedTable::new(table));
    let journal = journal.map(|journal| JournalWriter::start(journal, Arc::clone(&table)));
    let planner = Planner::new(plan, budget, table);
    let (prepare, likely) = mpsc::unbounded_channel();
    let sampler = Sampler::new();
    let demand = sampler.demand();
    let executors = Executors::start(&domains, scheduler.clone(), &sender, prepare)?;
    let parts = PlannerParts {
        planner,
        domains: Arc::clone(&domains),
        scheduler,
        sampler,
        executors,
        journal: journal.transpose()?,
    };
    let memory = PlannerHandle::start(parts, sender.clone(), inbox)?;
    let last_launches = LastLaunches::open(&config.state_dir, config.vmm.pmem_slots);
    let learner = Learner::new(
        &config.state_dir,
        &config.forecast,
        last_launches.memory_mib(),
    );
    let preparations = Preparations::open(config.runtime_dir.join("premapped"));
    let registry = VmRegistry::new(health.events().clone());
    let host = Host::new(Parts {
        driver: Arc::new(driver(&config)),
        groups: groups.map(Arc::new),
        preparations: Arc::new(preparations),
        config,
        health,
        store,
        domains,
        memory: Arc::new(memory),
        planner: sender,
        likely,
        learner: Arc::new(learner),
        last_launches: Arc::new(last_launches),
        demand,
        instances: Arc::new(registry),
        learning_tasks: Arc::default(),
    });
    Ok((Arc::new(host), journalled))
}

/// Users and groups of VMMs, where they are confined.
fn confinement(config: &Config, health: &Health) -> Option<(DomainUsers, VmmGroups)> {
    let VmmConfig {
        confine,
        first_user,
        users,
        ..
    } = config.vmm;
    if !confine {
        return None;
    }
    let range = first_user..first_user.saturating_add(users);
    let users = DomainUsers::open(&config.state_dir, range);
    let groups = VmmGroups::open(&config.runtime_dir);
    if !groups.lacks().is_empty() {
        health.lack(Dependency::ControlGroups, groups.lacks().join("; "));
    }
    Some((users, groups))
}

fn driver(config: &Config) -> QemuDriver {
    let mut driver = QemuDriver::new(&config.state_dir);
    driver.binary.clone_from(&config.vmm.qemu);
    // The configuration was checked when it was loaded.
    driver.accelerator = match config.vmm.accelerator.as_str() {
        "kvm" => Some(Accelerator::Kvm),
        "tcg" => Some(Accelerator::Tcg),
        _ => None,
    };
    driver
}

/// The planner's horizon, and how much memory it may take.
pub fn memory_settings(config: &Config) -> (PlanConfig, BudgetConfig) {
    let total = pressure::Probe::new()
        .sample()
        .map_or(1 << 30, |sample| total_bytes(&sample));
    let cap_bytes = match config.memory.budget_bytes {
        0 => (total as f64 * ADAPTIVE_SHARE) as u64,
        bytes => bytes,
    };
    let mut budget = BudgetConfig {
        cap_bytes,
        ..BudgetConfig::default()
    };
    if config.memory.critical_bytes > 0 && total > 0 {
        let critical = config.memory.critical_bytes as f64 / total as f64;
        budget.headroom_share = critical / budget.critical_share;
    }
    // The planner lives on the wall clock; its horizon and how long it remembers
    // belong to the forecaster's.
    let clock = ForecastClock::new(&config.forecast);
    let usual = PlanConfig::default();
    let wall_ms =
        |stretch: Duration| i64::try_from(clock.wall(stretch).as_millis()).unwrap_or(i64::MAX);
    let half_life = Duration::from_millis(usual.half_life_ms.unsigned_abs());
    let plan = PlanConfig {
        budget_bytes: cap_bytes,
        horizon_ms: wall_ms(config.forecast.horizon()),
        half_life_ms: wall_ms(half_life),
        ..usual
    };
    (plan, budget)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_starts_with_the_configuration_or_the_last_one_that_was_good() {
        let dir = tempfile::tempdir().unwrap();
        let (runtime, path) = (dir.path().join("run"), dir.path().join("forelay.toml"));
        std::fs::create_dir(&runtime).unwrap();
        let write = |cap_bytes: &str, runtime: &Path| {
            let text = format!("runtime_dir = {runtime:?}\n[cache]\ncap_bytes = {cap_bytes}\n");
            std::fs::write(&path, text).unwrap();
        };
        let start = || {
            let health = Health::default();
            let found = config_or_last_good(Some(&path), &runtime, &health);
            let lacks = health.lacks(Dependency::Configuration);
            (found.map(|config| config.cache.cap_bytes), lacks)
        };
        write("\"many\"", &runtime);
        let (found, _) = start();
        assert!(found.is_err(), "there was no good one");

        write("1000000000", &runtime);
        let (found, lacks) = start();
        assert_eq!((found.unwrap(), lacks), (1_000_000_000, false));
        keep_config(&load_config(Some(&path), &runtime).unwrap());
        for spoil in [
            || "\"many\"".to_owned(),
            || "2000000000\nno_such_key = 1".to_owned(),
        ] {
            write(&spoil(), &runtime);
            let (found, lacks) = start();
            assert_eq!((found.unwrap(), lacks), (1_000_000_000, true));
        }
        // The mounts are in the directory of before.
        write("2000000000", &dir.path().join("elsewhere"));
        let (found, lacks) = start();
        assert_eq!((found.unwrap(), lacks), (1_000_000_000, true));
        std::fs::remove_file(&path).unwrap();
        let (found, lacks) = start();
        assert_eq!((found.unwrap(), lacks), (1_000_000_000, true));
    }
}
