//! Pooling over profiles: what others touched of an image, weighted by how alike they are, as
//! the prior of what this profile will touch. Only profiles of one owner are pooled, unless the
//! configuration says otherwise.

use std::collections::BTreeMap;
use std::sync::Arc;

use forelay_image::{Digest, PlannedExtent};

use super::set::WorkingSet;
use super::spans::{Span, compact, overlay};
use super::{Basis, Expectation, WorkingSetConfig};

type Sets = BTreeMap<Arc<str>, WorkingSet>;

/// Pseudo-launches that the pooled prior counts as against a profile's own launches.
const PRIOR_LAUNCHES: f32 = 1.0;
/// Weight of a profile about which nothing in common is known.
const STRANGER: f32 = 0.25;
/// Launches beyond which another profile gains no further weight.
const EVIDENCE_CAP: f32 = 8.0;

/// How alike other profiles' working sets are to one profile's, over the images they share.
pub(super) struct Similarity {
    /// Per profile: bytes touched by both, bytes touched by either, split by image so that the
    /// image being forecast can be left out.
    overlaps: BTreeMap<Arc<str>, Vec<(Digest, f32, f32)>>,
}

impl Similarity {
    pub fn new(
        all: &BTreeMap<Digest, Sets>,
        profile: &str,
        images: &[Digest],
        config: &WorkingSetConfig,
    ) -> Self {
        let mut overlaps: BTreeMap<Arc<str>, Vec<(Digest, f32, f32)>> = BTreeMap::new();
        for image in images {
            let Some(sets) = all.get(image) else { continue };
            let Some(own) = sets.get(profile) else {
                continue;
            };
            for (other, set) in best_known(sets, profile, config) {
                let (both, either) = shared_pages(own, set);
                overlaps
                    .entry(other.clone())
                    .or_default()
                    .push((*image, both, either));
            }
        }
        Self { overlaps }
    }

    /// Similarity to `other` in `0..=1`, judged on all images but `image`.
    fn to(&self, other: &str, image: &Digest) -> f32 {
        let (both, either) = self
            .overlaps
            .get(other)
            .into_iter()
            .flatten()
            .filter(|(shared, ..)| shared != image)
            .fold((0.0, 0.0), |sum, (_, b, e)| (sum.0 + b, sum.1 + e));
        if either > 0.0 {
            0.05 + 0.95 * both / either
        } else {
            STRANGER
        }
    }
}

/// Whose a profile is: what stands before the `/` in its name, if there is one.
fn owner(profile: &str) -> Option<&str> {
    profile.split_once('/').map(|(owner, _)| owner)
}

/// The other profiles of an image that may be asked, those with the most evidence.
fn best_known<'a>(
    sets: &'a Sets,
    profile: &str,
    config: &WorkingSetConfig,
) -> Vec<(&'a Arc<str>, &'a WorkingSet)> {
    let may_ask = |other: &str| config.pool_across_owners || owner(other) == owner(profile);
    let mut others: Vec<_> = sets
        .iter()
        .filter(|(name, _)| &***name != profile && may_ask(name))
        .collect();
    if others.len() > config.max_pooled_profiles {
        others.sort_by(|a, b| b.1.weight.total_cmp(&a.1.weight).then(a.0.cmp(b.0)));
        others.truncate(config.max_pooled_profiles);
    }
    others
}

/// Pages touched by both and by either, in expectation.
fn shared_pages(a: &WorkingSet, b: &WorkingSet) -> (f32, f32) {
    let (mut both, mut either) = (0.0, 0.0);
    let share = |span: Option<&Span>, set: &WorkingSet| {
        span.map_or(0.0, |s| s.weight / set.weight.max(1e-6))
    };
    overlay(
        &a.spans,
        &b.spans,
        |s| (s.start, s.end),
        |s| (s.start, s.end),
        |start, end, x, y| {
            let pages = (end - start) as f32;
            let (p, q) = (share(x, a), share(y, b));
            both += pages * p.min(q);
            either += pages * p.max(q);
        },
    );
    (both, either)
}

/// What other profiles touched of one image.
pub(super) struct Pooled {
    spans: Vec<Span>,
    weight: f32,
    profiles: u32,
    launches: u32,
}

