//! The kernel that blurs a past gap into a belief about the next: a logistic bell, cut at zero.
//!
//! Owns the closed forms. Invariant: `fraction_by` is a distribution function on [0, infinity).

/// Beyond so many scales from its centre a kernel has no mass worth counting (6e-8 of it).
pub(crate) const CUTOFF: f64 = 16.6;

/// e^x for x within +-700, to eight digits, without a branch: several are computed at a time.
#[inline(always)]
pub(crate) fn exp(x: f64) -> f64 {
    // Adding and taking away 1.5 * 2^52 rounds to whole numbers; the sum's low bits are the number.
    const SERIES: [f64; 8] = [
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let rest = (x * std::f64::consts::LOG2_E - (shifted - ROUND)) * std::f64::consts::LN_2;
    let mut power = SERIES[0];
    for factor in &SERIES[1..] {
        power = power * rest + factor;
    }
    f64::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 52))
}

/// Logistic function.
pub(crate) fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Mass below zero of an uncut kernel.
pub(crate) fn below_zero(centre: f64, scale: f64) -> f64 {
    let z = centre / scale;
    if z > CUTOFF { 0.0 } else { logistic(-z) }
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
    let high = (x + HALF - centre) / scale;
    if high < -CUTOFF {
        return 0.0;
    }
    let low = (x - HALF - centre) / scale;
    if low > CUTOFF {
        return 0.0;
    }
    let cut = below_zero(centre, scale);
    let upper = (logistic(high) - cut).max(0.0);
    let lower = (logistic(low) - cut).max(0.0);
    (upper - lower) / (1.0 - cut) / (2.0 * HALF)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_exponential_is_one() {
        for step in -1660..=1660 {
            let x = f64::from(step) / 100.0;
            assert!((exp(x) / x.exp() - 1.0).abs() < 1.0e-8, "{x}");
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
