//! Compact binary columns: touched extents, launch times, component lists.
//!
//! Invariant: decoding never trusts a count or a length; damage gives `None`, never a panic.

use forelay_image::numbers::{put_number, take_number};
use forelay_image::{Extent, PAGE_BYTES};

/// Component ids, ascending.
pub(super) fn encode_members(ids: &[i64]) -> Vec<u8> {
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut out = Vec::new();
    let mut last = 0;
    for id in sorted {
        put_number(&mut out, (id - last).unsigned_abs());
        last = id;
    }
    out
}

/// Reads what [`encode_members`] wrote.
pub(super) fn decode_members(mut bytes: &[u8]) -> Option<Vec<i64>> {
    let mut ids = Vec::new();
    let mut last: i64 = 0;
    while !bytes.is_empty() {
        last = last.checked_add_unsigned(take_number(&mut bytes)?)?;
        ids.push(last);
    }
    Some(ids)
}

/// Touches of one image: pages and milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TouchedImage {
    pub component: i64,
    pub extents: Vec<(Extent, u32)>,
}

/// Encodes the touches of one launch; extents are widened to pages.
pub(super) fn encode_touches(images: &mut [TouchedImage]) -> Vec<u8> {
    let mut out = Vec::new();
    for image in images {
        image.extents.sort_unstable();
        put_number(&mut out, image.component.unsigned_abs());
        put_number(&mut out, image.extents.len() as u64);
        let mut last = 0;
        for (extent, ms) in &image.extents {
            let start = extent.offset / PAGE_BYTES;
            put_number(&mut out, start - last);
            put_number(&mut out, extent.end().div_ceil(PAGE_BYTES) - start);
            put_number(&mut out, u64::from(*ms));
            last = start;
        }
    }
    out
}

/// Reads what [`encode_touches`] wrote.
pub(super) fn decode_touches(mut bytes: &[u8]) -> Option<Vec<TouchedImage>> {
    let mut images = Vec::new();
    while !bytes.is_empty() {
        let component = i64::try_from(take_number(&mut bytes)?).ok()?;
        let count = take_number(&mut bytes)?;
        let mut extents = Vec::new();
        let mut start: u64 = 0;
        for _ in 0..count {
            start = start.checked_add(take_number(&mut bytes)?)?;
            let pages = take_number(&mut bytes)?;
            let ms = u32::try_from(take_number(&mut bytes)?).ok()?;
            let offset = start.checked_mul(PAGE_BYTES)?;
            extents.push((Extent::new(offset, pages.checked_mul(PAGE_BYTES)?), ms));
        }
        images.push(TouchedImage { component, extents });
    }
    Some(images)
}

/// Distinct launch times of a day that are kept exactly.
const EXACT_TIMES: usize = 48;
/// Width of a bin where they are not, in milliseconds.
const BIN_MS: i64 = 600_000;
/// Width of a bin in a weekly row, in milliseconds.
const WEEK_BIN_MS: i64 = 3_600_000;

/// Launches at offsets from the start of a row's time, with the resolution they are known to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Times {
    /// (milliseconds from the row's start, launches), ascending.
    pub at: Vec<(i64, u32)>,
    pub resolution_ms: i64,
}

impl Times {
    /// Times of one day: to the second while they are few, else in bins of ten minutes.
    pub fn of_day(mut at: Vec<(i64, u32)>) -> Self {
        at.sort_unstable();
        let exact = bin(&at, 1000);
        if exact.len() <= EXACT_TIMES {
            return Self {
                at: exact,
                resolution_ms: 1000,
            };
        }
        Self {
            at: bin(&at, BIN_MS),
            resolution_ms: BIN_MS,
        }
    }

    /// Times of one week, in bins of an hour.
    pub fn of_week(mut at: Vec<(i64, u32)>) -> Self {
        at.sort_unstable();
        Self {
            at: bin(&at, WEEK_BIN_MS),
            resolution_ms: WEEK_BIN_MS,
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_number(&mut out, self.resolution_ms.unsigned_abs());
        let mut last = 0;
        for (ms, count) in &self.at {
            let index = ms / self.resolution_ms;
            // The low bit says whether a count other than one follows.
            put_number(
                &mut out,
                ((index - last).unsigned_abs() << 1) | u64::from(*count != 1),
            );
            if *count != 1 {
                put_number(&mut out, u64::from(*count));
            }
            last = index;
        }
        out
    }

    pub fn decode(mut bytes: &[u8]) -> Option<Self> {
        let resolution_ms = i64::try_from(take_number(&mut bytes)?)
            .ok()
            .filter(|r| *r > 0)?;
        let mut at = Vec::new();
        let mut index: i64 = 0;
        while !bytes.is_empty() {
            let gap = take_number(&mut bytes)?;
            let count = match gap & 1 {
                0 => 1,
                _ => u32::try_from(take_number(&mut bytes)?).ok()?,
            };
            index = index.checked_add_unsigned(gap >> 1)?;
            at.push((index.checked_mul(resolution_ms)?, count));
        }
        Some(Self { at, resolution_ms })
    }
}

/// Rounds times down to bins and adds up their counts.
fn bin(at: &[(i64, u32)], bin_ms: i64) -> Vec<(i64, u32)> {
    let mut out: Vec<(i64, u32)> = Vec::new();
    for (ms, count) in at {
        let start = ms.div_euclid(bin_ms) * bin_ms;
        match out.last_mut() {
            Some((last, sum)) if *last == start => *sum = sum.saturating_add(*count),
            _ => out.push((start, *count)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn times_round_trip_and_keep_every_launch(
            at in prop::collection::vec((0_i64..86_400_000, 1_u32..5), 0..200)
        ) {
            let total: u32 = at.iter().map(|(_, c)| c).sum();
            for times in [Times::of_day(at.clone()), Times::of_week(at.clone())] {
                prop_assert_eq!(times.at.iter().map(|(_, c)| c).sum::<u32>(), total);
                prop_assert_eq!(Times::decode(&times.encode()), Some(times));
            }
        }

        #[test]
        fn touches_round_trip_page_aligned(
            pages in prop::collection::vec((0_u64..9000, 1_u64..50, 0_u32..9_000_000), 0..40)
        ) {
            let extents = pages.iter()
                .map(|(s, n, ms)| (Extent::new(s * PAGE_BYTES, n * PAGE_BYTES), *ms)).collect();
            let mut images = [TouchedImage { component: 7, extents }];
            let bytes = encode_touches(&mut images);
            prop_assert_eq!(decode_touches(&bytes), Some(images.to_vec()));
        }

        #[test]
        fn damage_is_refused_quietly(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = decode_touches(&bytes);
            let _ = decode_members(&bytes);
            let _ = Times::decode(&bytes);
        }
    }

    #[test]
    fn members_are_a_set() {
        let bytes = encode_members(&[9, 2, 300, 9]);
        assert_eq!(decode_members(&bytes), Some(vec![2, 9, 300]));
        assert_eq!(bytes, encode_members(&[300, 9, 2]));
    }
}
