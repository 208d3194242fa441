//! Does a hazard of one per hour mean one launch per hour? If not, scale it.
//!
//! Owns tables of launches expected and launches seen, by hazard, time since the last launch and
//! experience, and the factors that follow. Refuses to know profiles. Invariants: a stretch of
//! time is scaled by factors published before it began, so settling it late teaches nothing to
//! itself; published versions are bounded in number.

use super::kernel::{ln, one_minus_exp};
use super::pool::{STAGES, stage};
use crate::time::{MINUTE_MS, Timestamp};

const LEVELS: usize = 40;
const AGES: usize = 6;
const KINDS: usize = 3;
const CELLS: usize = KINDS * STAGES * AGES * LEVELS;
const VERSIONS: usize = 640;
const PRIOR: f32 = 5.0;
const CAPACITY: f32 = 2000.0;

/// What kind of evidence a hazard rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The profile's own gaps.
    Gaps,
    /// Own gaps of a profile that is usually announced, and is not just now.
    Unannounced,
    /// An open announcement.
    Announced,
}

/// Where in the tables a hazard belongs: two neighbouring levels and their mixing share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Site {
    lower: usize,
    share: f32,
}

impl Site {
    /// `experience` counts gaps, or announcements; `age_min` is the time since launch or source.
    pub(crate) fn new(kind: Kind, experience: u32, age_min: f64, hazard: f64) -> Self {
        let age = match age_min {
            a if a < 1.0 => 0,
            a if a < 3.0 => 1,
            a if a < 10.0 => 2,
            a if a < 60.0 => 3,
            a if a < 600.0 => 4,
            _ => 5,
        };
        // One and a half levels to each doubling, from one in a million minutes on.
        const PER_LN: f32 = 1.5 / std::f32::consts::LN_2;
        let level = ln((hazard.max(1.0e-7) * 1.0e6) as f32) * PER_LN;
        let level = level.clamp(0.0, (LEVELS - 2) as f32 + 0.999);
        let row = ((kind as usize * STAGES + stage(experience)) * AGES + age) * LEVELS;
        let whole = level as usize;
        Self {
            lower: row + whole,
            share: level - whole as f32,
        }
    }
}

#[derive(Debug, Clone)]
struct Version {
    from: Timestamp,
    factors: Vec<f32>,
}

/// The tables.
#[derive(Debug, Clone)]
pub(crate) struct HazardScale {
    seen: Vec<f32>,
    expected: Vec<f32>,
    versions: Vec<Version>,
    began: Option<Timestamp>,
    next_version: Timestamp,
}

impl Default for HazardScale {
    fn default() -> Self {
        Self {
            seen: vec![0.0; CELLS],
            expected: vec![0.0; CELLS],
            versions: Vec::new(),
            began: None,
            next_version: Timestamp(i64::MIN),
        }
    }
}

impl HazardScale {
    /// Version in force at a moment, to be passed to [`Self::factor`].
    pub(crate) fn version_at(&self, at: Timestamp) -> Option<usize> {
        self.versions
            .partition_point(|version| version.from <= at)
            .checked_sub(1)
    }

    /// When the version after that one comes into force, if there is one.
    pub(crate) fn end_of(&self, version: Option<usize>) -> Option<Timestamp> {
        let next = version.map_or(0, |index| index + 1);
        self.versions.get(next).map(|version| version.from)
    }

    /// What to multiply a hazard by.
    pub(crate) fn factor(&self, version: Option<usize>, site: Site) -> f64 {
        let Some(version) = version.and_then(|index| self.versions.get(index)) else {
            return 1.0;
        };
        let low = version.factors[site.lower];
        let high = version.factors[site.lower + 1];
        f64::from(low + (high - low) * site.share)
    }

    /// Learns the outcome of a stretch.
    pub(crate) fn learn(&mut self, site: Site, hazard: f64, length_min: f64, launched: bool) {
        let expected = one_minus_exp(hazard * length_min) as f32;
        for (cell, share) in [(site.lower, 1.0 - site.share), (site.lower + 1, site.share)] {
            self.expected[cell] += expected * share;
            if launched {
                self.seen[cell] += share;
            }
            if self.expected[cell] > CAPACITY {
                self.expected[cell] *= 0.5;
                self.seen[cell] *= 0.5;
            }
        }
    }

    /// Publishes what was learned until now, if the last time was long enough ago: often while
    /// little is known, hourly later.
    pub(crate) fn publish(&mut self, now: Timestamp) {
        let began = *self.began.get_or_insert(now);
        if now < self.next_version {
            // A clock set back far would otherwise silence learning until it catches up.
            if self.next_version.ms_since(now) > 2 * 60 * MINUTE_MS {
                self.next_version = now;
            }
            return;
        }
        let factors = self
            .seen
            .iter()
            .zip(&self.expected)
            .map(|(seen, expected)| (seen + PRIOR) / (expected + PRIOR))
            .collect();
        if self.versions.len() >= VERSIONS {
            self.versions.remove(0);
        }
        self.versions.retain(|version| version.from < now);
        self.versions.push(Version { from: now, factors });
        let pause = (now.ms_since(began) / 20).clamp(MINUTE_MS, 60 * MINUTE_MS);
        self.next_version = now.plus_ms(pause);
    }
}
