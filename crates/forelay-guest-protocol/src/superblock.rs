//! The three facts init needs from an EROFS image: its UUID and its device slots.
//!
//! Offsets are those of the kernel's `struct erofs_super_block` and
//! `struct erofs_deviceslot` (fs/erofs/erofs_fs.h). The component image that belongs into
//! a slot is named by the slot's tag, 64 hex digits of a SHA-256; a component image's UUID
//! is the first half of that digest, so slots are filled by UUID, never by device order.

/// Offset of the superblock in the image.
pub const SUPERBLOCK_OFFSET: u64 = 1024;
/// Bytes of the superblock that are read.
pub const SUPERBLOCK_BYTES: usize = 128;
/// Bytes of a device slot.
pub const SLOT_BYTES: usize = 128;
/// More devices than any VMM offers slots; bounds what a hostile image can ask for.
pub const MAX_DEVICES: u16 = 512;

const MAGIC: u32 = 0xe0f5_e1e2;

/// What [`parse`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// UUID of the image.
    pub uuid: [u8; 16],
    /// Number of extra devices.
    pub devices: u16,
    /// Byte offset of the first device slot in the image.
    pub slots_offset: u64,
}

/// Reads a superblock; `None` if the bytes are not one.
pub fn parse(bytes: &[u8]) -> Option<Superblock> {
    let bytes = bytes.get(..SUPERBLOCK_BYTES)?;
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    if bytes[..4] != MAGIC.to_le_bytes() {
        return None;
    }
    let devices = u16_at(86);
    if devices > MAX_DEVICES {
        return None;
    }
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&bytes[48..64]);
    let slots_offset = u64::from(u16_at(88)) * SLOT_BYTES as u64;
    Some(Superblock {
        uuid,
        devices,
        slots_offset,
    })
}

/// UUID of the component image that belongs into a device slot; `None` if the slot's tag is
/// not a digest.
pub fn slot_uuid(slot: &[u8]) -> Option<[u8; 16]> {
    parse_uuid(std::str::from_utf8(slot.get(..32)?).ok()?)
}

/// Reads 32 hex digits.
pub fn parse_uuid(hex: &str) -> Option<[u8; 16]> {
    if hex.len() != 32 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(hex, 16).ok().map(u128::to_be_bytes)
}

/// Writes 32 lower-case hex digits.
pub fn format_uuid(uuid: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*uuid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_and_bad_blocks_refused() {
        let mut block = [0u8; SUPERBLOCK_BYTES];
        assert_eq!(parse(&block), None);
        block[..4].copy_from_slice(&MAGIC.to_le_bytes());
        block[48..64].copy_from_slice(&[7; 16]);
        block[86] = 2;
        block[88] = 9;
        let found = parse(&block).unwrap();
        assert_eq!(
            (found.uuid, found.devices, found.slots_offset),
            ([7; 16], 2, 1152)
        );
        block[86..88].copy_from_slice(&[0xff, 0xff]);
        assert_eq!(parse(&block), None);
        assert_eq!(parse(&block[..100]), None);
    }

    #[test]
    fn uuids_round_trip() {
        let hex = "00112233445566778899aabbccddeeff";
        assert_eq!(format_uuid(&parse_uuid(hex).unwrap()), hex);
        assert!(parse_uuid("+0112233445566778899aabbccddeeff").is_none());
        assert!(slot_uuid(&[0; 64]).is_none());
        assert!(slot_uuid(&[b'a'; 64]).is_some());
    }
}
