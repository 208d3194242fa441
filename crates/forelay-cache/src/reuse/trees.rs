//! A small learner: gradient boosting of oblivious trees (one test a level, as in
//! CatBoost) for a share between 0 and 1, on its cross entropy by Newton steps (Friedman et
//! al., 2000), with features cut into quantile bins. Squared error would see no difference
//! between one in ten and one in a hundred thousand, and that is where it is decided what
//! leaves.
//!
//! Owns fitting and scoring. Refuses to know what features mean. Deterministic: the only
//! randomness is an own generator with a fixed seed.

/// Bins of a feature.
const BINS: usize = 32;

/// How a model is fitted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FitSettings {
    /// Number of trees.
    pub trees: usize,
    /// Tests from root to leaf.
    pub depth: usize,
    /// Share of each tree that counts.
    pub rate: f32,
    /// By what a leaf is drawn towards zero: in sums of p(1 - p) over samples whose share is
    /// put at p, so four times as many samples at a half.
    pub shrink: f32,
    /// Each tree sees one sample in this many,
    pub row_stride: usize,
    /// and at most about this many samples.
    pub tree_samples: usize,
    /// Each level looks at about this share of the features.
    pub feature_share: f64,
}

/// Samples of so many features each, with what they turned out to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples<O, const WIDTH: usize> {
    features: Vec<[f32; WIDTH]>,
    outcomes: Vec<O>,
    oldest: usize,
}

impl<O, const WIDTH: usize> Default for Samples<O, WIDTH> {
    fn default() -> Self {
        Self {
            features: Vec::new(),
            outcomes: Vec::new(),
            oldest: 0,
        }
    }
}

impl<O, const WIDTH: usize> Samples<O, WIDTH> {
    /// Adds a sample; beyond `most` samples the oldest is replaced.
    pub fn add(&mut self, features: [f32; WIDTH], outcome: O, most: usize) {
        if self.outcomes.len() < most {
            self.features.push(features);
            self.outcomes.push(outcome);
            return;
        }
        let at = self.oldest;
        self.features[at] = features;
        self.outcomes[at] = outcome;
        self.oldest = (at + 1) % most.max(1);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }
}

#[derive(Clone, Debug, PartialEq)]
struct RegressionTree {
    /// Feature and the value it must exceed, from the lowest bit of the leaf's number.
    tests: Vec<(u16, f32)>,
    leaves: Vec<f32>,
}

/// A fitted model.
#[derive(Clone, Debug, PartialEq)]
pub struct Trees {
    base: f32,
    trees: Vec<RegressionTree>,
}

/// xorshift64: enough for choosing rows and features.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Samples in columns of bins.
struct Binned {
    rows: usize,
    width: usize,
    cuts: Vec<Vec<f32>>,
    bins: Vec<u8>,
}

impl Binned {
    fn new<O, const WIDTH: usize>(parts: &[&Samples<O, WIDTH>]) -> Self {
        let rows: usize = parts.iter().map(|part| part.len()).sum();
        let mut bins = Vec::with_capacity(rows * WIDTH);
        let mut cuts = Vec::with_capacity(WIDTH);
        for feature in 0..WIDTH {
            let values = || {
                let all = parts.iter().flat_map(|part| &part.features);
                all.map(move |features| features[feature])
            };
            let mut sorted: Vec<f32> = values().step_by((rows / 4096).max(1)).collect();
            sorted.sort_unstable_by(f32::total_cmp);
            let quantile = |bin: usize| sorted[bin * sorted.len() / BINS];
            let mut borders: Vec<f32> = (1..BINS).map(quantile).collect();
            borders.dedup();
            let bin = |value: f32| borders.partition_point(|&border| border < value) as u8;
            bins.extend(values().map(bin));
            cuts.push(borders);
        }
        Self {
            rows,
            width: WIDTH,
            cuts,
            bins,
        }
    }

    fn column(&self, feature: usize) -> &[u8] {
        &self.bins[feature * self.rows..(feature + 1) * self.rows]
    }
}

/// Share of which nothing is surer.
const SUREST: f32 = 1e-4;

/// The share for which its log odds stand.
fn share_of(log_odds: f32) -> f32 {
    1.0 / (1.0 + (-log_odds).exp())
}

/// How far off a sample's share is, and how much it can be off: its variance.
#[derive(Clone, Copy, Default)]
struct Residual {
    off: f32,
    variance: f32,
}

