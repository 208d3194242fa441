//! What moves into shared memory, second by second: the numbers of the live chart.
//!
//! Invariant: bounded; what is counted elsewhere is only looked at.

use std::collections::VecDeque;
use std::sync::Weak;
use std::time::Duration;

use parking_lot::Mutex;
use serde::Serialize;

use crate::daemon::Host;
use crate::daemon::memory::planner::now_ms;
use crate::units;

/// Between two looks.
const EVERY: Duration = Duration::from_secs(2);
/// Looks that are kept: ten minutes.
const KEPT: usize = 300;

/// What was counted at a moment.
#[derive(Clone, Copy, Debug)]
struct Beat {
    at_ms: i64,
    /// Bytes that were loaded ahead of need, and that VMs waited for, since the worker started.
    ahead: u64,
    waited: u64,
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct Pulse(Mutex<VecDeque<Beat>>);

/// Bytes a second between two looks, at the later one's time.
#[derive(Debug, Default, PartialEq, Serialize)]
pub struct PulseReport {
    at_s: Vec<f64>,
    ahead: Vec<f64>,
    waited: Vec<f64>,
}

impl Pulse {
    /// As it is drawn.
    pub fn report(&self) -> PulseReport {
        let mut report = PulseReport::default();
        let beats = self.0.lock();
        for (before, beat) in beats.iter().zip(beats.iter().skip(1)) {
            let took_s = (beat.at_ms - before.at_ms).max(1) as f64 / 1e3;
            let rate = |before: u64, now: u64| (now.saturating_sub(before) as f64 / took_s).round();
            report.at_s.push(beat.at_ms as f64 / 1e3);
            report.ahead.push(rate(before.ahead, beat.ahead));
            report.waited.push(rate(before.waited, beat.waited));
        }
        report
    }

    /// As it is said.
    pub fn words(&self) -> String {
        let beats = self.0.lock();
        let (Some(first), Some(last)) = (beats.front(), beats.back()) else {
            return "Nothing was counted yet.".to_owned();
        };
        format!(
            "In the last {}, {} came ahead of need; VMs waited for {}.",
            units::seconds((last.at_ms - first.at_ms) as f64 / 1e3),
            units::bytes(last.ahead.saturating_sub(first.ahead)),
            units::bytes(last.waited.saturating_sub(first.waited)),
        )
    }

    fn note(&self, beat: Beat) {
        let mut beats = self.0.lock();
        // The wall's clock was set back: what was before cannot be drawn with what comes.
        if beats.back().is_some_and(|last| last.at_ms >= beat.at_ms) {
            beats.clear();
        }
        if beats.len() == KEPT {
            beats.pop_front();
        }
        beats.push_back(beat);
    }
}

/// Looks at what is counted for as long as somebody may ask.
pub async fn follow(host: Weak<Host>, pulse: Weak<Pulse>) {
    loop {
        {
            let (Some(host), Some(pulse)) = (host.upgrade(), pulse.upgrade()) else {
                return;
            };
            let totals = host.accounts.totals();
            pulse.note(Beat {
                at_ms: now_ms(),
                ahead: totals.pushed_bytes,
                waited: totals.demand_bytes,
            });
        }
        tokio::time::sleep(EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_time_between_and_bounded() {
        let pulse = Pulse::default();
        assert_eq!(pulse.report(), PulseReport::default());
        assert_eq!(pulse.words(), "Nothing was counted yet.");
        let beat = |at_ms, ahead, waited| Beat {
            at_ms,
            ahead,
            waited,
        };
        pulse.note(beat(1_000, 0, 10));
        pulse.note(beat(3_000, 4_096, 10));
        pulse.note(beat(7_000, 4_096, 2_010));
        let expected = PulseReport {
            at_s: vec![3.0, 7.0],
            ahead: vec![2_048.0, 0.0],
            waited: vec![0.0, 500.0],
        };
        assert_eq!(pulse.report(), expected);
        let words = "In the last 6.00 s, 4.0 KiB came ahead of need; VMs waited for 2.0 KiB.";
        assert_eq!(pulse.words(), words);
        for at in 0..2 * KEPT as i64 {
            pulse.note(beat(10_000 + at, 1, 1));
        }
        assert_eq!(pulse.report().at_s.len(), KEPT - 1);
        pulse.note(beat(5, 0, 0));
        assert_eq!(pulse.report(), PulseReport::default());
    }
}
