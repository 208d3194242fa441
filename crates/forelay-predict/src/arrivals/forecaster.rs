//! The forecaster: takes launches in, gives probabilities out.
//!
//! Owns the records of all profiles, the pools and the online calibration. Refuses to know clocks:
//! every call takes the time. Invariants: events of the past (late, twice, after a clock jump) never
//! corrupt state, the caller is told; `probability` changes nothing; `advance` only settles what has already happened.

use super::config::ArrivalsConfig;
use super::hazard_scale::HazardScale;
use super::outlook::{Outlook, likelihoods};
use super::pool::{OwnerPool, Pool};
use super::record::Record;
use super::rule::Regret;
use super::triggers;
use super::walk::{self, Place, Segment};
use crate::calibration::{Judged, Recalibration, Reliability};
use crate::time::Timestamp;
use std::collections::HashMap;

/// A profile's number inside one forecaster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProfileKey(pub u32);

/// An owner's number inside one forecaster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnerKey(pub u32);

/// What became of an observed launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Observed {
    /// The first launch of this profile.
    First,
    /// A launch after a gap that was learned.
    Learned,
    /// The same moment again: counted, nothing learned.
    Repeated,
    /// Older than what is known already: ignored.
    Late,
    /// The clock went back, or a gap was absurd: the profile's timeline was restarted.
    Restarted,
}

/// Horizon of the probabilities that are calibrated online.
pub(super) const CALIBRATED_HORIZON_S: f64 = 600.0;
/// Profiles looked at in one call of `advance`.
const ADVANCE_BATCH: usize = 1024;

/// Forecasts the launches of all profiles of a host.
#[derive(Debug, Clone)]
pub struct Forecaster {
    pub(super) config: ArrivalsConfig,
    pub(super) names: Names,
    owner_names: Names,
    pub(super) records: Vec<Record>,
    pub(super) owners: Vec<OwnerPool>,
    pub(super) pool: Pool,
    pub(super) scale: HazardScale,
    pair_prior: triggers::PairPrior,
    recalibration: Recalibration,
    reliability: Reliability,
    sampled_at: Option<Timestamp>,
    sampled: (u32, u32),
}

/// Strings and their numbers.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    list: Vec<String>,
    index: HashMap<String, u32>,
}

impl Names {
    fn intern(&mut self, name: &str) -> u32 {
        if let Some(&key) = self.index.get(name) {
            return key;
        }
        let key = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        self.list.push(name.to_owned());
        self.index.insert(name.to_owned(), key);
        key
    }

    pub(super) fn name(&self, key: u32) -> &str {
        self.list.get(key as usize).map_or("?", String::as_str)
    }
}

impl Forecaster {
    /// A forecaster that knows nothing yet.
    #[must_use]
    pub fn new(config: ArrivalsConfig) -> Self {
        Self {
            config,
            names: Names::default(),
            owner_names: Names::default(),
            records: Vec::new(),
            owners: Vec::new(),
            pool: Pool::default(),
            scale: HazardScale::default(),
            pair_prior: triggers::PairPrior::default(),
            recalibration: Recalibration::default(),
            reliability: Reliability::default(),
            sampled_at: None,
            sampled: (0, 0),
        }
    }

    /// The settings in force.
    #[must_use]
    pub fn config(&self) -> &ArrivalsConfig {
        &self.config
    }

    /// The number of a profile, new if it was never named before.
    pub fn profile(&mut self, name: &str) -> ProfileKey {
        let key = self.names.intern(name);
        if key as usize == self.records.len() {
            self.records.push(Record::new(0));
        }
        ProfileKey(key)
    }

    /// The number of a profile that has been named before.
    #[must_use]
    pub fn find_profile(&self, name: &str) -> Option<ProfileKey> {
        self.names.index.get(name).map(|&key| ProfileKey(key))
    }

    /// The number of an owner, new if it was never named before.
    pub fn owner(&mut self, name: &str) -> OwnerKey {
        let key = self.owner_names.intern(name);
        if key as usize == self.owners.len() {
            self.owners.push(OwnerPool::default());
        }
        OwnerKey(key)
    }

