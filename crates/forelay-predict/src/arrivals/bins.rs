//! Bins of gap length: whole minutes first, then growing by 15 %.
//!
//! Owns the edges, shared by every histogram of the model. Invariants: bins cover (0, infinity);
//! a bin contains its upper edge, so that a gap of exactly five minutes falls in (4, 5].

/// Number of bins; the last one is open-ended.
pub(crate) const BINS: usize = 64;
const MINUTE_BINS: usize = 12;

static EDGES: [f64; BINS + 1] = edges();

const fn edges() -> [f64; BINS + 1] {
    let mut edges = [0.0; BINS + 1];
    let mut i = 1;
    while i <= BINS {
        edges[i] = if i <= MINUTE_BINS {
            i as f64
        } else {
            (edges[i - 1] * 1.15).ceil()
        };
        i += 1;
    }
    edges
}

/// One over the width of each bin.
static PER_WIDTH: [f64; BINS] = {
    let mut per_width = [0.0; BINS];
    let mut bin = 0;
    while bin < BINS {
        per_width[bin] = 1.0 / width(bin);
        bin += 1;
    }
    per_width
};

/// Cells of [`FIRST_BINS`]: eight to each power of two, so that few bins begin in one of them.
const CELLS: usize = 8 * 16;

/// The bin that holds the least number of each cell, from 1 on.
static FIRST_BINS: [u8; CELLS] = first_bins();

const fn first_bins() -> [u8; CELLS] {
    let mut bins = [0; CELLS];
    let mut cell = 0;
    while cell < CELLS {
        let least = f32::from_bits(1.0f32.to_bits() + ((cell as u32) << 20)) as f64;
        let mut bin = 0;
        while bin + 1 < BINS && EDGES[bin + 1] < least {
            bin += 1;
        }
        bins[cell] = bin as u8;
        cell += 1;
    }
    bins
}

/// The bin that holds a gap, in minutes.
pub(crate) fn bin_of(gap_min: f64) -> usize {
    if gap_min <= 1.0 {
        return 0;
    }
    let cell = ((gap_min as f32).to_bits() - 1.0f32.to_bits()) >> 20;
    let mut bin = FIRST_BINS
        .get(cell as usize)
        .map_or(BINS - 1, |&bin| usize::from(bin));
    // Rounding to 32 bits may have reached the next cell.
    while EDGES[bin] >= gap_min {
        bin -= 1;
    }
    while bin + 1 < BINS && EDGES[bin + 1] < gap_min {
        bin += 1;
    }
    bin
}

/// Share of a bin that lies below a gap in it.
pub(crate) fn share_below(bin: usize, gap_min: f64) -> f64 {
    ((gap_min - EDGES[bin]) * PER_WIDTH[bin]).clamp(0.0, 1.0)
}

/// Width of a bin, in minutes.
pub(crate) const fn width(bin: usize) -> f64 {
    EDGES[bin + 1] - EDGES[bin]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upper_edges_belong_to_their_bin() {
        assert_eq!(bin_of(0.0), 0);
        assert_eq!(bin_of(1.0), 0);
        assert_eq!(bin_of(1.001), 1);
        assert_eq!(bin_of(5.0), 4);
        assert_eq!(bin_of(1.0e9), BINS - 1);
        let mut gap = 0.01;
        while gap < 1.0e6 {
            let slow = EDGES.partition_point(|&edge| edge < gap) - 1;
            assert_eq!(bin_of(gap), slow.min(BINS - 1), "{gap}");
            gap *= 1.003;
        }
        for (bin, edge) in EDGES.into_iter().enumerate().skip(1) {
            assert_eq!(bin_of(edge), bin - 1);
            assert_eq!(bin_of(edge.next_up()), bin.min(BINS - 1));
        }
        for gap in [0.3, 7.0, 59.9, 1440.0, 10_080.0] {
            let bin = bin_of(gap);
            assert!(EDGES[bin] < gap && gap <= EDGES[bin] + width(bin));
            assert!((share_below(bin, gap) * width(bin) + EDGES[bin] - gap).abs() < 1.0e-9);
        }
    }
}
