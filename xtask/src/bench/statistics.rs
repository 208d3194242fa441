//! Medians and ratios of samples, and how well they are known.

use serde_json::Value;

use super::draw::Draw;

/// The median; NaN of nothing.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The sample that the share `quantile` of all samples does not exceed; NaN of nothing.
pub fn quantile(samples: &[f64], quantile: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * quantile).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or(f64::NAN)
}

/// `a / b`, with 0 / 0 = 0.
pub fn ratio(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a / b }
}

/// Figures of launches of one kind, one entry a round.
#[derive(Default)]
pub struct VmSamples(pub Vec<Value>);

impl VmSamples {
    /// A figure of each, `absent` where nobody tells it.
    pub fn all(&self, field: &str, absent: f64) -> Vec<f64> {
        let told = self.0.iter().map(|one| one.pointer(field));
        told.map(|value| value.and_then(Value::as_f64).unwrap_or(absent))
            .collect()
    }

    /// The median of a figure over those that tell it.
    pub fn median(&self, field: &str) -> f64 {
        let mut told = self.all(field, f64::NAN);
        told.retain(|figure| !figure.is_nan());
        median(&told)
    }
}

/// Resamplings of a bootstrap.
const RESAMPLINGS: usize = 2000;

/// Ratios of samples that were taken in the same rounds.
pub struct Paired(Vec<f64>);

impl Paired {
    /// The ratios `a / b` of the rounds that have both.
    pub fn new(a: &[f64], b: &[f64]) -> Self {
        Self(a.iter().zip(b).map(|(a, b)| a / b).collect())
    }

    /// The median ratio.
    pub fn median(&self) -> f64 {
        median(&self.0)
    }

    /// The interval that holds the median ratio with 95 % confidence, by bootstrap; the same
    /// for the same samples.
    pub fn interval(&self) -> [f64; 2] {
        let mut draw = Draw(self.0.len() as u64);
        let mut medians = Vec::with_capacity(RESAMPLINGS);
        for _ in 0..RESAMPLINGS {
            let again = self.0.iter();
            let again: Vec<f64> = again
                .map(|_| self.0[draw.below(self.0.len() as u32) as usize])
                .collect();
            medians.push(median(&again));
        }
        [quantile(&medians, 0.025), quantile(&medians, 0.975)]
    }

    /// The width of that interval.
    pub fn width(&self) -> f64 {
        let [low, high] = self.interval();
        high - low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            (quantile(&samples, 0.95), quantile(&samples, 0.5)),
            (95.0, 50.0)
        );
        assert_eq!(ratio(0.0, 0.0), 0.0);
    }

    #[test]
    fn more_rounds_make_a_ratio_better_known_and_pairing_takes_out_what_rounds_share() {
        let noise = |round: usize| 1.0 + 0.3 * ((round * 7) % 11) as f64 / 11.0;
        let rounds = |count: usize, factor: f64| -> Vec<f64> {
            (0..count).map(|round| noise(round) * factor).collect()
        };
        let paired = Paired::new(&rounds(9, 1.1), &rounds(9, 1.0));
        assert!((paired.median() - 1.1).abs() < 1e-9 && paired.width() < 1e-9);
        let scattered = |count: usize| Paired::new(&rounds(count, 1.0), &vec![1.0; count]);
        let ([low, high], median) = (scattered(33).interval(), scattered(33).median());
        assert!(low <= median && median <= high);
        assert!(scattered(99).width() < scattered(9).width());
        assert_eq!(scattered(9).interval(), scattered(9).interval());
    }
}
