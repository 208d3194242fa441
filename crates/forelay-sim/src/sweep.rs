//! Forelay's own policy over a trace, at many prices of memory in one pass.
//!
//! Owns the virtual clock: it feeds launches to the very forecaster the daemon uses and applies its
//! rule at each price. Invariants: every stretch of time is decided on before the launch that ends
//! it is learned; launches of one moment are all judged before any of them is learned; repeats
//! are warm if the rule holds on over the span in which they may come (`repeat_span_min`).
//! Lanes are ordered from the highest price to the lowest, so that those which hold a profile are
//! always the last ones: a stretch costs time only where that border moves.

use crate::tally::{Frame, Tally};
use crate::trace::{Trace, TracedLaunch};
use forelay_predict::arrivals::{ArrivalsConfig, Forecaster, OwnerKey, ProfileKey, Rule, Segment};
use forelay_predict::calibration::Reliability;
use forelay_predict::time::{MINUTE_MS, Timestamp};

/// Repeats of one moment beyond so many teach nothing.
const REPEATS_THAT_TEACH: u32 = 6;

/// What the pass yields, tallies in the order of the prices given.
pub(crate) struct Sweep {
    pub tallies: Vec<Tally>,
    pub reliability: Reliability,
    pub fallen_back: usize,
    pub bytes_per_profile: f64,
}

/// One price of memory.
struct Lane {
    rule: Rule,
    /// Since when each loaded profile is loaded without interruption, in minutes after its launch.
    loaded_from: Vec<f32>,
    tally: Tally,
}

/// All prices, highest first.
struct Lanes<'a> {
    frame: &'a Frame,
    lanes: Vec<Lane>,
    /// First lane that holds each profile.
    border: Vec<u16>,
}

struct Pass<'a> {
    frame: &'a Frame,
    forecaster: Forecaster,
    keys: Vec<ProfileKey>,
    /// The latest launch learned of each profile.
    last: Vec<Option<Timestamp>>,
    /// The latest moment for which each profile's first launch was judged.
    judged: Vec<Option<Timestamp>>,
    lanes: Lanes<'a>,
    load_min: &'a [f64],
}

/// Runs the sweep. `load_min` gives each profile's load time; a launch is warm only if its load
/// began that long before.
pub(crate) fn run(
    trace: &Trace,
    frame: &Frame,
    config: &ArrivalsConfig,
    prices: &[f64],
    load_min: &[f64],
) -> Sweep {
    let mut order: Vec<usize> = (0..prices.len()).collect();
    order.sort_by(|&a, &b| prices[b].total_cmp(&prices[a]));
    let profiles = trace.profiles.len();
    let mut forecaster = Forecaster::new(config.clone());
    let keys = trace
        .profiles
        .iter()
        .map(|name| forecaster.profile(name))
        .collect();
    let owners: Vec<OwnerKey> = trace
        .owners
        .iter()
        .map(|name| forecaster.owner(name))
        .collect();
    let lanes = order
        .iter()
        .map(|&index| Lane {
            rule: config.rule(prices[index]),
            loaded_from: vec![0.0; profiles],
            tally: Tally::new(frame),
        })
        .collect();
    let border = vec![prices.len() as u16; profiles];
    let mut pass = Pass {
        frame,
        forecaster,
        keys,
        last: vec![None; profiles],
        judged: vec![None; profiles],
        lanes: Lanes {
            frame,
            lanes,
            border,
        },
        load_min,
    };
    pass.replay(trace, &owners);
    pass.finish(&order)
}

