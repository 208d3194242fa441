//! A set of bytes kept as disjoint ranges.
//!
//! Invariant: ranges are non-empty, sorted, and neither overlap nor touch.

use std::collections::BTreeMap;

use forelay_image::extent::Extent;

/// Disjoint byte ranges: start -> end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Adds `extent`; returns how many of its bytes were new.
    pub fn insert(&mut self, extent: Extent) -> u64 {
        if extent.len == 0 {
            return 0;
        }
        let new_bytes = extent.len - self.covered_bytes(extent);
        let (mut start, mut end) = (extent.offset, extent.end());
        while let Some((&found_start, &found_end)) = self.0.range(..=end).next_back() {
            if found_end < start {
                break;
            }
            self.0.remove(&found_start);
            start = start.min(found_start);
            end = end.max(found_end);
        }
        self.0.insert(start, end);
        new_bytes
    }

    /// Takes `extent` out; returns how many of its bytes were there.
    pub fn remove(&mut self, extent: Extent) -> u64 {
        let mut removed_bytes = 0;
        let hits: Vec<Extent> = self.overlaps(extent).collect();
        for found in hits {
            removed_bytes += found.len;
            let end = found.end();
            let Some((&start, &whole_end)) = self.0.range(..=found.offset).next_back() else {
                break;
            };
            self.0.remove(&start);
            if start < found.offset {
                self.0.insert(start, found.offset);
            }
            if end < whole_end {
                self.0.insert(end, whole_end);
            }
        }
        removed_bytes
    }

    /// The parts of `extent` that are in the set.
    pub fn overlaps(&self, extent: Extent) -> impl Iterator<Item = Extent> + '_ {
        let first = self
            .0
            .range(..=extent.offset)
            .next_back()
            .map_or(extent.offset, |(&start, _)| start);
        self.0
            .range(first..extent.end().max(first))
            .filter_map(move |(&start, &end)| Extent::new(start, end - start).intersection(&extent))
    }

    /// The parts of `extent` that are not in the set.
    pub fn gaps(&self, extent: Extent) -> Vec<Extent> {
        let mut gaps = Vec::new();
        let mut at = extent.offset;
        for found in self.overlaps(extent) {
            if at < found.offset {
                gaps.push(Extent::new(at, found.offset - at));
            }
            at = found.end();
        }
        if at < extent.end() {
            gaps.push(Extent::new(at, extent.end() - at));
        }
        gaps
    }

    /// How many bytes of `extent` are in the set.
    pub fn covered_bytes(&self, extent: Extent) -> u64 {
        self.overlaps(extent).map(|found| found.len).sum()
    }

    /// All ranges in order.
    pub fn extents(&self) -> Vec<Extent> {
        self.0
            .iter()
            .map(|(&start, &end)| Extent::new(start, end - start))
            .collect()
    }

    /// Bytes in the set.
    pub fn total_bytes(&self) -> u64 {
        self.0.iter().map(|(start, end)| end - start).sum()
    }
}

impl Extend<Extent> for RangeSet {
    fn extend<I: IntoIterator<Item = Extent>>(&mut self, extents: I) {
        for extent in extents {
            self.insert(extent);
        }
    }
}

impl FromIterator<Extent> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(extents: I) -> Self {
        let mut set = Self::default();
        set.extend(extents);
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_bytes(
            steps in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..20), 0..40),
        ) {
            let mut set = RangeSet::default();
            let mut model = BTreeSet::new();
            for (insert, offset, len) in steps {
                let extent = Extent::new(offset, len);
                let bytes: BTreeSet<u64> = (offset..offset + len).collect();
                let present = bytes.intersection(&model).count() as u64;
                prop_assert_eq!(set.covered_bytes(extent), present);
                let gap_bytes: u64 = set.gaps(extent).iter().map(|gap| gap.len).sum();
                prop_assert_eq!(gap_bytes, len - present);
                if insert {
                    prop_assert_eq!(set.insert(extent), len - present);
                    model.extend(bytes);
                } else {
                    prop_assert_eq!(set.remove(extent), present);
                    model.retain(|byte| !bytes.contains(byte));
                }
                let ranges = set.extents();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].offset));
                let flat: BTreeSet<u64> =
                    ranges.iter().flat_map(|range| range.offset..range.end()).collect();
                prop_assert_eq!(&flat, &model);
            }
        }
    }
}
