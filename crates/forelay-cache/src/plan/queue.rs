//! Prefetches that wait and prefetches under way.
//!
//! Owns their order and the sums of their bytes. Refuses to know whether a prefetch is worth
//! it. Invariant: a piece is either waiting or under way, under one urgency; what forecasts
//! want anew costs nothing for what waits on others' behalf.

use std::collections::{BTreeMap, BTreeSet};

use forelay_image::Extent;

use crate::names::{Domain, ProfileName, SharedImage, VmName};

use super::message::{PrefetchClass, Urgency};

/// On whose behalf a piece is fetched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
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

/// Place of a waiting piece.
type Turn = (Urgency, u64);

/// Waiting pieces by urgency, and pieces under way by place.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Turn, Piece>,
    waiting_bytes: u64,
    /// The turns of what waits, by reason.
    by_reason: BTreeMap<Reason, BTreeSet<Turn>>,
    under_way: BTreeMap<(SharedImage, u64), Piece>,
    under_way_bytes: u64,
    next: u64,
}

impl Queue {
    pub(super) fn push(&mut self, piece: Piece) {
        self.next += 1;
        self.wait((piece.urgency, self.next), piece);
    }

    fn wait(&mut self, turn: Turn, piece: Piece) {
        self.waiting_bytes += piece.extent.len;
        match self.by_reason.get_mut(&piece.reason) {
            Some(turns) => {
                turns.insert(turn);
            }
            None => {
                let turns = BTreeSet::from([turn]);
                self.by_reason.insert(piece.reason.clone(), turns);
            }
        }
        if let Some(replaced) = self.waiting.insert(turn, piece) {
            self.waiting_bytes -= replaced.extent.len;
        }
    }

    /// The most urgent waiting piece.
    pub(super) fn pop(&mut self) -> Option<Piece> {
        let (turn, piece) = self.waiting.pop_first()?;
        self.waiting_bytes -= piece.extent.len;
        if let Some(turns) = self.by_reason.get_mut(&piece.reason) {
            turns.remove(&turn);
            if turns.is_empty() {
                self.by_reason.remove(&piece.reason);
            }
        }
        Some(piece)
    }

    /// Puts a piece back before all others of its urgency.
    pub(super) fn unpop(&mut self, piece: Piece) {
        self.wait((piece.urgency, 0), piece);
    }

    pub(super) fn first_class(&self) -> Option<PrefetchClass> {
        let first = self.waiting.first_key_value();
        first.map(|((urgency, _), _)| urgency.class)
    }

    /// Drops waiting pieces of a class.
    pub(super) fn drop_class(&mut self, class: PrefetchClass) {
        let stays = |(urgency, _): &Turn| urgency.class != class;
        self.waiting.retain(|turn, _| stays(turn));
        self.by_reason.retain(|_, turns| {
            turns.retain(stays);
            !turns.is_empty()
        });
        self.waiting_bytes = self.waiting.values().map(|piece| piece.extent.len).sum();
    }

    /// Drops waiting pieces made for `reason`.
    pub(super) fn drop_reason(&mut self, reason: &Reason) {
        for turn in self.by_reason.remove(reason).unwrap_or_default() {
            if let Some(piece) = self.waiting.remove(&turn) {
                self.waiting_bytes -= piece.extent.len;
            }
        }
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

    pub(super) const fn waiting_bytes(&self) -> u64 {
        self.waiting_bytes
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::Digest;
    use proptest::prelude::*;

    use super::*;

    fn piece(reason: u8, order: u64, class: PrefetchClass) -> Piece {
        let name = format!("p{reason}");
        let domain = Domain::from("d");
        let reason = match class {
            PrefetchClass::Launch => Reason::Launch(name.into()),
            PrefetchClass::Forecast => Reason::Forecast(domain.clone(), name.into()),
        };
        Piece {
            image: SharedImage::new(domain, Digest::of(b"image")),
            image_bytes: 1 << 20,
            extent: Extent::new(order * 4096, 4096 * (1 + order)),
            urgency: Urgency { class, order },
            reason,
            seconds_per_byte: 1.0,
            pin: false,
        }
    }

    proptest! {
        /// What waits is what a plain list would hold, and the sums are its sums.
        #[test]
        fn the_queue_is_a_sorted_list(steps in prop::collection::vec((0..8u8, 0..4u8, 0..5u64), 0..60)) {
            let mut queue = Queue::default();
            let mut plain: Vec<(Turn, Piece)> = Vec::new();
            let mut next = 0;
            for (step, reason, order) in steps {
                let class = if reason == 0 { PrefetchClass::Launch } else { PrefetchClass::Forecast };
                match step {
                    0..=3 => {
                        next += 1;
                        let piece = piece(reason, order, class);
                        plain.push(((piece.urgency, next), piece.clone()));
                        queue.push(piece);
                    }
                    4 | 5 => {
                        plain.sort_by_key(|(turn, _)| *turn);
                        let first = (!plain.is_empty()).then(|| plain.remove(0).1);
                        let popped = queue.pop();
                        prop_assert_eq!(popped.as_ref().map(|one| one.extent), first.as_ref().map(|one| one.extent));
                        if let Some(piece) = popped.filter(|_| step == 5) {
                            plain.push(((piece.urgency, 0), piece.clone()));
                            queue.unpop(piece);
                        }
                    }
                    6 => {
                        let reason = piece(reason, order, class).reason;
                        plain.retain(|(_, one)| one.reason != reason);
                        queue.drop_reason(&reason);
                    }
                    _ => {
                        plain.retain(|(turn, _)| turn.0.class != class);
                        queue.drop_class(class);
                    }
                }
                let bytes: u64 = plain.iter().map(|(_, one)| one.extent.len).sum();
                prop_assert_eq!(queue.waiting_bytes(), bytes);
                prop_assert_eq!(queue.waiting.len(), plain.len());
                let turns: usize = queue.by_reason.values().map(BTreeSet::len).sum();
                prop_assert_eq!(turns, plain.len());
                prop_assert!(queue.by_reason.values().all(|turns| !turns.is_empty()));
            }
        }
    }
}
