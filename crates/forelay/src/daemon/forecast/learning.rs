//! What the daemon learns from launches, and what it expects of the next one.
//!
//! Owns the history database and the models in memory; both hold the same facts, the models
//! are rebuilt from the history once that could be opened. Until then models begin at nothing,
//! and what is to be recorded is kept in memory: a history that is away stops no launch.
//! Refuses to decide what is prefetched: it hands plans to the planner.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use forelay_image::{Digest, Extent, PlannedExtent, Touch};
use forelay_predict::arrivals::{Forecaster, LaunchForecast, ProfileKey};
use forelay_predict::time::Timestamp;
use forelay_predict::working_set::WorkingSetConfig;
use parking_lot::RwLock;
use tokio::sync::Mutex;

use crate::api::{HistoryEntry, SelfControl};
use crate::config::ForecastConfig;
use crate::daemon::error::HostError;
use crate::daemon::forecast::clock::ForecastClock;
use crate::daemon::forecast::models::{Models, model_key, profile_of};
use crate::daemon::forecast::observation::AttachTouches;
use crate::daemon::forecast::replay::Replay;
use crate::daemon::memory::faults::WaitFigures;
use crate::history::{
    ComponentRef, Event, EventId, History, LaunchId, OpenOptions, ProfileRef, ResourceSample,
    SqliteHistory, What,
};

/// The history's file in the state directory.
pub const HISTORY_FILE: &str = "history.db";
/// How often the history is rolled up.
const ROLL_UP_EVERY: Duration = Duration::from_secs(86_400);
/// Touches so long after a launch's request may still count to its working set.
const LONGEST_LAUNCH_MS: u32 = 600_000;
/// Longest time that anything waits for the history to be written.
const APPEND_LIMIT: Duration = Duration::from_secs(5);
/// Events kept for a history that cannot be written now; the oldest go first.
const MOST_UNWRITTEN: usize = 20_000;
/// Launches looked at for a profile's figures.
const RECENT_LAUNCHES: u32 = 100;

/// Learns from launches.
pub struct Learner {
    path: PathBuf,
    /// None until it could be opened.
    history: RwLock<Option<Arc<SqliteHistory>>>,
    /// What the history does not have yet, in order.
    unwritten: Mutex<VecDeque<Event>>,
    models: RwLock<Arc<Models>>,
    new_models: Box<dyn Fn() -> Models + Send + Sync>,
    clock: ForecastClock,
    /// Events told so far.
    told: AtomicU64,
}

/// A launch that was asked for.
#[derive(Clone, Debug)]
pub struct NewLaunch<'a> {
    /// Profile and owner.
    pub of: &'a ProfileRef,
    /// Name of the VM.
    pub vm: &'a str,
    /// When it was asked for, milliseconds since the epoch.
    pub launched_ms: i64,
    /// What the VM will have.
    pub components: Vec<ComponentRef>,
    /// Memory that its manifest asks for.
    pub memory_mib: u32,
}

/// What one launch did, told when its window has passed.
#[derive(Clone, Debug)]
pub struct LaunchOutcome {
    /// Id of the launch.
    pub launch_id: LaunchId,
    /// Profile and owner.
    pub of: ProfileRef,
    /// Component images the VM had.
    pub images: Vec<Digest>,
    /// What it touched of them, in first-touch order.
    pub touches: Vec<Touch>,
    /// What it waited for.
    pub waits: WaitFigures,
    /// What was prefetched for it.
    pub planned: Vec<(Digest, Extent)>,
    /// Milliseconds from the request to mounted.
    pub mounted_ms: Option<u64>,
    /// Milliseconds from the request to ready.
    pub ready_ms: Option<u64>,
}

impl Learner {
    /// Knows nothing yet: see [`Learner::open_history`].
    pub fn new(
        state_dir: &Path,
        config: &ForecastConfig,
        memory_mib: HashMap<String, u32>,
    ) -> Self {
        let window_ms = (config.window_s.max(0.0) * 1e3) as u32 + LONGEST_LAUNCH_MS;
        let ahead = config.prefetch && config.ahead;
        let sets = WorkingSetConfig {
            window_ms,
            pool_across_owners: config.pool_across_owners,
            ..WorkingSetConfig::default()
        };
        let new_models = move || Models::new(sets.clone(), ahead, memory_mib.clone());
        Self {
            path: state_dir.join(HISTORY_FILE),
            history: RwLock::default(),
            unwritten: Mutex::default(),
            models: RwLock::new(Arc::new(new_models())),
            new_models: Box::new(new_models),
            clock: ForecastClock::new(config),
            told: AtomicU64::new(0),
        }
    }

