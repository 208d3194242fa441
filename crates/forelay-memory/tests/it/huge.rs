//! The huge-page pool on a real tmpfs.

use std::fs::File;

use forelay_memory::huge::Pool;
use forelay_memory::mapping::FileMapping;

use crate::support::{MIB, PAGE, TestImage, skipped};

#[test]
fn privileged_promoted_images_are_right_read_only_and_outlive_the_pool_handle() {
    if skipped("privileged_promoted_images_are_right_read_only_and_outlive_the_pool_handle") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let pool = Pool::open(dir.path(), 64 * MIB).unwrap();
    let image = TestImage::new(1, 5 * MIB + 100);
    let key = image.key();
    let failed = pool.promote(&key, image.spec(), |_, _| {
        Err(std::io::ErrorKind::NotFound.into())
    });
    assert!(failed.is_err());
    assert_eq!(pool.path(&key), None, "nothing half-made is visible");

    let fill = |offset, bytes: &mut [u8]| {
        bytes.copy_from_slice(&image.content(offset, bytes.len()));
        Ok(())
    };
    let path = pool.promote(&key, image.spec(), fill).unwrap();
    let too_big = TestImage::new(2, 100 * MIB);
    assert!(
        pool.promote(&too_big.key(), too_big.spec(), |_, _| Ok(()))
            .is_err()
    );
    assert!(File::options().write(true).open(&path).is_err());

    // As the next daemon finds it.
    let pool = Pool::open(dir.path(), 64 * MIB).unwrap();
    assert_eq!(pool.path(&key), Some(path.clone()));
    assert_eq!(pool.files().unwrap(), [(key, 6 * MIB)]);
    let mapping = FileMapping::new(File::open(&path).unwrap(), image.spec().device_bytes).unwrap();
    assert_eq!(pool.demote(&key).unwrap(), 6 * MIB);
    assert_eq!((pool.demote(&key).unwrap(), pool.path(&key)), (0, None));
    pool.close().unwrap();
    for offset in (0..mapping.len()).step_by(PAGE as usize) {
        assert!(
            image.page_is_right(&mapping, offset),
            "still mapped: {offset}"
        );
    }
}