impl Pass<'_> {
    fn replay(&mut self, trace: &Trace, owners: &[OwnerKey]) {
        let mut next_advance = trace.start();
        let mut from = 0;
        while from < trace.launches.len() {
            let at = trace.launches[from].at;
            while next_advance < at {
                self.advance(next_advance);
                next_advance = next_advance.plus_ms(10 * MINUTE_MS);
            }
            let together = trace.launches[from..]
                .iter()
                .take_while(|launch| launch.at == at)
                .count();
            let batch = &trace.launches[from..from + together];
            for launch in batch {
                self.judge(launch);
            }
            for launch in batch {
                self.learn(launch, owners[launch.owner as usize]);
            }
            from += together;
        }
    }

    fn advance(&mut self, now: Timestamp) {
        let Self {
            forecaster,
            lanes,
            last,
            ..
        } = self;
        forecaster.advance(now, |key, segment| {
            if let Some(origin) = last[key.0 as usize] {
                lanes.account(key.0, origin, segment);
            }
        });
    }

    /// The launch meets the decisions made before it.
    fn judge(&mut self, launch: &TracedLaunch) {
        let index = launch.profile as usize;
        if self.judged[index].replace(launch.at) == Some(launch.at) {
            // A further row of the same moment: a repeat, judged when it is learned.
            return;
        }
        let Some(origin) = self.last[index] else {
            for lane in &mut self.lanes.lanes {
                lane.tally
                    .launched(self.frame, launch.profile, launch.at, 1, 1);
            }
            return;
        };
        let Self {
            forecaster, lanes, ..
        } = self;
        forecaster.settle(self.keys[index], launch.at, true, |segment| {
            lanes.account(launch.profile, origin, segment);
        });
        lanes.meet(launch, origin, self.load_min[index]);
    }

    /// The forecaster is told of the launch, and then of its repeats one after the other, each
    /// after it was judged.
    fn learn(&mut self, launch: &TracedLaunch, owner: OwnerKey) {
        let index = launch.profile as usize;
        let mut repeats = launch.count;
        if self.last[index] != Some(launch.at) {
            repeats -= 1;
            self.tell(launch, owner, 0);
            self.last[index] = Some(launch.at);
            self.lanes.load_all(index);
        }
        let mut taught = 0;
        while repeats > 0 {
            // What nothing more is learned of is judged at once.
            let alike = if taught < REPEATS_THAT_TEACH {
                1
            } else {
                repeats
            };
            self.judge_repeats(launch, alike);
            self.tell(launch, owner, alike - 1);
            repeats -= alike;
            taught += 1;
        }
    }

    fn tell(&mut self, launch: &TracedLaunch, owner: OwnerKey, repeats: u32) {
        let key = self.keys[launch.profile as usize];
        let Self {
            forecaster,
            lanes,
            last,
            ..
        } = self;
        // What an announcement settles of other profiles' time is theirs to be charged for.
        let announced = |key: ProfileKey, segment: &Segment| {
            if let Some(origin) = last[key.0 as usize] {
                lanes.account(key.0, origin, segment);
            }
        };
        forecaster.learn_launch(key, owner, launch.at, repeats, announced);
    }

    /// Further launches of a moment are warm if it paid to stay loaded after those before.
    fn judge_repeats(&mut self, launch: &TracedLaunch, repeats: u32) {
        let index = launch.profile as usize;
        if !self.frame.selected[index] {
            return;
        }
        let worth = self.forecaster.worth_of_repeats(self.keys[index]);
        for lane in &mut self.lanes.lanes {
            let cold = if lane.rule.pays(worth) { 0 } else { repeats };
            lane.tally
                .launched(self.frame, launch.profile, launch.at, repeats, cold);
        }
    }

    fn finish(mut self, order: &[usize]) -> Sweep {
        let horizon = self.frame.horizon;
        for index in 0..self.keys.len() {
            let Some(origin) = self.last[index] else {
                continue;
            };
            let Self {
                forecaster,
                lanes,
                keys,
                ..
            } = &mut self;
            forecaster.settle(keys[index], horizon, false, |segment| {
                lanes.account(index as u32, origin, segment);
            });
            let end_min = horizon.seconds_since(origin) / 60.0;
            lanes.move_border(index as u32, origin, end_min, lanes.lanes.len());
        }
        let mut tallies: Vec<(usize, Tally)> = order
            .iter()
            .copied()
            .zip(self.lanes.lanes.into_iter().map(|lane| lane.tally))
            .collect();
        tallies.sort_by_key(|&(index, _)| index);
        Sweep {
            tallies: tallies.into_iter().map(|(_, tally)| tally).collect(),
            reliability: self.forecaster.reliability().clone(),
            fallen_back: self
                .keys
                .iter()
                .filter(|&&key| self.forecaster.regret(key).harmful())
                .count(),
            bytes_per_profile: self.forecaster.bytes_per_profile(),
        }
    }
}

impl Lanes<'_> {
    /// Applies every lane's rule to a stretch.
    fn account(&mut self, profile: u32, origin: Timestamp, segment: &Segment) {
        if self.frame.selected[profile as usize] {
            let border = self.lanes.partition_point(|lane| !lane.rule.holds(segment));
            self.move_border(profile, origin, segment.start_min, border);
        }
    }

    /// From `at_min` on exactly the lanes from `border` hold the profile.
    fn move_border(&mut self, profile: u32, origin: Timestamp, at_min: f64, border: usize) {
        let index = profile as usize;
        let old = self.border[index] as usize;
        for lane in self.lanes.iter_mut().take(border).skip(old) {
            let began = f64::from(lane.loaded_from[index]);
            lane.tally.held(self.frame, profile, origin, began, at_min);
        }
        for lane in self.lanes.iter_mut().take(old).skip(border) {
            lane.loaded_from[index] = at_min as f32;
        }
        self.border[index] = border as u16;
    }

    /// A launch finds the profile loaded in some lanes.
    fn meet(&mut self, launch: &TracedLaunch, origin: Timestamp, load_min: f64) {
        let index = launch.profile as usize;
        if !self.frame.selected[index] {
            return;
        }
        let gap_min = launch.at.seconds_since(origin) / 60.0;
        let border = self.border[index] as usize;
        for (position, lane) in self.lanes.iter_mut().enumerate() {
            let began = f64::from(lane.loaded_from[index]);
            let warm = position >= border && (began <= 0.0 || gap_min - began >= load_min - 1.0e-4);
            lane.tally
                .launched(self.frame, launch.profile, launch.at, 1, u32::from(!warm));
        }
        self.move_border(launch.profile, origin, gap_min, self.lanes.len());
    }

    /// A launch loads the profile everywhere; whether it stays is the first stretch's decision.
    fn load_all(&mut self, index: usize) {
        self.border[index] = 0;
        for lane in &mut self.lanes {
            lane.loaded_from[index] = 0.0;
        }
    }
}
