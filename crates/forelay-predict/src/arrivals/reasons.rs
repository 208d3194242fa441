//! The ranked list of next launches, each with reasons a person can read.
//!
//! Owns the wording. Refuses to decide anything: a reason explains a probability that was computed
//! elsewhere, from the same state.

use super::experts::{ALL_VIEWS, BLURS, CALENDAR, HISTOGRAM, OWNER, View};
use super::forecaster::{Forecaster, ProfileKey};
use super::record::Record;
use super::walk::{self, Place};
use crate::time::Timestamp;
use std::fmt;

/// Why a launch is expected.
#[derive(Debug, Clone, PartialEq)]
pub enum Reason {
    /// Another launch used to come before.
    Announced {
        /// The profile that launched.
        source: String,
        /// Usual lag in seconds.
        lag_s: f64,
        /// How often (recently) the launch followed.
        hits: f64,
        /// Out of how many times.
        trials: f64,
    },
    /// Equal gaps.
    Periodic {
        /// The period in seconds.
        period_s: f64,
        /// Deviation in seconds.
        spread_s: f64,
        /// Minute of the day, for periods of whole days.
        minute_of_day: Option<u16>,
        /// Gaps this rests on.
        gaps: u32,
    },
    /// Launches recur at these times of the day.
    TimeOfDay {
        /// Minute of the day of the expected launch.
        minute_of_day: u16,
    },
    /// Gaps like these follow what was seen last.
    Pattern {
        /// Usual gap in seconds.
        typical_gap_s: f64,
        /// Gaps this rests on.
        gaps: u32,
    },
    /// Other profiles of the owner return after such gaps.
    OwnersHabit,
    /// Too little is known: the usual periods of schedules.
    CalendarPeriods,
    /// Too little is known: what profiles in general do.
    Population,
    /// Forecasting did harm for this profile; the fixed keep-alive is in force.
    FellBack {
        /// Cold starts lost against the simple rule.
        excess_cold_starts: f64,
    },
    /// Forecasting is switched off.
    SwitchedOff,
}

fn clock(minute_of_day: u16) -> String {
    format!("{:02}:{:02}", minute_of_day / 60, minute_of_day % 60)
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5_400.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => {
            let hours = s / 3_600.0;
            if (hours - hours.round()).abs() < 0.05 {
                format!("{hours:.0} h")
            } else {
                format!("{hours:.1} h")
            }
        }
        s => format!("{:.1} days", s / 86_400.0),
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Announced {
                source,
                lag_s,
                hits,
                trials,
            } => write!(
                f,
                "follows `{source}` by {}, {hits:.0} of the last {trials:.0} times",
                duration(*lag_s)
            ),
            Self::Periodic {
                period_s,
                spread_s,
                minute_of_day,
                gaps,
            } => {
                write!(f, "launches every {}", duration(*period_s))?;
                if let Some(minute) = minute_of_day {
                    write!(f, " at {}", clock(*minute))?;
                }
                write!(f, " +-{} ({gaps} gaps)", duration(*spread_s))
            }
            Self::TimeOfDay { minute_of_day } => {
                write!(f, "recurs at {} of the day", clock(*minute_of_day))
            }
            Self::Pattern {
                typical_gap_s,
                gaps,
            } => write!(
                f,
                "after launches like the latest, the next came within about {} ({gaps} gaps)",
                duration(*typical_gap_s)
            ),
            Self::OwnersHabit => write!(f, "as other profiles of its owner do"),
            Self::CalendarPeriods => write!(f, "little history: usual periods of schedules"),
            Self::Population => write!(f, "little history: what profiles in general do"),
            Self::FellBack { excess_cold_starts } => write!(
                f,
                "forecasting cost {excess_cold_starts:.1} cold starts more than the fixed \
                 keep-alive here: fell back to it"
            ),
            Self::SwitchedOff => write!(f, "forecasting is switched off: fixed keep-alive"),
        }
    }
}

/// A profile that may launch within the horizon.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchForecast {
    /// Its number.
    pub key: ProfileKey,
    /// Its name.
    pub profile: String,
    /// Probability of a launch within the horizon.
    pub probability: f64,
    /// Median launch time, given that there is one.
    pub expected_at: Timestamp,
    /// Half the width of the middle half of launch times, in seconds.
    pub spread_s: f64,
    /// Forecasting did harm here (or is switched off): the simpler rule is in force, and the
    /// forecast is told but not acted upon.
    pub fallen_back: bool,
    /// Why, strongest first.
    pub reasons: Vec<Reason>,
}

impl Forecaster {
    /// Profiles likely to launch within `horizon_s` after `now`, most likely first; those less
    /// likely than `least_probability` are left out.
    #[must_use]
    pub fn next_launches(
        &self,
        now: Timestamp,
        horizon_s: f64,
        least_probability: f64,
    ) -> Vec<LaunchForecast> {
        let mut ranked: Vec<(f64, u32)> = (0..self.profile_count() as u32)
            .map(|key| (self.probability(ProfileKey(key), now, horizon_s), key))
            .filter(|&(probability, _)| probability > 0.0 && probability >= least_probability)
            .collect();
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        ranked
            .into_iter()
            .map(|(probability, key)| self.describe(ProfileKey(key), now, horizon_s, probability))
            .collect()
    }

