//! The heaviest candidate gaps of a mixture, laid out so that all are evaluated at once.
//!
//! Owns the merging of like candidates and the two sums over all of them that every stretch of
//! time costs: mass beyond a moment, and how fine time must be cut there. Invariants: at most
//! [`ATOMS`] candidates, the rest of the places have no weight; no branch depends on a candidate,
//! so that the compiler can do several at a time.

use super::kernel::{below_zero, bounded, exp};

/// Most candidates kept.
pub(crate) const ATOMS: usize = 32;

/// A hazard that is too low to be worth looking at closely, in launches per minute.
const LEAST_HAZARD_PER_MIN: f32 = 0.002;

/// A candidate gap with its blur and its weight in the whole mixture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Atom {
    pub centre_min: f32,
    pub blur_min: f32,
    pub weight: f32,
}

/// Up to [`ATOMS`] candidates, column by column.
#[derive(Debug, Clone)]
pub(crate) struct Atoms {
    centre_min: [f32; ATOMS],
    blur_min: [f32; ATOMS],
    /// One over the blur.
    sharpness: [f32; ATOMS],
    /// Weight, made up for the kernel's mass below zero.
    weight: [f32; ATOMS],
}

impl Default for Atoms {
    fn default() -> Self {
        Self::new(&[])
    }
}

impl Atoms {
    /// The columns of at most [`ATOMS`] candidates.
    fn new(list: &[Atom]) -> Self {
        let column = |of: fn(&Atom) -> f32, none: f32| -> [f32; ATOMS] {
            std::array::from_fn(|place| list.get(place).map_or(none, of))
        };
        let made_up =
            |atom: &Atom| atom.weight / (1.0 - below_zero(atom.centre_min, 1.0 / atom.blur_min));
        Self {
            // Far away, so that an empty place never asks for fine stretches.
            centre_min: column(|atom| atom.centre_min, 1.0e30),
            blur_min: column(|atom| atom.blur_min, 1.0),
            sharpness: column(|atom| 1.0 / atom.blur_min, 1.0),
            weight: column(made_up, 0.0),
        }
    }

    /// Reads a word of every part (see [`super::record::Record::touch`]).
    pub(crate) fn touch(&self) -> f32 {
        let columns = [
            &self.centre_min,
            &self.blur_min,
            &self.sharpness,
            &self.weight,
        ];
        columns
            .into_iter()
            .map(|column| column[0] + column[16])
            .sum()
    }

    /// Mass of gaps longer than `elapsed_min`.
    pub(crate) fn beyond(&self, elapsed_min: f64) -> f64 {
        let elapsed_min = elapsed_min as f32;
        let mut cells = [0.0f32; ATOMS];
        for (atom, cell) in cells.iter_mut().enumerate() {
            let past = (elapsed_min - self.centre_min[atom]) * self.sharpness[atom];
            *cell = self.weight[atom] / (1.0 + exp(bounded(past)));
        }
        f64::from(sum(&cells))
    }

    /// The finest stretch that a candidate asks for at `elapsed_min`, with `survival` left. One
    /// that cannot raise the hazard to what anybody would pay for asks for nothing.
    pub(crate) fn finest(&self, elapsed_min: f64, survival: f64) -> f64 {
        let elapsed_min = elapsed_min as f32;
        // The peak hazard of a logistic kernel is a quarter of its weight over its blur.
        let least = 4.0 * LEAST_HAZARD_PER_MIN * survival as f32;
        let mut asked = [0.0f32; ATOMS];
        let columns = self.centre_min.iter().zip(&self.blur_min);
        for (asked, (centre, blur)) in asked.iter_mut().zip(columns) {
            let distance = 0.3 * (*centre - elapsed_min).abs();
            let blur = 0.5 * *blur;
            *asked = if distance > blur { distance } else { blur };
        }
        let heights = self.weight.iter().zip(&self.sharpness);
        for (asked, (weight, sharpness)) in asked.iter_mut().zip(heights) {
            let ignored = if weight * sharpness > least {
                1.0
            } else {
                1.0e9
            };
            *asked *= ignored;
        }
        let mut finest = [f32::MAX; 4];
        for four in asked.chunks_exact(4) {
            for (finest, &asked) in finest.iter_mut().zip(four) {
                *finest = if asked < *finest { asked } else { *finest };
            }
        }
        f64::from(finest.into_iter().fold(f32::MAX, f32::min))
    }
}

