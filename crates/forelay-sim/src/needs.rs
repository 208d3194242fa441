//! What launches consist of: the daemon's needs model over a trace that names components.
//!
//! Owns the figures. Each launch is ranked before the model sees it, and an attachment with what
//! the launch started with as known; then the model learns what the VM had in the end, and is
//! fitted when it says that a fit is due, as in the daemon. Beside it stands popularity: the
//! components that most launches so far had. Invariant: no launch is ranked with what it had.

use std::collections::HashMap;

use forelay_predict::needs::{Context, Model, NeedsConfig};
use serde::{Deserialize, Serialize};

use crate::tally::Frame;
use crate::trace::{Composition, Trace};

/// Ranks that count as found for an attachment.
const ATTACHMENT_RANKS: usize = 5;
/// Size class of all VMs: traces do not tell it.
const MEMORY_MIB: u32 = 512;

/// How well the components of launches were foretold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// Rows of launches judged (or attachments).
    pub judged: u64,
    /// Components that they had.
    pub components: u64,
    /// Percent of these that stood among the first ranks: as many as the launch had components,
    /// or five for an attachment.
    pub found_pct: f64,
    /// The same for popularity.
    pub found_by_popularity_pct: f64,
}

/// How the needs model fared on a trace that names components.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct NeedsOutcome {
    /// All launches.
    pub launches: Found,
    /// The first launch of each profile: what is needed of what never ran.
    pub first_launches: Found,
    /// Components attached to running VMs. A trace does not say when: they are learned with
    /// their launch, so VMs that overlap know of each other's, which flatters these figures.
    pub attachments: Found,
}

#[derive(Default)]
struct FoundCounts {
    judged: u64,
    components: u64,
    found: u64,
    popular: u64,
}

impl FoundCounts {
    fn add(&mut self, wanted: usize, found: usize, popular: usize) {
        self.judged += 1;
        self.components += wanted as u64;
        self.found += found as u64;
        self.popular += popular as u64;
    }

    fn figures(&self) -> Found {
        let percent = |part: u64| 100.0 * part as f64 / self.components.max(1) as f64;
        Found {
            judged: self.judged,
            components: self.components,
            found_pct: percent(self.found),
            found_by_popularity_pct: percent(self.popular),
        }
    }
}

/// How many launches had each component, and the order that follows from it.
#[derive(Default)]
struct Popularity {
    counts: HashMap<u32, u64>,
    order: Vec<u32>,
}

impl Popularity {
    fn add(&mut self, components: &[u32]) {
        for component in components {
            *self.counts.entry(*component).or_insert(0) += 1;
        }
        self.order.clear();
    }

    /// The first `ranks` components that are not in `present`.
    fn first(&mut self, ranks: usize, present: &[u32]) -> Vec<u32> {
        if self.order.is_empty() {
            let by_count = |key: &u32| (std::cmp::Reverse(self.counts[key]), *key);
            let mut order: Vec<u32> = self.counts.keys().copied().collect();
            order.sort_unstable_by_key(by_count);
            self.order = order;
        }
        let absent = self.order.iter().filter(|key| !present.contains(key));
        absent.take(ranks).copied().collect()
    }
}

/// Judges the model; `None` if the trace names no components.
pub(crate) fn judge(trace: &Trace, frame: &Frame) -> Option<NeedsOutcome> {
    if trace.components.is_empty() {
        return None;
    }
    let mut judge = Judge {
        trace,
        model: Model::new(NeedsConfig::default()),
        popularity: Popularity::default(),
        seen: vec![false; trace.profiles.len()],
        launches: FoundCounts::default(),
        first_launches: FoundCounts::default(),
        attachments: FoundCounts::default(),
    };
    for launch in &trace.launches {
        let composition = &trace.compositions[launch.composition as usize];
        if *composition == Composition::default() {
            continue;
        }
        let context = Context {
            profile: trace.profiles[launch.profile as usize].clone(),
            owner: trace.owners[launch.owner as usize].clone(),
            at: launch.at,
            memory_mib: MEMORY_MIB,
        };
        if frame.selected[launch.profile as usize] {
            judge.rank(&context, launch.profile, composition);
        }
        judge.learn(&context, composition);
    }
    Some(NeedsOutcome {
        launches: judge.launches.figures(),
        first_launches: judge.first_launches.figures(),
        attachments: judge.attachments.figures(),
    })
}

struct Judge<'a> {
    trace: &'a Trace,
    model: Model,
    popularity: Popularity,
    /// Profiles that launched before.
    seen: Vec<bool>,
    launches: FoundCounts,
    first_launches: FoundCounts,
    attachments: FoundCounts,
}

impl Judge<'_> {
    /// How many of `wanted` are among the first `ranks`, by the model and by popularity.
    fn found(
        &mut self,
        context: &Context,
        wanted: &[u32],
        present: &[u32],
        ranks: usize,
    ) -> (usize, usize) {
        let name = |key: &u32| self.trace.components[*key as usize].as_str();
        let known: Vec<&str> = present.iter().map(name).collect();
        let ranked = self.model.rank(context, &known);
        let first = &ranked[..ranks.min(ranked.len())];
        let is_first = |key: &&u32| first.iter().any(|(ranked, _)| **ranked == *name(key));
        let found = wanted.iter().filter(is_first).count();
        let popular = self.popularity.first(ranks, present);
        let by_popularity = wanted.iter().filter(|key| popular.contains(key)).count();
        (found, by_popularity)
    }

    fn rank(&mut self, context: &Context, profile: u32, composition: &Composition) {
        let wanted = &composition.components;
        let (found, popular) = self.found(context, wanted, &[], wanted.len());
        self.launches.add(wanted.len(), found, popular);
        if !std::mem::replace(&mut self.seen[profile as usize], true) {
            self.first_launches.add(wanted.len(), found, popular);
        }
        let mut present = wanted.clone();
        for component in &composition.attached {
            let wanted = std::slice::from_ref(component);
            let (found, popular) = self.found(context, wanted, &present, ATTACHMENT_RANKS);
            self.attachments.add(1, found, popular);
            present.push(*component);
        }
    }

    fn learn(&mut self, context: &Context, composition: &Composition) {
        let all = composition.components.iter().chain(&composition.attached);
        let all: Vec<u32> = all.copied().collect();
        let names = all
            .iter()
            .map(|key| self.trace.components[*key as usize].as_str());
        self.model.observe(context, names);
        self.popularity.add(&all);
        if self.model.fit_due() {
            let fitted = self.model.training_set().fit();
            self.model.install(fitted);
        }
    }
}
