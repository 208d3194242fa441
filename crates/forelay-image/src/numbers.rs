//! Whole numbers in compact binary forms: LEB128, as the `leb128` crate writes it.
//!
//! Invariant: what is cut off or larger than 64 bits is refused, never a panic.

/// Appends a number.
pub fn put_number(out: &mut Vec<u8>, value: u64) {
    leb128::write::unsigned(out, value).expect("memory takes all bytes");
}

/// Takes a number off the front.
pub fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    leb128::read::unsigned(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_and_damage_is_refused() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut bytes = Vec::new();
            put_number(&mut bytes, value);
            bytes.push(7);
            let mut rest = &bytes[..];
            assert_eq!(take_number(&mut rest), Some(value));
            assert_eq!(rest, [7]);
            for cut in 0..bytes.len() - 1 {
                assert_eq!(take_number(&mut &bytes[..cut]), None, "{value} {cut}");
            }
        }
        assert_eq!(take_number(&mut &[0x80; 64][..]), None);
        // Ten bytes hold 70 bits.
        let too_large = [&[0xff; 9][..], &[0x7f]].concat();
        assert_eq!(take_number(&mut &too_large[..]), None);
    }
}