/// Pools the sets of all profiles but `profile`.
pub(super) fn pool(
    sets: &Sets,
    profile: &str,
    image: &Digest,
    similarity: &Similarity,
    config: &WorkingSetConfig,
) -> Pooled {
    let mut pooled = Pooled {
        spans: Vec::new(),
        weight: 0.0,
        profiles: 0,
        launches: 0,
    };
    for (other, set) in best_known(sets, profile, config) {
        if set.weight <= 0.0 {
            continue;
        }
        let scale = similarity.to(other, image) * (EVIDENCE_CAP / set.weight).min(1.0);
        pooled.weight += scale * set.weight;
        pooled.profiles += 1;
        pooled.launches = pooled.launches.saturating_add(set.launches);
        let mut out = Vec::with_capacity(pooled.spans.len() + set.spans.len());
        overlay(
            &pooled.spans,
            &set.spans,
            |s| (s.start, s.end),
            |s| (s.start, s.end),
            |start, end, sum, add| out.extend(add_scaled(start, end, sum, add, scale)),
        );
        compact(&mut out, 2 * config.max_spans);
        pooled.spans = out;
    }
    pooled
}

/// Adds `scale` times another profile's span to the pooled sum.
fn add_scaled(
    start: u32,
    end: u32,
    sum: Option<&Span>,
    add: Option<&Span>,
    scale: f32,
) -> Option<Span> {
    let (w0, t0, h0) = sum.map_or((0.0, 0.0, 0), |s| (s.weight, s.first_ms, s.hits));
    let (w1, t1, h1) = add.map_or((0.0, 0.0, 0), |s| (s.weight * scale, s.first_ms, s.hits));
    let weight = w0 + w1;
    (weight > 0.0).then(|| Span {
        start,
        end,
        weight,
        hits: h0.saturating_add(h1),
        first_ms: (w0 * t0 + w1 * t1) / weight,
    })
}

/// The forecast of one image: own counts shrunk towards the pooled ones.
pub(super) fn blend(
    image: Digest,
    own: Option<&WorkingSet>,
    pooled: &Pooled,
    config: &WorkingSetConfig,
) -> Vec<Expectation> {
    let empty = WorkingSet::default();
    let own = own.unwrap_or(&empty);
    let alone = pooled.weight <= 0.0;
    let mut out: Vec<Expectation> = Vec::new();
    overlay(
        &own.spans,
        &pooled.spans,
        |s| (s.start, s.end),
        |s| (s.start, s.end),
        |start, end, mine, theirs| {
            if mine.is_none() && theirs.is_none() {
                return;
            }
            // Without other profiles the prior is one launch that touches everything half.
            let prior = if alone {
                0.5
            } else {
                (theirs.map_or(0.0, |s| s.weight) + 0.5) / (pooled.weight + 1.0)
            };
            let weight = mine.map_or(0.0, |s| s.weight);
            let probability = ((weight + PRIOR_LAUNCHES * prior)
                / (own.weight.max(weight) + PRIOR_LAUNCHES))
                .clamp(0.0, 1.0);
            if probability < config.min_probability {
                return;
            }
            let first_ms = mine.or(theirs).map_or(0.0, |s| s.first_ms);
            let span = Span {
                start,
                end,
                weight,
                hits: 0,
                first_ms,
            };
            let planned = PlannedExtent {
                image,
                extent: span.extent(),
                probability: probability.into(),
                first_touch_ms: first_ms.round().max(0.0) as u32,
            };
            let basis = basis(own, mine, pooled);
            out.push(Expectation { planned, basis });
        },
    );
    join_planned(out)
}

fn basis(own: &WorkingSet, mine: Option<&Span>, pooled: &Pooled) -> Basis {
    match (mine, own.predecessor) {
        (Some(span), Some(image)) if own.inherited >= own.launches => Basis::Predecessor {
            image,
            hits: span.hits,
            launches: own.launches,
        },
        (Some(span), _) => Basis::Own {
            hits: span.hits,
            launches: own.launches,
        },
        (None, _) => Basis::OtherProfiles {
            profiles: pooled.profiles,
            launches: pooled.launches,
        },
    }
}

/// Joins neighbours that the plan would treat alike.
fn join_planned(expected: Vec<Expectation>) -> Vec<Expectation> {
    let mut out: Vec<Expectation> = Vec::with_capacity(expected.len());
    for Expectation {
        planned: next,
        basis,
    } in expected
    {
        match out.last_mut() {
            Some(Expectation {
                planned: last,
                basis: of_last,
            }) if last.extent.end() == next.extent.offset
                && (last.probability - next.probability).abs() < 0.02
                && last.first_touch_ms.abs_diff(next.first_touch_ms) <= 20
                && *of_last == basis =>
            {
                last.extent.len += next.extent.len;
            }
            _ => out.push(Expectation {
                planned: next,
                basis,
            }),
        }
    }
    out
}
