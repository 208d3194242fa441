//! What a wait costs depends on where the bytes would come from.

use super::*;

fn on_disk(number: u8) -> PlannerEvent {
    PlannerEvent::DiskCacheChanged(DiskContent {
        image: image(number),
        absent: Vec::new(),
    })
}

#[test]
fn what_is_on_disk_goes_before_what_only_the_repository_has() {
    let mut host = Host::new(config(4));
    for number in [1, 2] {
        host.tell(forecast(&format!("p{number}"), number, 0.4));
        host.push_all();
    }
    host.tell(on_disk(1));
    host.launch("now", "web", &[3], vec![planned(3, 0, MIB, 1.0, 0)]);
    host.push_all();
    assert_eq!(
        [1, 2, 3].map(|number| host.resident(number) / MIB),
        [1, 2, 1]
    );
}

#[test]
fn an_appraisal_tells_where_bytes_are_and_the_worth_that_the_queue_goes_by() {
    let mut host = Host::new(config(16));
    host.tell(forecast("p1", 1, 0.8));
    assert!(host.push_one(), "one of two pieces");
    let prospect = Prospect {
        domain: "d".into(),
        device: device(1, 4 * MIB),
        probability: 0.8,
        expected_ms: None,
        working_set: vec![planned(1, 0, 4 * MIB, 0.5, 0)],
    };
    let config = host.planner.config.clone();
    let repository = |bytes: u64| {
        let latency = config.latency_ms / 1e3 / MIB as f64;
        0.4 * bytes as f64 * (latency + 1.0 / config.bandwidth_bytes_per_s)
    };
    let cold = host.planner.appraise(&prospect, host.now_ms);
    // The second piece is under way.
    assert_eq!((cold.bytes, cold.resident_bytes), (4 * MIB, MIB));
    assert!((cold.seconds_saved - repository(2 * MIB)).abs() < 1e-6);
    assert!((cold.seconds_per_mib() - cold.seconds_saved / 4.0).abs() < 1e-9);
    host.tell(PlannerEvent::DiskCacheChanged(DiskContent {
        image: image(1),
        absent: vec![Extent::new(3 * MIB, MIB)],
    }));
    let warm = host.planner.appraise(&prospect, host.now_ms);
    assert_eq!(warm.disk_bytes, 2 * MIB);
    let saved = warm.seconds_saved;
    assert!(repository(MIB) < saved && saved < repository(MIB) * 1.2);
}
