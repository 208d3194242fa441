//! What the daemon learns from launches, and what it expects of the next one.
//!
//! Owns the history database and the models in memory (working sets per profile); both
//! hold the same facts, the models are rebuilt from the history when the daemon starts.
//! Refuses to decide what is prefetched: it hands plans to the planner.

use std::path::Path;
use std::sync::Arc;

use forelay_cache::plan::PlannedExtent;
use forelay_image::{Digest, Extent};
use forelay_predict::arrivals::{self, Forecaster, LaunchForecast};
use forelay_predict::time::Timestamp;
use forelay_predict::working_set::{self, Touch, WorkingSet, WorkingSets};
use parking_lot::Mutex;

use super::HostError;
use super::faults::WaitFigures;
use super::memory::now_ms;
use crate::api::{HistoryEntry, Vm};
use crate::history::{
    ComponentRef, Event, EventId, History, OpenOptions, ProfileRef, Sink, SqliteHistory, What,
};

/// Launches looked at for a profile's figures.
const RECENT_LAUNCHES: u32 = 100;

/// Learns from launches.
pub struct Learner {
    history: Arc<SqliteHistory>,
    sets: Mutex<WorkingSets>,
    forecaster: Mutex<Forecaster>,
}

/// What one launch did, told when its window has passed.
#[derive(Clone, Debug)]
pub struct LaunchOutcome {
    /// Id of the launch.
    pub launch_id: i64,
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

/// The name under which models know a profile: two owners may use the same name.
pub fn model_key(of: &ProfileRef) -> String {
    format!("{}/{}", of.owner, of.profile)
}

struct Loader<'a>(&'a mut WorkingSets, &'a mut Forecaster);

impl Sink for Loader<'_> {
    fn launches(&mut self, of: &ProfileRef, at: Timestamp, count: u32, _resolution_ms: i64) {
        note_launch(self.1, of, at, count);
    }

    fn working_set(&mut self, of: &ProfileRef, image: Digest, set: WorkingSet) {
        self.0.insert(&model_key(of), image, set);
    }

    fn touched(&mut self, of: &ProfileRef, images: &[Digest], touches: &[Touch]) {
        self.0.observe(&model_key(of), images, touches);
    }
}

fn note_launch(forecaster: &mut Forecaster, of: &ProfileRef, at: Timestamp, count: u32) {
    let profile = forecaster.profile(&model_key(of));
    let owner = forecaster.owner(&of.owner);
    forecaster.observe_launch(profile, owner, at, count.saturating_sub(1));
}

impl Learner {
    /// Opens the history in `state_dir` and rebuilds the models from it.
    pub async fn open(state_dir: &Path, window_ms: u32) -> Result<Self, HostError> {
        let path = state_dir.join("history.db");
        let opened = SqliteHistory::open(&path, OpenOptions::default()).await;
        let history = opened.map_err(HostError::failed)?;
        let config = working_set::Config {
            window_ms,
            ..working_set::Config::default()
        };
        let mut sets = WorkingSets::new(config);
        let mut forecaster = Forecaster::new(arrivals::Config::default());
        let replayed = history
            .replay(Timestamp(0), &mut Loader(&mut sets, &mut forecaster))
            .await;
        let replayed = replayed.map_err(HostError::failed)?;
        tracing::info!(
            launches = replayed.launches,
            working_sets = replayed.working_sets,
            events = replayed.events,
            "history replayed"
        );
        Ok(Self {
            history: Arc::new(history),
            sets: Mutex::new(sets),
            forecaster: Mutex::new(forecaster),
        })
    }

    /// What the next launch of `of` with `images` is expected to touch, in first-touch
    /// order.
    pub fn plan(&self, of: &ProfileRef, images: &[Digest]) -> Vec<PlannedExtent> {
        let planned = self.sets.lock().plan(&model_key(of), images, None);
        planned
            .into_iter()
            .map(|planned| PlannedExtent {
                image: planned.image,
                extent: planned.extent,
                probability: f64::from(planned.probability),
                first_touch_ms: planned.first_touch_ms,
            })
            .collect()
    }

    /// True if launches of this very profile have been observed.
    pub fn knows(&self, of: &ProfileRef) -> bool {
        let key = model_key(of);
        self.sets.lock().pairs().any(|(profile, ..)| profile == key)
    }

    /// Profiles (by model key) likely to launch within the horizon, most likely first.
    pub fn next_launches(
        &self,
        now: Timestamp,
        horizon_s: f64,
        least_probability: f64,
    ) -> Vec<LaunchForecast> {
        let mut forecaster = self.forecaster.lock();
        forecaster.advance(now, |_, _| {});
        forecaster.next_launches(now, horizon_s, least_probability)
    }

    /// Records that a launch was asked for; returns its id.
    pub async fn launched(&self, of: &ProfileRef, vm: &Vm) -> i64 {
        let at = Timestamp(vm.launched_ms);
        let id = EventId::derive(at, &[b"launch", vm.name.as_bytes(), of.owner.as_bytes()]);
        let components = vm.components.iter().map(|component| ComponentRef {
            name: component.name.clone(),
            image: component.image,
        });
        note_launch(&mut self.forecaster.lock(), of, at, 1);
        let what = What::Launch {
            components: components.collect(),
            count: 1,
        };
        self.append(&[Event {
            id,
            vm: id.nonce,
            of: of.clone(),
            what,
        }])
        .await;
        id.nonce as i64
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
            self.sets.lock().observe(&model_key(of), images, touches);
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
    pub async fn stopped(&self, of: &ProfileRef, launch_id: i64, ran_ms: u64) {
        self.tell(of, launch_id, vec![What::Stop { ran_ms }]).await;
    }

    /// Records a hot attach.
    pub async fn attached(&self, of: &ProfileRef, launch_id: i64, component: ComponentRef) {
        self.tell(of, launch_id, vec![What::Attach { component }])
            .await;
    }

    async fn tell(&self, of: &ProfileRef, launch_id: i64, whats: Vec<What>) {
        let at = Timestamp(now_ms());
        let vm = launch_id as u64;
        let events = whats.into_iter().enumerate().map(|(index, what)| {
            let number = [index as u8];
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

    /// History is worth having, but no launch fails for want of it.
    async fn append(&self, events: &[Event]) {
        if let Err(error) = self.history.append(events).await {
            tracing::error!(error = %super::chain(&error), "the history was not written");
        }
    }

    /// What is known of profiles' past.
    pub async fn entries(&self, profile: Option<&str>) -> Result<Vec<HistoryEntry>, HostError> {
        let mut entries = Vec::new();
        for summary in self.history.profiles().await.map_err(HostError::failed)? {
            if profile.is_some_and(|name| name != summary.of.profile) {
                continue;
            }
            let launches = self
                .history
                .launches(Some(&summary.of.profile), RECENT_LAUNCHES);
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
                last_launch_ms: summary.last.map(|at| at.0),
                profile: summary.of.profile,
                owner: summary.of.owner,
            });
        }
        Ok(entries)
    }

    fn working_set_bytes(&self, of: &ProfileRef) -> u64 {
        let key = model_key(of);
        let sets = self.sets.lock();
        let own = sets.pairs().filter(|(profile, ..)| *profile == key);
        own.map(|(_, _, set)| set.likely_bytes()).sum()
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