    fn describe(
        &self,
        key: ProfileKey,
        now: Timestamp,
        horizon_s: f64,
        probability: f64,
    ) -> LaunchForecast {
        let record = &self.records[key.0 as usize];
        let (expected_at, spread_s) = self.launch_time(record, now, horizon_s);
        LaunchForecast {
            key,
            profile: self.profile_name(key).to_owned(),
            probability,
            expected_at,
            spread_s,
            fallen_back: !self.config.forecasting || record.regret.harmful(),
            reasons: self.reasons(record, now, expected_at),
        }
    }

    /// Median and half the interquartile range of the next launch, given one within the horizon.
    fn launch_time(&self, record: &Record, now: Timestamp, horizon_s: f64) -> (Timestamp, f64) {
        let start = (now.seconds_since(record.last) / 60.0).max(0.0);
        let end = start + horizon_s / 60.0;
        let mut points = vec![(start, 0.0)];
        let mut here = Place::new(record, start, &self.scale);
        let mut sum = 0.0;
        while here.at_min < end {
            let stretch = walk::stretch(record, here, &self.scale, &self.config);
            let length = stretch.length_min.min(end - here.at_min);
            sum += stretch.hazard_per_min * length;
            here = stretch.end;
            points.push((here.at_min.min(end), 1.0 - (-sum).exp()));
        }
        let total = points.last().map_or(0.0, |point| point.1);
        let quantile = |share: f64| {
            let target = share * total;
            let after = points
                .partition_point(|point| point.1 < target)
                .clamp(1, points.len() - 1);
            let (a, b) = (points[after - 1], points[after]);
            let within = if b.1 > a.1 {
                (target - a.1) / (b.1 - a.1)
            } else {
                0.5
            };
            a.0 + (b.0 - a.0) * within
        };
        let median = record.last.plus_seconds(quantile(0.5) * 60.0);
        (median, (quantile(0.75) - quantile(0.25)) * 30.0)
    }

    fn reasons(&self, record: &Record, now: Timestamp, expected_at: Timestamp) -> Vec<Reason> {
        let mut reasons = Vec::new();
        if !self.config.forecasting {
            reasons.push(Reason::SwitchedOff);
        } else if record.regret.harmful() {
            reasons.push(Reason::FellBack {
                excess_cold_starts: record.regret.excess(),
            });
        }
        if let Some((index, _)) = walk::strongest(record, now, &self.config) {
            let slot = &record.slots[index];
            reasons.push(Reason::Announced {
                source: self.names.name(slot.source).to_owned(),
                lag_s: slot.lag_min() * 60.0,
                hits: slot.hits(),
                trials: slot.trials(),
            });
        }
        reasons.push(self.gap_reason(record, expected_at));
        reasons
    }

    fn gap_reason(&self, record: &Record, expected_at: Timestamp) -> Reason {
        if let Some(reason) = periodic(record) {
            return reason;
        }
        let weights: Vec<f64> = {
            let pooled = self.pool.weights(record.gap_count);
            let share = self.config.share;
            record
                .weights
                .iter()
                .zip(pooled)
                .map(|(&own, &pooled)| (1.0 - share) * f64::from(own) + share * pooled)
                .collect()
        };
        let family = |view: usize| -> f64 {
            weights[view * BLURS.len()..(view + 1) * BLURS.len()]
                .iter()
                .sum()
        };
        let mut best = (weights[HISTOGRAM], None);
        for (view, &kind) in ALL_VIEWS.iter().enumerate() {
            let weight = family(view);
            if weight > best.0 {
                best = (weight, Some(kind));
            }
        }
        if record.gap_count == 0 || weights[OWNER].max(weights[CALENDAR]) > best.0 {
            return if weights[OWNER] >= weights[CALENDAR] && record.gap_count > 0 {
                Reason::OwnersHabit
            } else {
                Reason::CalendarPeriods
            };
        }
        match best.1 {
            Some(View::TimeOfDay | View::DayPhase) => Reason::TimeOfDay {
                minute_of_day: expected_at.minute_of_day(),
            },
            Some(_) => Reason::Pattern {
                typical_gap_s: record.median_gap_min() * 60.0,
                gaps: record.gap_count,
            },
            None if record.gap_count < 4 => Reason::Population,
            None => Reason::Pattern {
                typical_gap_s: record.median_gap_min() * 60.0,
                gaps: record.gap_count,
            },
        }
    }
}

/// "Every 24 h at 09:00 +-2 min", if the remembered gaps are that regular.
fn periodic(record: &Record) -> Option<Reason> {
    let count = record.remembered();
    if count < 2 {
        return None;
    }
    let period_min = record.median_gap_min();
    let mut deviations: Vec<f64> = (0..count)
        .filter_map(|age| record.gap(age))
        .map(|gap| (gap - period_min).abs())
        .collect();
    deviations.sort_unstable_by(f64::total_cmp);
    let spread_min = deviations[count * 3 / 4];
    if period_min <= 0.0 || spread_min > 0.05 * period_min + 0.2 {
        return None;
    }
    let next = record.last.plus_seconds(period_min * 60.0);
    let days = period_min / 1440.0;
    let whole_days = days > 0.9 && (days - days.round()).abs() < 0.03;
    Some(Reason::Periodic {
        period_s: period_min * 60.0,
        spread_s: spread_min * 60.0,
        minute_of_day: whole_days.then(|| next.minute_of_day()),
        gaps: record.gap_count,
    })
}
