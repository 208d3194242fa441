//! The history told to the models when a daemon starts.
//!
//! Of the last three days each forecast is judged again before the launches that followed it
//! are learned, so that a daemon that was restarted knows how well it forecasts. Refuses to know
//! the database and what the facts mean.
//!
//! Invariant: whatever is told arrives in [`Models`] as it would have online.

use std::collections::VecDeque;

use forelay_image::{Digest, Touch};
use forelay_predict::resources::Sketch;
use forelay_predict::time::{DAY_MS, Timestamp};
use forelay_predict::working_set::WorkingSet;

use crate::daemon::forecast::models::{Models, model_key};
use crate::history::{ComponentRef, LaunchId, ProfileRef, ResourceSample, Sink};

/// How far back forecasts are judged again: what they are recalibrated by is recent anyway.
const JUDGED_MS: i64 = 3 * DAY_MS;
/// How often, as while the daemon runs.
const JUDGED_EVERY_MS: i64 = 600_000;
/// Launches that are told to the planner again: enough to learn from, done in a second.
const MOST_RECENT: usize = 10_000;
/// Launches known less exactly than this cannot judge a forecast for ten minutes.
const EXACT_MS: i64 = 1_000;

/// The models as they take in a history. Borrowed, since a replay wants to own nothing.
pub struct Replay<'a> {
    models: &'a Models,
    /// When the next forecasts are to be judged; `None` until a launch is recent enough.
    due: Option<Timestamp>,
    now: Timestamp,
    recent: VecDeque<(ProfileRef, Timestamp)>,
}

impl<'a> Replay<'a> {
    /// A replay into `models` at the time `now`.
    pub fn new(models: &'a Models, now: Timestamp) -> Self {
        Self {
            models,
            due: None,
            now,
            recent: VecDeque::new(),
        }
    }

    /// The last launches whose times are known exactly, oldest first.
    pub fn into_recent(self) -> VecDeque<(ProfileRef, Timestamp)> {
        self.recent
    }

    /// Lets the forecaster be judged until `at`, or until now if that is earlier.
    pub fn judge_until(&mut self, at: Timestamp) {
        let Some(mut due) = self.due else { return };
        let mut forecaster = self.models.forecaster.lock();
        while due.0 < at.0.min(self.now.0) {
            forecaster.advance(due, |_, _| {});
            due = due.plus_ms(JUDGED_EVERY_MS);
        }
        self.due = Some(due);
    }
}

