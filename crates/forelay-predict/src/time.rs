//! Points in time and the calendar, as the forecaster sees them.
//!
//! Owns [`Timestamp`] and the arithmetic on it. Refuses to know the present: there is no `now()`
//! here, callers pass time in. Invariant: arithmetic saturates, so no clock value, however absurd,
//! can overflow.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Milliseconds in a second.
pub const SECOND_MS: i64 = 1_000;
/// Milliseconds in a minute.
pub const MINUTE_MS: i64 = 60 * SECOND_MS;
/// Milliseconds in an hour.
pub const HOUR_MS: i64 = 60 * MINUTE_MS;
/// Milliseconds in a day.
pub const DAY_MS: i64 = 24 * HOUR_MS;
/// Milliseconds since the Unix epoch (or since a trace's own zero).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// From seconds; not-a-number becomes zero, values out of range saturate.
    #[must_use]
    pub fn from_seconds(seconds: f64) -> Self {
        Self((seconds * SECOND_MS as f64).round() as i64)
    }

    /// Seconds since the epoch.
    #[must_use]
    pub fn seconds(self) -> f64 {
        self.0 as f64 / SECOND_MS as f64
    }

    /// Minutes since the epoch.
    #[must_use]
    pub fn minutes(self) -> f64 {
        self.0 as f64 / MINUTE_MS as f64
    }

    /// This moment moved by a number of seconds, which may be negative.
    #[must_use]
    pub fn plus_seconds(self, seconds: f64) -> Self {
        Self(
            self.0
                .saturating_add((seconds * SECOND_MS as f64).round() as i64),
        )
    }

    /// This moment moved by a number of milliseconds, which may be negative.
    #[must_use]
    pub fn plus_ms(self, ms: i64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds from `earlier` to this moment; negative if `earlier` is in fact later.
    #[must_use]
    pub fn ms_since(self, earlier: Self) -> i64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Seconds from `earlier` to this moment; negative if `earlier` is in fact later.
    #[must_use]
    pub fn seconds_since(self, earlier: Self) -> f64 {
        self.ms_since(earlier) as f64 / SECOND_MS as f64
    }

    /// Hour of the day, 0 to 23, UTC.
    #[must_use]
    pub fn hour_of_day(self) -> u8 {
        (self.0.rem_euclid(DAY_MS) / HOUR_MS) as u8
    }

    /// Minute of the day, 0 to 1439, UTC.
    #[must_use]
    pub fn minute_of_day(self) -> u16 {
        (self.0.rem_euclid(DAY_MS) / MINUTE_MS) as u16
    }

    /// Day of the week, 0 is Monday, UTC.
    #[must_use]
    pub fn day_of_week(self) -> u8 {
        // The epoch was a Thursday.
        ((self.0.div_euclid(DAY_MS) + 3).rem_euclid(7)) as u8
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let minute = self.minute_of_day();
        let day = self.0.div_euclid(DAY_MS);
        let second = self.0.rem_euclid(MINUTE_MS) / SECOND_MS;
        write!(
            f,
            "day {day} {:02}:{:02}:{second:02}",
            minute / 60,
            minute % 60
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calendar_starts_on_a_thursday() {
        assert_eq!(Timestamp(0).day_of_week(), 3);
        assert_eq!(Timestamp(-1).day_of_week(), 2);
        assert_eq!(Timestamp(4 * DAY_MS).day_of_week(), 0);
        assert_eq!(
            Timestamp(DAY_MS + 9 * HOUR_MS + 2 * MINUTE_MS).minute_of_day(),
            542
        );
        assert_eq!(Timestamp(-1).hour_of_day(), 23);
    }

    #[test]
    fn absurd_clocks_saturate() {
        assert_eq!(Timestamp::from_seconds(f64::MAX).0, i64::MAX);
        assert_eq!(Timestamp::from_seconds(f64::NAN).0, 0);
        assert_eq!(Timestamp(i64::MAX).plus_seconds(1.0e30).0, i64::MAX);
        assert_eq!(Timestamp(i64::MIN).ms_since(Timestamp(i64::MAX)), i64::MIN);
    }
}