    /// The name behind a number.
    #[must_use]
    pub fn profile_name(&self, profile: ProfileKey) -> &str {
        self.names.name(profile.0)
    }

    /// How many profiles have been named.
    #[must_use]
    pub fn profile_count(&self) -> usize {
        self.records.len()
    }

    /// Notes a launch. `repeats` counts further launches of the profile at the same moment.
    pub fn observe_launch(
        &mut self,
        profile: ProfileKey,
        owner: OwnerKey,
        at: Timestamp,
        repeats: u32,
    ) -> Observed {
        self.settle(profile, at, true, |_| {});
        self.learn_launch(profile, owner, at, repeats, |_, _| {})
    }

    /// Accounts for a profile's time until `until`, giving each stretch with the hazard that was
    /// forecast for it. `launched` says that a launch ends the last one; [`Self::learn_launch`]
    /// must follow then. The simulator's way in: it sees every decision before the outcome.
    pub fn settle(
        &mut self,
        profile: ProfileKey,
        until: Timestamp,
        launched: bool,
        mut sink: impl FnMut(&Segment),
    ) {
        let Some(record) = self.records.get_mut(profile.0 as usize) else {
            return;
        };
        walk::settle(
            record,
            until,
            launched,
            &mut self.scale,
            &self.config,
            &mut sink,
        );
    }

    /// The second half of [`Self::observe_launch`], after [`Self::settle`]. A launch that announces
    /// others settles their time until `at`: `sink` is given those stretches.
    pub fn learn_launch(
        &mut self,
        profile: ProfileKey,
        owner: OwnerKey,
        at: Timestamp,
        repeats: u32,
        mut sink: impl FnMut(ProfileKey, &Segment),
    ) -> Observed {
        let index = profile.0 as usize;
        if index >= self.records.len() || owner.0 as usize >= self.owners.len() {
            return Observed::Late;
        }
        let outcome = self.classify(index, at);
        match outcome {
            Observed::Late => return outcome,
            Observed::Repeated => {
                let all = u32::from(self.records[index].last_burst).saturating_add(repeats);
                self.note_repeats(index, all, true);
                return outcome;
            }
            Observed::First | Observed::Learned | Observed::Restarted => {}
        }
        if outcome == Observed::Learned {
            self.learn_gap(index, owner, at);
        }
        let previous = (outcome == Observed::Learned).then(|| self.records[index].last);
        self.resolve_sample(index, at);
        let record = &mut self.records[index];
        if outcome == Observed::First {
            self.owners[owner.0 as usize].enrol(profile.0);
            for (own, &pooled) in record.weights.iter_mut().zip(self.pool.weights(0)) {
                *own = pooled as f32;
            }
            record.repeats = self.pool.expected_first_repeats();
            self.pool.enrol();
        }
        record.owner = owner.0;
        record.launches = record.launches.saturating_add(1);
        triggers::settle(record, at, &mut self.pair_prior, &self.config);
        let owner_pool = &self.owners[owner.0 as usize];
        triggers::discover(
            &mut self.records,
            profile.0,
            owner_pool,
            at,
            previous,
            &self.config,
        );
        let record = &mut self.records[index];
        record.last = at;
        record.settled_min = 0.0;
        self.note_repeats(index, repeats, false);
        let record = &mut self.records[index];
        record.outlook = Outlook::new(
            record,
            &self.owners[owner.0 as usize],
            &self.pool,
            &self.config,
        );
        self.announce(index, at, &mut sink);
        self.owners[owner.0 as usize].note_launch(profile.0, at);
        self.scale.publish(at);
        outcome
    }

    fn note_repeats(&mut self, index: usize, repeats: u32, again: bool) {
        let record = &mut self.records[index];
        let before = if again { record.counted_repeats() } else { 0.0 };
        record.note_repeats(repeats, again);
        if record.launches == 1 {
            let learned = record.counted_repeats() - before;
            self.pool.learn_first_repeats(learned);
        }
    }