impl Sink for Replay<'_> {
    fn launches(&mut self, of: &ProfileRef, at: Timestamp, count: u32, resolution_ms: i64) {
        let recent = at.0 >= self.now.0.saturating_sub(JUDGED_MS) && at.0 <= self.now.0;
        if self.due.is_none() && recent && resolution_ms <= EXACT_MS {
            let whole = at.0.div_euclid(JUDGED_EVERY_MS) * JUDGED_EVERY_MS;
            self.due = Some(Timestamp(whole));
        }
        self.judge_until(at);
        if resolution_ms <= EXACT_MS {
            if self.recent.len() >= MOST_RECENT {
                self.recent.pop_front();
            }
            self.recent.push_back((of.clone(), at));
        }
        self.models.launches(of, at, count);
    }

    fn composition(
        &mut self,
        of: &ProfileRef,
        at: Timestamp,
        components: &[ComponentRef],
        weight: f64,
    ) {
        self.models.compositions(of, at, components, weight);
    }

    fn launched_with(
        &mut self,
        of: &ProfileRef,
        at: Timestamp,
        vm: u64,
        components: &[ComponentRef],
    ) {
        self.models
            .launched_with(of, at, LaunchId(vm), components.iter());
    }

    fn attached(&mut self, _of: &ProfileRef, at: Timestamp, vm: u64, component: &ComponentRef) {
        self.models.attached(at, LaunchId(vm), component);
    }

    fn working_set(&mut self, of: &ProfileRef, image: Digest, set: WorkingSet) {
        self.models.sets.lock().insert(&model_key(of), image, set);
    }

    fn touched(&mut self, of: &ProfileRef, images: &[Digest], touches: &[Touch]) {
        self.models.touched(of, images, touches);
    }

    fn touched_late(&mut self, of: &ProfileRef, touches: &[Touch]) {
        self.models.touched_late(of, touches);
    }

    fn memory_sketch(&mut self, of: &ProfileRef, sketch: Sketch) {
        self.models.demand.lock().restore(&model_key(of), sketch);
    }

    fn sample(&mut self, of: &ProfileRef, at: Timestamp, vm: u64, sample: &ResourceSample) {
        self.models.sampled(of, at, LaunchId(vm), sample);
    }

    fn stopped(&mut self, _of: &ProfileRef, _at: Timestamp, vm: u64, _ran_ms: u64) {
        self.models.stopped(LaunchId(vm));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use forelay_image::Extent;

    use super::*;
    use crate::history::{Event, EventId, History as _, OpenOptions, SqliteHistory, What};

    const HOUR_MS: i64 = 3_600_000;

    fn component(name: &str) -> ComponentRef {
        ComponentRef {
            name: name.into(),
            image: Digest::of(name.as_bytes()),
        }
    }

    fn touch(name: &str, page: u64) -> Touch {
        Touch {
            image: Digest::of(name.as_bytes()),
            extent: Extent::new(page * 4096, 4096),
            first_touch_ms: 10 * page as u32,
        }
    }

    /// The life of VM `number`: what happens, and when. Every other one is given a tool.
    fn life(number: i64) -> Vec<(i64, What)> {
        let start = number * HOUR_MS;
        let images = vec![component("base").image];
        let mut all = vec![
            (
                start,
                What::Launch {
                    components: vec![component("base"), component("nginx")],
                    count: 1,
                },
            ),
            (
                start + 5_000,
                What::Touched {
                    images: images.clone(),
                    touches: vec![touch("base", number as u64 % 3)],
                },
            ),
            (
                start + 15_000,
                What::Sample(ResourceSample {
                    memory_bytes: (200 + number as u64) << 20,
                    ..ResourceSample::default()
                }),
            ),
        ];
        if number % 2 == 0 {
            let component = component("tool");
            all.push((start + 120_000, What::Attach { component }));
            let late = What::TouchedLate {
                touches: vec![touch("base", 40), touch("base", number as u64 % 4)],
            };
            all.push((start + 130_000, late));
        }
        // The last one runs on.
        if number < 39 {
            all.push((start + 600_000, What::Stop { ran_ms: 600_000 }));
        }
        all
    }

    /// Tells the models what the daemon tells them as it happens.
    fn tell(models: &Models, of: &ProfileRef, vm: LaunchId, at: Timestamp, what: &What) {
        match what {
            What::Launch { components, .. } => {
                models.launches(of, at, 1);
                models.launched_with(of, at, vm, components.iter());
            }
            What::Touched { images, touches } => models.touched(of, images, touches),
            What::TouchedLate { touches } => models.touched_late(of, touches),
            What::Sample(sample) => models.sampled(of, at, vm, sample),
            What::Attach { component } => models.attached(at, vm, component),
            What::Stop { .. } => {
                models.stopped(vm);
                models.fit_if_due();
            }
            _ => {}
        }
    }

    fn models() -> Models {
        let memory = HashMap::from([("ann/web".to_owned(), 256)]);
        Models::new(Default::default(), true, memory)
    }

    /// Everything that is forecast, in words.
    fn forecasts(models: &Models, of: &ProfileRef, now: Timestamp) -> String {
        let launches = models.forecaster.lock().next_launches(now, 3_600.0, 0.0);
        let needs = models.needs.lock();
        let context = needs.context(of, now);
        let ranked = needs.model.rank(&context, &["base"]);
        let outlook = needs.attachments.outlook("ann/web", "tool", 60.0, 600.0);
        let images = [component("base").image];
        let plan = models.sets.lock().plan("ann/web", &images);
        let demand = models.demand.lock();
        let host = demand.host(300_000, &[("ann/web", 0.5)]).quantile(0.9);
        format!("{launches:?} {ranked:?} {outlook:?} {plan:?} {host}")
    }

    #[tokio::test]
    async fn a_daemon_that_was_restarted_forecasts_what_its_predecessor_did() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history.db");
        let history = SqliteHistory::open(&path, OpenOptions::default()).await;
        let history = history.unwrap();
        let of = ProfileRef::new("web", "ann");
        let online = models();
        let now = Timestamp(39 * HOUR_MS + 180_000);
        let mut ten_minutes = Replay::new(&online, now);
        ten_minutes.due = Some(Timestamp(0));
        for number in 0..40 {
            let start = Timestamp(number * HOUR_MS);
            let vm = EventId::derive(start, &[b"launch"]).nonce;
            for (index, (at, what)) in life(number).into_iter().enumerate() {
                ten_minutes.judge_until(Timestamp(at));
                tell(&online, &of, LaunchId(vm), Timestamp(at), &what);
                let nonce = if index == 0 { vm } else { index as u64 };
                let id = EventId {
                    at: Timestamp(at),
                    nonce,
                };
                let event = Event {
                    id,
                    vm,
                    of: of.clone(),
                    what,
                };
                history.append(&[event]).await.unwrap();
            }
        }
        ten_minutes.judge_until(now);
        let restarted = models();
        restarted.begin_replay();
        let mut replay = Replay::new(&restarted, now);
        history.replay(Timestamp(0), &mut replay).await.unwrap();
        replay.judge_until(now);
        restarted.end_replay();
        let before = forecasts(&online, &of, now);
        assert!(
            before.contains("tool") && before.contains("Periodic"),
            "{before}"
        );
        let late_page = format!("{:?}", touch("base", 40).extent);
        assert!(before.contains(&late_page), "{before}");
        assert_eq!(forecasts(&restarted, &of, now), before);

        // Nor does it forget how well it forecast.
        let judged = |models: &Models| {
            let forecaster = models.forecaster.lock();
            let key = forecaster.find_profile("ann/web").unwrap();
            forecaster.judged(key)
        };
        assert!(judged(&online).count() > 200, "{:?}", judged(&online));
        assert_eq!(judged(&restarted), judged(&online));

        // The VM whose end nobody saw is closed once, and counts then.
        let observed = |models: &Models| models.needs.lock().model.observed();
        assert_eq!(observed(&restarted), 39);
        restarted.keep_running(|_| false);
        assert_eq!(observed(&restarted), 40);
        assert_eq!(restarted.demand.lock().in_use(), 0.0);
    }
}
