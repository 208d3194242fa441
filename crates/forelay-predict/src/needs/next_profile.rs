//! Which profile an owner launches next.
//!
//! Candidates (recent profiles, and what followed the last ones before) are scored by a softmax
//! over features that are themselves forecasts: how often, how recently, what followed the last
//! one, two and three launches, when each profile is due. The weights are learned online (AdaGrad
//! of Duchi, Hazan and Singer 2011), shared by all owners, with an offset per owner.
//!
//! Invariants: a forecast uses nothing later than the owner's latest launch; state per owner is
//! bounded by the constants below; probabilities of a ranking sum to at most one.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::time::Timestamp;

/// Features of a candidate.
const FEATURES: usize = 13;
/// Recency ranks told apart.
const RANKS: usize = 64;
/// Profiles remembered per owner; the one not launched longest is forgotten first.
const MAX_PROFILES: usize = 2048;
/// Contexts remembered per owner, over all orders.
const MAX_CONTEXTS: usize = 8192;
/// Successors remembered per context.
const MAX_SUCCESSORS: usize = 12;
/// Candidates taken by recency.
const RECENT_CANDIDATES: usize = 24;
/// Step of the shared weights.
const STEP: f64 = 0.1;
/// Step of an owner's offsets.
const OWNER_STEP: f64 = 0.03;

/// Online forecaster of the next profile of every owner.
#[derive(Clone, Debug)]
pub struct NextProfile {
    owners: BTreeMap<Arc<str>, Owner>,
    /// How often the next profile was at each recency rank, over all owners.
    ranks: [f64; RANKS + 1],
    weights: [f64; FEATURES],
    squares: [f64; FEATURES],
}

impl Default for NextProfile {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Clone, Debug)]
struct Owner {
    names: Vec<Arc<str>>,
    ids: BTreeMap<Arc<str>, u32>,
    profiles: Vec<Profile>,
    /// Most recent first.
    recent: Vec<u32>,
    contexts: BTreeMap<(u8, u64), Vec<(u32, f32)>>,
    /// The last three launches, latest first.
    last: [u32; 3],
    last_at: Timestamp,
    launches: f64,
    run: u32,
    /// Typical time between launches of this owner, in seconds.
    gap_s: f64,
    ranks: [f32; RANKS + 1],
    offsets: [f64; FEATURES],
    squares: [f64; FEATURES],
}

#[derive(Clone, Debug)]
struct Profile {
    launches: f32,
    /// Decayed launches, as of `seen_at` launches of the owner.
    recent: f32,
    seen_at: f64,
    last_at: Timestamp,
    gap_s: f64,
    /// Mean absolute relative deviation of gaps.
    jitter: f64,
    /// Times it was followed by itself, of its launches.
    repeats: f32,
}

/// No profile.
const NONE: u32 = u32::MAX;
/// Owner launches after which a decayed count is halved.
const HALF_LIFE: f64 = 60.0;

struct Candidate {
    id: u32,
    features: [f64; FEATURES],
}

impl NextProfile {
    /// Knows nothing yet.
    pub fn new() -> Self {
        let mut ranks = [0.0; RANKS + 1];
        for (rank, weight) in ranks.iter_mut().enumerate() {
            *weight = 2.0 / (1.0 + rank as f64);
        }
        let mut weights = [0.0; FEATURES];
        // A start that is sensible before anything is learned: mostly what followed, and recency.
        weights[1] = 0.3;
        weights[2] = 0.4;
        weights[3] = 0.3;
        Self {
            owners: BTreeMap::new(),
            ranks,
            weights,
            squares: [1.0; FEATURES],
        }
    }

    /// The likeliest next profiles of an owner, best first.
    pub fn rank(&self, owner: &str, top: usize) -> Vec<(Arc<str>, f64)> {
        let Some(owner) = self.owners.get(owner) else {
            return Vec::new();
        };
        let candidates = self.candidates(owner);
        let scores = self.softmax(owner, &candidates);
        // Some of the probability belongs to profiles never seen.
        let known = 1.0 - owner.novelty();
        let mut ranked: Vec<(u32, f64)> = candidates
            .iter()
            .zip(&scores)
            .map(|(c, p)| (c.id, p * known))
            .collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked.truncate(top);
        ranked
            .into_iter()
            .map(|(id, p)| (owner.names[id as usize].clone(), p))
            .collect()
    }

