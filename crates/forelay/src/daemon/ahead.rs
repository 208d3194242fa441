//! Ahead of launches: what each profile would need is mapped and loaded before anyone
//! asks, as its next launch becomes likely.
//!
//! Remembers, on disk, the last manifest and lock of each profile; at intervals asks the
//! forecaster how likely a launch is and hands probability, devices and working set to
//! the planner, which decides. Also answers `forelay forecast`.
//!
//! Invariant: nothing here loads or evicts by itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forelay_cache::plan::{Event, PlannedExtent};
use forelay_image::lock::Lock;
use forelay_predict::arrivals::LaunchForecast;
use forelay_predict::time::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::learning::model_key;
use super::memory::now_ms;
use super::order::{Order, PlannedDevice};
use super::{Host, HostError};
use crate::api::ForecastEntry;
use crate::history::ProfileRef;

/// How often forecasts are made anew.
const EVERY: Duration = Duration::from_secs(5);
/// Horizon of a forecast, in seconds; the planner's is the same.
const HORIZON_S: f64 = 600.0;
/// Launches less likely than this within the horizon are not told to the planner.
const LEAST_PROBABILITY: f64 = 0.01;

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
            let unfinished = path.with_extension("new");
            std::fs::write(&unfinished, serde_json::to_vec(&last)?)?;
            std::fs::rename(unfinished, &path)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, path = %path.display(), "a launch was not remembered");
        }
        self.orders.lock().insert(key, Arc::new(order.clone()));
    }

    fn get(&self, key: &str) -> Option<Arc<Order>> {
        self.orders.lock().get(key).cloned()
    }

    fn all(&self) -> Vec<Arc<Order>> {
        self.orders.lock().values().cloned().collect()
    }
}

impl Host {
    /// Looks ahead for as long as the daemon lives.
    pub(super) async fn look_ahead(self: Arc<Self>) {
        let mut told: BTreeMap<String, f64> = BTreeMap::new();
        let mut interval = tokio::time::interval(EVERY);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let now = Timestamp(now_ms());
            let mut likely = self
                .learner
                .next_launches(now, HORIZON_S, LEAST_PROBABILITY);
            let quiet = told
                .iter()
                .filter(|(key, _)| !likely.iter().any(|one| one.profile == **key));
            // What became unlikely is told once more, so that the planner lets go of it.
            let quiet: Vec<String> = quiet.map(|(key, _)| key.clone()).collect();
            for launch in likely.drain(..) {
                told.insert(launch.profile.clone(), launch.probability);
                self.tell_ahead(
                    &launch.profile,
                    launch.probability,
                    Some(launch.expected_at.0),
                )
                .await;
            }
            for key in quiet {
                told.remove(&key);
                self.tell_ahead(&key, 0.0, None).await;
            }
        }
    }

    async fn tell_ahead(
        self: &Arc<Self>,
        key: &str,
        probability: f64,
        next_launch_ms: Option<i64>,
    ) {
        let Some(order) = self.last_launches.get(key) else {
            return;
        };
        let working_set = self.working_set(&order);
        if probability > 0.0
            && let Err(error) = self.map_images(&order).await
        {
            tracing::warn!(profile = key, %error, "cannot map a profile ahead");
            return;
        }
        self.premaps.offer(&order);
        self.memory.tell(Event::ForecastChanged {
            domain: order.domain.clone(),
            profile: order.of.profile.as_str().into(),
            devices: order.device_images(),
            launch_probability: probability,
            next_launch_ms,
            working_set,
        });
    }

    fn working_set(&self, order: &Order) -> Vec<PlannedExtent> {
        self.learner.plan(&order.of, &order.images())
    }

    /// What is expected to be needed next, most valuable first.
    pub async fn forecast(&self, profile: Option<&str>) -> Result<Vec<ForecastEntry>, HostError> {
        let now = Timestamp(now_ms());
        let launches = self.learner.next_launches(now, HORIZON_S, 0.0);
        let counters = self.store.scheduler().counters();
        let latency_s = counters.latency_ns.map_or(0.02, |ns| ns as f64 / 1e9);
        let bandwidth = counters
            .bandwidth_bytes_per_s
            .map_or(100e6, |rate| rate as f64);
        let mut entries = Vec::new();
        for order in self.last_launches.all() {
            if profile.is_some_and(|name| name != order.of.profile) {
                continue;
            }
            let key = model_key(&order.of);
            let launch = launches.iter().find(|one| one.profile == key);
            entries.extend(self.entries_of(&order, launch, now, latency_s, bandwidth));
        }
        entries.sort_by(|a, b| {
            b.score
                .total_cmp(&a.score)
                .then_with(|| a.component.cmp(&b.component))
        });
        Ok(entries)
    }

    fn entries_of(
        &self,
        order: &Order,
        launch: Option<&LaunchForecast>,
        now: Timestamp,
        latency_s: f64,
        bandwidth: f64,
    ) -> Vec<ForecastEntry> {
        let plan = self.working_set(order);
        let missing = self.missing(&order.domain, &plan);
        let entry = |device: &PlannedDevice| {
            let extents: Vec<_> = plan
                .iter()
                .filter(|one| one.image == device.image)
                .collect();
            let bytes: u64 = extents.iter().map(|one| one.extent.len).sum();
            let absent = missing.iter().filter(|(image, _)| *image == device.image);
            let absent: u64 = absent.map(|(_, extent)| extent.len).sum();
            let touched = extents
                .iter()
                .map(|one| one.probability)
                .fold(0.0, f64::max);
            let launched = launch.map_or(0.0, |one| one.probability);
            let probability = launched * touched;
            let wait_s = latency_s * extents.len() as f64 + bytes as f64 / bandwidth;
            let mut reasons: Vec<String> = launch
                .map(|one| one.reasons.iter().map(ToString::to_string).collect())
                .unwrap_or_default();
            if bytes > 0 {
                reasons.push(format!("launches touch it with probability {touched:.2}"));
            }
            ForecastEntry {
                profile: order.of.profile.clone(),
                component: device.label.clone(),
                image: device.image,
                probability,
                expected_in_s: launch.map(|one| (one.expected_at.0 - now.0) as f64 / 1e3),
                bytes,
                resident_bytes: bytes - absent.min(bytes),
                score: probability * wait_s / bytes.max(1) as f64,
                reasons,
            }
        };
        order.devices.iter().map(entry).collect()
    }
}

impl Order {
    /// An order from what was kept; `None` if it does not parse any more.
    fn remembered(manifest: &str, lock: &str, pmem_slots: usize) -> Option<Self> {
        let manifest = forelay_image::manifest::Manifest::parse(manifest).ok()?;
        Self::new(manifest, Lock::parse(lock).ok()?, 0.0, pmem_slots).ok()
    }
}
