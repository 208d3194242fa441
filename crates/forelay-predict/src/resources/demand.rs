//! Memory demand of VMs and of the host, as quantiles some minutes ahead.
//!
//! Per VM: a centre (the last sample, a quick or a slow mean, whichever erred least lately) and a
//! scale (its usual change), and a sketch of all it used. Per profile and horizon: how far reality
//! lay from the centre, in scales, as a sketch. A VM's quantiles lie between its centre plus those
//! deviations and its own past quantiles, nearer to whichever lost less for the profile at that
//! horizon (soon the former, an hour ahead the latter); the host's distribution is the sum over VMs
//! taken as independent, by convolution.
//!
//! Invariant: state per VM and per profile is bounded by the size of a sketch; quantiles do not
//! decrease in q.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Sketch;
use crate::time::{MINUTE_MS, Timestamp};

/// Horizons that are learned; a forecast uses the next longer one.
pub const HORIZONS_MS: [i64; 3] = [5 * MINUTE_MS, 15 * MINUTE_MS, 60 * MINUTE_MS];
/// Points of a distribution.
const POINTS: usize = 64;
/// Deviations are stored in thousandths of a scale.
const UNIT: f64 = 1000.0;
/// Factor on a profile's deviations each time it has gathered this many more.
const DECAY_EVERY: f64 = 4096.0;

/// A distribution as equally likely points, ascending.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution(Vec<f64>);

impl Distribution {
    /// Certainly `value`.
    pub fn certain(value: f64) -> Self {
        Self(vec![value])
    }

    /// From points in any order.
    pub fn from_points(mut points: Vec<f64>) -> Self {
        points.sort_by(f64::total_cmp);
        Self(points)
    }

    /// The quantile, between points by straight lines.
    pub fn quantile(&self, q: f64) -> f64 {
        let last = self.0.len().saturating_sub(1);
        let at = (q.clamp(0.0, 1.0) * self.0.len() as f64 - 0.5).clamp(0.0, last as f64);
        let low = at.floor() as usize;
        let (Some(a), Some(b)) = (self.0.get(low), self.0.get((low + 1).min(last))) else {
            return 0.0;
        };
        a + (b - a) * (at - low as f64)
    }

    /// The distribution of the sum of two independent quantities.
    pub fn plus(&self, other: &Self) -> Self {
        let sums = self
            .0
            .iter()
            .flat_map(|a| other.0.iter().map(move |b| a + b));
        let all = Self::from_points(sums.collect());
        all.thinned()
    }

    /// This with probability `p`, else 0: a launch that may come.
    pub fn with_probability(&self, p: f64) -> Self {
        let p = p.clamp(0.0, 1.0);
        let at = |i: usize| {
            let q = (i as f64 + 0.5) / POINTS as f64;
            if q < 1.0 - p {
                0.0
            } else {
                self.quantile((q - (1.0 - p)) / p.max(1e-9))
            }
        };
        Self((0..POINTS).map(at).collect())
    }

    fn thinned(self) -> Self {
        if self.0.len() <= POINTS {
            return self;
        }
        // Means of equal parts keep the mean of the sum exact.
        let size = self.0.len() as f64 / POINTS as f64;
        let part = |i: usize| {
            let from = (i as f64 * size) as usize;
            let to = (((i + 1) as f64 * size) as usize).clamp(from + 1, self.0.len());
            self.0[from..to].iter().sum::<f64>() / (to - from) as f64
        };
        Self((0..POINTS).map(part).collect())
    }
}

/// Online forecaster of memory demand.
#[derive(Clone, Debug, Default)]
pub struct Demand {
    profiles: BTreeMap<Arc<str>, Profile>,
    vms: BTreeMap<u64, Vm>,
}