    /// Learns from a launch. Launches of one owner that come out of order count as of the latest.
    pub fn observe(&mut self, owner_name: &str, profile: &str, at: Timestamp) {
        if !self.owners.contains_key(owner_name) {
            self.owners.insert(owner_name.into(), Owner::new(at));
        }
        let Some(owner) = self.owners.get(owner_name) else {
            return;
        };
        if let Some(id) = owner.ids.get(profile).copied() {
            let candidates = self.candidates(owner);
            let scores = self.softmax(owner, &candidates);
            if let Some(hit) = candidates.iter().position(|c| c.id == id) {
                let gradient = gradient(&candidates, &scores, hit);
                step(&mut self.weights, &mut self.squares, &gradient, STEP);
                if let Some(owner) = self.owners.get_mut(owner_name) {
                    step(
                        &mut owner.offsets,
                        &mut owner.squares,
                        &gradient,
                        OWNER_STEP,
                    );
                }
            }
        }
        if let Some(owner) = self.owners.get_mut(owner_name) {
            let rank = owner.observe(profile, at.max(owner.last_at));
            self.ranks[rank] += 1.0;
        }
    }

    /// Weights learned, in the order of the features.
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    fn softmax(&self, owner: &Owner, candidates: &[Candidate]) -> Vec<f64> {
        let logits: Vec<f64> = candidates
            .iter()
            .map(|c| {
                let weights = self.weights.iter().zip(&owner.offsets).map(|(w, o)| w + o);
                weights.zip(&c.features).map(|(w, f)| w * f).sum()
            })
            .collect();
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut p: Vec<f64> = logits.iter().map(|l| (l - largest).exp()).collect();
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        p
    }

    /// Candidates with their features, as of the owner's latest launch.
    fn candidates(&self, owner: &Owner) -> Vec<Candidate> {
        let mut ids: Vec<u32> = owner
            .recent
            .iter()
            .take(RECENT_CANDIDATES)
            .copied()
            .collect();
        let mut after: Vec<Option<&Vec<(u32, f32)>>> = Vec::with_capacity(3);
        for order in 1..=3 {
            let found = owner.contexts.get(&owner.context(order));
            if let Some(successors) = found {
                ids.extend(successors.iter().map(|(id, _)| *id));
            }
            after.push(found);
        }
        ids.sort_unstable();
        ids.dedup();
        let rank_total: f64 = self.ranks.iter().sum();
        let own_rank_total: f64 = owner.ranks.iter().map(|r| f64::from(*r)).sum();
        ids.into_iter()
            .map(|id| {
                let rank = owner.recency(id);
                let shared = self.ranks[rank] / rank_total;
                let own = (f64::from(owner.ranks[rank]) + 8.0 * shared) / (own_rank_total + 8.0);
                let features = owner.features(id, rank, own, &after);
                Candidate { id, features }
            })
            .collect()
    }
}

/// Gradient of the log-likelihood.
fn gradient(candidates: &[Candidate], scores: &[f64], hit: usize) -> [f64; FEATURES] {
    let mut gradient = candidates[hit].features;
    for (candidate, p) in candidates.iter().zip(scores) {
        for (g, f) in gradient.iter_mut().zip(&candidate.features) {
            *g -= p * f;
        }
    }
    gradient
}

fn step(
    weights: &mut [f64; FEATURES],
    squares: &mut [f64; FEATURES],
    gradient: &[f64; FEATURES],
    size: f64,
) {
    for ((w, s), g) in weights.iter_mut().zip(squares).zip(gradient) {
        *s += g * g;
        *w += size * g / s.sqrt();
    }
}

impl Owner {
    fn new(at: Timestamp) -> Self {
        Self {
            names: Vec::new(),
            ids: BTreeMap::new(),
            profiles: Vec::new(),
            recent: Vec::new(),
            contexts: BTreeMap::new(),
            last: [NONE; 3],
            last_at: at,
            launches: 0.0,
            run: 0,
            gap_s: 600.0,
            ranks: [0.0; RANKS + 1],
            offsets: [0.0; FEATURES],
            squares: [1.0; FEATURES],
        }
    }

    /// Probability that the next profile was never launched before.
    fn novelty(&self) -> f64 {
        (f64::from(self.ranks[RANKS]) + 0.5) / (self.launches + 1.0)
    }

