//! Which snapshot a launch goes on from: asked by the launch, and by those who prepare it.
//!
//! Refuses to know how a VM resumes.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use forelay_cache::DeviceImage;

use crate::daemon::error::HostError;
use crate::daemon::forecast::announced::ResumedMemory;
use crate::daemon::launch::compose::Composer;
use crate::daemon::launch::prefetch::device_of;
use crate::daemon::launch::start::Starter;
use crate::daemon::order::Order;
use crate::daemon::snapshot::kept::Kept;
use crate::daemon::snapshot::origin::Runtime;
use crate::daemon::snapshot::service::{Resumable, Snapshots};

/// How long a launch looks for a snapshot; a boot takes little longer.
const FIND_LIMIT: Duration = Duration::from_secs(1);

/// Finds the snapshots of launches.
pub struct SnapshotFinder {
    pub composer: Arc<Composer>,
    pub starter: Arc<Starter>,
    pub snapshots: Arc<Snapshots>,
}

impl SnapshotFinder {
    /// The best snapshot that a launch of this order can resume from at once, if there is one;
    /// and why others cannot be.
    pub async fn open(&self, order: &Order) -> Result<(Option<Resumable>, Vec<String>), HostError> {
        if !self.snapshots.any(order) {
            return Ok((None, Vec::new()));
        }
        let runtime = self.runtime(order).await?;
        let best = self.snapshots.best(order, &runtime);
        let found = tokio::time::timeout(FIND_LIMIT, best).await;
        found.unwrap_or_else(|_| {
            let text = format!("opening one takes longer than {FIND_LIMIT:?}");
            Err(HostError::Failed(text))
        })
    }

    /// Whether a launch of this order would look at this snapshot first.
    pub async fn is_first(&self, order: &Order, kept: &Kept) -> Result<bool, HostError> {
        let runtime = self.runtime(order).await?;
        let shelf = self.snapshots.shelf(&order.domain).await?;
        let first = self.snapshots.candidates(&shelf, order, &runtime).next();
        Ok(first.is_some_and(|first| first.id == kept.id))
    }

    async fn runtime(&self, order: &Order) -> Result<Runtime, HostError> {
        let kernel = self.composer.kernel(&order.lock.kernel).await?;
        self.starter.runtime(&kernel.kernel).await
    }
}

#[async_trait]
impl ResumedMemory for SnapshotFinder {
    async fn memory_of(&self, order: &Order) -> Option<DeviceImage> {
        if !self.snapshots.any(order) {
            return None;
        }
        let runtime = self.runtime(order).await.ok()?;
        let finding = self.snapshots.memory_of(order, &runtime);
        let memory = tokio::time::timeout(FIND_LIMIT, finding).await.ok()??;
        Some(device_of(&memory))
    }
}
