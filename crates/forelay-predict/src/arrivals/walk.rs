//! A profile's hazard as a series of stretches of time.
//!
//! Owns the joining of gaps and announcements into one hazard. Stretches are cut where an
//! announcement opens, so that nothing decided before it knows of it. Invariant: the walk depends
//! only on the record, the published scale and the moment it starts from.

use super::config::ArrivalsConfig;
use super::hazard_scale::{HazardScale, Kind, Site};
use super::kernel::ln_of_ratio;
use super::record::Record;
use super::triggers::{LEAST_PROBABILITY, Slot};
use crate::time::Timestamp;

/// A stretch of time over which the hazard is treated as constant, decided about at its start.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Minutes from the latest launch to the start.
    pub start_min: f64,
    /// Length that was lived through, in minutes (shorter than planned if a launch ended it).
    pub length_min: f64,
    /// Expected launches per minute.
    pub hazard_per_min: f64,
    /// Further launches expected per minute right after a launch (bursts).
    pub repeats_per_min: f64,
    /// True if a launch ended this stretch.
    pub launched: bool,
    /// True while the profile is left to the simple rule, because forecasting did it harm.
    pub fallen_back: bool,
}

impl Segment {
    /// Launches per minute that would find the profile loaded, if it is kept so.
    #[must_use]
    pub fn worth_per_min(&self) -> f64 {
        self.hazard_per_min + self.repeats_per_min
    }
}

/// A moment of a record's time, with what the walk knows there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// Minutes since the latest launch.
    pub at_min: f64,
    /// Survival of the gap mixture.
    survival: f64,
    /// The scale's version in force, and for how long.
    version: Option<usize>,
    version_ends_min: f64,
    /// Whether any announcement is open, or will be.
    announced: bool,
}

impl Place {
    /// A place to begin a walk at.
    pub(crate) fn new(record: &Record, at_min: f64, scale: &HazardScale) -> Self {
        let version = scale.version_at(moment(record, at_min));
        Self {
            at_min,
            survival: record.outlook.survival(at_min),
            version,
            version_ends_min: Self::end_of(version, record, scale),
            announced: record.slots.iter().any(|slot| slot.open_since.is_some()),
        }
    }

    fn end_of(version: Option<usize>, record: &Record, scale: &HazardScale) -> f64 {
        let end = scale.end_of(version);
        end.map_or(f64::INFINITY, |end| end.seconds_since(record.last) / 60.0)
    }

    /// The place a stretch later.
    fn after(self, length_min: f64, survival: f64, record: &Record, scale: &HazardScale) -> Self {
        let mut place = Self {
            at_min: self.at_min + length_min,
            survival,
            ..self
        };
        while place.at_min >= place.version_ends_min {
            place.version = place.version.map_or(Some(0), |version| Some(version + 1));
            place.version_ends_min = Self::end_of(place.version, record, scale);
        }
        place
    }
}

fn moment(record: &Record, at_min: f64) -> Timestamp {
    record.last.plus_seconds(at_min * 60.0)
}

/// A stretch as planned, before it is known what came of it.
pub(crate) struct Stretch {
    pub length_min: f64,
    pub hazard_per_min: f64,
    pub raw_hazard_per_min: f64,
    pub site: Site,
    /// Where to go on from.
    pub end: Place,
}

/// The strongest announcement open at a moment.
pub(crate) fn strongest(
    record: &Record,
    at: Timestamp,
    config: &ArrivalsConfig,
) -> Option<(usize, f64)> {
    let mut best: Option<(usize, f64, f64)> = None;
    for (index, slot) in record.slots.iter().enumerate() {
        let Some(since_min) = open_for(slot, at) else {
            continue;
        };
        if since_min < config.trigger_window_min {
            let still = slot.still(since_min);
            if still > best.map_or(LEAST_PROBABILITY, |(_, _, value)| value) {
                best = Some((index, since_min, still));
            }
        }
    }
    best.map(|(index, since_min, _)| (index, since_min))
}

fn open_for(slot: &Slot, at: Timestamp) -> Option<f64> {
    let since_min = at.seconds_since(slot.open_since?) / 60.0;
    (since_min >= 0.0).then_some(since_min)
}

/// Minutes after `start_min` at which the next announcement opens.
fn next_opening(record: &Record, start_min: f64) -> Option<f64> {
    record
        .slots
        .iter()
        .filter_map(|slot| slot.open_since)
        .map(|since| since.seconds_since(record.last) / 60.0 - start_min)
        .filter(|&wait| wait > 1.0e-9)
        .min_by(f64::total_cmp)
}

