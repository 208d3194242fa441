//! A decaying quantile sketch: counts in logarithmic buckets (the idea of DDSketch, Masson, Rim
//! and Lee 2019), each about 4% wide.
//!
//! Invariant: buckets are sorted by index, hold positive weight, and number at most
//! [`MAX_BUCKETS`]; a quantile is within 2% of the true value of what was added.

use forelay_image::numbers::{put_number, take_number};
use serde::{Deserialize, Serialize};

/// Buckets kept; beyond it the two lowest are joined, so that upper quantiles stay exact.
const MAX_BUCKETS: usize = 512;
/// Natural logarithm of the ratio between bucket borders.
const LOG_GAMMA: f64 = 0.04;

/// Weighted quantiles of non-negative numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sketch {
    /// (bucket index, weight); index 0 holds everything below 1.
    buckets: Vec<(u16, f32)>,
    weight: f64,
}

impl Sketch {
    /// An empty sketch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Total weight.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Adds `value` with `weight`; values that are no number and weights not above zero are
    /// ignored.
    pub fn add(&mut self, value: f64, weight: f64) {
        if value.is_nan() || weight.is_nan() || weight <= 0.0 {
            return;
        }
        self.add_bucket(bucket(value), weight as f32);
        self.weight += weight;
    }

    fn add_bucket(&mut self, index: u16, weight: f32) {
        match self.buckets.binary_search_by_key(&index, |(i, _)| *i) {
            Ok(at) => self.buckets[at].1 += weight,
            Err(at) => self.buckets.insert(at, (index, weight)),
        }
        if self.buckets.len() > MAX_BUCKETS {
            let (_, lowest) = self.buckets.remove(0);
            self.buckets[0].1 += lowest;
        }
    }

    /// Adds all of `other`, scaled.
    pub fn merge(&mut self, other: &Self, scale: f64) {
        if scale.is_nan() || scale <= 0.0 {
            return;
        }
        for (index, weight) in &other.buckets {
            self.add_bucket(*index, weight * scale as f32);
        }
        self.weight += other.weight * scale;
    }

    /// Multiplies every weight by `factor`; buckets that fade out are dropped.
    pub fn decay(&mut self, factor: f64) {
        for (_, weight) in &mut self.buckets {
            *weight *= factor as f32;
        }
        self.buckets.retain(|(_, weight)| *weight > 1e-4);
        self.weight = self.buckets.iter().map(|(_, w)| f64::from(*w)).sum();
    }

    /// The value below which a share `q` of the weight lies; `None` when empty.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let total: f64 = self.buckets.iter().map(|(_, w)| f64::from(*w)).sum();
        let target = q.clamp(0.0, 1.0) * total;
        let mut below = 0.0;
        for (index, weight) in &self.buckets {
            let weight = f64::from(*weight);
            if below + weight >= target {
                // Within a bucket the weight is taken as even.
                let inside = ((target - below) / weight).clamp(0.0, 1.0);
                let (low, high) = borders(*index);
                return Some(low + (high - low) * inside);
            }
            below += weight;
        }
        self.buckets.last().map(|(index, _)| borders(*index).1)
    }

    /// Stable binary form: pairs of LEB128 (index gap, weight in 1/64).
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![1];
        let mut last = 0;
        for (index, weight) in &self.buckets {
            put_number(&mut out, u64::from(index - last));
            let weight = (f64::from(*weight) * 64.0).round().max(1.0);
            put_number(&mut out, weight as u64);
            last = *index;
        }
        out
    }

    /// Reads what [`Sketch::to_bytes`] wrote; `None` if it is damaged.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (&1, mut rest) = bytes.split_first()? else {
            return None;
        };
        let mut out = Self::new();
        let mut index: u64 = 0;
        while !rest.is_empty() {
            index = index.checked_add(take_number(&mut rest)?)?;
            let weight = take_number(&mut rest)? as f32 / 64.0;
            out.add_bucket(u16::try_from(index).ok()?, weight);
            out.weight += f64::from(weight);
        }
        Some(out)
    }
}

fn bucket(value: f64) -> u16 {
    if value < 1.0 {
        return 0;
    }
    (1.0 + value.ln() / LOG_GAMMA).min(f64::from(u16::MAX)) as u16
}

fn borders(index: u16) -> (f64, f64) {
    if index == 0 {
        return (0.0, 1.0);
    }
    let low = f64::from(index - 1) * LOG_GAMMA;
    (low.exp(), (low + LOG_GAMMA).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_two_percent() {
        let mut sketch = Sketch::new();
        let mut values: Vec<f64> = (0..5000_u64)
            .map(|i| ((i * 7919) % 5003) as f64 * 1e6 + 3.0)
            .collect();
        for value in &values {
            sketch.add(*value, 1.0);
        }
        values.sort_by(f64::total_cmp);
        for q in [0.05, 0.25, 0.5, 0.9, 0.99] {
            let exact = values[(q * 4999.0) as usize];
            let got = sketch.quantile(q).unwrap();
            assert!(
                (got / exact - 1.0).abs() < 0.02,
                "q {q}: {got} against {exact}"
            );
        }
        let copy = Sketch::from_bytes(&sketch.to_bytes()).unwrap();
        assert_eq!(copy.quantile(0.9), sketch.quantile(0.9));
    }

    #[test]
    fn hostile_values_are_bounded_and_damage_is_refused() {
        let mut sketch = Sketch::new();
        for i in 0..100_000 {
            sketch.add(1.01_f64.powi(i % 9000), 1.0);
        }
        sketch.add(f64::NAN, 1.0);
        sketch.add(f64::INFINITY, 1.0);
        sketch.add(-5.0, 1.0);
        sketch.add(5.0, -1.0);
        assert!(sketch.buckets.len() <= MAX_BUCKETS);
        assert!(Sketch::from_bytes(&[]).is_none());
        assert!(Sketch::from_bytes(&[1, 0x80]).is_none());
        assert!(Sketch::from_bytes(&[9, 1, 1]).is_none());
    }
}
