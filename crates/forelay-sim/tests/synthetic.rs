//! Seeded synthetic traces whose truth is known.
//!
//! Owns the generators: periodic, Poisson, diurnal, bursty, drifting, chained and new profiles.
//! Each tells its true hazard where there is one, so that a learner's log-loss can be held against
//! the generator's own. Invariant: the same seed gives the same trace on every machine.

use forelay_predict::time::Timestamp;
use forelay_sim::trace::{Trace, TracedLaunch};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How a profile's launches come about.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ArrivalProcess {
    /// Every `period_min`, each launch off its grid by a normal deviation.
    Periodic {
        /// Period in minutes.
        period_min: f64,
        /// Standard deviation in minutes.
        jitter_min: f64,
    },
    /// Independent exponential gaps.
    Poisson {
        /// Launches per hour.
        per_hour: f64,
    },
    /// Exponential gaps with a rate that follows the hour of the day.
    Diurnal {
        /// Launches per hour at 14:00.
        peak_per_hour: f64,
        /// Launches per hour at 02:00.
        trough_per_hour: f64,
    },
    /// Bursts of launches with long pauses.
    Bursts {
        /// Mean pause in minutes.
        pause_min: f64,
        /// Mean gap within a burst in minutes.
        gap_min: f64,
        /// Mean launches per burst.
        size: f64,
    },
    /// A period that grows by a share with each launch.
    Drift {
        /// First period in minutes.
        period_min: f64,
        /// Growth per launch.
        growth: f64,
    },
    /// Follows each launch of the profile generated just before, with a probability and a lag.
    Follows {
        /// Probability.
        probability: f64,
        /// Mean lag in minutes; its deviation is a tenth of it.
        lag_min: f64,
    },
}

/// A profile to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntheticProfile {
    /// Its name.
    pub name: String,
    /// Its owner.
    pub owner: String,
    /// When it first may launch, in minutes.
    pub from_min: f64,
    /// How its launches come about.
    pub process: ArrivalProcess,
}

impl SyntheticProfile {
    /// A profile that exists from the beginning.
    #[must_use]
    pub fn new(name: &str, owner: &str, process: ArrivalProcess) -> Self {
        Self {
            name: name.to_owned(),
            owner: owner.to_owned(),
            from_min: 0.0,
            process,
        }
    }
}

fn exponential(rng: &mut ChaCha8Rng, mean: f64) -> f64 {
    -mean * (1.0 - unit(rng)).ln()
}

fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

fn normal(rng: &mut ChaCha8Rng) -> f64 {
    (-2.0 * (1.0 - unit(rng)).ln()).sqrt() * (std::f64::consts::TAU * unit(rng)).cos()
}

/// Rate per minute of a diurnal process.
fn diurnal_rate(at_min: f64, peak_per_hour: f64, trough_per_hour: f64) -> f64 {
    let phase = (at_min.rem_euclid(1440.0) - 840.0) / 1440.0 * std::f64::consts::TAU;
    let middle = (peak_per_hour + trough_per_hour) / 2.0;
    let swing = (peak_per_hour - trough_per_hour) / 2.0;
    (middle + swing * phase.cos()) / 60.0
}

/// Bursts of `size` launches on average, `gap_min` apart, after pauses of `pause_min`.
fn bursts(
    rng: &mut ChaCha8Rng,
    (from, until): (f64, f64),
    [pause_min, gap_min, size]: [f64; 3],
) -> Vec<f64> {
    let mut times = Vec::new();
    let mut at = from;
    while at < until {
        at += exponential(rng, pause_min);
        times.push(at);
        while unit(rng) < 1.0 - 1.0 / size {
            at += exponential(rng, gap_min);
            times.push(at);
        }
    }
    times
}

impl ArrivalProcess {
    /// True hazard per minute at a moment, for processes whose hazard depends on time alone.
    #[must_use]
    pub fn hazard_per_min(&self, at_min: f64) -> Option<f64> {
        match *self {
            Self::Poisson { per_hour } => Some(per_hour / 60.0),
            Self::Diurnal {
                peak_per_hour,
                trough_per_hour,
            } => Some(diurnal_rate(at_min, peak_per_hour, trough_per_hour)),
            _ => None,
        }
    }

    fn times(&self, rng: &mut ChaCha8Rng, from: f64, until: f64, leader: &[f64]) -> Vec<f64> {
        let mut times = Vec::new();
        let mut at = from;
        match *self {
            Self::Periodic {
                period_min,
                jitter_min,
            } => {
                at += period_min * unit(rng);
                while at < until {
                    times.push(at + jitter_min * normal(rng));
                    at += period_min;
                }
            }
            Self::Poisson { per_hour } => {
                at += exponential(rng, 60.0 / per_hour);
                while at < until {
                    times.push(at);
                    at += exponential(rng, 60.0 / per_hour);
                }
            }
            Self::Diurnal {
                peak_per_hour,
                trough_per_hour,
            } => {
                let most = peak_per_hour.max(trough_per_hour) / 60.0;
                while at < until {
                    at += exponential(rng, 1.0 / most);
                    let rate = diurnal_rate(at, peak_per_hour, trough_per_hour);
                    if unit(rng) * most < rate {
                        times.push(at);
                    }
                }
            }
            Self::Bursts {
                pause_min,
                gap_min,
                size,
            } => times = bursts(rng, (from, until), [pause_min, gap_min, size]),
            Self::Drift { period_min, growth } => {
                let mut period = period_min;
                while at < until {
                    times.push(at);
                    at += period;
                    period *= 1.0 + growth;
                }
            }
            Self::Follows {
                probability,
                lag_min,
            } => {
                for &lead in leader {
                    if unit(rng) < probability {
                        times.push(lead + lag_min * (1.0 + 0.1 * normal(rng)).max(0.01));
                    }
                }
            }
        }
        times.retain(|&at| at >= from && at < until);
        times.sort_unstable_by(f64::total_cmp);
        times
    }
}

/// Generates a trace of `days` days.
#[must_use]
pub fn generate(profiles: &[SyntheticProfile], days: f64, seed: u64) -> Trace {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut trace = Trace::default();
    let mut leader: Vec<f64> = Vec::new();
    for (index, profile) in profiles.iter().enumerate() {
        let owner = match trace.owners.iter().position(|name| *name == profile.owner) {
            Some(owner) => owner,
            None => {
                trace.owners.push(profile.owner.clone());
                trace.owners.len() - 1
            }
        };
        trace.profiles.push(profile.name.clone());
        let times = profile
            .process
            .times(&mut rng, profile.from_min, days * 1440.0, &leader);
        trace.launches.extend(times.iter().map(|&at| TracedLaunch {
            at: Timestamp::from_seconds(at * 60.0),
            profile: index as u32,
            owner: owner as u32,
            count: 1,
            composition: 0,
        }));
        leader = times;
    }
    trace.finish();
    trace
}
