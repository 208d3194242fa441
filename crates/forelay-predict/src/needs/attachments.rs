//! When components come to a VM: with its launch, or attached later, and how much later.
//!
//! Owns counts per profile and component of both ways, and the last delays. Refuses to know how
//! likely a component is at all: that is the model's. A profile that never attached a component
//! is told what others did.
//!
//! Invariant: pairs are bounded, the least recently seen leaves; probabilities stay in [0, 1].

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Delays remembered for a pair.
const DELAYS: usize = 32;
/// Pairs remembered.
const MOST_PAIRS: usize = 4096;
/// A pair's counts fade by this with every VM of the profile that had the component.
const FADE: f64 = 0.95;

#[derive(Clone, Debug, Default)]
struct Pair {
    /// Faded counts of VMs that had it from the launch on, and of those that got it later.
    at_launch: f64,
    attached: f64,
    /// Seconds from the launch, the newest last.
    delays_s: VecDeque<f64>,
    seen: u64,
}

/// What is to be expected of a component that a VM does not have yet.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttachOutlook {
    /// Share of the VMs with the component that were given it after their launch.
    pub attached_share: f64,
    /// Of the attachments, the share that had come by the VM's present age.
    pub came_by_now: f64,
    /// Of the attachments, the share that comes between now and the horizon's end.
    pub comes_soon: f64,
    /// Seconds until it usually comes, from now.
    pub until_s: f64,
    /// Usual delay after the launch, in seconds.
    pub usual_delay_s: f64,
    /// Attachments that this rests on.
    pub attachments: u32,
}

impl AttachOutlook {
    /// Probability that the component comes within the horizon, if a VM has it in the end with
    /// `probability`, and has not got it by now.
    pub fn within_horizon(&self, probability: f64) -> f64 {
        let ever = probability.clamp(0.0, 1.0) * self.attached_share;
        let not_yet = 1.0 - ever * self.came_by_now;
        (ever * self.comes_soon / not_yet.max(1e-9)).clamp(0.0, 1.0)
    }
}

/// Counts of all pairs. See the module's header.
#[derive(Clone, Debug, Default)]
pub struct Attachments {
    /// By component first, so that pooling over profiles is one walk.
    pairs: BTreeMap<Arc<str>, BTreeMap<Arc<str>, Pair>>,
    count: usize,
    clock: u64,
}

impl Attachments {
    /// Knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A VM of `profile` was launched with a component.
    pub fn launched_with(&mut self, profile: &str, component: &str) {
        self.pair(profile, component).at_launch += 1.0;
    }

    /// A VM of `profile` was given a component `delay_s` after its launch.
    pub fn attached(&mut self, profile: &str, component: &str, delay_s: f64) {
        let pair = self.pair(profile, component);
        pair.attached += 1.0;
        if delay_s.is_finite() {
            if pair.delays_s.len() >= DELAYS {
                pair.delays_s.pop_front();
            }
            pair.delays_s.push_back(delay_s.max(0.0));
        }
    }

    fn pair(&mut self, profile: &str, component: &str) -> &mut Pair {
        self.clock += 1;
        let clock = self.clock;
        let known = self
            .pairs
            .get(component)
            .is_some_and(|by_profile| by_profile.contains_key(profile));
        if !known {
            if self.count >= MOST_PAIRS {
                self.forget_oldest();
            }
            self.count += 1;
        }
        let by_profile = self.pairs.entry(component.into()).or_default();
        let pair = by_profile.entry(profile.into()).or_default();
        pair.at_launch *= FADE;
        pair.attached *= FADE;
        pair.seen = clock;
        pair
    }

    fn forget_oldest(&mut self) {
        let pairs = self.pairs.iter().flat_map(|(component, by_profile)| {
            by_profile
                .iter()
                .map(move |(profile, pair)| (pair.seen, component, profile))
        });
        let Some((_, component, profile)) = pairs.min() else {
            return;
        };
        let (component, profile) = (Arc::clone(component), Arc::clone(profile));
        if let Some(by_profile) = self.pairs.get_mut(&component) {
            by_profile.remove(&profile);
            if by_profile.is_empty() {
                self.pairs.remove(&component);
            }
            self.count -= 1;
        }
    }