impl Residual {
    fn new(outcome: f32, log_odds: f32) -> Self {
        let share = share_of(log_odds);
        Self {
            off: outcome - share,
            variance: (share * (1.0 - share)).max(1e-3),
        }
    }
}

/// Sum of residuals.
#[derive(Clone, Copy, Default)]
struct Sum {
    off: f32,
    variance: f32,
}

impl Sum {
    fn add(&mut self, other: Residual) {
        self.off += other.off;
        self.variance += other.variance;
    }

    /// The Newton step for this part.
    fn step(self, shrink: f32) -> f32 {
        self.off / (self.variance + shrink)
    }

    /// What that step takes off the cross entropy, twice.
    fn gain(self, shrink: f32) -> f32 {
        self.off * self.step(shrink)
    }
}

impl Trees {
    /// Fits a model of a share that is a function of the outcomes of all parts; nothing without
    /// samples.
    pub fn fit<O: Copy, const WIDTH: usize>(
        parts: &[&Samples<O, WIDTH>],
        share: impl Fn(O) -> f32,
        settings: &FitSettings,
    ) -> Option<Self> {
        if parts.iter().all(|part| part.is_empty()) {
            return None;
        }
        let binned = Binned::new(parts);
        let outcomes = parts.iter().flat_map(|part| &part.outcomes);
        let outcomes: Vec<f32> = outcomes.map(|&outcome| share(outcome)).collect();
        let sum: f64 = outcomes.iter().map(|&outcome| f64::from(outcome)).sum();
        let mean = (sum / outcomes.len() as f64) as f32;
        let mean = mean.clamp(SUREST, 1.0 - SUREST);
        let base = (mean / (1.0 - mean)).ln();
        let mut log_odds = vec![base; outcomes.len()];
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut trees = Vec::with_capacity(settings.trees);
        for _ in 0..settings.trees {
            let pairs = outcomes.iter().zip(&log_odds);
            let residuals: Vec<Residual> = pairs.map(|(&y, &f)| Residual::new(y, f)).collect();
            trees.push(fit_tree(
                &binned,
                &residuals,
                &mut log_odds,
                settings,
                &mut random,
            ));
        }
        Some(Self { base, trees })
    }

    /// The share for one set of features.
    pub fn score(&self, features: &[f32]) -> f32 {
        let leaf = |tree: &RegressionTree| {
            let mut leaf = 0;
            for (level, &(feature, border)) in tree.tests.iter().enumerate() {
                leaf |= usize::from(features[usize::from(feature)] > border) << level;
            }
            tree.leaves[leaf]
        };
        share_of(self.base + self.trees.iter().map(leaf).sum::<f32>())
    }
}

fn fit_tree(
    binned: &Binned,
    residuals: &[Residual],
    log_odds: &mut [f32],
    settings: &FitSettings,
    random: &mut Random,
) -> RegressionTree {
    let least = binned.rows.div_ceil(settings.tree_samples.max(1));
    let stride = settings.row_stride.max(least).max(1) as u64;
    let seen = (0..binned.rows as u32).filter(|_| random.next().is_multiple_of(stride));
    let seen: Vec<u32> = seen.collect();
    let mut leaf_of = vec![0u16; binned.rows];
    let mut tests = Vec::with_capacity(settings.depth);
    for level in 0..settings.depth {
        let Some((feature, bin)) =
            best_test(binned, residuals, &seen, &leaf_of, level, settings, random)
        else {
            break;
        };
        tests.push((feature as u16, binned.cuts[feature][bin]));
        for (leaf, &value) in leaf_of.iter_mut().zip(binned.column(feature)) {
            *leaf |= u16::from(usize::from(value) > bin) << level;
        }
    }
    let mut sums = vec![Sum::default(); 1 << tests.len()];
    for &row in &seen {
        sums[usize::from(leaf_of[row as usize])].add(residuals[row as usize]);
    }
    let value = |sum: &Sum| settings.rate * sum.step(settings.shrink);
    let leaves: Vec<f32> = sums.iter().map(value).collect();
    for (log_odds, &leaf) in log_odds.iter_mut().zip(&leaf_of) {
        *log_odds += leaves[usize::from(leaf)];
    }
    RegressionTree { tests, leaves }
}

