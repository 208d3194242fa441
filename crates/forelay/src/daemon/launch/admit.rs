//! Admission of a launch: its name is claimed first, and only then is it history.
//!
//! Refuses to know how a VM is made. Invariant: a launch that is refused is in no history,
//! no model and no profile's last launch.

use std::path::PathBuf;
use std::sync::Arc;

use crate::api::{LaunchFigures, LaunchRequest, LaunchTimings, Waits};
use crate::daemon::error::HostError;
use crate::daemon::forecast::last_launches::LastLaunches;
use crate::daemon::forecast::learning::{Learner, NewLaunch};
use crate::daemon::order::{Order, vm_component};
use crate::daemon::vm::directory::VmDir;
use crate::daemon::vm::instance::VmData;
use crate::daemon::vm::registry::{Claim, VmRegistry, WantedName};
use crate::history::{ComponentRef, LaunchId};

/// Admits launches.
pub struct Admission {
    pub registry: Arc<VmRegistry>,
    pub learner: Arc<Learner>,
    pub last_launches: Arc<LastLaunches>,
    pub vms_dir: PathBuf,
}

impl Admission {
    /// Claims the launch's name and records that it was asked for.
    pub async fn admit(
        &self,
        order: &Order,
        request: &LaunchRequest,
        launched_ms: i64,
    ) -> Result<Claim, HostError> {
        let given = request.name.as_ref().or(order.manifest.name.as_ref());
        let wanted = match given {
            Some(name) => WantedName::Given(name),
            None => WantedName::OfProfile(&order.of.profile),
        };
        let claim = self.registry.claim(wanted, |name| {
            let dir = VmDir::of(&self.vms_dir, name).map_err(HostError::invalid)?;
            Ok(launching(order, request, &dir, launched_ms))
        })?;
        let instance = claim.instance();
        let components = order.lock.components.iter().map(|one| ComponentRef {
            name: one.name.clone(),
            image: one.image,
        });
        let launch = NewLaunch {
            of: &order.of,
            vm: instance.name(),
            launched_ms,
            components: components.collect(),
            memory_mib: order.memory_mib(),
        };
        let launch_id = self.learner.launched(launch).await;
        instance.update(|vm| vm.launch_id = launch_id);
        self.last_launches.remember(order, request.lock.is_some());
        Ok(claim)
    }
}

/// What a VM is that was just admitted.
fn launching(order: &Order, request: &LaunchRequest, dir: &VmDir, launched_ms: i64) -> VmData {
    VmData {
        of: order.of.clone(),
        domain: order.domain.clone(),
        launch_id: LaunchId::default(),
        launched_ms,
        runtime_dir: dir.path(),
        manifest: request.manifest.clone(),
        lock: order.lock.to_toml(),
        components: order.lock.components.iter().map(vm_component).collect(),
        devices: vec![],
        forwards: vec![],
        launch: LaunchFigures {
            solve_s: order.solve_s,
            timings: LaunchTimings {
                solve_s: order.solve_s,
                ..LaunchTimings::default()
            },
            image_bytes: order.lock.image_bytes(),
            ..LaunchFigures::default()
        },
        waits: Waits::default(),
        exit_status: None,
        paused: false,
        saved: None,
        forked_from: None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::config::ForecastConfig;
    use crate::daemon::order::tests::order;

    async fn admission(dir: &std::path::Path) -> Admission {
        let config = ForecastConfig::default();
        let learner = Learner::new(dir, &config, HashMap::new());
        learner.open_history().await.unwrap();
        Admission {
            registry: Arc::default(),
            learner: Arc::new(learner),
            last_launches: Arc::new(LastLaunches::open(dir, 8)),
            vms_dir: dir.join("vms"),
        }
    }

    fn request(name: Option<&str>) -> LaunchRequest {
        LaunchRequest {
            manifest: String::new(),
            lock: None,
            name: name.map(str::to_owned),
            prefetch: Default::default(),
        }
    }

    #[tokio::test]
    async fn a_launch_that_is_refused_is_in_no_history_and_no_ones_last() {
        let dir = tempfile::tempdir().unwrap();
        let admission = admission(dir.path()).await;
        let first = order("web", "", "base");
        let claim = admission
            .admit(&first, &request(Some("web")), 1)
            .await
            .unwrap();
        let launches = async || {
            let entries = admission.learner.entries(None).await.unwrap();
            entries.iter().map(|one| one.launches).sum::<u64>()
        };
        assert_eq!(launches().await, 1);
        // The name is taken, and the other profile must stay unheard of.
        let other = order("other", "", "base");
        for name in ["web", "../web", "", "-x"] {
            let refused = admission.admit(&other, &request(Some(name)), 2).await;
            let error = refused.err().unwrap();
            assert_eq!(
                matches!(error, HostError::Busy(_)),
                name == "web",
                "{error}"
            );
        }
        assert_eq!(launches().await, 1);
        assert_eq!(admission.last_launches.all().len(), 1);
        assert_eq!(
            std::fs::read_dir(dir.path().join("profiles"))
                .unwrap()
                .count(),
            1
        );
        // Without a name of its own it gets a free one; a claim that is let go frees its own.
        let second = admission.admit(&first, &request(None), 3).await.unwrap();
        assert_eq!(second.instance().name(), "web-2");
        drop(claim);
        admission
            .admit(&first, &request(Some("web")), 4)
            .await
            .unwrap()
            .keep();
        assert_eq!(launches().await, 3);
    }
}
