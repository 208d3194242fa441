//! The uncompressed kernel inside a bzImage, for boots under TCG.
//!
//! A bzImage unpacks itself, which an emulated CPU is slow at; the ELF image inside has a
//! PVH entry that QEMU starts directly. Only LZ4 payloads (Debian's) are unpacked here; with
//! any other the bzImage is used as it is. The guest kernel is then not relocated at random,
//! so this is for emulated guests only, not for KVM.
//!
//! Sources: the x86 boot protocol (Documentation/arch/x86/boot.rst) for the header, the
//! legacy frame of the lz4 project (doc/lz4_Frame_format.md); its blocks are `lz4_flex`'s
//! business. Its frame decoder is not used: the kernel's size stands behind the last block,
//! which is no frame's end.

use std::io;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use forelay_host::atomic_write;
use twox_hash::XxHash3_64;

/// Magic of the LZ4 legacy frame.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// A block of the legacy frame holds at most this much.
const LZ4_BLOCK_BYTES: usize = 8 << 20;
/// More than any kernel.
const MAX_KERNEL_BYTES: usize = 512 << 20;

/// The uncompressed form of `kernel` in `cache_dir`, made if missing; `None` if the kernel's
/// format is not understood (then use it as it is).
pub fn uncompressed(kernel: &Path, cache_dir: &Path) -> io::Result<Option<PathBuf>> {
    let found = std::fs::metadata(kernel)?;
    let modified = found
        .modified()?
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let path = XxHash3_64::oneshot(kernel.as_os_str().as_encoded_bytes());
    let name = format!(
        "{path:016x}-{}-{:x}.vmlinux",
        found.len(),
        modified.as_nanos()
    );
    let target = cache_dir.join(name);
    if target.exists() {
        return Ok(Some(target));
    }
    let Some(image) = extract(&std::fs::read(kernel)?) else {
        return Ok(None);
    };
    std::fs::create_dir_all(cache_dir)?;
    atomic_write(&target, &image)?;
    Ok(Some(target))
}

/// The ELF image inside a bzImage with an LZ4 payload.
pub fn extract(image: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (setup_sectors + 1) * 512 + word(0x248)? as usize;
    let payload = image.get(start..start.checked_add(word(0x24c)? as usize)?)?;
    let mut blocks = payload.strip_prefix(&LZ4_LEGACY)?;
    let mut kernel = Vec::new();
    // One for all blocks: a small block costs what it holds.
    let mut unpacked = vec![0; LZ4_BLOCK_BYTES];
    while blocks.len() > 4 {
        let (size, rest) = blocks.split_at(4);
        let size = u32::from_le_bytes(size.try_into().ok()?) as usize;
        // The payload ends with the size of the kernel, which is no block.
        let Some(block) = rest.get(..size) else { break };
        let count = lz4_flex::block::decompress_into(block, &mut unpacked).ok()?;
        kernel.extend_from_slice(&unpacked[..count]);
        if kernel.len() > MAX_KERNEL_BYTES {
            return None;
        }
        blocks = &rest[size..];
    }
    kernel.starts_with(b"\x7fELF").then_some(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A bzImage with these LZ4 blocks as its payload.
    fn image(blocks: &[&[u8]]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        for block in blocks {
            payload.extend_from_slice(&(block.len() as u32).to_le_bytes());
            payload.extend_from_slice(block);
        }
        payload.extend_from_slice(&[0xff; 4]);
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(&payload);
        image
    }

    #[test]
    fn literals_copies_and_overlapping_copies_are_unpacked() {
        // 6 literals, then 4 + 15 + 2 bytes from 2 back, then 1 literal.
        let block = b"\x6f\x7fELFab\x02\x00\x02\x10z";
        let kernel = extract(&image(&[block])).unwrap();
        assert_eq!(
            kernel,
            [b"\x7fELFab".as_slice(), &b"ab".repeat(11)[..21], b"z"].concat()
        );
        assert_eq!(extract(&image(&[b"\x40\x7fELF"])).unwrap(), b"\x7fELF");
        for bad in [&b"\x40none"[..], b"\xf0", b"\x00\x01\x00", b"\x10a\x00\x00"] {
            assert!(extract(&image(&[bad])).is_none());
        }
        assert!(extract(b"not a kernel").is_none());
    }

    #[test]
    fn a_small_block_costs_what_it_holds() {
        // With a whole block's room set for each, this would be terabytes: it would not end.
        let blocks: Vec<&[u8]> = std::iter::once(&b"\x40\x7fELF"[..])
            .chain(std::iter::repeat_n(&b"\x10z"[..], 500_000))
            .collect();
        assert_eq!(extract(&image(&blocks)).unwrap().len(), 500_004);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn any_block_is_unpacked_or_refused(block in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = extract(&image(&[&block]));
        }
    }
}
