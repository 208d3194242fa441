//! A lookup in the mapping table allocates nothing.

use forelay_cache::mapping_table::{Arrival, MappingTable, PageState, Phase};
use forelay_cache::{DeviceImage, Domain, SharedImage, VmName};
use forelay_image::{Digest, Extent};

#[test]
fn a_lookup_allocates_nothing() {
    let domain = Domain::from("tenant");
    let device = DeviceImage {
        image: Digest::of(b"base"),
        image_bytes: 4096 * 1024,
    };
    let vm = VmName::from("web");
    let mut table = MappingTable::new();
    table
        .map(&vm, &domain, &"p".into(), &[device], Phase::Running)
        .unwrap();
    let image = SharedImage::new(domain, device.image);
    for page in (0..1024).step_by(2) {
        let extent = Extent::new(page * 4096, 4096);
        table
            .complete_fetch(&image, extent, Arrival::Demand)
            .unwrap();
        table.pin(&image, extent).unwrap();
    }
    let mut resident = 0;
    let allocations = allocation_counter::measure(|| {
        for page in 0..1024 {
            let entry = table.lookup("web", &device.image, page * 4096).unwrap();
            resident += u32::from(entry.state == PageState::Resident);
            assert!(table.lookup("nobody", &device.image, 0).is_none());
        }
    });
    assert_eq!(resident, 512);
    assert_eq!(allocations.count_total, 0);
    let counts = allocation_counter::measure(|| drop(std::hint::black_box(vec![1u8; 64])));
    assert_eq!(counts.count_total, 1, "the counter counts");
}
