//! Launches that announce other launches: lead-lag pairs among the profiles of one owner.
//!
//! Owns the pairs: for each profile up to [`SLOTS`] sources that used to launch shortly before it,
//! with how often that came true and after which lag. Refuses to know gaps. Invariants: a source
//! lists a profile as successor exactly if that profile holds a slot for it; a source of the same
//! moment announces nothing (it was not earlier).

use super::config::ArrivalsConfig;
use super::kernel::logistic;
use super::pool::OwnerPool;
use super::record::Record;
use crate::time::Timestamp;

/// Most sources per profile.
pub(crate) const SLOTS: usize = 6;
/// Most profiles that one source may announce.
pub(crate) const SUCCESSORS: usize = 10;
/// Candidates looked at, and taken, per launch.
const EXAMINED: usize = 4;
const TAKEN: usize = 2;
/// An announcement less likely than this to come true is not listened to.
pub(crate) const LEAST_PROBABILITY: f64 = 0.05;
const SHORTEST_LAG_MIN: f64 = 0.002;
const PRIOR_TRIALS: f32 = 1.5;

/// How far a pair seen once is to be believed: the share of such pairs that came true the next
/// time, over all profiles.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PairPrior {
    came_true: f32,
    judged: f32,
}

impl Default for PairPrior {
    fn default() -> Self {
        Self {
            came_true: 1.0,
            judged: 4.0,
        }
    }
}

impl PairPrior {
    fn share(self) -> f32 {
        self.came_true / self.judged
    }

    fn judge(&mut self, came_true: bool) {
        self.judged += 1.0;
        self.came_true += f32::from(u8::from(came_true));
        if self.judged > 1000.0 {
            self.judged *= 0.5;
            self.came_true *= 0.5;
        }
    }
}

/// A source and what it announced so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub source: u32,
    /// Share of new pairs that come true, as it was when the announcement opened.
    prior: f32,
    hits: f32,
    trials: f32,
    log_lag: f32,
    log_lag_variance: f32,
    /// When the source launched, if its announcement is still open.
    pub open_since: Option<Timestamp>,
}

impl Slot {
    fn new(source: u32, lag_min: f64) -> Self {
        Self {
            source,
            prior: 0.0,
            hits: 0.0,
            trials: 0.0,
            log_lag: lag_min.max(SHORTEST_LAG_MIN).ln() as f32,
            log_lag_variance: 0.5,
            open_since: None,
        }
    }

    /// Probability that an announcement comes true.
    pub(crate) fn probability(&self) -> f64 {
        f64::from((self.hits + PRIOR_TRIALS * self.prior) / (self.trials + PRIOR_TRIALS))
    }

    /// Announcements this rests on.
    pub(crate) fn trials(&self) -> f64 {
        f64::from(self.trials)
    }

    /// How many of them came true.
    pub(crate) fn hits(&self) -> f64 {
        f64::from(self.hits)
    }

    /// Typical lag in minutes.
    pub(crate) fn lag_min(&self) -> f64 {
        f64::from(self.log_lag).exp()
    }

    /// Probability, given that it comes true, that it does so within `since_min`.
    pub(crate) fn fraction_by(&self, since_min: f64) -> f64 {
        if since_min <= 0.0 {
            return 0.0;
        }
        let scale = f64::from(self.log_lag_variance).max(0.02).sqrt() * 0.55;
        logistic((since_min.ln() - f64::from(self.log_lag)) / scale)
    }

    /// Probability that it still comes true, given that it has not until `since_min`.
    pub(crate) fn still(&self, since_min: f64) -> f64 {
        let probability = self.probability();
        let by = self.fraction_by(since_min);
        probability * (1.0 - by) / (1.0 - probability * by).max(1.0e-9)
    }

    /// True once it has been given its chances and almost never came true.
    pub(crate) fn is_useless(&self) -> bool {
        self.trials >= 6.0 && self.probability() < LEAST_PROBABILITY
    }

    fn worth(&self) -> f64 {
        self.probability() + 0.01 * self.trials()
    }

    fn confirm(&mut self, lag_min: f64) {
        self.hits += 1.0;
        let n = (self.hits + 1.0).min(8.0);
        let d = lag_min.max(SHORTEST_LAG_MIN).ln() as f32 - self.log_lag;
        self.log_lag += d / n.max(1.0);
        self.log_lag_variance += (d * d - self.log_lag_variance) / n.max(2.0);
    }