#[derive(Clone, Debug, Default)]
struct Profile {
    /// Per horizon: deviations below and above the centre.
    deviations: [(Sketch, Sketch); HORIZONS_MS.len()],
    /// Per horizon and [`JUDGED`] quantile: decayed pinball losses by (deviations, own past).
    losses: [[[f64; 2]; JUDGED.len()]; HORIZONS_MS.len()],
    /// Memory in use, over all samples: what a new VM will use.
    use_bytes: Sketch,
}

/// The quantiles by which deviations and own past are compared.
const JUDGED: [f64; 3] = [0.5, 0.9, 0.99];

/// A forecast that waits for the truth.
#[derive(Clone, Copy, Debug)]
struct Pending {
    due: Timestamp,
    centre: f64,
    scale: f64,
    /// [`JUDGED`] quantiles by deviations and by own past, once both are known.
    quantiles: Option<[[f64; JUDGED.len()]; 2]>,
}

#[derive(Clone, Debug)]
struct Vm {
    profile: Arc<str>,
    last: f64,
    last_at: Timestamp,
    /// Quick and slow mean.
    means: [f64; 2],
    scale: f64,
    /// Decayed absolute errors of (last, quick mean, slow mean).
    errors: [f64; 3],
    own: Sketch,
    /// The outstanding forecast of each horizon.
    pending: [Option<Pending>; HORIZONS_MS.len()],
}

impl Profile {
    /// Centre plus the deviations of this profile's VMs, if enough of them are known.
    fn by_deviation(&self, slot: usize, vm: &Vm, q: f64) -> Option<f64> {
        let (below, above) = &self.deviations[slot];
        let total = below.weight() + above.weight();
        if total < 8.0 {
            return None;
        }
        let share = below.weight() / total;
        let deviation = if q < share {
            -below.quantile(1.0 - q / share).unwrap_or(0.0)
        } else {
            let within = (q - share) / (1.0 - share).max(1e-9);
            above.quantile(within).unwrap_or(0.0)
        };
        Some(vm.centre() + deviation / UNIT * vm.scale())
    }

    /// How much of a quantile is the VM's own past, 0 to 1.
    fn own_share(&self, slot: usize, q: f64) -> f64 {
        let nearest = match q {
            q if q < 0.75 => 0,
            q if q < 0.95 => 1,
            _ => 2,
        };
        let [changed, own] = self.losses[slot][nearest].map(|loss| loss.powi(4));
        if changed + own > 0.0 {
            changed / (changed + own)
        } else {
            0.0
        }
    }

    fn both(&self, slot: usize, vm: &Vm) -> Option<[[f64; JUDGED.len()]; 2]> {
        let mut quantiles = [[0.0; JUDGED.len()]; 2];
        for (i, q) in JUDGED.into_iter().enumerate() {
            quantiles[0][i] = self.by_deviation(slot, vm, q)?;
            quantiles[1][i] = vm.own.quantile(q)?;
        }
        Some(quantiles)
    }

    /// Learns from the truth of a pending forecast.
    fn settle(&mut self, slot: usize, pending: &Pending, truth: f64) {
        if let Some(quantiles) = pending.quantiles {
            for (i, q) in JUDGED.into_iter().enumerate() {
                for (loss, forecasts) in self.losses[slot][i].iter_mut().zip(&quantiles) {
                    let lost = pinball(q, forecasts[i], truth) / truth.max(1.0);
                    *loss = *loss * 0.9995 + lost;
                }
            }
        }
        let deviation = (truth - pending.centre) / pending.scale * UNIT;
        let (below, above) = &mut self.deviations[slot];
        let side = if deviation < 0.0 {
            &mut *below
        } else {
            &mut *above
        };
        side.add(deviation.abs(), 1.0);
        if below.weight() + above.weight() > 2.0 * DECAY_EVERY {
            below.decay(0.5);
            above.decay(0.5);
        }
    }
}

/// Loss of a quantile forecast.
fn pinball(q: f64, forecast: f64, truth: f64) -> f64 {
    let miss = truth - forecast;
    if miss >= 0.0 {
        q * miss
    } else {
        (q - 1.0) * miss
    }
}

