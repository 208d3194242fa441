//! What is known about objects and owners from past requests, as features of
//! expected reuse: gaps, rates at several time scales, the owner's habits.
//!
//! Everything is causal: a feature at time t depends on requests up to t alone. Time
//! features are log2 of seconds, so that one model serves seconds and days.

use super::ObjectRequest;

/// Number of features.
pub const FEATURES: usize = 43;

/// Past requests of an object that are remembered one by one.
const REMEMBERED: usize = 10;

/// Half-lives of the decayed counts of an object, in seconds.
const HALF_LIVES_S: [f64; 4] = [1800.0, 4.0 * 3600.0, 24.0 * 3600.0, 96.0 * 3600.0];

/// Stands for "never", in seconds.
const NEVER_S: f64 = 1e7;

/// log2(1 + x)
fn log2(x: f64) -> f32 {
    (x.max(0.0) + 1.0).log2() as f32
}

/// The same on both sides of zero.
fn signed_log2(x: f64) -> f32 {
    if x < 0.0 { -log2(-x) } else { log2(x) }
}

fn decay(elapsed_s: f64, half_life_s: f64) -> f32 {
    (-elapsed_s / half_life_s).exp2() as f32
}

/// One object's past.
#[derive(Clone, Debug)]
struct ObjectPast {
    owner: u32,
    /// What the owner requested before this object, last time.
    predecessor: u32,
    first_s: f64,
    last_s: f64,
    last_request: u64,
    count: u32,
    gaps_s: [f64; 4],
    gap_requests: f64,
    mean_gap_s: f64,
    /// Gaps counted in requests of the owner.
    turns: [f64; 2],
    last_turn: f64,
    rates: [f32; 4],
    /// The owner's number of objects when this one was new, and at its last request.
    owner_objects_first: f64,
    owner_objects_last: f64,
    /// Latest requests, newest first.
    times_s: [f64; REMEMBERED],
}

/// One owner's past.
#[derive(Clone, Debug, Default)]
struct OwnerPast {
    last_s: f64,
    before_s: f64,
    last_object: u32,
    requests: f64,
    objects: f64,
    /// Objects that were requested a second time.
    returned: f64,
    repeat_share: f64,
    log_gap: f64,
    log_second_gap: f64,
    rates: [f32; 2],
}

/// All objects' and owners' past.
#[derive(Clone, Debug, Default)]
pub struct RequestHistory {
    objects: Vec<Option<ObjectPast>>,
    owners: Vec<OwnerPast>,
    requests: u64,
}

impl OwnerPast {
    fn observe(&mut self, object: u32, gap_s: Option<f64>, count: u32, now_s: f64) {
        let elapsed_s = now_s - self.last_s;
        self.rates[0] = self.rates[0] * decay(elapsed_s, 3600.0) + 1.0;
        self.rates[1] = self.rates[1] * decay(elapsed_s, 86_400.0) + 1.0;
        (self.before_s, self.last_s) = (self.last_s, now_s);
        self.requests += 1.0;
        self.last_object = object;
        self.repeat_share += 0.1 * (f64::from(u8::from(gap_s.is_some())) - self.repeat_share);
        let Some(gap_s) = gap_s else {
            self.objects += 1.0;
            return;
        };
        let log_gap = f64::from(log2(gap_s));
        let blend = |mean: &mut f64, weight: f64| {
            *mean = if *mean == 0.0 {
                log_gap
            } else {
                *mean + weight * (log_gap - *mean)
            };
        };
        blend(&mut self.log_gap, 0.1);
        if count == 1 {
            self.returned += 1.0;
            blend(&mut self.log_second_gap, 0.2);
        }
    }
}

impl RequestHistory {
    /// Seconds since the object's last request, if there was one.
    pub fn age_s(&self, object: u32, now_ms: i64) -> Option<f64> {
        let past = self.objects.get(object as usize)?.as_ref()?;
        Some(now_ms as f64 / 1e3 - past.last_s)
    }