    /// What is known of `component` in a VM of `profile` that is `age_s` old; `None` if no VM
    /// ever had it. A VM that is yet to launch has an age of minus the time until then.
    pub fn outlook(
        &self,
        profile: &str,
        component: &str,
        age_s: f64,
        horizon_s: f64,
    ) -> Option<AttachOutlook> {
        let by_profile = self.pairs.get(component)?;
        let own = by_profile.get(profile);
        // The profile's own ways count; what others did speaks where it has none.
        let (at_launch, attached, delays) = match own {
            Some(pair) => (
                pair.at_launch,
                pair.attached,
                pair.delays_s.iter().copied().collect::<Vec<_>>(),
            ),
            None => {
                let all = by_profile.values();
                let delays = all.clone().flat_map(|pair| pair.delays_s.iter().copied());
                let delays = delays.collect();
                let total = |of: fn(&Pair) -> f64| by_profile.values().map(of).sum();
                (
                    total(|pair| pair.at_launch),
                    total(|pair| pair.attached),
                    delays,
                )
            }
        };
        Some(outlook_of(at_launch, attached, delays, age_s, horizon_s))
    }
}

fn outlook_of(
    at_launch: f64,
    attached: f64,
    mut delays: Vec<f64>,
    age_s: f64,
    horizon_s: f64,
) -> AttachOutlook {
    delays.sort_by(f64::total_cmp);
    let count = delays.len() as f64;
    let longest = delays.last().copied().unwrap_or(0.0);
    // One more delay than seen, longer than all of them: there is always a rest to come, and the
    // longer it has not come, the longer it may still take.
    let share_by = |age: f64| {
        let seen = delays.partition_point(|delay| *delay <= age) as f64;
        let rest = if age > longest && age > 0.0 {
            1.0 - longest / age
        } else {
            0.0
        };
        (seen + rest) / (count + 1.0)
    };
    let came_by_now = share_by(age_s);
    let to_come = delays.iter().filter(|delay| **delay > age_s);
    let to_come: Vec<f64> = to_come.copied().collect();
    let median = |sorted: &[f64]| sorted.get(sorted.len() / 2).copied();
    AttachOutlook {
        attached_share: if attached > 0.0 {
            attached / (attached + at_launch)
        } else {
            0.0
        },
        came_by_now,
        comes_soon: share_by(age_s + horizon_s.max(0.0)) - came_by_now,
        until_s: median(&to_come)
            .map_or(age_s, |delay| delay - age_s)
            .max(0.0),
        usual_delay_s: median(&delays).unwrap_or(0.0),
        attachments: u32::try_from(delays.len()).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_usually_comes_at_ten_minutes_is_likely_before_and_unlikely_after() {
        let mut known = Attachments::new();
        for i in 0..20 {
            known.attached("dev", "python3", 590.0 + f64::from(i));
            known.launched_with("dev", "nginx");
        }
        let at = |age| known.outlook("dev", "python3", age, 600.0).unwrap();
        let before = at(100.0);
        assert!(before.within_horizon(0.95) > 0.85, "{before:?}");
        assert!((before.until_s - 500.0).abs() < 11.0, "{before:?}");
        assert_eq!(before.attachments, 20);
        let (after, long_after) = (at(700.0), at(7000.0));
        assert!(after.within_horizon(0.95) < 0.3, "{after:?}");
        assert!(long_after.within_horizon(0.95) < 0.01, "{long_after:?}");
        // Too far away to be within the horizon.
        assert!(at(-3000.0).within_horizon(0.95) < 1e-9);
        // What is there from the launch on is not attached.
        let nginx = known.outlook("dev", "nginx", 10.0, 600.0).unwrap();
        assert_eq!(nginx.within_horizon(1.0), 0.0);
        assert!(known.outlook("dev", "absent", 0.0, 600.0).is_none());
    }

    #[test]
    fn a_profile_without_a_past_is_told_what_others_did() {
        let mut known = Attachments::new();
        for _ in 0..5 {
            known.attached("one", "tool", 60.0);
            known.attached("two", "tool", 120.0);
        }
        let new = known.outlook("new", "tool", 0.0, 600.0).unwrap();
        assert_eq!((new.attachments, new.attached_share), (10, 1.0));
        assert!(new.within_horizon(0.5) > 0.4, "{new:?}");
        // One that has it at launch keeps its own ways.
        known.launched_with("new", "tool");
        let own = known.outlook("new", "tool", 0.0, 600.0).unwrap();
        assert_eq!(own.within_horizon(0.5), 0.0);
    }

    #[test]
    fn pairs_are_bounded_and_the_oldest_leaves() {
        let mut known = Attachments::new();
        for i in 0..MOST_PAIRS + 10 {
            known.attached("p", &format!("c{i}"), 1.0);
        }
        assert_eq!(known.count, MOST_PAIRS);
        assert!(known.outlook("p", "c9", 0.0, 60.0).is_none());
        assert!(known.outlook("p", "c10", 0.0, 60.0).is_some());
    }
}