    fn classify(&self, index: usize, at: Timestamp) -> Observed {
        let record = &self.records[index];
        if record.launches == 0 {
            return Observed::First;
        }
        let gap_min = at.seconds_since(record.last) / 60.0;
        if gap_min == 0.0 {
            Observed::Repeated
        } else if gap_min < -self.config.late_tolerance_min || gap_min > self.config.longest_gap_min
        {
            Observed::Restarted
        } else if gap_min < 0.0 {
            Observed::Late
        } else {
            Observed::Learned
        }
    }

    fn learn_gap(&mut self, index: usize, owner: OwnerKey, at: Timestamp) {
        let owner_pool = &self.owners[owner.0 as usize];
        let record = &mut self.records[index];
        let gap_min = at.seconds_since(record.last) / 60.0;
        let densities = likelihoods(record, owner_pool, &self.pool, &self.config, gap_min);
        let pooled = self.pool.weights(record.gap_count);
        let share = self.config.share;
        let mut sum = 0.0;
        for (expert, weight) in record.weights.iter_mut().enumerate() {
            let prior = (1.0 - share) * f64::from(*weight) + share * pooled[expert];
            let posterior = prior * (densities[expert] + 1.0e-12);
            *weight = posterior as f32;
            sum += posterior;
        }
        let per_sum = 1.0 / sum;
        for weight in &mut record.weights {
            *weight = (f64::from(*weight) * per_sum) as f32;
        }
        self.pool
            .learn(record.gap_count, gap_min, &densities, &record.weights);
        record.push_gap(gap_min, &self.config);
        self.owners[owner.0 as usize].learn_gap(gap_min);
    }

    /// Opens the announcements that a launch makes, and drops those that never come true.
    fn announce(
        &mut self,
        source: usize,
        at: Timestamp,
        sink: &mut impl FnMut(ProfileKey, &Segment),
    ) {
        let mut position = 0;
        while let Some(&successor) = self.records[source].successors.get(position) {
            position += 1;
            let record = &mut self.records[successor as usize];
            let Some(index) = record
                .slots
                .iter()
                .position(|slot| slot.source as usize == source)
            else {
                continue;
            };
            if record.last >= at {
                continue;
            }
            let open = record.slots[index].open_since.is_some();
            if open {
                // Its past must be settled before the announcement moves.
                let key = ProfileKey(successor);
                self.settle(key, at, false, |segment| sink(key, segment));
            }
            let slots = &mut self.records[successor as usize].slots;
            slots[index].open(at, &mut self.pair_prior);
            if slots[index].is_useless() {
                slots.swap_remove(index);
                position -= 1;
                self.records[source].successors.swap_remove(position);
            }
        }
    }

    /// Lets time pass: settles what happened until `now` for some of the profiles, takes samples
    /// for calibration. Call it every ten minutes or so; each call costs a few milliseconds.
    pub fn advance(&mut self, now: Timestamp, mut sink: impl FnMut(ProfileKey, &Segment)) {
        self.scale.publish(now);
        let count = self.records.len();
        if count == 0 {
            return;
        }
        if let Some(at) = self.sampled_at {
            if now.seconds_since(at) < CALIBRATED_HORIZON_S && now >= at {
                return;
            }
            for index in self.sampled.0..self.sampled.1.min(count as u32) {
                self.close_sample(index as usize);
            }
        }
        let start = if (self.sampled.1 as usize) < count {
            self.sampled.1 as usize
        } else {
            0
        };
        let end = (start + ADVANCE_BATCH).min(count);
        for index in start..end {
            let key = ProfileKey(index as u32);
            self.settle(key, now, false, |segment| sink(key, segment));
            let raw = self.raw_probability(index, now, CALIBRATED_HORIZON_S);
            self.records[index].pending = raw as f32;
        }
        self.sampled = (start as u32, end as u32);
        self.sampled_at = Some(now);
    }