    /// Takes a request into account.
    pub fn observe(&mut self, request: &ObjectRequest) {
        let now_s = request.now_ms as f64 / 1e3;
        let (object, owner) = (request.object as usize, request.owner as usize);
        if self.objects.len() <= object {
            self.objects.resize(object + 1, None);
        }
        if self.owners.len() <= owner {
            self.owners.resize_with(owner + 1, OwnerPast::default);
        }
        self.requests += 1;
        let owner = &mut self.owners[owner];
        let predecessor = owner.last_object;
        let past = &mut self.objects[object];
        let gap_s = past.as_ref().map(|past| now_s - past.last_s);
        owner.observe(
            request.object,
            gap_s,
            past.as_ref().map_or(0, |past| past.count),
            now_s,
        );
        match past {
            None => {
                *past = Some(ObjectPast::new(
                    request.owner,
                    predecessor,
                    now_s,
                    self.requests,
                    owner,
                ))
            }
            Some(past) => {
                if predecessor != request.object {
                    past.predecessor = predecessor;
                }
                past.observe(request.owner, now_s, self.requests, owner);
            }
        }
    }

    /// Features of an object at a time; nothing for an object never requested.
    pub fn features(&self, object: u32, now_ms: i64) -> Option<[f32; FEATURES]> {
        let now_s = now_ms as f64 / 1e3;
        let past = self.objects.get(object as usize)?.as_ref()?;
        let owner = self.owners.get(past.owner as usize)?;
        let predecessor = self
            .objects
            .get(past.predecessor as usize)
            .and_then(Option::as_ref);
        let mut features = [0.0; FEATURES];
        past.write(now_s, self.requests, owner, &mut features);
        let owner_age_s = now_s - owner.last_s;
        let age = features[1];
        let rest = [
            log2(owner_age_s),
            owner.rates[0] * decay(owner_age_s, 3600.0),
            owner.rates[1] * decay(owner_age_s, 86_400.0),
            log2(owner.objects),
            log2(owner.last_s - owner.before_s),
            ((owner.returned + 0.3) / (owner.objects + 1.0)) as f32,
            owner.log_gap as f32,
            owner.log_second_gap as f32,
            owner.repeat_share as f32,
            age - owner.log_gap as f32,
            log2(now_s - predecessor.map_or(now_s - NEVER_S, |past| past.last_s)),
        ];
        features[FEATURES - rest.len()..].copy_from_slice(&rest);
        Some(features)
    }
}

impl ObjectPast {
    fn new(owner: u32, predecessor: u32, now_s: f64, request: u64, past: &OwnerPast) -> Self {
        Self {
            owner,
            predecessor,
            first_s: now_s,
            last_s: now_s,
            last_request: request,
            count: 1,
            gaps_s: [NEVER_S; 4],
            gap_requests: NEVER_S,
            mean_gap_s: NEVER_S,
            turns: [NEVER_S / 10.0; 2],
            last_turn: past.requests,
            rates: [1.0; 4],
            owner_objects_first: past.objects,
            owner_objects_last: past.objects,
            times_s: [now_s; REMEMBERED],
        }
    }

    fn observe(&mut self, owner: u32, now_s: f64, request: u64, past: &OwnerPast) {
        let gap_s = now_s - self.last_s;
        self.gaps_s.rotate_right(1);
        self.gaps_s[0] = gap_s;
        let blended = 0.7 * self.mean_gap_s + 0.3 * gap_s;
        self.mean_gap_s = if self.count == 1 { gap_s } else { blended };
        self.gap_requests = (request - self.last_request) as f64;
        if owner == self.owner {
            self.turns = [past.requests - self.last_turn, self.turns[0]];
        }
        for (rate, half_life_s) in self.rates.iter_mut().zip(HALF_LIVES_S) {
            *rate = *rate * decay(gap_s, half_life_s) + 1.0;
        }
        self.times_s.rotate_right(1);
        self.times_s[0] = now_s;
        self.owner = owner;
        self.last_turn = past.requests;
        self.owner_objects_last = past.objects;
        self.last_s = now_s;
        self.last_request = request;
        self.count = self.count.saturating_add(1);
    }

