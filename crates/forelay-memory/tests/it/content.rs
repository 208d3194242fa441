//! Bytes, names, sizes, counters: what a single daemon serves while nothing goes wrong.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use forelay_image::extent::{Extent, total_bytes};

use crate::support::{MIB, PAGE, TestImage, TestMount, eventually, skipped};

#[test]
fn privileged_files_look_as_promised_and_refuse_writes() {
    if skipped("privileged_files_look_as_promised_and_refuse_writes") {
        return;
    }
    let images: Vec<_> = (0..40)
        .map(|n| TestImage::new(n, 3 * MIB + n * 1000))
        .collect();
    let mount = TestMount::new(&images);
    let listed = std::fs::read_dir(mount.memory.mountpoint()).unwrap();
    let mut names: Vec<_> = listed.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let mut wanted: Vec<_> = images
        .iter()
        .map(|image| {
            mount
                .memory
                .path(&image.key())
                .file_name()
                .unwrap()
                .to_owned()
        })
        .collect();
    wanted.sort();
    assert_eq!(names, wanted);

    let path = mount.memory.path(&images[0].key());
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!(meta.size(), 4 * MIB);
    assert_eq!(meta.mode() & 0o7777, 0o440);
    let refused = File::options().write(true).open(&path).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    assert!(std::fs::remove_file(&path).is_err());
    assert!(File::create(mount.memory.mountpoint().join("x")).is_err());

    let mut buffer = vec![0; 8000];
    let file = File::open(&path).unwrap();
    file.read_exact_at(&mut buffer, 3 * MIB - 4000).unwrap();
    assert_eq!(buffer, images[0].content(3 * MIB - 4000, 8000));
    assert!(buffer[4000..].iter().all(|&byte| byte == 0));
}

#[test]
fn privileged_pushed_pages_need_no_read_and_residency_is_exact() {
    if skipped("privileged_pushed_pages_need_no_read_and_residency_is_exact") {
        return;
    }
    let image = TestImage::new(1, 8 * MIB + 100);
    let mount = TestMount::new(&[image]);
    let key = image.key();
    let pushes = [
        Extent::new(0, PAGE),
        Extent::new(10 * PAGE, 3 * PAGE),
        Extent::new(2 * MIB, 2 * MIB),
        Extent::new(8 * MIB, 100),
    ];
    for extent in pushes {
        let data = image.content(extent.offset, extent.len as usize);
        mount.memory.push(&key, extent.offset, &data).unwrap();
    }
    let resident = mount.memory.resident(&key).unwrap();
    let wanted: Vec<_> = pushes.iter().map(Extent::page_aligned).collect();
    assert_eq!(resident, wanted);

    let mapping = mount.map(&image);
    for extent in &wanted {
        for offset in (extent.offset..extent.end()).step_by(PAGE as usize) {
            assert!(image.page_is_right(&mapping, offset), "page at {offset}");
        }
    }
    assert_eq!(mount.memory.counters().demand_faults, 0);
    assert_eq!(mount.memory.counters().pushed_bytes, total_bytes(&pushes));

    mount
        .memory
        .note_touched(&key, &[Extent::new(0, 12 * PAGE)])
        .unwrap();
    mount
        .memory
        .note_touched(&key, &[Extent::new(0, 12 * PAGE)])
        .unwrap();
    assert_eq!(mount.memory.counters().pushed_used_bytes, 3 * PAGE);

    let freed = mount
        .memory
        .evict(&key, &[Extent::new(2 * MIB, MIB)])
        .unwrap();
    assert_eq!(freed, MIB);
    let left = mount.memory.resident(&key).unwrap();
    assert!(left.contains(&Extent::new(3 * MIB, MIB)));
    assert!(
        image.page_is_right(&mapping, 2 * MIB),
        "faulted back after eviction"
    );
    assert!(mount.memory.counters().demand_faults >= 1);
    eventually("readahead is answered", || {
        mount.memory.counters().in_flight == 0
    });
}
