//! The last manifest and lock of each profile, kept on disk: what its next launch will ask for.
//!
//! Invariant: what cannot be read any more is skipped, never an error.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forelay_cache::plan::PastLaunch;
use forelay_image::lock::Lock;
use forelay_predict::time::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::daemon::forecast::clock::ForecastClock;
use crate::daemon::forecast::models::model_key;
use crate::daemon::launch::resolve::Order;
use crate::history::ProfileRef;

/// The last launch of a profile, as kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct LastLaunch {
    of: ProfileRef,
    manifest: String,
    lock: String,
}

/// The last launches of all profiles.
pub struct LastLaunches {
    dir: PathBuf,
    orders: Mutex<BTreeMap<String, Arc<Order>>>,
}

impl LastLaunches {
    /// Reads what earlier daemons kept in `state_dir`. What cannot be read is skipped.
    pub fn open(state_dir: &Path, pmem_slots: usize) -> std::io::Result<Self> {
        let dir = state_dir.join("profiles");
        std::fs::create_dir_all(&dir)?;
        let mut orders = BTreeMap::new();
        for entry in std::fs::read_dir(&dir)?.flatten() {
            let read = std::fs::read(entry.path()).ok();
            let last: Option<LastLaunch> = read.and_then(|text| serde_json::from_slice(&text).ok());
            if let Some(order) =
                last.and_then(|last| Order::remembered(&last.manifest, &last.lock, pmem_slots))
            {
                orders.insert(model_key(&order.of), Arc::new(order));
            }
        }
        Ok(Self {
            dir,
            orders: Mutex::new(orders),
        })
    }

    /// Remembers a launch.
    pub fn remember(&self, order: &Order) {
        let key = model_key(&order.of);
        let last = LastLaunch {
            of: order.of.clone(),
            manifest: order.manifest.to_toml(),
            lock: order.lock.to_toml(),
        };
        let name = forelay_image::Digest::of(key.as_bytes()).hex();
        let path = self.dir.join(format!("{name}.json"));
        let write = || -> std::io::Result<()> {
            forelay_host::atomic_write(&path, &serde_json::to_vec(&last)?).map(drop)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, path = %path.display(), "a launch was not remembered");
        }
        self.orders.lock().insert(key, Arc::new(order.clone()));
    }

    /// The last order of a profile, by its model key.
    pub fn get(&self, key: &str) -> Option<Arc<Order>> {
        self.orders.lock().get(key).cloned()
    }

    /// The last orders of all profiles, by model key.
    pub fn all(&self) -> Vec<Arc<Order>> {
        self.orders.lock().values().cloned().collect()
    }

    /// Past launches as the planner knows them: each with the devices of its profile's last.
    pub fn past(
        &self,
        recent: &VecDeque<(ProfileRef, Timestamp)>,
        clock: &ForecastClock,
    ) -> Vec<PastLaunch> {
        let orders = self.orders.lock();
        let past = |(of, at): &(ProfileRef, Timestamp)| {
            let order = orders.get(&model_key(of))?;
            Some(PastLaunch {
                at_ms: clock.wall_ms(*at),
                domain: order.domain.clone(),
                profile: of.profile.as_str().into(),
                devices: order.device_images(),
            })
        };
        recent.iter().filter_map(past).collect()
    }

    /// Memory that each profile's manifest asks for, in MiB.
    pub fn memory_mib(&self) -> HashMap<String, u32> {
        let orders = self.orders.lock();
        let memory = orders.iter();
        memory
            .map(|(key, order)| (key.clone(), order.memory_mib()))
            .collect()
    }
}

impl Order {
    /// Memory of its VM.
    pub(in crate::daemon) fn memory_mib(&self) -> u32 {
        u32::try_from(self.manifest.vm.memory_mib).unwrap_or(u32::MAX)
    }

    /// An order from what was kept; `None` if it does not parse any more.
    fn remembered(manifest: &str, lock: &str, pmem_slots: usize) -> Option<Self> {
        let manifest = forelay_image::manifest::Manifest::parse(manifest).ok()?;
        Self::new(manifest, Lock::parse(lock).ok()?, 0.0, pmem_slots).ok()
    }
}