/// The stretch that starts at a place.
pub(crate) fn stretch(
    record: &Record,
    here: Place,
    scale: &HazardScale,
    config: &ArrivalsConfig,
) -> Stretch {
    let (start_min, survival) = (here.at_min, here.survival);
    let mut length = record.outlook.stretch_min(start_min, survival, config);
    let open = if here.announced {
        strongest(record, moment(record, start_min), config)
    } else {
        None
    };
    if let Some((index, since_min)) = open {
        let lag = record.slots[index].lag_min();
        length = length.min((0.5 * lag).max(0.5 * since_min).clamp(0.05, 5.0));
    }
    let survival_at = |at_min: f64| record.outlook.survival(at_min).min(survival);
    let mut survival_after = survival_at(start_min + length);
    let from_gaps = ln_of_ratio(survival, survival_after) / length;
    let (raw, site) = match open {
        Some((index, since_min)) => {
            let slot = &record.slots[index];
            let p = slot.probability();
            let before = 1.0 - p * slot.fraction_by(since_min);
            let after = (1.0 - p * slot.fraction_by(since_min + length)).min(before);
            let announced = ln_of_ratio(before, after) / length;
            if announced < from_gaps {
                // Its own rhythm says more.
                (
                    from_gaps,
                    Site::new(Kind::Gaps, record.gap_count, start_min, from_gaps),
                )
            } else {
                let raw = announced + from_gaps * (1.0 - f64::from(record.announced));
                let experience = (slot.trials() as u32).clamp(1, 16);
                (raw, Site::new(Kind::Announced, experience, since_min, raw))
            }
        }
        None => {
            let quarter = ((record.announced * 4.0) as u8).min(3);
            let raw = from_gaps * (1.0 - 0.225 * f64::from(quarter));
            let kind = if quarter > 0 {
                Kind::Unannounced
            } else {
                Kind::Gaps
            };
            (raw, Site::new(kind, record.gap_count, start_min, raw))
        }
    };
    let factor = scale.factor(here.version, site);
    if here.announced
        && let Some(wait) = next_opening(record, start_min)
        && wait < length
    {
        length = wait;
        survival_after = survival_at(start_min + wait);
    }
    Stretch {
        length_min: length,
        hazard_per_min: raw * factor,
        raw_hazard_per_min: raw,
        site,
        end: here.after(length, survival_after, record, scale),
    }
}

/// Further launches of the latest burst per minute, in the stretch that starts at `start_min`.
pub(crate) fn repeats_per_min(
    record: &Record,
    start_min: f64,
    length_min: f64,
    config: &ArrivalsConfig,
) -> f64 {
    if start_min > 0.0 && start_min >= config.repeat_span_min {
        return 0.0;
    }
    f64::from(record.repeats) / config.repeat_span_min.max(length_min)
}

/// Walks a record's time from where it was settled to `until`, learning from each stretch.
pub(crate) fn settle(
    record: &mut Record,
    until: Timestamp,
    launched: bool,
    scale: &mut HazardScale,
    config: &ArrivalsConfig,
    sink: &mut impl FnMut(&Segment),
) {
    if record.launches == 0 || record.outlook.is_empty() {
        return;
    }
    record.touch();
    let end_min = until.seconds_since(record.last) / 60.0;
    let mut here = Place::new(record, record.settled_min, scale);
    let mut done = here.at_min >= end_min;
    while !done {
        let start_min = here.at_min;
        let planned = stretch(record, here, scale, config);
        here = planned.end;
        done = here.at_min >= end_min - 1.0e-9;
        let length_min = if done {
            end_min - start_min
        } else {
            planned.length_min
        };
        let ended = done && launched;
        let exposure = if ended {
            planned.length_min
        } else {
            length_min
        };
        scale.learn(planned.site, planned.raw_hazard_per_min, exposure, ended);
        let segment = Segment {
            start_min,
            length_min,
            hazard_per_min: planned.hazard_per_min,
            repeats_per_min: repeats_per_min(record, start_min, planned.length_min, config),
            launched: ended,
            fallen_back: record.regret.harmful() || !config.forecasting,
        };
        record.regret.note(&segment, &config.reference_rule());
        sink(&segment);
    }
    record.settled_min = end_min.max(record.settled_min);
}
