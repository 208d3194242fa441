//! The kernel that blurs a past gap into a belief about the next: a logistic bell, cut at zero.
//!
//! Owns the closed forms. Invariant: `fraction_by` is a distribution function on [0, infinity).

/// Beyond so many scales from its centre a kernel has no mass worth counting (6e-8 of it).
pub(crate) const CUTOFF: f64 = 16.6;

/// e^x for x within +-80, to six digits, without a branch: several are computed at a time.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 * 2^23 rounds to whole numbers; the sum's low bits are the number.
    const SERIES: [f32; 7] = [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    const ROUND: f32 = 12_582_912.0;
    // The natural logarithm of two in two parts, the first of which multiplies exactly.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = (x - whole * LN_2[0]) - whole * LN_2[1];
    let mut power = SERIES[0];
    for factor in &SERIES[1..] {
        power = power * rest + factor;
    }
    f32::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// Logistic function.
pub(crate) fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Mass below zero of an uncut kernel.
pub(crate) fn below_zero(centre: f64, scale: f64) -> f64 {
    let z = centre / scale;
    if z > CUTOFF {
        return 0.0;
    }
    f64::from(1.0 / (1.0 + exp(z as f32)))
}

/// Share of the kernel's mass at or below `x`.
#[cfg(test)]
pub(crate) fn fraction_by(centre: f64, scale: f64, x: f64) -> f64 {
    let z = (x - centre) / scale;
    if z > CUTOFF {
        return 1.0;
    }
    if z < -CUTOFF {
        return 0.0;
    }
    let cut = below_zero(centre, scale);
    ((logistic(z) - cut) / (1.0 - cut)).clamp(0.0, 1.0)
}

/// Density per minute at `x`, averaged over a quarter of a minute (the resolution of decisions).
pub(crate) fn density(centre: f64, scale: f64, x: f64) -> f64 {
    const HALF: f64 = 0.125;
    const PER_MIN: f64 = 0.5 / HALF;
    let sharpness = 1.0 / scale;
    let high = (x + HALF - centre) * sharpness;
    if high < -CUTOFF {
        return 0.0;
    }
    let low = (x - HALF - centre) * sharpness;
    if low > CUTOFF {
        return 0.0;
    }
    let cut = below_zero(centre, scale);
    let share = if x < HALF {
        // Part of the quarter lies below zero.
        (logistic(high) - cut).max(0.0)
    } else {
        // Difference of two logistics without one taken from the other, which are near alike.
        let (upper, lower) = (exp(-high as f32), exp(-low as f32));
        f64::from((lower - upper) / ((1.0 + upper) * (1.0 + lower)))
    };
    if cut > 0.0 {
        share * PER_MIN / (1.0 - cut)
    } else {
        share * PER_MIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_exponential_is_one() {
        for step in -1660..=1660 {
            let x = step as f32 / 40.0;
            let ratio = f64::from(exp(x)) / f64::from(x).exp();
            assert!((ratio - 1.0).abs() < 1.0e-6, "{x}: {ratio}");
        }
    }

    #[test]
    fn density_is_the_mass_of_a_quarter_minute() {
        for (centre, scale) in [(5.0, 0.1), (0.2, 1.5), (1440.0, 25.0), (300.0, 100.0)] {
            for step in 0..4000 {
                let x = f64::from(step) * 0.4;
                let mass = fraction_by(centre, scale, x + 0.125)
                    - fraction_by(centre, scale, (x - 0.125).max(0.0));
                let dense = density(centre, scale, x);
                assert!((dense * 0.25 - mass).abs() < 1.0e-6, "{centre} {scale} {x}");
            }
        }
    }

    #[test]
    fn the_kernel_is_a_distribution() {
        for (centre, scale) in [(5.0, 0.1), (0.2, 1.5), (1440.0, 25.0)] {
            assert!(fraction_by(centre, scale, 0.0) < 1.0e-9);
            assert!(fraction_by(centre, scale, centre + 40.0 * scale) > 1.0 - 1.0e-9);
            let mut mass = 0.0;
            let mut x = 0.125;
            while x < centre + 60.0 * scale {
                mass += density(centre, scale, x) * 0.25;
                x += 0.25;
            }
            assert!((mass - 1.0).abs() < 0.01, "{centre} {scale}: {mass}");
        }
    }
}