    /// Opens the history and rebuilds the models from it. Returns the last launches, oldest
    /// first.
    pub async fn open_history(&self) -> Result<VecDeque<(ProfileRef, Timestamp)>, HostError> {
        let opened = SqliteHistory::open(&self.path, OpenOptions::default()).await;
        let history = Arc::new(opened.map_err(HostError::failed)?);
        // Held until the new models are in place: what is told meanwhile waits.
        let mut unwritten = self.unwritten.lock().await;
        let written = history.append(unwritten.make_contiguous()).await;
        written.map_err(HostError::failed)?;
        unwritten.clear();
        let models = Arc::new((self.new_models)());
        models.begin_replay();
        let now = self.clock.now();
        let mut replay = Replay::new(&models, now);
        let replayed = history.replay(Timestamp(0), &mut replay).await;
        let replayed = replayed.map_err(HostError::failed)?;
        replay.judge_until(now);
        tracing::info!(
            launches = replayed.launches,
            working_sets = replayed.working_sets,
            events = replayed.events,
            "history replayed"
        );
        let recent = replay.into_recent();
        let replayed_models = Arc::clone(&models);
        let fitted = tokio::task::spawn_blocking(move || replayed_models.end_replay());
        fitted.await.map_err(HostError::failed)?;
        *self.models.write() = models;
        *self.history.write() = Some(history);
        Ok(recent)
    }

    fn history(&self) -> Option<Arc<SqliteHistory>> {
        self.history.read().clone()
    }

    /// The models.
    pub fn models(&self) -> Arc<Models> {
        Arc::clone(&self.models.read())
    }

    /// The forecaster's clock.
    pub fn clock(&self) -> &ForecastClock {
        &self.clock
    }

