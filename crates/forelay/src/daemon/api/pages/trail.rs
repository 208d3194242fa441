//! What forecasts told, written down as they told it, so that it can be shown beside what
//! happened.
//!
//! Invariant: bounded: a number of profiles, each with as many moments as [`KEPT`] says.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Weak;
use std::time::Duration;

use parking_lot::Mutex;

use crate::daemon::Host;
use crate::daemon::memory::planner::now_ms;

/// Between two moments.
const EVERY: Duration = Duration::from_secs(10);
/// Moments that are kept: half an hour.
const KEPT: usize = 180;
/// Profiles that are followed, the likeliest.
const MOST_PROFILES: usize = 12;

/// A profile's forecast at a moment of the wall's clock.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub at_ms: i64,
    pub probability: f64,
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct Trail(Mutex<BTreeMap<String, VecDeque<Moment>>>);

impl Trail {
    /// What was told of each profile (`owner/profile`), oldest first.
    pub fn told(&self) -> BTreeMap<String, Vec<Moment>> {
        let told = self.0.lock();
        let all = told.iter();
        all.map(|(key, moments)| (key.clone(), moments.iter().copied().collect()))
            .collect()
    }

    fn note(&self, at_ms: i64, likely: impl IntoIterator<Item = (String, f64)>) {
        let mut told = self.0.lock();
        for (key, probability) in likely.into_iter().take(MOST_PROFILES) {
            let moments = told.entry(key).or_default();
            if moments.len() == KEPT {
                moments.pop_front();
            }
            moments.push_back(Moment { at_ms, probability });
        }
        let oldest_ms = at_ms - EVERY.as_millis() as i64 * KEPT as i64;
        told.retain(|_, moments| moments.back().is_some_and(|last| last.at_ms >= oldest_ms));
        // Profiles come and go; what is followed stays bounded.
        while told.len() > 2 * MOST_PROFILES {
            let stalest = told
                .iter()
                .min_by_key(|(_, moments)| moments.back().map(|last| last.at_ms));
            let Some(stalest) = stalest.map(|(key, _)| key.clone()) else {
                break;
            };
            told.remove(&stalest);
        }
    }
}

/// Writes down what is told for as long as somebody may look.
pub async fn follow(host: Weak<Host>, trail: Weak<Trail>) {
    loop {
        let (Some(of), Some(to)) = (host.upgrade(), trail.upgrade()) else {
            return;
        };
        let noted = tokio::task::spawn_blocking(move || {
            let now = of.forecasts.learner.clock().now();
            let likely = of.forecasts.next_launches(now, 0.0).into_iter();
            to.note(now_ms(), likely.map(|one| (one.profile, one.probability)));
        });
        let _ = noted.await;
        tokio::time::sleep(EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_is_bounded_and_what_is_told_no_more_goes() {
        let trail = Trail::default();
        let every_ms = EVERY.as_millis() as i64;
        for step in 0..3 * KEPT as i64 {
            let profiles = (0..40).map(|at| (format!("o/p{}", (step / 10) * 40 + at), 0.5));
            trail.note(
                step * every_ms,
                std::iter::once(("o/web".to_owned(), 0.9)).chain(profiles),
            );
            assert!(trail.told().len() <= 2 * MOST_PROFILES);
        }
        let web = &trail.told()["o/web"];
        assert_eq!(web.len(), KEPT);
        assert!(
            web.windows(2)
                .all(|two| two[1].at_ms - two[0].at_ms == every_ms)
        );
        trail.note(9 * KEPT as i64 * every_ms, []);
        assert!(trail.told().is_empty());
    }
}
