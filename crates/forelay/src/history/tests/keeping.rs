//! What is appended, rolled up, folded and bounded.

use super::*;

#[tokio::test]
async fn events_come_back_and_a_second_append_changes_nothing() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let mut events = life(5 * DAY_MS, 100, "web");
    events.extend(life(4 * DAY_MS, 200, "ci"));
    events.reverse();
    let done = history.append(&events).await.unwrap();
    assert_eq!((done.stored, done.duplicates, done.late), (16, 0, 0));
    let again = history.append(&events).await.unwrap();
    assert_eq!((again.stored, again.duplicates), (0, 16));

    let launches = history.launches(None, 10).await.unwrap();
    assert_eq!(launches.len(), 2);
    let first = &launches[0];
    assert_eq!((first.of.profile.as_str(), first.vm), ("web", 100));
    assert_eq!((first.ready_ms, first.ran_ms), (Some(1500), Some(60_000)));
    assert_eq!((first.demand_fetches, first.stall_ns), (3, 5_000_000));
    assert_eq!((first.prefetched_bytes, first.used_bytes), (9000, 8000));
    assert_eq!(history.launches(Some("ci"), 10).await.unwrap().len(), 1);

    let notes = replay(&history).await;
    let order: Vec<&str> = notes.launches.iter().map(|l| l.0.as_str()).collect();
    assert_eq!(order, ["ci", "web"]);
    assert_eq!((notes.touched, notes.samples, notes.stops), (2, 2, 2));
    assert_eq!(
        notes.vms[0].1,
        ["base", "nginx", "redis"],
        "what was attached is told after the launch"
    );

    history.close().await;
    let reopened = scratch.open().await;
    assert_eq!(replay(&reopened).await, notes);
    assert_eq!(reopened.profiles().await.unwrap().len(), 2);
}

#[tokio::test]
async fn rolling_up_keeps_what_is_learned_and_closes_the_day() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    for day in 0..20 {
        let at = (100 + day) * DAY_MS + 9 * HOUR_MS;
        history
            .append(&life(at, 1000 + day as u64 * 100, "web"))
            .await
            .unwrap();
    }
    let now = Timestamp(120 * DAY_MS);
    let done = history.roll_up(now).await.unwrap();
    assert_eq!((done.days, done.events), (13, 13 * 8 + 6));
    assert_eq!(history.roll_up(now).await.unwrap().days, 0, "once");

    let late = history
        .append(&life(101 * DAY_MS, 5000, "web"))
        .await
        .unwrap();
    assert_eq!((late.stored, late.late), (0, 8));

    let notes = replay(&history).await;
    assert_eq!(notes.launches.len(), 20);
    let times: Vec<i64> = notes.launches.iter().map(|l| l.1).collect();
    assert!(times.is_sorted());
    assert!(
        times
            .iter()
            .all(|t| (t - 9 * HOUR_MS).rem_euclid(DAY_MS) <= 500)
    );
    assert_eq!(notes.sets.len(), 2);
    assert!(notes.sets.iter().all(|s| s.2 == 19), "{:?}", notes.sets);
    assert_eq!(notes.touched, 1);
    assert_eq!(notes.compositions[0].1, 13.0);
    assert_eq!((notes.compositions.len(), notes.vms.len()), (1, 7));
    let memory = notes.sketches[0] / f64::from(300 << 20);
    assert!((memory - 1.0).abs() < 0.03, "{memory}");
    let summary = &history.profiles().await.unwrap()[0];
    assert_eq!(summary.launches, 20);

    // Much later days share a row a week, and no launch is lost.
    let later = history.roll_up(Timestamp(200 * DAY_MS)).await.unwrap();
    assert_eq!(
        (later.days, later.weekly_merged),
        (6, 19),
        "the newest day stays raw"
    );
    let notes = replay(&history).await;
    let total: u32 = notes.launches.iter().map(|l| l.2).sum();
    assert_eq!(total, 20);
    assert_eq!(notes.launches[0].3, HOUR_MS);
    let gone = history.roll_up(Timestamp(900 * DAY_MS)).await.unwrap();
    assert!(gone.deleted > 0);
}

/// The working sets that a replay gives.
struct Sets(WorkingSets);

impl Sink for Sets {
    fn working_set(&mut self, of: &ProfileRef, image: Digest, set: WorkingSet) {
        self.0.insert(&of.profile, image, set);
    }
    fn touched(&mut self, of: &ProfileRef, images: &[Digest], touches: &[Touch]) {
        self.0.observe(&of.profile, images, touches);
    }
    fn touched_late(&mut self, of: &ProfileRef, touches: &[Touch]) {
        self.0.observe_late(&of.profile, touches);
    }
    fn launches(&mut self, _: &ProfileRef, _: Timestamp, _: u32, _: i64) {}
    fn composition(&mut self, _: &ProfileRef, _: Timestamp, _: &[ComponentRef], _: f64) {}
    fn launched_with(&mut self, _: &ProfileRef, _: Timestamp, _: u64, _: &[ComponentRef]) {}
    fn attached(&mut self, _: &ProfileRef, _: Timestamp, _: u64, _: &ComponentRef) {}
    fn memory_sketch(&mut self, _: &ProfileRef, _: Sketch) {}
    fn sample(&mut self, _: &ProfileRef, _: Timestamp, _: u64, _: &ResourceSample) {}
    fn stopped(&mut self, _: &ProfileRef, _: Timestamp, _: u64, _: u64) {}
}

