//! Sorted, disjoint page spans with touch statistics, and the sweeps over them.
//!
//! Invariant of every list that leaves this file: `start < end`, sorted by `start`, no overlap.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use forelay_image::{Extent, PAGE_BYTES};

/// Pages `start..end` first touched `ms` after a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub start: u32,
    pub end: u32,
    pub ms: u32,
}

impl Seen {
    /// The pages of `extent`; none if it is empty or lies beyond 16 TiB.
    pub fn new(extent: Extent, ms: u32) -> Option<Self> {
        let page = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        let start = page(extent.offset / PAGE_BYTES);
        let end = page(extent.end().div_ceil(PAGE_BYTES));
        (extent.len > 0 && start < end).then_some(Self { start, end, ms })
    }
}

/// Pages `start..end` with how often (decayed and in whole launches) and when they are touched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Span {
    pub start: u32,
    pub end: u32,
    /// Decayed number of launches that touched them.
    pub weight: f32,
    /// Number of launches that touched them, saturating.
    pub hits: u32,
    /// Decayed mean of the first touch, in milliseconds.
    pub first_ms: f32,
}

impl Span {
    pub fn pages(&self) -> u32 {
        self.end - self.start
    }

    pub fn extent(&self) -> Extent {
        Extent::new(
            u64::from(self.start) * PAGE_BYTES,
            u64::from(self.pages()) * PAGE_BYTES,
        )
    }
}

/// Makes touches disjoint; where they overlap the earliest counts. Equal neighbours join.
pub(super) fn disjoint(mut seen: Vec<Seen>) -> Vec<Seen> {
    seen.sort_unstable_by_key(|s| (s.start, s.ms, s.end));
    let mut borders: Vec<u32> = seen.iter().flat_map(|s| [s.start, s.end]).collect();
    borders.sort_unstable();
    borders.dedup();
    let mut out: Vec<Seen> = Vec::with_capacity(seen.len());
    let mut open: BinaryHeap<Reverse<(u32, u32)>> = BinaryHeap::new();
    let mut next = 0;
    for pair in borders.windows(2) {
        let (start, end) = (pair[0], pair[1]);
        while next < seen.len() && seen[next].start <= start {
            open.push(Reverse((seen[next].ms, seen[next].end)));
            next += 1;
        }
        while open.peek().is_some_and(|Reverse((_, e))| *e <= start) {
            open.pop();
        }
        let Some(&Reverse((ms, _))) = open.peek() else {
            continue;
        };
        match out.last_mut() {
            Some(last) if last.end == start && last.ms == ms => last.end = end,
            _ => out.push(Seen { start, end, ms }),
        }
    }
    out
}

/// Walks two disjoint lists together; `emit` gets each elementary range with what either has.
pub(super) fn overlay<A, B>(
    left: &[A],
    right: &[B],
    range_left: impl Fn(&A) -> (u32, u32),
    range_right: impl Fn(&B) -> (u32, u32),
    mut emit: impl FnMut(u32, u32, Option<&A>, Option<&B>),
) {
    let (mut i, mut j) = (0, 0);
    let mut at = 0;
    while i < left.len() || j < right.len() {
        let a = left.get(i).map(&range_left);
        let b = right.get(j).map(&range_right);
        let start_of = |r: Option<(u32, u32)>| r.map_or(u32::MAX, |(s, _)| s.max(at));
        let start = start_of(a).min(start_of(b));
        let in_a = a.is_some_and(|(s, _)| s <= start);
        let in_b = b.is_some_and(|(s, _)| s <= start);
        let stop = |r: Option<(u32, u32)>, inside: bool| {
            r.map_or(u32::MAX, |(s, e)| if inside { e } else { s })
        };
        let end = stop(a, in_a).min(stop(b, in_b));
        emit(
            start,
            end,
            left.get(i).filter(|_| in_a),
            right.get(j).filter(|_| in_b),
        );
        at = end;
        if a.is_some_and(|(_, e)| e <= end) {
            i += 1;
        }
        if b.is_some_and(|(_, e)| e <= end) {
            j += 1;
        }
    }
}

/// Joins neighbours with equal counts and close times, then, while there are more than `max`,
/// ever less alike ones; if even that does not suffice, the least touched go.
pub(super) fn compact(spans: &mut Vec<Span>, max: usize) {
    join(spans, 1e-3, 0, true);
    let mut tolerance = 0.1;
    let mut gap_pages = 1;
    while spans.len() > max && tolerance < 4.0 {
        join(spans, tolerance, gap_pages, false);
        tolerance *= 2.0;
        gap_pages *= 4;
    }
    if spans.len() > max {
        let mut weights: Vec<f32> = spans.iter().map(|s| s.weight).collect();
        let cut = weights.len() - max;
        let (_, threshold, _) = weights.select_nth_unstable_by(cut, f32::total_cmp);
        let threshold = *threshold;
        spans.retain(|s| s.weight >= threshold);
        spans.truncate(max);
    }
}

/// One pass of joining: neighbours at most `gap` pages apart whose weights differ by at most
/// `tolerance` (absolute) and whose times are close.
fn join(spans: &mut Vec<Span>, tolerance: f32, gap: u32, exact_hits: bool) {
    let mut kept: usize = 0;
    for i in 1..spans.len() {
        let next = spans[i];
        let last = spans[kept];
        let close_ms = 50.0 + 0.25 * last.first_ms.min(next.first_ms);
        let slack = if exact_hits {
            1.0
        } else {
            1.0 + tolerance * 4.0
        };
        let alike = next.start - last.end <= gap
            && (next.weight - last.weight).abs() <= tolerance
            && (!exact_hits || next.hits == last.hits)
            && (next.first_ms - last.first_ms).abs() <= close_ms * slack;
        if !alike {
            kept += 1;
            spans[kept] = next;
            continue;
        }
        let (a, b) = (last.pages() as f32, next.pages() as f32);
        let pages = (next.end - last.start) as f32;
        let touched = a * last.weight + b * next.weight;
        spans[kept] = Span {
            start: last.start,
            end: next.end,
            // Pages of the gap were not touched: they dilute the joined weight.
            weight: touched / pages,
            hits: last.hits.max(next.hits),
            first_ms: if touched > 0.0 {
                (a * last.weight * last.first_ms + b * next.weight * next.first_ms) / touched
            } else {
                last.first_ms.min(next.first_ms)
            },
        };
    }
    spans.truncate(kept + usize::from(!spans.is_empty()));
}