/// The sum, in an order in which several are added at a time.
fn sum(cells: &[f32; ATOMS]) -> f32 {
    let mut quarters = [0.0f32; ATOMS / 4];
    for (i, cell) in quarters.iter_mut().enumerate() {
        let [a, b, c, d] = [0, 1, 2, 3].map(|quarter| cells[quarter * ATOMS / 4 + i]);
        *cell = (a + b) + (c + d);
    }
    let mut sums = [0.0f32; 4];
    for (i, sum) in sums.iter_mut().enumerate() {
        *sum = quarters[i] + quarters[4 + i];
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// Merges like candidates and keeps the heaviest; returns the mass dropped, too.
pub(crate) fn compact(mut atoms: Vec<Atom>) -> (Atoms, f64) {
    // Neither is negative, and bits of such floats sort like the floats.
    let bits = |value: f32| u64::from(value.to_bits());
    atoms.sort_unstable_by_key(|atom| bits(atom.centre_min) << 32 | bits(atom.blur_min));
    atoms.dedup_by(|atom, last| {
        let like = (atom.blur_min - last.blur_min).abs() < 0.01 * last.blur_min
            && atom.centre_min - last.centre_min < 0.25 * last.blur_min;
        if like {
            last.weight += atom.weight;
            last.centre_min += (atom.centre_min - last.centre_min) * atom.weight / last.weight;
        }
        like
    });
    let mut dropped = 0.0;
    if atoms.len() > ATOMS {
        atoms.select_nth_unstable_by(ATOMS, |a, b| b.weight.total_cmp(&a.weight));
        dropped = atoms[ATOMS..]
            .iter()
            .map(|atom| f64::from(atom.weight))
            .sum();
        atoms.truncate(ATOMS);
    }
    (Atoms::new(&atoms), dropped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arrivals::kernel::fraction_by;

    #[test]
    fn columns_say_what_the_kernels_say_one_by_one() {
        let list: Vec<Atom> = (0..20)
            .map(|i| Atom {
                centre_min: 0.3 + 1.9f32.powi(i % 13),
                blur_min: [0.1, 1.5, 100.0][i as usize % 3],
                weight: 0.05,
            })
            .collect();
        let atoms = Atoms::new(&list);
        for step in 0..200 {
            let elapsed_min = 1.07f64.powi(step) - 1.0;
            let expected: f64 = list
                .iter()
                .map(|atom| {
                    let (centre, blur) = (f64::from(atom.centre_min), f64::from(atom.blur_min));
                    0.05 * (1.0 - fraction_by(centre, blur, elapsed_min))
                })
                .sum();
            let beyond = atoms.beyond(elapsed_min);
            assert!(
                (beyond - expected).abs() < 2.0e-6,
                "{elapsed_min}: {beyond} instead of {expected}"
            );
        }
    }

    #[test]
    fn like_candidates_become_one_and_only_the_heaviest_stay() {
        let atom = |centre_min: f32, weight: f32| Atom {
            centre_min,
            blur_min: 1.0,
            weight,
        };
        let mut list: Vec<Atom> = (0..40).map(|i| atom(10.0 * i as f32, 0.001)).collect();
        list.push(atom(100.1, 0.5));
        let (atoms, dropped) = compact(list);
        assert!((dropped - 0.008).abs() < 1.0e-6, "{dropped}");
        let near = atoms.beyond(95.0) - atoms.beyond(105.0);
        assert!((near - 0.501 * 0.993).abs() < 0.005, "{near}");
        assert!((atoms.finest(100.1, 1.0) - 0.5).abs() < 1.0e-6);
        assert!(
            atoms.finest(200.1, 1.0) > 20.0,
            "the light ones ask for nothing"
        );
    }
}