impl Vm {
    fn centres(&self) -> [f64; 3] {
        [self.last, self.means[0], self.means[1]]
    }

    fn centre(&self) -> f64 {
        let best = (1..3).fold(0, |best, i| {
            // A mean has to be clearly better than the last sample.
            if self.errors[i] * 1.02 < self.errors[best] {
                i
            } else {
                best
            }
        });
        self.centres()[best]
    }

    fn scale(&self) -> f64 {
        // A VM that never moved may still move by a thousandth.
        self.scale.max(self.last.abs() * 1e-3).max(1.0)
    }
}

impl Demand {
    /// Knows nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Learns from one sample of a VM's memory. Samples out of order are left out.
    pub fn observe(&mut self, profile: &str, vm: u64, at: Timestamp, memory_bytes: f64) {
        if !memory_bytes.is_finite() || memory_bytes < 0.0 {
            return;
        }
        let stats = match self.profiles.get_mut(profile) {
            Some(stats) => stats,
            None => self.profiles.entry(profile.into()).or_default(),
        };
        stats.use_bytes.add(memory_bytes, 1.0);
        fade(&mut stats.use_bytes);
        let Some(state) = self.vms.get_mut(&vm) else {
            let state = Vm {
                profile: profile.into(),
                last: memory_bytes,
                last_at: at,
                means: [memory_bytes; 2],
                scale: memory_bytes * 0.05,
                errors: [0.0; 3],
                own: Sketch::new(),
                pending: [None; HORIZONS_MS.len()],
            };
            self.vms.insert(vm, state);
            return;
        };
        if at <= state.last_at {
            return;
        }
        let centres = state.centres();
        for (error, centre) in state.errors.iter_mut().zip(centres) {
            *error = *error * 0.95 + (memory_bytes - centre).abs();
        }
        state.scale += 0.05 * ((memory_bytes - state.last).abs() - state.scale);
        state.means[0] += 0.3 * (memory_bytes - state.means[0]);
        state.means[1] += 0.03 * (memory_bytes - state.means[1]);
        state.last = memory_bytes;
        state.last_at = at;
        state.own.add(memory_bytes, 1.0);
        fade(&mut state.own);
        for (slot, horizon) in HORIZONS_MS.into_iter().enumerate() {
            if let Some(pending) = state.pending[slot]
                && at >= pending.due
            {
                // Far too late a sample says nothing about this horizon.
                if at.ms_since(pending.due) <= horizon {
                    stats.settle(slot, &pending, memory_bytes);
                }
                state.pending[slot] = None;
            }
            if state.pending[slot].is_none() {
                state.pending[slot] = Some(Pending {
                    due: at.plus_ms(horizon),
                    centre: state.centre(),
                    scale: state.scale(),
                    quantiles: stats.both(slot, state),
                });
            }
        }
    }

    /// Forgets a VM that stopped.
    pub fn stopped(&mut self, vm: u64) {
        self.vms.remove(&vm);
    }

    /// Forgets VMs that `runs` does not know.
    pub fn keep_running(&mut self, runs: impl Fn(u64) -> bool) {
        self.vms.retain(|vm, _| runs(*vm));
    }

    /// Memory in use at the last samples, over all running VMs, in bytes.
    pub fn in_use(&self) -> f64 {
        self.vms.values().map(|vm| vm.last).sum()
    }

    /// Puts back what was rolled up of a profile's memory use.
    pub fn restore(&mut self, profile: &str, use_bytes: Sketch) {
        self.profiles.entry(profile.into()).or_default().use_bytes = use_bytes;
    }

