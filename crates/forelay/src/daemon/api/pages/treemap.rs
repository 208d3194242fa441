//! A map of things by size: each a rectangle whose area is its size.
//!
//! Squarified: rows are filled along the shorter side for as long as that makes their
//! rectangles squarer.

/// A rectangle.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Area {
    pub x: f64,
    pub y: f64,
    pub width: f64,
    pub height: f64,
}

/// Rectangles for `sizes`, which are sorted, largest first, and positive.
pub fn squarify(sizes: &[f64], mut within: Area) -> Vec<Area> {
    let mut areas = Vec::with_capacity(sizes.len());
    let mut left: f64 = sizes.iter().sum();
    let mut rest = sizes;
    while !rest.is_empty() && left > 0.0 {
        let scale = within.width * within.height / left;
        let side = within.width.min(within.height).max(f64::MIN_POSITIVE);
        let mut count = 1;
        while count < rest.len()
            && worst(&rest[..count + 1], scale, side) <= worst(&rest[..count], scale, side)
        {
            count += 1;
        }
        let (row, others) = rest.split_at(count);
        let sum: f64 = row.iter().sum();
        let depth = sum * scale / side;
        let mut at = 0.0;
        for size in row {
            let length = size * scale / depth.max(f64::MIN_POSITIVE);
            areas.push(if within.width >= within.height {
                Area {
                    x: within.x,
                    y: within.y + at,
                    width: depth,
                    height: length,
                }
            } else {
                Area {
                    x: within.x + at,
                    y: within.y,
                    width: length,
                    height: depth,
                }
            });
            at += length;
        }
        if within.width >= within.height {
            within.x += depth;
            within.width -= depth;
        } else {
            within.y += depth;
            within.height -= depth;
        }
        left -= sum;
        rest = others;
    }
    areas
}

/// The least square of a row's rectangles: how much longer than wide.
fn worst(row: &[f64], scale: f64, side: f64) -> f64 {
    let sum: f64 = row.iter().sum::<f64>() * scale;
    let depth = sum / side;
    let ratios = row.iter().map(|size| {
        let length = size * scale / depth;
        (length / depth).max(depth / length)
    });
    ratios.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn areas_are_the_sizes_within_the_whole(mut sizes in prop::collection::vec(1.0..1e9f64, 1..60)) {
            sizes.sort_by(|a, b| b.total_cmp(a));
            let whole = Area { x: 0.0, y: 0.0, width: 1000.0, height: 300.0 };
            let areas = squarify(&sizes, whole);
            prop_assert_eq!(areas.len(), sizes.len());
            let sum: f64 = sizes.iter().sum();
            for (area, size) in areas.iter().zip(&sizes) {
                prop_assert!((area.width * area.height - size / sum * 300_000.0).abs() < 1.0);
                prop_assert!(area.x >= -1e-6 && area.x + area.width < 1000.0 + 1e-3);
                prop_assert!(area.y >= -1e-6 && area.y + area.height < 300.0 + 1e-3);
            }
        }
    }
}