    /// Position in the list of recent profiles; [`RANKS`] if beyond or unknown.
    fn recency(&self, id: u32) -> usize {
        let at = self.recent.iter().take(RANKS).position(|r| *r == id);
        at.unwrap_or(RANKS)
    }

    fn context(&self, order: usize) -> (u8, u64) {
        let hash = self.last[..order]
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, id| {
                (hash ^ u64::from(*id).wrapping_add(1)).wrapping_mul(0x0000_0100_0000_01b3)
            });
        (order as u8, hash)
    }

    fn features(
        &self,
        id: u32,
        rank: usize,
        rank_p: f64,
        after: &[Option<&Vec<(u32, f32)>>],
    ) -> [f64; FEATURES] {
        let profile = &self.profiles[id as usize];
        let count = self.profiles.len() as f64;
        let frequency = (f64::from(profile.launches) + 0.5) / (self.launches + 0.5 * count);
        let faded = 0.5_f64.powf((self.launches - profile.seen_at) / HALF_LIFE);
        let window = HALF_LIFE * std::f64::consts::LOG2_E;
        let recent = (f64::from(profile.recent) * faded + 0.2) / (window.min(self.launches) + 1.0);
        // What followed the last one, two, three launches, each backing off to the shorter.
        let mut p = recent.min(1.0);
        let mut followed = [0.0; 3];
        let mut certain = [0.0; 3];
        for (order, successors) in after.iter().enumerate() {
            let total: f64 = successors.map_or(0.0, |s| s.iter().map(|(_, n)| f64::from(*n)).sum());
            let hits = successors
                .and_then(|s| s.iter().find(|(other, _)| *other == id))
                .map_or(0.0, |(_, n)| f64::from(*n));
            p = (hits + p) / (total + 1.0);
            followed[order] = p.max(1e-6).ln();
            certain[order] = total / (total + 2.0);
        }
        let elapsed = self.last_at.seconds_since(profile.last_at).max(0.0);
        let wait = (profile.gap_s - elapsed) / self.gap_s.max(1.0);
        // How regular a profile is decides how much its being due counts.
        let regular = (1.0 - profile.jitter).clamp(0.0, 1.0);
        let due = -(1.0 + wait.abs()).ln();
        let stale = ((elapsed + 1.0) / (profile.gap_s + 1.0))
            .ln()
            .clamp(-4.0, 6.0);
        let same = if rank == 0 { 1.0 } else { 0.0 };
        let repeat = (profile.repeats + 0.5) / (profile.launches + 1.0);
        [
            frequency.ln(),
            rank_p.max(1e-6).ln(),
            followed[0],
            followed[1],
            followed[2],
            due,
            due * regular,
            stale,
            same * f64::from(repeat).ln(),
            same * f64::from(self.run).ln_1p(),
            same,
            recent.max(1e-6).ln(),
            certain[2] * followed[2],
        ]
    }

    /// Adds a launch; returns the recency rank that the profile had.
    fn observe(&mut self, profile: &str, at: Timestamp) -> usize {
        let id = match self.ids.get(profile) {
            Some(id) => *id,
            None => self.add_profile(profile, at),
        };
        let rank = self.recency(id);
        if self.last[0] != NONE {
            let gap = at.seconds_since(self.last_at).max(0.0);
            self.gap_s += 0.1 * (gap - self.gap_s);
        }
        for order in 1..=3 {
            if self.last[order - 1] != NONE {
                self.count_successor(order, id);
            }
        }
        let previous = self.last[0];
        if previous == id {
            self.run = self.run.saturating_add(1);
            self.profiles[id as usize].repeats += 1.0;
        } else {
            self.run = 1;
        }
        self.launches += 1.0;
        self.ranks[rank] += 1.0;
        let launches = self.launches;
        let entry = &mut self.profiles[id as usize];
        if entry.launches > 0.0 {
            let gap = at.seconds_since(entry.last_at).max(0.0);
            let deviation = (gap - entry.gap_s).abs() / gap.max(entry.gap_s).max(1.0);
            entry.jitter += 0.2 * (deviation - entry.jitter);
            let rate = (1.0 / f64::from(entry.launches)).max(0.2);
            entry.gap_s += rate * (gap - entry.gap_s);
        }
        entry.recent =
            entry.recent * 0.5_f64.powf((launches - entry.seen_at) / HALF_LIFE) as f32 + 1.0;
        entry.seen_at = launches;
        entry.launches += 1.0;
        entry.last_at = at;
        if let Some(at) = self.recent.iter().position(|r| *r == id) {
            self.recent.remove(at);
        }
        self.recent.insert(0, id);
        self.last = [id, self.last[0], self.last[1]];
        self.last_at = at;
        rank
    }

    fn add_profile(&mut self, profile: &str, at: Timestamp) -> u32 {
        let name: Arc<str> = profile.into();
        let fresh = Profile {
            launches: 0.0,
            recent: 0.0,
            seen_at: self.launches,
            last_at: at,
            gap_s: 86_400.0,
            jitter: 1.0,
            repeats: 0.0,
        };
        let id = if self.profiles.len() >= MAX_PROFILES
            && let Some(oldest) = self.recent.pop()
        {
            self.ids.remove(&self.names[oldest as usize]);
            for successors in self.contexts.values_mut() {
                successors.retain(|(id, _)| *id != oldest);
            }
            self.profiles[oldest as usize] = fresh;
            self.names[oldest as usize] = name.clone();
            oldest
        } else {
            self.profiles.push(fresh);
            self.names.push(name.clone());
            self.profiles.len() as u32 - 1
        };
        self.ids.insert(name, id);
        id
    }

    fn count_successor(&mut self, order: usize, id: u32) {
        if self.contexts.len() >= MAX_CONTEXTS {
            // Contexts seen least go; what is left is worth half.
            self.contexts.retain(|_, successors| {
                successors.iter_mut().for_each(|(_, n)| *n *= 0.5);
                successors.retain(|(_, n)| *n >= 0.75);
                !successors.is_empty()
            });
            if self.contexts.len() >= MAX_CONTEXTS {
                self.contexts.clear();
            }
        }
        let successors = self.contexts.entry(self.context(order)).or_default();
        // A context's older successors fade as it is seen again.
        successors.iter_mut().for_each(|(_, n)| *n *= 0.95);
        if let Some(known) = successors.iter_mut().find(|(other, _)| *other == id) {
            known.1 += 1.0;
            return;
        }
        if successors.len() >= MAX_SUCCESSORS {
            let least = (0..successors.len()).fold(0, |least, i| {
                if successors[i].1 < successors[least].1 {
                    i
                } else {
                    least
                }
            });
            successors.swap_remove(least);
        }
        successors.push((id, 1.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(model: &mut NextProfile, owner: &str, profile: &str, second: i64) {
        model.observe(owner, profile, Timestamp(second * 1000));
    }

    fn first(model: &NextProfile, owner: &str) -> String {
        model.rank(owner, 1)[0].0.to_string()
    }

    #[test]
    fn a_cycle_is_learned_and_each_owner_has_their_own() {
        let mut model = NextProfile::new();
        for i in 0..60 {
            launch(
                &mut model,
                "ann",
                ["a", "b", "a", "c"][i % 4],
                i as i64 * 60,
            );
            launch(&mut model, "bob", ["x", "y", "z"][i % 3], i as i64 * 60 + 7);
        }
        // After "a" alone either follows; the two before tell which.
        for i in 60..72 {
            assert_eq!(
                first(&model, "ann"),
                ["a", "b", "a", "c"][i % 4],
                "launch {i}"
            );
            launch(
                &mut model,
                "ann",
                ["a", "b", "a", "c"][i % 4],
                i as i64 * 60,
            );
        }
        assert_eq!(first(&model, "bob"), "x");
        assert!(model.rank("nobody", 3).is_empty());
        let sum: f64 = model.rank("ann", 99).iter().map(|(_, p)| p).sum();
        assert!(sum <= 1.0 && sum > 0.9, "{sum}");
    }

    #[test]
    fn a_hostile_owner_is_bounded() {
        let mut model = NextProfile::new();
        for i in 0..6000_i64 {
            // Clocks that jump both ways, ever new names.
            launch(&mut model, "eve", &format!("p{i}"), (i * 7919) % 1000 - 500);
        }
        let owner = &model.owners["eve"];
        assert!(owner.profiles.len() <= MAX_PROFILES && owner.contexts.len() <= MAX_CONTEXTS);
        assert_eq!(owner.ids.len(), owner.profiles.len());
        assert_eq!(owner.recent.len(), owner.profiles.len());
        assert!(model.rank("eve", 5).iter().all(|(_, p)| p.is_finite()));
    }
}
