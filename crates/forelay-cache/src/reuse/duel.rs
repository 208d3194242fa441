//! Whether to go by learned values or by S3-FIFO: both are simulated on the names of the
//! objects alone, and who has lately missed less leads.
//!
//! A learner that has seen too little, or whose past no longer resembles the present, keeps
//! what will not return; S3-FIFO needs no past. The idea is that of set duelling (Qureshi et
//! al., ISCA 2007), here with whole directories instead of sampled sets: they cost some
//! dozen bytes an object.
//!
//! Invariants: each simulated memory is as large as the true one; `dropped` is what the true
//! memory holds and S3-FIFO's does not.

use std::collections::BTreeSet;

use super::ObjectRequest;
use super::ranked::Ranked;
use super::s3_fifo::S3Fifo;

/// Misses older than this count half, in milliseconds.
const MEMORY_MS: f64 = 2.0 * 3_600_000.0;

/// S3-FIFO leads once its misses, times this, cost less than those of the learned values.
const MARGIN: f64 = 1.015;

/// See the module's header.
#[derive(Clone, Debug)]
pub(super) struct Duel {
    s3_fifo: S3Fifo,
    /// What learned values alone would hold; nothing until there are any.
    learned: Option<Ranked<u64>>,
    /// Load times missed, in seconds, decayed: S3-FIFO's and the learned values'.
    missed_s: (f64, f64),
    now_ms: i64,
    dropped: BTreeSet<u32>,
    /// Scratch of [`Self::request`].
    left: Vec<u32>,
}

impl Duel {
    /// Both memories are empty; S3-FIFO leads.
    pub(super) fn new(capacity_bytes: u64) -> Self {
        Self {
            s3_fifo: S3Fifo::new(capacity_bytes),
            learned: None,
            missed_s: (0.0, 0.0),
            now_ms: i64::MIN,
            dropped: BTreeSet::new(),
            left: Vec::new(),
        }
    }

    /// There are values now: they start with what is held.
    pub(super) fn begin(&mut self, held: &Ranked<u64>) {
        self.learned.get_or_insert_with(|| held.clone());
    }

    /// Both serve a request for an object of that rank, before the true memory does.
    pub(super) fn request(&mut self, request: &ObjectRequest, rank: u64, held: &Ranked<u64>) {
        self.left.clear();
        let s3_hit = self.s3_fifo.request_telling(request, &mut self.left);
        let left = self.left.iter().filter(|object| held.contains(**object));
        self.dropped.extend(left);
        self.dropped.remove(&request.object);
        let Some(learned) = &mut self.learned else {
            return;
        };
        let hit = learned.contains(request.object);
        if !hit && request.bytes <= learned.capacity_bytes() {
            while !learned.fits(request.bytes) {
                learned.pop();
            }
            learned.insert(request.object, rank, request.bytes);
        }
        let passed_ms = request.now_ms.saturating_sub(self.now_ms).max(0);
        self.now_ms = request.now_ms;
        let decay = (-(passed_ms as f64) / MEMORY_MS).exp2();
        let missed_s = |hit| if hit { 0.0 } else { request.load_s };
        self.missed_s.0 = self.missed_s.0 * decay + missed_s(s3_hit);
        self.missed_s.1 = self.missed_s.1 * decay + missed_s(hit);
    }

    /// The true memory has given up an object.
    pub(super) fn left(&mut self, object: u32) {
        self.dropped.remove(&object);
    }

    /// An object is ranked again.
    pub(super) fn set_rank(&mut self, object: u32, rank: u64) {
        if let Some(learned) = &mut self.learned {
            learned.set_rank(object, rank);
        }
    }

    /// Whether the rank of an object matters here.
    pub(super) fn ranks(&self, object: u32) -> bool {
        let learned = self.learned.as_ref();
        learned.is_some_and(|learned| learned.contains(object))
    }

    /// The objects whose ranks matter here.
    pub(super) fn ranked(&self) -> impl Iterator<Item = u32> + '_ {
        self.learned.iter().flat_map(Ranked::objects)
    }

    fn s3_fifo_leads(&self) -> bool {
        self.learned.is_none() || self.missed_s.0 * MARGIN < self.missed_s.1
    }

    /// What is to leave the true memory, if S3-FIFO leads: of what it does not hold, what
    /// is ranked lowest.
    pub(super) fn victim(&self, held: &Ranked<u64>) -> Option<u32> {
        if !self.s3_fifo_leads() {
            return None;
        }
        let ranked = self
            .dropped
            .iter()
            .map(|&object| (held.rank(object), object));
        ranked.min().map(|(_, object)| object)
    }
}

#[cfg(test)]
mod tests {
    use super::super::EvictionPolicy as _;
    use super::*;

    const SLOTS: u64 = 10;

    fn request(object: u32, at: u32) -> ObjectRequest {
        ObjectRequest {
            object,
            owner: 0,
            bytes: 1,
            load_s: 1.0,
            now_ms: i64::from(at) * 60_000,
        }
    }

    /// Three objects in turn among others that never come again, as seen by a memory that
    /// holds what the duel says; the three are ranked by `rank`.
    fn misses(rank: u64, rounds: u32) -> (u32, Duel) {
        let mut held = Ranked::new(SLOTS);
        let mut duel = Duel::new(SLOTS);
        duel.begin(&held);
        let mut misses = 0;
        for at in 0..rounds {
            let kept = at % 4 == 0;
            let object = if kept { at / 4 % 3 } else { 10 + at };
            let rank = if kept { rank } else { 100 };
            duel.request(&request(object, at), rank, &held);
            if !held.contains(object) {
                misses += u32::from(kept && at >= rounds / 2);
                while !held.fits(1) {
                    let lowest = held.lowest().map(|(_, object)| object);
                    let victim = duel.victim(&held).or(lowest).unwrap();
                    held.remove(victim);
                    duel.left(victim);
                }
                held.insert(object, rank, 1);
            }
            let dropped: BTreeSet<u32> = held
                .objects()
                .filter(|object| !duel.s3_fifo.contains(*object))
                .collect();
            assert_eq!(duel.dropped, dropped);
        }
        (misses, duel)
    }

    #[test]
    fn bad_values_lose_to_s3_fifo_and_good_ones_lead() {
        let (bad, duel) = misses(0, 4_000);
        assert!(duel.s3_fifo_leads());
        let (good, duel) = misses(1_000, 4_000);
        assert!(!duel.s3_fifo_leads());
        assert_eq!(good, 0);
        // Of the 500 requests for the three, S3-FIFO's main queue misses few; values that
        // rank them below all else would miss every one.
        assert!(bad < 50, "{bad}");
    }
}
