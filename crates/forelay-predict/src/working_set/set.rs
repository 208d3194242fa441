//! The touch statistics of one (profile, component image) pair.

use forelay_image::{Digest, Extent};

use super::WorkingSetConfig;
use super::spans::{Seen, Span, compact, overlay};

/// Decayed touch counts of one profile on one image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkingSet {
    /// Decayed number of launches that had the image.
    pub(super) weight: f32,
    /// Number of launches that had the image, saturating.
    pub(super) launches: u32,
    /// Launches of the above that had a predecessor of the image.
    pub(super) inherited: u32,
    /// That predecessor; not kept in snapshots.
    pub(super) predecessor: Option<Digest>,
    pub(super) spans: Vec<Span>,
}

impl WorkingSet {
    /// Launches that had the image (or a predecessor it inherits from).
    pub fn launches(&self) -> u32 {
        self.launches
    }

    /// Extents ever touched and not forgotten, with their (unpooled) share of decayed launches
    /// and mean first touch in milliseconds.
    pub fn extents(&self) -> impl Iterator<Item = (Extent, f32, f32)> {
        self.spans
            .iter()
            .map(|s| (s.extent(), s.weight / self.weight.max(s.weight), s.first_ms))
    }

    /// Adds one launch that touched `seen` (disjoint, sorted).
    pub(super) fn observe(&mut self, seen: Vec<Seen>, config: &WorkingSetConfig) {
        let decay = 0.5_f32.powf(1.0 / config.half_life_launches.max(1.0));
        self.weight = self.weight * decay + 1.0;
        self.launches = self.launches.saturating_add(1);
        let mut out: Vec<Span> = Vec::with_capacity(self.spans.len() + seen.len());
        overlay(
            &self.spans,
            &seen,
            |span| (span.start, span.end),
            |seen| (seen.start, seen.end),
            |start, end, span, seen| out.extend(step(start, end, span, seen, decay)),
        );
        self.replace(out, config);
    }

    /// Adds what a launch that counts already touched later, `seen` (disjoint, sorted): no
    /// further launch, and nothing decays. No page is touched more often than there were
    /// launches.
    pub(super) fn observe_late(&mut self, seen: &[Seen], config: &WorkingSetConfig) {
        let (most_weight, most_hits) = (self.weight, self.launches);
        let mut out: Vec<Span> = Vec::with_capacity(self.spans.len() + seen.len());
        overlay(
            &self.spans,
            seen,
            |span| (span.start, span.end),
            |seen| (seen.start, seen.end),
            |start, end, span, seen| {
                let added = step(start, end, span, seen, 1.0).map(|added| Span {
                    // What is joined of several launches' spans may lie above already.
                    weight: added
                        .weight
                        .min(most_weight.max(span.map_or(0.0, |s| s.weight))),
                    hits: added.hits.min(most_hits.max(span.map_or(0, |s| s.hits))),
                    ..added
                });
                out.extend(added);
            },
        );
        self.replace(out, config);
    }

    fn replace(&mut self, mut spans: Vec<Span>, config: &WorkingSetConfig) {
        compact(&mut spans, config.max_spans);
        spans.shrink_to_fit();
        self.spans = spans;
    }
}

/// Statistics below this decayed weight are forgotten.
const FORGET_WEIGHT: f32 = 0.02;

/// What becomes of one elementary range when a launch's touches are added.
fn step(
    start: u32,
    end: u32,
    span: Option<&Span>,
    seen: Option<&Seen>,
    decay: f32,
) -> Option<Span> {
    let old = span.map_or(0.0, |s| s.weight * decay);
    let (weight, hits, first_ms) = match (span, seen) {
        (Some(s), Some(t)) => (
            old + 1.0,
            s.hits.saturating_add(1),
            (s.first_ms * old + t.ms as f32) / (old + 1.0),
        ),
        (Some(s), None) => (old, s.hits, s.first_ms),
        (None, Some(t)) => (1.0, 1, t.ms as f32),
        (None, None) => return None,
    };
    (weight >= FORGET_WEIGHT).then_some(Span {
        start,
        end,
        weight,
        hits,
        first_ms,
    })
}