    /// Memory that a running VM will use `horizon_ms` from now.
    pub fn vm(&self, vm: u64, horizon_ms: i64) -> Option<Distribution> {
        let state = self.vms.get(&vm)?;
        let slot = HORIZONS_MS.iter().position(|h| *h >= horizon_ms);
        let slot = slot.unwrap_or(HORIZONS_MS.len() - 1);
        let stats = self.profiles.get(&state.profile)?;
        let at = |i: usize| {
            let q = (i as f64 + 0.5) / POINTS as f64;
            let changed = stats.by_deviation(slot, state, q).unwrap_or_else(|| {
                // Too little is known: a few scales either way.
                state.centre() + (8.0 * q - 4.0) * state.scale()
            });
            let own = state.own.quantile(q).unwrap_or(changed);
            (changed + stats.own_share(slot, q) * (own - changed)).max(0.0)
        };
        Some(Distribution::from_points((0..POINTS).map(at).collect()))
    }

    /// Memory that a VM of this profile uses, at a random moment of its life.
    pub fn profile(&self, profile: &str) -> Option<Distribution> {
        let sketch = &self.profiles.get(profile)?.use_bytes;
        let at = |i: usize| sketch.quantile((i as f64 + 0.5) / POINTS as f64);
        Some(Distribution((0..POINTS).map(at).collect::<Option<_>>()?))
    }

    /// Memory of all running VMs plus launches that may come within the horizon (profile and
    /// probability each).
    pub fn host(&self, horizon_ms: i64, launches: &[(&str, f64)]) -> Distribution {
        let running = self.vms.keys().filter_map(|vm| self.vm(*vm, horizon_ms));
        let coming = launches
            .iter()
            .filter_map(|(profile, p)| Some(self.profile(profile)?.with_probability(*p)));
        running
            .chain(coming)
            .fold(Distribution::certain(0.0), |sum, one| sum.plus(&one))
    }
}