    /// Rolls the history up: when the daemon has started, and every day.
    pub async fn keep_history(&self) {
        let mut interval = tokio::time::interval(self.clock.wall(ROLL_UP_EVERY));
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let Some(history) = self.history() else {
                continue;
            };
            match history.roll_up(self.clock.now()).await {
                Ok(done) => tracing::info!(?done, "history rolled up"),
                Err(error) => {
                    tracing::error!(error = %forelay_host::error_chain(&error), "the history was not rolled up");
                }
            }
        }
    }

    /// What the next launch of `of` with `images` is expected to touch, in first-touch
    /// order.
    pub fn plan(&self, of: &ProfileRef, images: &[Digest]) -> Vec<PlannedExtent> {
        let expected = self.models().plan(&model_key(of), images);
        expected.iter().map(|one| one.planned).collect()
    }

    /// True if launches of this very profile have been observed.
    pub fn knows(&self, of: &ProfileRef) -> bool {
        let key = model_key(of);
        let models = self.models();
        let sets = models.sets.lock();
        sets.pairs().any(|(profile, ..)| profile == key)
    }

    /// Profiles (by model key) likely to launch within the horizon, most likely first.
    pub fn next_launches(
        &self,
        now: Timestamp,
        horizon_s: f64,
        least_probability: f64,
    ) -> Vec<LaunchForecast> {
        let models = self.models();
        let mut forecaster = models.forecaster.lock();
        forecaster.advance(now, |_, _| {});
        forecaster.next_launches(now, horizon_s, least_probability)
    }

    /// How forecasting does for a profile, by its own account.
    pub fn self_control(&self, of: &ProfileRef) -> SelfControl {
        let models = self.models();
        let forecaster = models.forecaster.lock();
        let key = forecaster.find_profile(&model_key(of));
        key.map_or_else(SelfControl::default, |key| control_of(&forecaster, key))
    }

    /// How it does for each profile that it knows.
    pub fn self_controls(&self) -> Vec<(ProfileRef, SelfControl)> {
        let models = self.models();
        let forecaster = models.forecaster.lock();
        let keys = (0..forecaster.profile_count() as u32).map(ProfileKey);
        let of = |key| profile_of(forecaster.profile_name(key));
        keys.map(|key| (of(key), control_of(&forecaster, key)))
            .collect()
    }

    /// Records that a launch was asked for; returns its id.
    pub async fn launched(&self, launch: NewLaunch<'_>) -> LaunchId {
        let NewLaunch {
            of,
            vm,
            launched_ms,
            components,
            memory_mib,
        } = launch;
        let at = self.clock.of(launched_ms);
        let id = EventId::derive(at, &[b"launch", vm.as_bytes(), of.owner.as_bytes()]);
        let models = self.models();
        models.note_memory(of, memory_mib);
        models.launches(of, at, 1);
        let launch_id = LaunchId(id.nonce);
        models.launched_with(of, at, launch_id, components.iter());
        let what = What::Launch {
            components,
            count: 1,
        };
        self.append(&[Event {
            id,
            vm: id.nonce,
            of: of.clone(),
            what,
        }])
        .await;
        launch_id
    }

    /// Records what a launch did and learns from it.
    pub async fn observed(&self, outcome: LaunchOutcome) {
        let LaunchOutcome {
            of,
            images,
            touches,
            waits,
            planned,
            ..
        } = &outcome;
        if outcome.mounted_ms.is_some() {
            self.models().touched(of, images, touches);
        }
        let mut whats = Vec::new();
        if let (Some(mounted_ms), Some(ready_ms)) = (outcome.mounted_ms, outcome.ready_ms) {
            whats.push(What::Ready {
                mounted_ms,
                ready_ms,
            });
        }
        if outcome.mounted_ms.is_some() {
            whats.push(What::Touched {
                images: images.clone(),
                touches: touches.clone(),
            });
        }
        if let Some(&image) = images.first() {
            // Waits are known for each VM, not for each image: they go with the base's.
            whats.push(What::DemandFetch {
                image,
                fetches: waits.fetches,
                bytes: waits.bytes,
                stall_ns: waits.stall_ns,
            });
        }
        for image in images {
            let of_image =
                |(planned, extent): &(Digest, Extent)| (planned == image).then_some(*extent);
            let planned: Vec<Extent> = planned.iter().filter_map(of_image).collect();
            if !planned.is_empty() {
                whats.push(What::Prefetch {
                    image: *image,
                    prefetched_bytes: planned.iter().map(|extent| extent.len).sum(),
                    used_bytes: used_bytes(*image, &planned, touches),
                });
            }
        }
        self.tell(&outcome.of, outcome.launch_id, whats).await;
    }

    /// Records that a VM stopped.
    pub async fn stopped(&self, of: &ProfileRef, launch_id: LaunchId, ran_ms: u64) {
        let models = self.models();
        models.stopped(launch_id);
        if models.fit_due() {
            tokio::task::spawn_blocking(move || models.fit_if_due());
        }
        self.tell(of, launch_id, vec![What::Stop { ran_ms }]).await;
    }

    /// Records a hot attach.
    pub async fn attached(&self, of: &ProfileRef, launch_id: LaunchId, component: ComponentRef) {
        let at = self.clock.now();
        self.models().attached(at, launch_id, &component);
        let what = vec![What::Attach { component }];
        self.tell_at(at, of, launch_id, what).await;
    }

    /// Records what a VM touched of a component that it was given while it ran, and of what it
    /// had before.
    pub async fn attached_touched(
        &self,
        of: &ProfileRef,
        launch_id: LaunchId,
        image: Digest,
        touched: AttachTouches,
    ) {
        let images = vec![image];
        let models = self.models();
        models.touched(of, &images, &touched.own);
        models.touched_late(of, &touched.others);
        let mut whats = vec![What::Touched {
            images,
            touches: touched.own,
        }];
        if !touched.others.is_empty() {
            whats.push(What::TouchedLate {
                touches: touched.others,
            });
        }
        self.tell(of, launch_id, whats).await;
    }

    /// Records what a VM uses.
    pub async fn sampled(&self, of: &ProfileRef, launch_id: LaunchId, sample: ResourceSample) {
        let at = self.clock.now();
        self.models().sampled(of, at, launch_id, &sample);
        self.tell_at(at, of, launch_id, vec![What::Sample(sample)])
            .await;
    }

    async fn tell(&self, of: &ProfileRef, launch_id: LaunchId, whats: Vec<What>) {
        self.tell_at(self.clock.now(), of, launch_id, whats).await;
    }

    async fn tell_at(&self, at: Timestamp, of: &ProfileRef, launch_id: LaunchId, whats: Vec<What>) {
        let vm = launch_id.0;
        let events = whats.into_iter().map(|what| {
            // One VM may have several things to tell in one millisecond.
            let number = self.told.fetch_add(1, Relaxed).to_le_bytes();
            let id = EventId::derive(at, &[&number, &vm.to_le_bytes()]);
            Event {
                id,
                vm,
                of: of.clone(),
                what,
            }
        });
        self.append(&events.collect::<Vec<_>>()).await;
    }

    /// History is worth having, but no launch fails for want of it: what cannot be written
    /// now is kept for later, and a disk that does not answer keeps no VM from ending.
    async fn append(&self, events: &[Event]) {
        let appended = tokio::time::timeout(APPEND_LIMIT, self.append_unlimited(events)).await;
        if appended.is_err() {
            tracing::error!("the history was not written within {APPEND_LIMIT:?}");
        }
    }

    async fn append_unlimited(&self, events: &[Event]) {
        let mut unwritten = self.unwritten.lock().await;
        unwritten.extend(events.iter().cloned());
        let excess = unwritten.len().saturating_sub(MOST_UNWRITTEN);
        unwritten.drain(..excess);
        let Some(history) = self.history() else {
            return;
        };
        match history.append(unwritten.make_contiguous()).await {
            Ok(_) => unwritten.clear(),
            Err(error) => {
                tracing::error!(error = %forelay_host::error_chain(&error), "the history was not written");
            }
        }
    }

    /// What is known of profiles' past.
    pub async fn entries(&self, profile: Option<&str>) -> Result<Vec<HistoryEntry>, HostError> {
        let history = self.history().ok_or_else(|| {
            let path = self.path.display();
            HostError::Failed(format!(
                "the history {path} is not open: see `forelay doctor`"
            ))
        })?;
        let mut entries = Vec::new();
        for summary in history.profiles().await.map_err(HostError::failed)? {
            if profile.is_some_and(|name| name != summary.of.profile) {
                continue;
            }
            let launches = history.launches(Some(&summary.of.profile), RECENT_LAUNCHES);
            let mut launches = launches.await.map_err(HostError::failed)?;
            launches.retain(|launch| launch.of == summary.of);
            let mut ready: Vec<u64> = launches.iter().filter_map(|one| one.ready_ms).collect();
            ready.sort_unstable();
            let done = launches.iter().filter(|launch| launch.ready_ms.is_some());
            let warm = done
                .clone()
                .filter(|launch| launch.demand_fetches == 0)
                .count();
            entries.push(HistoryEntry {
                working_set_bytes: self.working_set_bytes(&summary.of),
                warm_share: warm as f64 / done.count().max(1) as f64,
                ready_p50_s: ready.get(ready.len() / 2).map(|&ms| ms as f64 / 1e3),
                launches: summary.launches,
                last_launch_ms: summary.last.map(|at| self.clock.wall_ms(at)),
                control: self.self_control(&summary.of),
                profile: summary.of.profile,
                owner: summary.of.owner,
            });
        }
        Ok(entries)
    }

    fn working_set_bytes(&self, of: &ProfileRef) -> u64 {
        let key = model_key(of);
        let models = self.models();
        let sets = models.sets.lock();
        let own = sets.pairs().filter(|(profile, ..)| *profile == key);
        own.map(|(_, _, set)| set.likely_bytes()).sum()
    }
}

