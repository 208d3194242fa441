//! Resolving: a launch request, understood.
//!
//! Refuses to know shared memory, VMMs and instances.

use std::sync::Arc;
use std::time::Instant;

use forelay_image::component::Component;
use forelay_image::lock::Lock;
use forelay_image::manifest::Manifest;
use forelay_image::solve::solve;
use forelay_store::{Store, StoreError};

use crate::daemon::error::HostError;
use crate::daemon::order::Order;
use crate::recipe::{check_architectures, runs_here, solve_for_this_host};

/// Finds out what a request asks for.
pub struct Resolver {
    pub store: Store,
    pub pmem_slots: usize,
}

impl Resolver {
    /// Understands a manifest and resolves it, unless a lock does.
    pub async fn resolve(&self, text: &str, lock: Option<&str>) -> Result<Order, HostError> {
        let manifest = Manifest::parse(text).map_err(HostError::invalid)?;
        let started = Instant::now();
        let lock = match lock {
            Some(text) => {
                let lock = Lock::parse(text).map_err(HostError::invalid)?;
                if lock.manifest_digest != manifest.digest() {
                    return Err(HostError::Invalid(
                        "the lock is of another manifest: run `forelay lock` again".to_owned(),
                    ));
                }
                lock
            }
            None => {
                let components = self.store.components().await.map_err(HostError::failed)?;
                solve_for_this_host(&components, |components| solve(&manifest, components))
                    .map_err(HostError::invalid)?
            }
        };
        self.check_components(&lock).await?;
        let solve_s = started.elapsed().as_secs_f64();
        Order::new(manifest, lock, solve_s, self.pmem_slots)
    }
}

impl Resolver {
    /// Refuses what is for other machines than this host, and a lock that says of components
    /// what their metadata does not say. What cannot be read here is told by the launch.
    async fn check_components(&self, lock: &Lock) -> Result<(), HostError> {
        let found = lock.all().map(|one| self.store.locked_component(one));
        let mut all = Vec::new();
        for found in futures_util::future::join_all(found).await {
            match found {
                Ok(component) => all.push(component),
                Err(error @ StoreError::NotAsLocked { .. }) => {
                    return Err(HostError::invalid(error));
                }
                Err(_) => {}
            }
        }
        check_architectures(all.iter().map(|one| &**one)).map_err(HostError::invalid)?;
        let here = forelay_import::host_architecture();
        let foreign = |one: &&Arc<Component>| !runs_here(one);
        match all.iter().find(foreign) {
            None => Ok(()),
            Some(one) => Err(HostError::Invalid(format!(
                "{} {} is for {}, this host runs VMs of {here}",
                one.name, one.version, one.architecture
            ))),
        }
    }
}