    /// Opens an announcement; one that was open already has failed.
    pub(crate) fn open(&mut self, at: Timestamp, pair_prior: &mut PairPrior) {
        if self.open_since.is_some() && self.trials == 1.0 {
            pair_prior.judge(false);
        }
        self.prior = pair_prior.share();
        self.trials += 1.0;
        self.open_since = Some(at);
        if self.trials > 12.0 {
            self.trials *= 0.7;
            self.hits *= 0.7;
        }
    }
}

/// Settles the open announcements of a profile that launches at `at`; returns whether one that
/// was to be believed came true.
pub(crate) fn settle(
    record: &mut Record,
    at: Timestamp,
    pair_prior: &mut PairPrior,
    config: &ArrivalsConfig,
) {
    let mut announced = false;
    for slot in &mut record.slots {
        let Some(since) = slot.open_since.take() else {
            continue;
        };
        let lag_min = at.seconds_since(since) / 60.0;
        if lag_min <= 0.0 {
            // Of the same moment: neither right nor wrong.
            slot.trials = (slot.trials - 1.0).max(0.0);
            continue;
        }
        let came_true = lag_min <= config.trigger_window_min;
        if slot.trials == 1.0 {
            pair_prior.judge(came_true);
        }
        if came_true {
            announced |= slot.probability() >= 0.3;
            slot.confirm(lag_min);
        }
    }
    let rate = (1.0 / (f32::from(record.announced_count) + 1.0)).max(0.1);
    record.announced += (f32::from(u8::from(announced)) - record.announced) * rate;
    record.announced_count = record.announced_count.saturating_add(1);
}

/// Looks for new sources of `profile`, which launches at `at` and did so before at `previous`.
pub(crate) fn discover(
    records: &mut [Record],
    profile: u32,
    owner: &OwnerPool,
    at: Timestamp,
    previous: Option<Timestamp>,
    config: &ArrivalsConfig,
) {
    let mut candidates: [(u32, f64); EXAMINED] = [(0, 0.0); EXAMINED];
    let mut count = 0;
    for (source, launched) in owner.recent_launches() {
        let lag_min = at.seconds_since(launched) / 60.0;
        if lag_min > config.trigger_window_min || previous.is_some_and(|p| launched <= p) {
            break;
        }
        if source == profile
            || lag_min <= 0.0
            || candidates[..count]
                .iter()
                .any(|&(known, _)| known == source)
        {
            continue;
        }
        candidates[count] = (source, lag_min);
        count += 1;
        if count == EXAMINED {
            break;
        }
    }
    let mut taken = 0;
    for &(source, lag_min) in &candidates[..count] {
        if taken == TAKEN {
            break;
        }
        let known = records[profile as usize]
            .slots
            .iter()
            .any(|slot| slot.source == source);
        if !known && add_pair(records, profile, source, lag_min) {
            taken += 1;
        }
    }
}

fn add_pair(records: &mut [Record], profile: u32, source: u32, lag_min: f64) -> bool {
    if records[source as usize].successors.len() >= SUCCESSORS
        && !drop_weakest_successor(records, source)
    {
        return false;
    }
    if records[profile as usize].slots.len() >= SLOTS && !drop_weakest_slot(records, profile) {
        return false;
    }
    let record = &mut records[profile as usize];
    record.slots.reserve_exact(1);
    record.slots.push(Slot::new(source, lag_min));
    let source = &mut records[source as usize];
    source.successors.reserve_exact(1);
    source.successors.push(profile);
    true
}

fn drop_weakest_successor(records: &mut [Record], source: u32) -> bool {
    let worth = |profile: u32| {
        records[profile as usize]
            .slots
            .iter()
            .find(|slot| slot.source == source)
            .map_or(0.0, Slot::worth)
    };
    let weakest = records[source as usize]
        .successors
        .iter()
        .map(|&profile| (profile, worth(profile)))
        .min_by(|a, b| a.1.total_cmp(&b.1));
    match weakest {
        Some((profile, worth)) if worth <= 0.5 => {
            records[source as usize]
                .successors
                .retain(|&known| known != profile);
            records[profile as usize]
                .slots
                .retain(|slot| slot.source != source);
            true
        }
        _ => false,
    }
}

fn drop_weakest_slot(records: &mut [Record], profile: u32) -> bool {
    let weakest = records[profile as usize]
        .slots
        .iter()
        .map(|slot| (slot.source, slot.worth()))
        .min_by(|a, b| a.1.total_cmp(&b.1));
    match weakest {
        Some((source, worth)) if worth <= 0.5 => {
            records[profile as usize]
                .slots
                .retain(|slot| slot.source != source);
            records[source as usize]
                .successors
                .retain(|&known| known != profile);
            true
        }
        _ => false,
    }
}