    fn write(&self, now_s: f64, requests: u64, owner: &OwnerPast, features: &mut [f32]) {
        let age_s = now_s - self.last_s;
        let age_requests = log2((requests - self.last_request) as f64);
        let turns = log2(owner.requests - self.last_turn);
        features[0] = age_requests;
        features[1] = log2(age_s);
        for (feature, gap_s) in features[2..6].iter_mut().zip(self.gaps_s) {
            *feature = log2(gap_s);
        }
        features[6] = log2(f64::from(self.count));
        for (at, half_life_s) in HALF_LIVES_S.into_iter().enumerate() {
            features[7 + at] = self.rates[at] * decay(age_s, half_life_s);
        }
        features[11] = log2(now_s - self.first_s);
        features[12] = turns;
        features[13] = log2(self.turns[0]);
        features[14] = log2(self.turns[1]);
        features[15] = features[1] - features[2];
        features[16] = turns - features[13];
        features[17] = features[1] - log2(self.mean_gap_s);
        features[18] = log2(self.gap_requests) - age_requests;
        features[19] = (age_s - self.gaps_s[0]).clamp(-1e5, 1e5) as f32;
        features[20] = log2(owner.objects - self.owner_objects_last);
        features[21] = log2(owner.objects - self.owner_objects_first);
        features[22..29].copy_from_slice(&self.gap_features(age_s));
        features[29..32].copy_from_slice(&self.calendar_features(now_s));
    }

    /// Times of the remembered requests, newest first.
    fn times_s(&self) -> &[f64] {
        &self.times_s[..(self.count as usize).min(REMEMBERED)]
    }

    /// How the remembered gaps speak about what is left of the present one.
    fn gap_features(&self, age_s: f64) -> [f32; 7] {
        let mut newest_first = [0.0; REMEMBERED];
        let pairs = self.times_s().windows(2);
        let count = pairs.len();
        for (gap, pair) in newest_first.iter_mut().zip(pairs) {
            *gap = pair[0] - pair[1];
        }
        let newest_first = &newest_first[..count];
        let mut sorted = [0.0; REMEMBERED];
        let sorted = &mut sorted[..count];
        sorted.copy_from_slice(newest_first);
        sorted.sort_unstable_by(f64::total_cmp);
        let median_s = sorted.get(count / 2).copied().unwrap_or(NEVER_S);
        let longer = &sorted[sorted.partition_point(|&gap| gap <= age_s)..];
        let left_s = longer.first().map_or(NEVER_S, |gap| gap - age_s);
        let logs: f32 = longer.iter().map(|gap| log2(gap - age_s)).sum();
        // What came after a gap like the latest.
        let like = |gap: f64| (gap / newest_first[0].max(1.0)).ln().abs() < 0.15;
        let followed_s = (1..count)
            .find(|&at| like(newest_first[at]))
            .map_or(NEVER_S, |at| newest_first[at - 1]);
        [
            log2(median_s),
            sorted
                .last()
                .map_or(-1.0, |last| log2(*last) - log2(sorted[0])),
            longer.len() as f32 / (count as f32 + 0.5),
            log2(left_s),
            if longer.is_empty() {
                log2(NEVER_S)
            } else {
                logs / longer.len() as f32
            },
            signed_log2(median_s - age_s),
            signed_log2(followed_s - age_s),
        ]
    }

    /// Time until the next day's (hour's) return of a remembered request, how many return soon.
    fn calendar_features(&self, now_s: f64) -> [f32; 3] {
        let waits_s = |cycle_s: f64, slack_s: f64| {
            let since_s = self.times_s().iter().map(move |time_s| now_s - time_s);
            let past = since_s.filter(move |&since_s| since_s >= slack_s);
            past.map(move |since_s| (slack_s - since_s).rem_euclid(cycle_s))
        };
        let day = || waits_s(86_400.0, 600.0);
        let soon = day().filter(|&wait_s| wait_s < 21_600.0).count();
        [
            log2(day().fold(86_400.0, f64::min)),
            soon as f32,
            log2(waits_s(3_600.0, 60.0).fold(3_600.0, f64::min)),
        ]
    }
}
