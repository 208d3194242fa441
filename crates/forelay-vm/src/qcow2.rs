//! Empty qcow2 overlays: what VMs without Forelay boot from, for comparison.
//!
//! Written by hand so that nothing but QEMU itself is needed. The layout is the one of
//! docs/interop/qcow2.txt in QEMU's tree, version 3, 64 KiB clusters:
//!
//! ```text
//! cluster 0   header, backing format, backing file name
//! cluster 1   refcount table -> cluster 2
//! cluster 2   refcount block: one reference for each cluster here
//! cluster 3.. L1 table, empty: everything comes from the backing file
//! ```

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

const CLUSTER_BITS: u32 = 16;
const CLUSTER_BYTES: u64 = 1 << CLUSTER_BITS;
const HEADER_BYTES: usize = 104;
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The longest backing file name the format allows.
const MAX_NAME_BYTES: usize = 1023;

/// Makes `overlay`, an empty qcow2 file over the raw disk `backing`.
pub fn create_overlay(overlay: &Path, backing: &Path) -> io::Result<()> {
    let backing = std::path::absolute(backing)?;
    let name = backing.as_os_str().as_bytes();
    if name.len() > MAX_NAME_BYTES {
        return Err(io::Error::other(format!(
            "{}: the path is too long",
            backing.display()
        )));
    }
    let disk_bytes = std::fs::metadata(&backing)?.len();
    // An L1 entry covers one L2 table: cluster / 8 clusters.
    let l1_entries = disk_bytes
        .div_ceil(CLUSTER_BYTES * CLUSTER_BYTES / 8)
        .max(1);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER_BYTES);

    let mut header = Vec::with_capacity(HEADER_BYTES + 32 + name.len());
    let name_offset = HEADER_BYTES as u64 + 8 + 8 + 8;
    header.extend_from_slice(b"QFI\xfb");
    header.extend_from_slice(&3u32.to_be_bytes());
    header.extend_from_slice(&name_offset.to_be_bytes());
    header.extend_from_slice(&(name.len() as u32).to_be_bytes());
    header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
    header.extend_from_slice(&disk_bytes.to_be_bytes());
    header.extend_from_slice(&0u32.to_be_bytes());
    header.extend_from_slice(&(l1_entries as u32).to_be_bytes());
    header.extend_from_slice(&(3 * CLUSTER_BYTES).to_be_bytes());
    header.extend_from_slice(&CLUSTER_BYTES.to_be_bytes());
    header.extend_from_slice(&1u32.to_be_bytes());
    // No snapshots (count, offset), no feature bits (three words).
    header.extend_from_slice(&[0; 4 + 8 + 3 * 8]);
    header.extend_from_slice(&4u32.to_be_bytes());
    header.extend_from_slice(&(HEADER_BYTES as u32).to_be_bytes());
    debug_assert_eq!(header.len(), HEADER_BYTES);
    header.extend_from_slice(&BACKING_FORMAT.to_be_bytes());
    header.extend_from_slice(&3u32.to_be_bytes());
    header.extend_from_slice(b"raw\0\0\0\0\0");
    header.extend_from_slice(&[0; 8]);
    debug_assert_eq!(header.len() as u64, name_offset);
    header.extend_from_slice(name);

    let refcounts: Vec<u8> = (0..3 + l1_clusters)
        .flat_map(|_| 1u16.to_be_bytes())
        .collect();
    let file = std::fs::File::create_new(overlay)?;
    file.set_len((3 + l1_clusters) * CLUSTER_BYTES)?;
    file.write_all_at(&header, 0)?;
    file.write_all_at(&(2 * CLUSTER_BYTES).to_be_bytes(), CLUSTER_BYTES)?;
    file.write_all_at(&refcounts, 2 * CLUSTER_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_names_size_and_backing_file() {
        let dir = tempfile::tempdir().unwrap();
        let (backing, overlay) = (dir.path().join("disk"), dir.path().join("overlay"));
        std::fs::File::create(&backing)
            .unwrap()
            .set_len(5 << 30)
            .unwrap();
        create_overlay(&overlay, &backing).unwrap();
        let bytes = std::fs::read(&overlay).unwrap();
        assert_eq!(&bytes[..8], b"QFI\xfb\0\0\0\x03");
        assert_eq!(
            u64::from_be_bytes(bytes[24..32].try_into().unwrap()),
            5 << 30
        );
        assert_eq!(u32::from_be_bytes(bytes[36..40].try_into().unwrap()), 10);
        let at = u64::from_be_bytes(bytes[8..16].try_into().unwrap()) as usize;
        assert!(bytes[at..].starts_with(backing.as_os_str().as_bytes()));
        assert!(
            create_overlay(&overlay, &backing).is_err(),
            "an overlay is never overwritten"
        );
    }
}
