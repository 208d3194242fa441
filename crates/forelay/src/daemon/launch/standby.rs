//! VMMs that stand by: started for a launch that is likely, before it is asked for.
//!
//! ```text
//! prepared launch, its snapshot open -> VMM started -> state taken -> guest answers -> paused
//!     launch of that order: files move to its VM's directory -> ports, name -> runs on
//!     not likely any more, memory not plentiful, snapshot to go, VMM dead, daemon ends: ended
//! ```
//! Nothing of the image has run, and the guest knows neither name nor entropy of its own: all
//! launches of the order would get the same from here.
//!
//! Refuses to know which launches are likely. Invariants: as many as the configuration says,
//! started one after the other, while memory is plentiful and the CPUs have time, each only
//! where all memory of its VM has room; none outlives the daemon that started it: what one left
//! that was killed is ended by the next ([`StandbyStarter::clear`]), by the mark of its directory
//! or, from the moment at which it is a VM's, by that VM's record.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use forelay_cache::budget::PressureLevel;
use forelay_vm::VmSpec;

use crate::daemon::error::HostError;
use crate::daemon::launch::ahead::is_quiet;
use crate::daemon::launch::maker::check_memory;
use crate::daemon::launch::prepared::PreparedFiles;
use crate::daemon::launch::restore::{clone_of, take_state, within};
use crate::daemon::launch::start::{StartedVmm, Starter, spec};
use crate::daemon::memory::planner::{PlannerHandle, now_ms};
use crate::daemon::order::Order;
use crate::daemon::snapshot::kept::NotResumed;
use crate::daemon::snapshot::service::Resumable;
use crate::daemon::vm::directory::VmDir;
use crate::daemon::vm::registry::VmRegistry;

/// Name of VMMs that have no VM yet.
const NAME: &str = "standby";
/// How long a guest may take to answer that was restored.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A VMM that stands by; ended when dropped.
pub struct Standby {
    vmm: Option<StartedVmm>,
    dir: VmDir,
    /// What it resumes from.
    pub from: Arc<Resumable>,
}

impl Standby {
    /// Makes it the VMM of a launch, whose record is on disk, and lets its guest run on.
    pub async fn launch_as(mut self, spec: &VmSpec) -> Result<StartedVmm, HostError> {
        let mut vmm = self.vmm.take().expect("taken here and by `end` alone");
        let becoming = async {
            vmm.launch_as(spec).await?;
            // Else the next daemon would take the VM's VMM for one that was left there.
            self.dir.remove().map_err(HostError::failed)
        };
        match becoming.await {
            Ok(()) => Ok(vmm),
            Err(error) => {
                vmm.end().await;
                Err(error)
            }
        }
    }

    /// Ends it, and waits until it is gone.
    pub async fn end(mut self) {
        if let Some(vmm) = self.vmm.take() {
            vmm.end().await;
        }
    }

    /// Its process, while it lives.
    pub fn pid(&self) -> Option<u32> {
        let handle = self.vmm.as_ref()?.handle();
        handle.progress().ended.is_none().then(|| handle.pid())
    }

    fn clear(&self) {
        if let Err(error) = self.dir.remove() {
            tracing::warn!(%error, "what a VMM left that stood by stays");
        }
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        drop(self.vmm.take());
        self.clear();
    }
}

/// Starts VMMs that stand by.
pub struct StandbyStarter {
    pub dir: PathBuf,
    /// Most that stand by at a time.
    pub most: usize,
    /// Most of the time that tasks may wait for a CPU, in percent.
    pub cpu_stall: f64,
    pub starter: Arc<Starter>,
    pub memory: Arc<PlannerHandle>,
    pub registry: Arc<VmRegistry>,
    pub next: AtomicI64,
}

impl StandbyStarter {
    /// Ends what an earlier daemon left.
    pub fn clear(&self) {
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let ended = forelay_vm::stray::end_all(&entry.path());
            let name = entry.file_name().to_string_lossy().into_owned();
            let removed = VmDir::of(&self.dir, &name).map(|dir| dir.remove());
            if let Err(error) = &ended {
                tracing::error!(name, %error, "a VMM lives on that stood by for a daemon of before");
            }
            if !matches!(removed, Ok(Ok(()))) {
                tracing::warn!(name, "files are left of a VMM that stood by");
            }
        }
        // A name is another's for good: a VMM that ends removes its sockets by their old path.
        self.next.store(now_ms(), Ordering::Relaxed);
    }

    /// Whether memory is plentiful; if not, none may stand by.
    pub fn has_memory(&self) -> bool {
        self.memory.status().level == PressureLevel::Plenty
    }

    /// Whether one may be started now, beside so many.
    pub fn may_start(&self, standing_by: usize) -> bool {
        standing_by < self.most && is_quiet(&self.registry, &self.memory, self.cpu_stall)
    }

    /// Starts one for what is prepared; returns when it stands by.
    pub async fn start(
        &self,
        order: &Order,
        prepared: &PreparedFiles,
        from: Arc<Resumable>,
    ) -> Result<Standby, NotResumed> {
        check_memory(order, "a VMM that stands by")?;
        std::fs::create_dir_all(&self.dir).map_err(HostError::failed)?;
        let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let dir = VmDir::of(&self.dir, &name).map_err(HostError::invalid)?;
        dir.make().map_err(HostError::failed)?;
        let mut standby = Standby {
            vmm: None,
            dir,
            from: Arc::clone(&from),
        };
        standby.vmm = Some(self.start_in(order, prepared, &standby).await?);
        Ok(standby)
    }

    async fn start_in(
        &self,
        order: &Order,
        prepared: &PreparedFiles,
        standby: &Standby,
    ) -> Result<StartedVmm, NotResumed> {
        let from = &standby.from;
        let mut devices = vec![prepared.map.record.clone()];
        devices.extend_from_slice(&prepared.devices);
        from.check_devices(&devices).map_err(NotResumed::Snapshot)?;
        let dir = standby.dir.path();
        let kernel = prepared.kernel.clone();
        let mut spec = spec(order, (NAME, &dir), &devices, Some(&prepared.map), kernel);
        spec.mergeable = self.starter.merges(&order.domain);
        let vmm = self.starter.start(&clone_of(&spec, from)).await?;
        let standing_by = async {
            take_state(&vmm, from).await?;
            let waiting = vmm.handle().stand_by();
            Ok::<_, NotResumed>(within(ANSWER_LIMIT, "answer", waiting).await?)
        };
        match standing_by.await {
            Ok(()) => Ok(vmm),
            Err(error) => {
                vmm.end().await;
                Err(error)
            }
        }
    }
}
