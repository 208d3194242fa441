//! Prefetches that wait and prefetches under way.
//!
//! Owns their order and the sum of bytes under way. Refuses to know whether a prefetch
//! is worth it. Invariant: a piece is either waiting or under way, under one urgency.

use std::collections::BTreeMap;

use forelay_image::Extent;

use crate::names::{Domain, ProfileName, SharedImage, VmName};

use super::message::{PrefetchClass, Urgency};

/// On whose behalf a piece is fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Launch(VmName),
    Forecast(Domain, ProfileName),
}

/// One prefetch.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) image: SharedImage,
    pub(super) image_bytes: u64,
    pub(super) extent: Extent,
    pub(super) urgency: Urgency,
    pub(super) reason: Reason,
    /// Expected seconds saved per byte.
    pub(super) seconds_per_byte: f64,
    pub(super) pin: bool,
}

/// Waiting pieces by urgency, and pieces under way by place.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<(Urgency, u64), Piece>,
    under_way: BTreeMap<(SharedImage, u64), Piece>,
    under_way_bytes: u64,
    next: u64,
}

impl Queue {
    pub(super) fn push(&mut self, piece: Piece) {
        self.next += 1;
        self.waiting.insert((piece.urgency, self.next), piece);
    }

    /// The most urgent waiting piece.
    pub(super) fn pop(&mut self) -> Option<Piece> {
        self.waiting.pop_first().map(|(_, piece)| piece)
    }

    /// Puts a piece back before all others of its urgency.
    pub(super) fn unpop(&mut self, piece: Piece) {
        self.waiting.insert((piece.urgency, 0), piece);
    }

    pub(super) fn first_class(&self) -> Option<PrefetchClass> {
        let first = self.waiting.first_key_value();
        first.map(|((urgency, _), _)| urgency.class)
    }

    /// Drops waiting pieces of a class.
    pub(super) fn drop_class(&mut self, class: PrefetchClass) {
        self.waiting
            .retain(|(urgency, _), _| urgency.class != class);
    }

    /// Drops waiting pieces made for `reason`.
    pub(super) fn drop_reason(&mut self, reason: &Reason) {
        self.waiting.retain(|_, piece| piece.reason != *reason);
    }

    /// Takes the pieces under way for which `unwanted` holds.
    pub(super) fn take_under_way(&mut self, unwanted: impl Fn(&Piece) -> bool) -> Vec<Piece> {
        let taken = self.under_way.extract_if(.., |_, piece| unwanted(piece));
        let taken: Vec<Piece> = taken.map(|(_, piece)| piece).collect();
        self.under_way_bytes -= taken.iter().map(|piece| piece.extent.len).sum::<u64>();
        taken
    }

    pub(super) fn started(&mut self, piece: Piece) {
        self.under_way_bytes += piece.extent.len;
        let key = (piece.image.clone(), piece.extent.offset);
        if let Some(replaced) = self.under_way.insert(key, piece) {
            self.under_way_bytes -= replaced.extent.len;
        }
    }

    /// Takes the pieces under way that lie within `extent`: they have ended.
    pub(super) fn ended(&mut self, image: &SharedImage, extent: Extent) -> Vec<Piece> {
        let from = (image.clone(), extent.offset);
        let to = (image.clone(), extent.end());
        let within = self.under_way.range(from..to);
        let within = within.filter(|(_, piece)| piece.extent.end() <= extent.end());
        let keys: Vec<_> = within.map(|(key, _)| key.clone()).collect();
        let pieces = keys.iter().filter_map(|key| self.under_way.remove(key));
        let pieces: Vec<Piece> = pieces.collect();
        self.under_way_bytes -= pieces.iter().map(|piece| piece.extent.len).sum::<u64>();
        pieces
    }

    pub(super) const fn under_way_bytes(&self) -> u64 {
        self.under_way_bytes
    }

    pub(super) fn waiting_bytes(&self) -> u64 {
        self.waiting.values().map(|piece| piece.extent.len).sum()
    }
}