/// The feature and bin that, asked in every leaf alike, explain most.
fn best_test(
    binned: &Binned,
    residuals: &[Residual],
    seen: &[u32],
    leaf_of: &[u16],
    level: usize,
    settings: &FitSettings,
    random: &mut Random,
) -> Option<(usize, usize)> {
    let leaves = 1 << level;
    let mut histogram = vec![Sum::default(); leaves * BINS];
    let mut best = None;
    let mut best_gain = f32::MIN;
    for feature in 0..binned.width {
        let skip = random.next() as f64 / u64::MAX as f64 >= settings.feature_share;
        if skip || binned.cuts[feature].is_empty() {
            continue;
        }
        histogram.fill(Sum::default());
        let column = binned.column(feature);
        for &row in seen {
            let row = row as usize;
            histogram[usize::from(leaf_of[row]) * BINS + usize::from(column[row])]
                .add(residuals[row]);
        }
        let mut gains = [0f32; BINS];
        for bins in histogram.chunks_exact(BINS) {
            let mut all = Sum::default();
            for bin in bins {
                all.off += bin.off;
                all.variance += bin.variance;
            }
            let mut low = Sum::default();
            for (gain, bin) in gains.iter_mut().zip(bins) {
                low.off += bin.off;
                low.variance += bin.variance;
                let high = Sum {
                    off: all.off - low.off,
                    variance: all.variance - low.variance,
                };
                *gain += low.gain(settings.shrink) + high.gain(settings.shrink);
            }
        }
        for (bin, &gain) in gains[..binned.cuts[feature].len()].iter().enumerate() {
            if gain > best_gain {
                (best, best_gain) = (Some((feature, bin)), gain);
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: FitSettings = FitSettings {
        trees: 60,
        depth: 4,
        rate: 0.3,
        shrink: 1.0,
        row_stride: 1,
        tree_samples: 100_000,
        feature_share: 1.0,
    };

    #[test]
    fn learns_an_interaction_and_ignores_noise() {
        let mut random = Random(7);
        let mut unit = || (random.next() % 1000) as f32 / 1000.0;
        let likely = |x: &[f32; 3]| (x[0] > 0.5) == (x[1] > 0.3);
        let mut samples = Samples::default();
        for _ in 0..4000 {
            let features = [unit(), unit(), unit()];
            let chance = if likely(&features) { 0.8 } else { 0.1 };
            samples.add(features, f32::from(u8::from(unit() < chance)), 4000);
        }
        let model = Trees::fit(&[&samples], |x| x, &SETTINGS).unwrap();
        let mut wrong = 0;
        for _ in 0..500 {
            let features = [unit(), unit(), unit()];
            let score = model.score(&features);
            assert!((0.0..=1.0).contains(&score));
            wrong += u32::from((score > 0.45) != likely(&features));
        }
        assert!(wrong < 40, "{wrong} of 500 wrong");
        assert!(Trees::fit::<f32, 3>(&[&Samples::default()], |x| x, &SETTINGS).is_none());
    }

    /// One in a hundred and one in a thousand are told apart beside what is likely.
    #[test]
    fn rare_is_told_from_rarer() {
        let mut samples = Samples::default();
        for at in 0..30_000u32 {
            let kind = at % 3;
            let happens = match kind {
                0 => at % 2 == 0,
                1 => at % 100 == 1,
                _ => at % 1000 == 2,
            };
            samples.add([kind as f32], f32::from(u8::from(happens)), 30_000);
        }
        let model = Trees::fit(&[&samples], |x| x, &SETTINGS).unwrap();
        for (kind, truth) in [(0, 0.5), (1, 0.01), (2, 0.001)] {
            let ratio = model.score(&[kind as f32]) / truth;
            assert!((0.8..1.25).contains(&ratio), "kind {kind}: {ratio}");
        }
    }

    #[test]
    fn the_oldest_samples_are_forgotten() {
        let mut samples = Samples::default();
        for outcome in 0..25 {
            samples.add([1.0, 2.0], outcome as f32, 10);
        }
        assert_eq!(samples.len(), 10);
        let constant = FitSettings {
            trees: 1,
            ..SETTINGS
        };
        let model = Trees::fit(&[&samples], |x| x / 100.0, &constant).unwrap();
        let score = model.score(&[1.0, 2.0]);
        assert!((score - 0.195).abs() < 1e-3, "mean of 0.15..0.25: {score}");
    }
}