fn fade(sketch: &mut Sketch) {
    if sketch.weight() > 2.0 * DECAY_EVERY {
        sketch.decay(0.5);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_independent_demands_have_the_right_mean_and_width() {
        let even = Distribution((0..64).map(|i| f64::from(i) + 0.5).collect());
        let sum = (0..16).fold(Distribution::certain(0.0), |sum, _| sum.plus(&even));
        assert!((sum.quantile(0.5) - 16.0 * 32.0).abs() < 4.0);
        // Standard deviation 64 / sqrt(12) each, four times that for sixteen.
        let deviation = 4.0 * 64.0 / 12.0_f64.sqrt();
        let upper = sum.quantile(0.975) - 512.0;
        assert!((upper / (1.96 * deviation) - 1.0).abs() < 0.08, "{upper}");
        let maybe = Distribution::certain(10.0).with_probability(0.25);
        assert_eq!((maybe.quantile(0.5), maybe.quantile(0.9)), (0.0, 10.0));
    }

    #[test]
    fn a_regular_vm_is_forecast_closely_and_the_host_adds_up() {
        let mut demand = Demand::new();
        for i in 0..500_i64 {
            for vm in 0..3_u64 {
                let wobble = ((i * 7919 + vm as i64) % 100) as f64 * 1e5;
                let bytes = 1e9 + wobble;
                demand.observe("web", vm, Timestamp(i * 300_000), bytes);
            }
        }
        let one = demand.vm(1, HORIZONS_MS[0]).unwrap();
        assert!(
            one.quantile(0.05) > 0.99e9 && one.quantile(0.95) < 1.02e9,
            "{one:?}"
        );
        let host = demand.host(HORIZONS_MS[0], &[("web", 0.5), ("unknown", 1.0)]);
        assert!(host.quantile(0.1) > 2.9e9 && host.quantile(0.95) > 3.9e9);
        assert!(demand.in_use() > 2.9e9);
        demand.stopped(0);
        assert!(demand.vm(0, HORIZONS_MS[0]).is_none());
        demand.keep_running(|vm| vm == 2);
        assert!(demand.vm(1, HORIZONS_MS[0]).is_none() && demand.vm(2, HORIZONS_MS[0]).is_some());
    }

    #[test]
    fn hostile_samples_are_ignored() {
        let mut demand = Demand::new();
        for (i, value) in [f64::NAN, -1.0, f64::INFINITY, 5.0].into_iter().enumerate() {
            demand.observe("p", 1, Timestamp(i as i64), value);
        }
        demand.observe("p", 1, Timestamp(-99), 1e30);
        let now = demand.vm(1, 1).unwrap();
        assert!(now.quantile(0.99).is_finite() && now.quantile(0.99) < 1e3);
    }

    /// On 1,600 VM-days: the second half of each day against simple forecasts.
    #[test]
    fn pinball_loss_beats_simple_forecasts_on_real_vms() {
        let name = "pinball_loss_beats_simple_forecasts_on_real_vms";
        let folder = std::env::var_os("FORELAY_TRACES").map(std::path::PathBuf::from);
        let path = folder.map(|folder| folder.join("google2011-vm-util.tar.gz"));
        let Some(path) = path.filter(|path| path.is_file()) else {
            println!("SKIPPED {name}: no google2011-vm-util.tar.gz in FORELAY_TRACES");
            return;
        };
        use std::io::Read as _;
        let file = std::fs::File::open(path).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
        let mut series: Vec<Vec<f64>> = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut text = String::new();
            let mut entry = entry.unwrap();
            // Every fourth machine-day: the others tell the same.
            if entry.header().entry_type().is_file() && entry.read_to_string(&mut text).is_ok() {
                let values: Vec<f64> = text
                    .lines()
                    .filter_map(|line| {
                        let mut columns = line.split([',', ' ', '\t']).filter(|c| !c.is_empty());
                        columns.nth(1)?.parse().ok()
                    })
                    .collect();
                if values.len() > 100 {
                    series.push(values);
                }
            }
        }
        let series: Vec<Vec<f64>> = series.into_iter().step_by(4).collect();
        assert!(series.len() > 100, "{} series", series.len());
        let quantiles = [0.5, 0.9, 0.99];
        let steps = [1_usize, 3, 12];
        // [horizon][quantile][forelay, last value, own quantile, all VMs' quantile]
        let mut losses = [[[0.0_f64; 4]; 3]; 3];
        let mut demand = Demand::new();
        let length = series.iter().map(Vec::len).max().unwrap_or(0);
        let mut own: Vec<Sketch> = vec![Sketch::new(); series.len()];
        let mut all = Sketch::new();
        const BYTES: f64 = 1e7;
        for t in 0..length {
            for (vm, values) in series.iter().enumerate() {
                let Some(value) = values.get(t) else { continue };
                let at = Timestamp(t as i64 * 300_000);
                demand.observe("vm", vm as u64, at, value * BYTES);
                own[vm].add(value * BYTES, 1.0);
                all.add(value * BYTES, 1.0);
                if t < length / 2 || (t + vm) % 6 != 0 {
                    continue;
                }
                for (h, step) in steps.iter().enumerate() {
                    let Some(truth) = values.get(t + step) else {
                        continue;
                    };
                    let ours = demand.vm(vm as u64, HORIZONS_MS[h]).unwrap();
                    for (k, q) in quantiles.iter().enumerate() {
                        let forecasts = [
                            ours.quantile(*q),
                            value * BYTES,
                            own[vm].quantile(*q).unwrap(),
                            all.quantile(*q).unwrap(),
                        ];
                        for (loss, forecast) in losses[h][k].iter_mut().zip(forecasts) {
                            *loss += pinball(*q, forecast, truth * BYTES) / BYTES;
                        }
                    }
                }
            }
        }
        for (h, minutes) in [5, 15, 60].into_iter().enumerate() {
            for (k, q) in quantiles.iter().enumerate() {
                let [ours, last, own, all] = losses[h][k].map(|l| l / losses[0][0][3]);
                println!(
                    "{minutes:>2} min q{q:<4}: forelay {ours:.4} last {last:.4} own {own:.4} all {all:.4}"
                );
                assert!(ours < own && ours < all, "{minutes} min, q {q}");
                assert!(ours < last * 1.02, "{minutes} min, q {q}");
            }
        }
    }
}
