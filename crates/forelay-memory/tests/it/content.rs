//! Bytes, names, sizes, counters: what a single daemon serves while nothing goes wrong.

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};

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
    assert_eq!(meta.mode() & 0o7777, 0o460);
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

fn punch_hole(file: &File) -> std::io::Result<()> {
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, 0, PAGE)?)
}

/// Maps a whole file, writable, shared with others or not.
fn map_writable(file: &File, bytes: u64, flags: rustix::mm::MapFlags) -> *mut u8 {
    use rustix::mm::{ProtFlags, mmap};
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe {
        mmap(
            std::ptr::null_mut(),
            bytes as usize,
            protection,
            flags,
            file,
            0,
        )
        .unwrap()
    };
    address.cast()
}

#[test]
fn privileged_files_that_open_for_writing_are_mapped_privately_and_change_for_nobody() {
    if skipped("privileged_files_that_open_for_writing_are_mapped_privately_and_change_for_nobody")
    {
        return;
    }
    let image = TestImage::new(1, 4 * MIB);
    let mount = TestMount::new(&[image]);
    let path = mount.memory.private_path(&image.key()).unwrap();
    let closed = path.ancestors().nth(2).unwrap();
    assert_eq!(std::fs::metadata(closed).unwrap().mode() & 0o777, 0o700);
    let file = File::options().read(true).write(true).open(&path).unwrap();

    let other = mount.map(&image);
    assert!(image.page_is_right(&other, 0));
    let own = map_writable(&file, 4 * MIB, rustix::mm::MapFlags::PRIVATE);
    for page in 0..64 {
        // SAFETY: inside the mapping, which nobody else has.
        unsafe { own.add((page * PAGE) as usize).write(0xaa) };
    }
    // SAFETY: as above.
    assert_eq!(unsafe { own.read() }, 0xaa);
    let unchanged = |what: &str| {
        for offset in (0..64).map(|page| page * PAGE) {
            assert!(
                image.page_is_right(&other, offset),
                "{what}: mapped at {offset}"
            );
        }
        let mut read = vec![0; 64 * PAGE as usize];
        File::open(mount.memory.path(&image.key()))
            .unwrap()
            .read_exact_at(&mut read, 0)
            .unwrap();
        assert_eq!(read, image.content(0, read.len()), "{what}: read");
    };
    unchanged("private writes");
    type Change = fn(&File) -> std::io::Result<()>;
    let changes: [(&str, Change); 5] = [
        ("truncation", |file| file.set_len(0)),
        ("punching a hole", punch_hole),
        ("mode", |file| {
            file.set_permissions(Permissions::from_mode(0o666))
        }),
        ("write", |file| file.write_at(&[0xbb; 8192], 0).map(drop)),
        ("appending", |file| {
            file.write_at(&[0xbb; 1], 4 * MIB).map(drop)
        }),
    ];
    for (what, change) in changes {
        let refused = change(&file).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EROFS), "{what}");
        unchanged(what);
    }
    assert!(File::create(path.with_file_name("x")).is_err());
    assert!(std::fs::remove_file(&path).is_err());
    // The one way that is left, as the module of the mounts says; what is dropped comes back.
    let shared = map_writable(&file, 4 * MIB, rustix::mm::MapFlags::SHARED);
    // SAFETY: inside the mapping; others may read the byte, and do only below.
    unsafe { shared.write(0xcc) };
    assert!(
        !image.page_is_right(&other, 0),
        "it changes for others after all"
    );
    mount
        .memory
        .evict(&image.key(), &[Extent::new(0, PAGE)])
        .unwrap();
    unchanged("a shared mapping, after eviction");
}
