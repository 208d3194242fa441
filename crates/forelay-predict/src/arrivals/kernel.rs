//! The kernel that blurs a past gap into a belief about the next: a logistic bell, cut at zero.
//!
//! Owns the closed forms. Invariant: `fraction_by` is a distribution function on [0, infinity).

/// So many scales away from its centre a kernel has no mass worth counting (4e-18 of it).
pub(crate) const FARTHEST: f32 = 40.0;

/// Within +-[`FARTHEST`], by comparisons and not `clamp`, which the compiler does one at a time.
#[inline(always)]
pub(crate) fn bounded(scales: f32) -> f32 {
    let low = if scales > -FARTHEST {
        scales
    } else {
        -FARTHEST
    };
    if low < FARTHEST { low } else { FARTHEST }
}

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

/// Natural logarithm of a positive, normal number, to six digits, without a branch.
#[inline(always)]
pub(crate) fn ln(x: f32) -> f32 {
    // x = m * 2^e with m in [2/3, 4/3); ln m is a short series of (m - 1) / (m + 1).
    const TWO_THIRDS: u32 = 0x3f2a_aaab;
    let bits = x.to_bits();
    let exponent = bits.wrapping_sub(TWO_THIRDS) & 0xff80_0000;
    let m = f32::from_bits(bits.wrapping_sub(exponent));
    let t = (m - 1.0) / (m + 1.0);
    let square = t * t;
    let series = square * (1.0 / 9.0) + 1.0 / 7.0;
    let series = (series * square + 0.2) * square + 1.0 / 3.0;
    let whole = (exponent as i32 >> 23) as f32;
    whole * std::f32::consts::LN_2 + 2.0 * t * (series * square + 1.0)
}

/// ln(a / b) of positive numbers; quick and exact where they are near alike.
pub(crate) fn ln_of_ratio(a: f64, b: f64) -> f64 {
    let t = (a - b) / (a + b);
    if t.abs() > 0.15 {
        return (a / b).ln();
    }
    let square = t * t;
    let series = (square * (1.0 / 9.0) + 1.0 / 7.0) * square + 0.2;
    2.0 * t * ((series * square + 1.0 / 3.0) * square + 1.0)
}

/// 1 - e^-x for x of at least zero, precise for small ones.
pub(crate) fn one_minus_exp(x: f64) -> f64 {
    if x > 0.2 {
        return 1.0 - (-x).exp();
    }
    let series = 1.0 - x * (1.0 / 5.0) * (1.0 - x * (1.0 / 6.0));
    let series = 1.0 - x * (1.0 / 3.0) * (1.0 - x * 0.25 * series);
    x * (1.0 - x * 0.5 * series)
}

/// Logistic function.
pub(crate) fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Mass below zero of an uncut kernel.
#[inline(always)]
pub(crate) fn below_zero(centre: f32, sharpness: f32) -> f32 {
    1.0 / (1.0 + exp(bounded(centre * sharpness)))
}

/// Share of the kernel's mass at or below `x`.
#[cfg(test)]
pub(crate) fn fraction_by(centre: f64, scale: f64, x: f64) -> f64 {
    let cut = logistic(-centre / scale);
    let share = logistic((x - centre) / scale);
    ((share - cut) / (1.0 - cut)).clamp(0.0, 1.0)
}

/// Densities per minute at `x` of kernels at `centres`, averaged over a quarter of a minute (the
/// resolution of decisions). `sharpness` is one over the scale.
#[inline(always)]
pub(crate) fn densities<const N: usize>(
    centres: &[f32; N],
    sharpness: &[f32; N],
    x: f64,
) -> [f32; N] {
    const HALF: f64 = 0.125;
    const PER_MIN: f32 = (0.5 / HALF) as f32;
    let (high, low) = (x + HALF, (x - HALF).max(0.0));
    let mut result = [0.0; N];
    for ((result, &centre), &sharpness) in result.iter_mut().zip(centres).zip(sharpness) {
        let above = bounded((high - f64::from(centre)) as f32 * sharpness);
        let below = bounded((low - f64::from(centre)) as f32 * sharpness);
        // Difference of two logistics without one taken from the other, which are near alike.
        let (upper, lower) = (exp(-above), exp(-below));
        let share = (lower - upper) / ((1.0 + upper) * (1.0 + lower));
        *result = share * PER_MIN / (1.0 - below_zero(centre, sharpness));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn density(centre: f64, scale: f64, x: f64) -> f64 {
        f64::from(densities(&[centre as f32], &[1.0 / scale as f32], x)[0])
    }

    #[test]
    fn the_fast_exponential_is_one() {
        for step in -1660..=1660 {
            let x = step as f32 / 40.0;
            let ratio = f64::from(exp(x)) / f64::from(x).exp();
            assert!((ratio - 1.0).abs() < 1.0e-6, "{x}: {ratio}");
        }
    }

    #[test]
    fn the_fast_logarithms_are_logarithms() {
        for step in -2000..2000 {
            let x = 1.01f64.powi(step);
            assert!(
                (f64::from(ln(x as f32)) - f64::from(x as f32).ln()).abs() < 2.0e-6,
                "{x}"
            );
            let y = 1.0 + x * 1.0e-3;
            let ratio = ln_of_ratio(y, 1.0) / y.ln();
            assert!((ratio - 1.0).abs() < 1.0e-7, "{y}: {ratio}");
            let lost = one_minus_exp(x) / -(-x).exp_m1();
            assert!((lost - 1.0).abs() < 1.0e-7, "{x}: {lost}");
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
