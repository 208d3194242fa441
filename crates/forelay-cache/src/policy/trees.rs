//! A small learner: gradient boosting of oblivious trees (one test a level, as in
//! CatBoost) on squared error, with features cut into quantile bins.
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
    /// Samples by which a leaf is drawn towards zero.
    pub shrink: f32,
    /// Each tree sees one sample in this many,
    pub row_stride: usize,
    /// and at most about this many samples.
    pub tree_samples: usize,
    /// Each level looks at about this share of the features.
    pub feature_share: f64,
}

/// Samples of `width` features each, with what they turned out to be.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Samples {
    features: Vec<f32>,
    outcomes: Vec<f32>,
    oldest: usize,
}

impl Samples {
    /// Adds a sample; beyond `most` samples the oldest is replaced.
    pub fn add<const WIDTH: usize>(&mut self, features: &[f32; WIDTH], outcome: f32, most: usize) {
        if self.outcomes.len() < most {
            self.features.extend_from_slice(features);
            self.outcomes.push(outcome);
            return;
        }
        let at = self.oldest;
        self.features[at * WIDTH..(at + 1) * WIDTH].copy_from_slice(features);
        self.outcomes[at] = outcome;
        self.oldest = (at + 1) % most.max(1);
    }

    /// Forgets what was added after the first `len`.
    pub fn truncate<const WIDTH: usize>(&mut self, len: usize) {
        self.features.truncate(len * WIDTH);
        self.outcomes.truncate(len);
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
struct Tree {
    /// Feature and the value it must exceed, from the lowest bit of the leaf's number.
    tests: Vec<(u16, f32)>,
    leaves: Vec<f32>,
}

/// A fitted model.
#[derive(Clone, Debug, PartialEq)]
pub struct Trees {
    base: f32,
    trees: Vec<Tree>,
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
    fn new(samples: &Samples) -> Self {
        let rows = samples.len();
        let width = samples.features.len() / rows;
        let mut bins = vec![0; rows * width];
        let mut cuts = Vec::with_capacity(width);
        for feature in 0..width {
            let value = |row: usize| samples.features[row * width + feature];
            let mut sorted: Vec<f32> = (0..rows).step_by((rows / 4096).max(1)).map(value).collect();
            sorted.sort_unstable_by(f32::total_cmp);
            let quantile = |bin: usize| sorted[bin * sorted.len() / BINS];
            let mut borders: Vec<f32> = (1..BINS).map(quantile).collect();
            borders.dedup();
            let column = &mut bins[feature * rows..(feature + 1) * rows];
            for (row, bin) in column.iter_mut().enumerate() {
                let value = value(row);
                *bin = borders.partition_point(|&border| border < value) as u8;
            }
            cuts.push(borders);
        }
        Self {
            rows,
            width,
            cuts,
            bins,
        }
    }

    fn column(&self, feature: usize) -> &[u8] {
        &self.bins[feature * self.rows..(feature + 1) * self.rows]
    }
}

/// Sum of residuals and number of samples.
#[derive(Clone, Copy, Default)]
struct Sum {
    total: f32,
    count: f32,
}

impl Sum {
    fn add(&mut self, residual: f32) {
        self.total += residual;
        self.count += 1.0;
    }

    /// What predicting this part's mean takes off the squared error.
    fn gain(self, shrink: f32) -> f32 {
        self.total * self.total / (self.count + shrink)
    }
}

impl Trees {
    /// Fits a model of a function of the outcomes; nothing without samples.
    pub fn fit(
        samples: &Samples,
        function: impl Fn(f32) -> f32,
        settings: &FitSettings,
    ) -> Option<Self> {
        if samples.is_empty() {
            return None;
        }
        let binned = Binned::new(samples);
        let mut residuals: Vec<f32> = samples.outcomes.iter().map(|&x| function(x)).collect();
        let sum: f64 = residuals.iter().map(|&outcome| f64::from(outcome)).sum();
        let base = (sum / samples.len() as f64) as f32;
        for residual in &mut residuals {
            *residual -= base;
        }
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut trees = Vec::with_capacity(settings.trees);
        for _ in 0..settings.trees {
            trees.push(fit_tree(&binned, &mut residuals, settings, &mut random));
        }
        Some(Self { base, trees })
    }

    /// The model's answer for one set of features.
    pub fn score(&self, features: &[f32]) -> f32 {
        let leaf = |tree: &Tree| {
            let mut leaf = 0;
            for (level, &(feature, border)) in tree.tests.iter().enumerate() {
                leaf |= usize::from(features[usize::from(feature)] > border) << level;
            }
            tree.leaves[leaf]
        };
        self.base + self.trees.iter().map(leaf).sum::<f32>()
    }
}

fn fit_tree(
    binned: &Binned,
    residuals: &mut [f32],
    settings: &FitSettings,
    random: &mut Random,
) -> Tree {
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
    let value = |sum: &Sum| settings.rate * sum.total / (sum.count + settings.shrink);
    let leaves: Vec<f32> = sums.iter().map(value).collect();
    for (residual, &leaf) in residuals.iter_mut().zip(&leaf_of) {
        *residual -= leaves[usize::from(leaf)];
    }
    Tree { tests, leaves }
}

/// The feature and bin that, asked in every leaf alike, explain most.
fn best_test(
    binned: &Binned,
    residuals: &[f32],
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
                all.total += bin.total;
                all.count += bin.count;
            }
            let mut low = Sum::default();
            for (gain, bin) in gains.iter_mut().zip(bins) {
                low.total += bin.total;
                low.count += bin.count;
                let high = Sum {
                    total: all.total - low.total,
                    count: all.count - low.count,
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
        let truth = |x: &[f32; 3]| {
            if (x[0] > 0.5) == (x[1] > 0.3) {
                1.0
            } else {
                -1.0
            }
        };
        let mut samples = Samples::default();
        for _ in 0..4000 {
            let features = [unit(), unit(), unit()];
            samples.add(&features, truth(&features) + unit() - 0.5, 4000);
        }
        let model = Trees::fit(&samples, |x| x, &SETTINGS).unwrap();
        let mut wrong = 0;
        for _ in 0..500 {
            let features = [unit(), unit(), unit()];
            wrong += u32::from((model.score(&features) > 0.0) != (truth(&features) > 0.0));
        }
        assert!(wrong < 40, "{wrong} of 500 wrong");
        assert!(Trees::fit(&Samples::default(), |x| x, &SETTINGS).is_none());
    }

    #[test]
    fn the_oldest_samples_are_forgotten() {
        let mut samples = Samples::default();
        for outcome in 0..25 {
            samples.add(&[1.0, 2.0], outcome as f32, 10);
        }
        assert_eq!(samples.len(), 10);
        let constant = FitSettings {
            trees: 1,
            ..SETTINGS
        };
        let model = Trees::fit(&samples, |x| x, &constant).unwrap();
        assert!(
            (model.score(&[1.0, 2.0]) - 19.5).abs() < 1e-3,
            "mean of 15..25"
        );
    }
}
