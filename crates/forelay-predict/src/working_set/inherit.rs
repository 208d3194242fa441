//! A patched component inherits its predecessor's working set by file path.
//!
//! Two versions of a package share most paths and little of their image offsets. A touch of page
//! `k` of a file is carried to page `k` of the file of the same path; what the new file no longer
//! has is dropped, pages it gained start without evidence.

use std::collections::BTreeMap;

use forelay_image::{Digest, Extent, PAGE_BYTES};

use super::spans::{Seen, Span, compact, overlay};
use super::{WorkingSet, WorkingSets};

/// Where one file's bytes are in an image, in file order.
#[derive(Clone, Copy, Debug)]
pub struct FileLayout<'a> {
    /// Path in the image.
    pub path: &'a [u8],
    /// Extents of the image that hold the file's bytes, first bytes first.
    pub extents: &'a [Extent],
}

impl WorkingSets {
    /// Starts `new` with what every profile did with `old`. Profiles that already launched `new`
    /// keep their own evidence. The inherited evidence counts at most
    /// [`super::WorkingSetConfig::inherited_launches`], so the first launches of the new version overrule it
    /// quickly. Returns how many profiles inherited.
    pub fn inherit(
        &mut self,
        old: &Digest,
        old_files: &[FileLayout<'_>],
        new: &Digest,
        new_files: &[FileLayout<'_>],
    ) -> usize {
        if old == new {
            return 0;
        }
        self.revision += 1;
        let Some(from) = self.images.get(old).cloned() else {
            return 0;
        };
        let moves = page_moves(old_files, new_files);
        let into = self.images.entry(*new).or_default();
        let mut inherited = 0;
        for (profile, set) in &from {
            if into.contains_key(profile) || set.weight <= 0.0 {
                continue;
            }
            let scale = (self.config.inherited_launches / set.weight).min(1.0);
            let set = carry(set, *old, &moves, scale, self.config.max_spans);
            into.insert(profile.clone(), set);
            inherited += 1;
        }
        inherited
    }
}

/// Old pages `old.start..old.end` are new pages from `to`.
struct Move {
    old: Seen,
    to: u32,
}

/// Which old pages become which new pages; disjoint in old pages and sorted by them.
fn page_moves(old_files: &[FileLayout<'_>], new_files: &[FileLayout<'_>]) -> Vec<Move> {
    let new_by_path: BTreeMap<&[u8], &[Extent]> = new_files
        .iter()
        .map(|file| (file.path, file.extents))
        .collect();
    let mut moves = Vec::new();
    for file in old_files {
        if let Some(new) = new_by_path.get(file.path) {
            align(file.extents, new, &mut moves);
        }
    }
    moves.sort_by_key(|m| (m.old.start, m.old.end, m.to));
    // Hard-linked or deduplicated files share pages: the first path decides.
    let mut end = 0;
    moves.retain(|m| {
        let keep = m.old.start >= end;
        if keep {
            end = m.old.end;
        }
        keep
    });
    moves
}

/// Pairs the pages of one file's old extents with those of its new ones.
fn align(old: &[Extent], new: &[Extent], moves: &mut Vec<Move>) {
    let mut old_pages = old.iter().filter_map(|e| Seen::new(*e, 0));
    let mut new_pages = new.iter().filter_map(|e| Seen::new(*e, 0));
    let (mut a, mut b) = (old_pages.next(), new_pages.next());
    while let (Some(from), Some(to)) = (a, b) {
        let pages = (from.end - from.start).min(to.end - to.start);
        moves.push(Move {
            old: Seen {
                start: from.start,
                end: from.start + pages,
                ms: 0,
            },
            to: to.start,
        });
        let rest = |s: Seen| Seen {
            start: s.start + pages,
            ..s
        };
        let (x, y) = (rest(from), rest(to));
        a = if x.start < x.end {
            Some(x)
        } else {
            old_pages.next()
        };
        b = if y.start < y.end {
            Some(y)
        } else {
            new_pages.next()
        };
    }
}

/// The set of the new image, with evidence scaled by `scale`.
fn carry(
    set: &WorkingSet,
    predecessor: Digest,
    moves: &[Move],
    scale: f32,
    max_spans: usize,
) -> WorkingSet {
    let mut spans = Vec::new();
    overlay(
        &set.spans,
        moves,
        |s| (s.start, s.end),
        |m| (m.old.start, m.old.end),
        |start, end, span, moved| {
            if let (Some(span), Some(moved)) = (span, moved) {
                let to = moved.to + (start - moved.old.start);
                spans.push(Span {
                    start: to,
                    end: to + (end - start),
                    weight: span.weight * scale,
                    ..*span
                });
            }
        },
    );
    spans.sort_by_key(|s| (s.start, s.end));
    // Two old files may have become one set of shared pages in the new image.
    let mut end = 0;
    spans.retain(|s| {
        let keep = s.start >= end;
        if keep {
            end = s.end;
        }
        keep
    });
    compact(&mut spans, max_spans);
    debug_assert!(spans.iter().all(|s| u64::from(s.end) * PAGE_BYTES > 0));
    WorkingSet {
        weight: set.weight * scale,
        launches: set.launches,
        inherited: set.launches,
        predecessor: Some(predecessor),
        spans,
    }
}
