//! Bins of gap length: whole minutes first, then growing by 15 %.
//!
//! Owns the edges, shared by every histogram of the model. Invariants: bins cover (0, infinity);
//! a bin contains its upper edge, so that a gap of exactly five minutes falls in (4, 5].

use std::sync::OnceLock;

/// Number of bins; the last one is open-ended.
pub(crate) const BINS: usize = 64;
const MINUTE_BINS: usize = 12;

fn edges() -> &'static [f64; BINS + 1] {
    static EDGES: OnceLock<[f64; BINS + 1]> = OnceLock::new();
    EDGES.get_or_init(|| {
        let mut edges = [0.0; BINS + 1];
        for (i, edge) in edges.iter_mut().enumerate().take(MINUTE_BINS + 1) {
            *edge = i as f64;
        }
        for i in MINUTE_BINS + 1..=BINS {
            edges[i] = (edges[i - 1] * 1.15).ceil();
        }
        edges
    })
}

/// The bin that holds a gap, in minutes.
pub(crate) fn bin_of(gap_min: f64) -> usize {
    edges()
        .partition_point(|&edge| edge < gap_min)
        .saturating_sub(1)
        .min(BINS - 1)
}

/// Lower edge of a bin, in minutes.
pub(crate) fn lower_edge(bin: usize) -> f64 {
    edges()[bin]
}

/// Width of a bin, in minutes.
pub(crate) fn width(bin: usize) -> f64 {
    edges()[bin + 1] - edges()[bin]
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
        for gap in [0.3, 7.0, 59.9, 1440.0, 10_080.0] {
            let bin = bin_of(gap);
            assert!(lower_edge(bin) < gap && gap <= lower_edge(bin) + width(bin));
        }
    }
}