    /// A launch answers the sample that is waiting for it.
    fn resolve_sample(&mut self, index: usize, at: Timestamp) {
        let Some(sampled_at) = self.sampled_at else {
            return;
        };
        let pending = self.records[index].pending;
        if pending < 0.0 {
            return;
        }
        let wait_s = at.seconds_since(sampled_at);
        if wait_s > 0.0 && wait_s <= CALIBRATED_HORIZON_S {
            self.note_sample(index, true);
        }
    }

    fn close_sample(&mut self, index: usize) {
        if self.records[index].pending >= 0.0 {
            self.note_sample(index, false);
        }
    }

    fn note_sample(&mut self, index: usize, launched: bool) {
        let record = &mut self.records[index];
        let raw = f64::from(record.pending);
        record.pending = -1.0;
        if record.launches == 0 {
            return;
        }
        let told = self.recalibration.apply(raw);
        record.judged.note(told, launched);
        self.reliability.note(told, launched);
        self.recalibration.learn(raw, launched);
    }

    fn raw_probability(&self, index: usize, now: Timestamp, horizon_s: f64) -> f64 {
        let record = &self.records[index];
        if record.launches == 0 || record.outlook.is_empty() {
            return 0.0;
        }
        let start = (now.seconds_since(record.last) / 60.0).max(0.0);
        1.0 - (-self.integrated_hazard(record, start, start + horizon_s / 60.0)).exp()
    }

    fn integrated_hazard(&self, record: &Record, start_min: f64, end_min: f64) -> f64 {
        let mut here = Place::new(record, start_min, &self.scale);
        let mut sum = 0.0;
        while here.at_min < end_min {
            let stretch = walk::stretch(record, here, &self.scale, &self.config);
            let length = stretch.length_min.min(end_min - here.at_min);
            sum += stretch.hazard_per_min * length;
            here = stretch.end;
        }
        sum
    }

    /// Probability that the profile launches within `horizon_s` after `now`.
    #[must_use]
    pub fn probability(&self, profile: ProfileKey, now: Timestamp, horizon_s: f64) -> f64 {
        if profile.0 as usize >= self.records.len() || horizon_s <= 0.0 {
            return 0.0;
        }
        self.recalibration
            .apply(self.raw_probability(profile.0 as usize, now, horizon_s))
    }

    /// What holding on is worth, per minute, at any time within the span over which the latest
    /// launch's repeats may come: they are served only if all of it is worth the price.
    #[must_use]
    pub fn worth_of_repeats(&self, profile: ProfileKey) -> f64 {
        let Some(record) = self.records.get(profile.0 as usize) else {
            return 0.0;
        };
        let mut here = Place::new(record, 0.0, &self.scale);
        let mut least = f64::MAX;
        loop {
            let at = here.at_min;
            let stretch = walk::stretch(record, here, &self.scale, &self.config);
            let repeats = walk::repeats_per_min(record, at, stretch.length_min, &self.config);
            least = least.min(stretch.hazard_per_min + repeats);
            here = stretch.end;
            if here.at_min >= self.config.repeat_span_min {
                return least;
            }
        }
    }

    /// The account of forecasting against the simple rule, for one profile.
    #[must_use]
    pub fn regret(&self, profile: ProfileKey) -> Regret {
        self.records
            .get(profile.0 as usize)
            .map(|record| record.regret)
            .unwrap_or_default()
    }

    /// How well "launch within ten minutes" has been told of one profile.
    #[must_use]
    pub fn judged(&self, profile: ProfileKey) -> Judged {
        let record = self.records.get(profile.0 as usize);
        record.map(|record| record.judged).unwrap_or_default()
    }

    /// How well "launch within ten minutes" has been told so far, each forecast judged before it
    /// was learned from.
    #[must_use]
    pub fn reliability(&self) -> &Reliability {
        &self.reliability
    }

    /// Bytes of state per profile, owners' shared state included, names not.
    #[must_use]
    pub fn bytes_per_profile(&self) -> f64 {
        let records: usize = self.records.iter().map(Record::bytes).sum();
        let owners: usize = self.owners.iter().map(OwnerPool::bytes).sum();
        (records + owners) as f64 / self.records.len().max(1) as f64
    }
}