#[tokio::test]
async fn what_a_launch_touched_late_is_folded_as_it_is_replayed() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let late = What::TouchedLate {
        touches: vec![Touch {
            image: image("nginx"),
            extent: Extent::new(40 * PAGE_BYTES, 2 * PAGE_BYTES),
            first_touch_ms: 30_000,
        }],
    };
    for number in 0..8 {
        let at = 100 * DAY_MS + number * 2 * HOUR_MS;
        let nonce = 100 * number.unsigned_abs();
        history.append(&life(at, nonce, "web")).await.unwrap();
        if number < 6 {
            let late = event(at + 60_000, nonce + 50, "web", late.clone());
            history.append(&[late]).await.unwrap();
        }
    }
    let sets = async || {
        let mut sets = Sets(WorkingSets::new(Default::default()));
        history.replay(Timestamp(0), &mut sets).await.unwrap();
        let plan = sets.0.plan("web", &[image("base"), image("nginx")]);
        let nginx = sets.0.get("web", &image("nginx")).unwrap().launches();
        (nginx, plan)
    };
    let (launches, raw) = sets().await;
    let late = raw.iter().find(|one| one.planned.image == image("nginx"));
    let late = late.unwrap().planned;
    assert_eq!((launches, late.first_touch_ms), (8, 30_000));
    assert!((0.5..0.9).contains(&late.probability), "{late:?}");

    let notes = replay(&history).await;
    assert_eq!((notes.touched, notes.touched_late), (8, 6));
    history.roll_up(Timestamp(101 * DAY_MS)).await.unwrap();
    let notes = replay(&history).await;
    assert!(notes.touched_late < 6, "some are folded: {notes:?}");
    let (launches, folded) = sets().await;
    assert_eq!(launches, 8);
    // What is stored is rounded: a 256th of a launch, a millisecond.
    let close = |a: f64, b: f64| (a - b).abs() < 0.01;
    assert_eq!(folded.len(), raw.len());
    for (a, b) in folded.iter().zip(&raw) {
        assert_eq!(a.basis, b.basis);
        let (a, b) = (a.planned, b.planned);
        assert_eq!((a.image, a.extent), (b.image, b.extent));
        assert!(close(a.probability, b.probability), "{a:?} {b:?}");
    }
}

#[tokio::test]
async fn a_clock_that_jumps_destroys_nothing() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    for day in 0..10 {
        history
            .append(&life((1000 + day) * DAY_MS, day as u64 * 100, "web"))
            .await
            .unwrap();
    }
    // The daemon believes it is 1970: nothing happens.
    let past = history.roll_up(Timestamp(0)).await.unwrap();
    assert!(past.clock_suspect);
    assert_eq!(size(&history).await.raw_events, 80);
    // One launch was dated ten years ahead: only it goes.
    history
        .append(&life(5000 * DAY_MS, 7700, "web"))
        .await
        .unwrap();
    let done = history.roll_up(Timestamp(1010 * DAY_MS)).await.unwrap();
    assert_eq!(
        (done.misdated, done.days, done.clock_suspect),
        (8, 3, false)
    );
    // The daemon believes it is ten years later: the newest day stays open.
    history.roll_up(Timestamp(5000 * DAY_MS)).await.unwrap();
    let today = history
        .append(&life(1009 * DAY_MS + HOUR_MS, 8800, "web"))
        .await
        .unwrap();
    assert_eq!((today.stored, today.late), (8, 0));
}

#[tokio::test]
async fn numbers_that_a_guest_made_up_stop_no_rolling_up() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let made_up = |read_bytes| ResourceSample {
        read_bytes,
        memory_bytes: 300 << 20,
        received_bytes: u64::MAX,
        sent_bytes: u64::MAX,
        ..ResourceSample::default()
    };
    for (nonce, read_bytes) in [(100, u64::MAX), (200, 0)] {
        let sample = event(DAY_MS, nonce, "web", What::Sample(made_up(read_bytes)));
        history.append(&[sample]).await.unwrap();
    }
    // The newest day stays raw.
    history
        .append(&life(20 * DAY_MS, 300, "web"))
        .await
        .unwrap();
    let done = history.roll_up(Timestamp(20 * DAY_MS)).await.unwrap();
    assert_eq!((done.days, done.events), (1, 2));
    let gone = history.roll_up(Timestamp(900 * DAY_MS)).await.unwrap();
    assert!(gone.deleted > 0);
}

#[tokio::test]
async fn size_is_bounded_whatever_is_appended() {
    let scratch = Scratch::new();
    let limits = Limits {
        max_bytes: 400 << 10,
        ..Limits::default()
    };
    let history = scratch.open_with(limits).await;
    for day in 0..40_i64 {
        let events: Vec<Event> = (0..200)
            .map(|i| {
                let what = What::Launch {
                    components: vec![],
                    count: 1,
                };
                let at = day * DAY_MS + i * 400_000;
                event(at, (day * 1000 + i) as u64, &format!("p{}", i % 50), what)
            })
            .collect();
        history.append(&events).await.unwrap();
        history
            .roll_up(Timestamp((day + 1) * DAY_MS))
            .await
            .unwrap();
        let size = size(&history).await;
        assert!(size.bytes <= limits.max_bytes, "day {day}: {size:?}");
    }
    let kept: u32 = replay(&history).await.launches.iter().map(|l| l.2).sum();
    assert!(kept >= 2000, "{kept} of 8000 launches are left");
}