/// How forecasting does for a profile, by its own account.
fn control_of(forecaster: &Forecaster, key: ProfileKey) -> SelfControl {
    let (judged, regret) = (forecaster.judged(key), forecaster.regret(key));
    let bins = judged.bins().into_iter();
    SelfControl {
        judged: judged.count(),
        brier_score: judged.brier_score(),
        reliability: bins
            .map(|bin| (bin.mean_forecast, bin.observed, bin.forecasts))
            .collect(),
        regret_cold_starts: regret.excess(),
        fallen_back: regret.harmful(),
        switched_off: !forecaster.config().forecasting,
    }
}

/// Bytes of `planned` that are among the touches of `image`.
fn used_bytes(image: Digest, planned: &[Extent], touches: &[Touch]) -> u64 {
    let touched = touches
        .iter()
        .filter(|touch| touch.image == image)
        .map(|touch| touch.extent);
    let touched = forelay_image::extent::normalise(touched.collect());
    let part = |extent: &Extent| -> u64 {
        touched
            .iter()
            .filter_map(|one| one.intersection(extent))
            .map(|part| part.len)
            .sum()
    };
    planned.iter().map(part).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_bytes_count_what_was_both_planned_and_touched() {
        let image = Digest::of(b"image");
        let touch = |offset, len| Touch {
            image,
            extent: Extent::new(offset, len),
            first_touch_ms: 0,
        };
        let touches = [touch(0, 8192), touch(4096, 8192), touch(40960, 4096)];
        let planned = [Extent::new(4096, 16384), Extent::new(81920, 4096)];
        assert_eq!(used_bytes(image, &planned, &touches), 8192);
        assert_eq!(used_bytes(Digest::of(b"other"), &planned, &touches), 0);
    }
}
