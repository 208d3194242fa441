//! The forecaster's clock: the one on the wall, or one that runs faster for a compressed day.
//!
//! Owns the conversion between both. Everything that is learned, forecast and kept in the history
//! is in forecast time; what VMs and the planner see is wall time.
//!
//! Invariant: the conversion is monotonic, and the identity unless configured otherwise.

use std::time::Duration;

use forelay_predict::time::Timestamp;

use crate::config::ForecastConfig;
use crate::daemon::memory::planner::now_ms;

/// See the module's header.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ForecastClock {
    origin_ms: i64,
    starts_ms: i64,
    scale: f64,
}

impl ForecastClock {
    /// The clock as configured. A scale that makes no sense counts as 1.
    pub fn new(config: &ForecastConfig) -> Self {
        let scale = config.time_scale;
        let sound = scale.is_finite() && scale > 0.0;
        Self {
            origin_ms: config.time_origin_ms,
            starts_ms: config.time_starts_ms.unwrap_or(config.time_origin_ms),
            scale: if sound { scale } else { 1.0 },
        }
    }

    /// Now.
    pub fn now(&self) -> Timestamp {
        self.of(now_ms())
    }

    /// Forecast time of a moment on the wall clock.
    pub fn of(&self, wall_ms: i64) -> Timestamp {
        let since_ms = wall_ms.saturating_sub(self.origin_ms);
        let scaled_ms = if since_ms <= 0 || self.scale == 1.0 {
            since_ms
        } else {
            (since_ms as f64 * self.scale) as i64
        };
        Timestamp(self.starts_ms.saturating_add(scaled_ms))
    }

    /// The moment on the wall clock of a forecast time.
    pub fn wall_ms(&self, at: Timestamp) -> i64 {
        let since_ms = at.0.saturating_sub(self.starts_ms);
        let wall_ms = if since_ms <= 0 || self.scale == 1.0 {
            since_ms
        } else {
            (since_ms as f64 / self.scale) as i64
        };
        self.origin_ms.saturating_add(wall_ms)
    }

    /// How long a stretch of forecast time takes on the wall clock.
    pub fn wall(&self, stretch: Duration) -> Duration {
        stretch.div_f64(self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(time_scale: f64) -> ForecastClock {
        ForecastClock::new(&ForecastConfig {
            time_scale,
            time_origin_ms: 1_000_000,
            ..ForecastConfig::default()
        })
    }

    #[test]
    fn a_day_takes_six_minutes_at_a_scale_of_240() {
        let clock = clock(240.0);
        assert_eq!(clock.of(999_999), Timestamp(999_999));
        let day_ms = 86_400_000;
        assert_eq!(clock.of(1_000_000 + 360_000), Timestamp(1_000_000 + day_ms));
        assert_eq!(clock.wall_ms(Timestamp(1_000_000 + day_ms)), 1_360_000);
        assert_eq!(clock.wall(Duration::from_secs(240)), Duration::from_secs(1));
    }

    #[test]
    fn a_replayed_day_may_begin_at_another_time() {
        let clock = ForecastClock::new(&ForecastConfig {
            time_scale: 10.0,
            time_origin_ms: 5_000,
            time_starts_ms: Some(-100_000),
            ..ForecastConfig::default()
        });
        assert_eq!(clock.of(5_000), Timestamp(-100_000));
        assert_eq!(clock.of(6_000), Timestamp(-90_000));
        assert_eq!(clock.of(4_000), Timestamp(-101_000));
        for wall_ms in [0, 4_999, 5_000, 123_456] {
            assert_eq!(clock.wall_ms(clock.of(wall_ms)), wall_ms);
        }
    }

    #[test]
    fn a_scale_that_makes_no_sense_is_none() {
        for scale in [0.0, -3.0, f64::NAN, f64::INFINITY, 1.0] {
            let clock = clock(scale);
            assert_eq!(clock.of(5_000_000), Timestamp(5_000_000));
            assert_eq!(clock.wall_ms(Timestamp(i64::MAX)), i64::MAX);
        }
    }
}
