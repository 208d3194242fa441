//! Cold reads: order, single flight, promotion, coalescing, cancelling.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use forelay_image::Extent;
use forelay_store::{Limits, PrefetchItem, Priority};
use tokio::sync::Semaphore;

use crate::support::{Bench, Sample, is_on_disk};

/// What arrives of a plan, by request and place.
async fn drain(mut stream: forelay_store::Prefetch, sample: &Sample) -> Vec<(usize, Extent)> {
    let (mut seen, mut ended) = (Vec::new(), Vec::new());
    while let Some(item) = stream.next().await {
        match item {
            PrefetchItem::Arrived { request, part } => {
                assert_eq!(part.image, sample.image());
                assert_eq!(part.bytes, sample.part(part.extent));
                assert!(!ended.contains(&request), "a part after its end");
                seen.push((request, part.extent));
            }
            PrefetchItem::Failed { error, .. } => panic!("{error}"),
            PrefetchItem::Ended { request } => ended.push(request),
        }
    }
    seen.sort_unstable();
    seen
}

/// A host whose line takes one request at a time, each held at the gate.
async fn narrow_host(bench: &Bench) -> (forelay_store::Store, Arc<Semaphore>) {
    let one = Limits {
        prefetch_requests: 1,
        ..Limits::default()
    };
    let host = bench.store_with(&bench.dir.path().join("one"), one).await;
    let gate = Arc::new(Semaphore::new(0));
    *bench.faults.gate.lock() = Some(gate.clone());
    (host, gate)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_request_gets_exactly_its_parts_and_ends_once() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 40, 50_000)
        .await;
    let host = bench.store().await;
    let plan = vec![
        (sample.image(), Extent::new(1_500_000, 4096)),
        (sample.image(), Extent::new(0, 120_000)),
        (sample.image(), Extent::new(1_510_000, 4096)),
        (sample.image(), Extent::new(10_000, 1000)),
    ];
    let expected = [
        (0, Extent::new(1_500_000, 4096)),
        (1, Extent::new(0, 50_000)),
        (1, Extent::new(50_000, 50_000)),
        (1, Extent::new(100_000, 20_000)),
        (2, Extent::new(1_510_000, 4096)),
        (3, Extent::new(10_000, 1000)),
    ];
    // The line is held until the plan is asked for, so that its requests meet.
    let gate = Arc::new(Semaphore::new(0));
    *bench.faults.gate.lock() = Some(gate.clone());
    let stream = host.scheduler().prefetch(plan.clone());
    while host.scheduler().counters().joined < 2 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(100);
    assert_eq!(drain(stream, &sample).await, expected);
    let cold = host.scheduler().counters();
    assert_eq!(
        (cold.prefetch_chunks, cold.demand_requests),
        (4, 0),
        "requests share chunks"
    );
    // Bytes are handed out before they are on the disk: wait until they are.
    for (image, extent) in &plan {
        while !is_on_disk(&host, *image, *extent) {
            tokio::task::yield_now().await;
        }
    }
    // Warm: the same from the disk cache.
    let before = host.scheduler().counters();
    assert_eq!(
        drain(host.scheduler().prefetch(plan), &sample).await,
        expected
    );
    let warm = host.scheduler().counters();
    assert_eq!(warm.prefetch_requests, cold.prefetch_requests);
    assert_eq!(warm.cache_hits, before.cache_hits + 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_request_ends_at_once_and_the_others_go_on() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 4, 300_000)
        .await;
    let (host, gate) = narrow_host(&bench).await;
    let image = sample.image();
    host.open_image(image).await.unwrap();
    let plan = [0, 1, 1, 3].map(|chunk| (image, sample.extent(chunk)));
    let mut stream = host.scheduler().prefetch(plan.into());
    while bench.faults.ranges.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    // The first is in flight, the last is queued, the third joins the second.
    for request in [0, 2, 3] {
        stream.canceller().cancel(request);
        let ended = stream.next().await;
        assert!(
            matches!(ended, Some(PrefetchItem::Ended { request: of }) if of == request),
            "{ended:?}"
        );
    }
    gate.add_permits(100);
    assert_eq!(drain(stream, &sample).await, [(1, sample.extent(1))]);
    let asked = bench.faults.ranges.lock().len();
    assert_eq!(asked, 2, "nothing was asked for on behalf of the last");
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_are_fetched_together() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 200, 20_000)
        .await;
    let (host, gate) = narrow_host(&bench).await;
    host.open_image(sample.image()).await.unwrap();
    let whole = Extent::new(0, sample.bytes.len() as u64);
    // The line is held until the whole plan is queued behind its first chunk, which shows by
    // another plan that joins all of it.
    let stream = host.scheduler().prefetch(vec![(sample.image(), whole)]);
    let other = host.scheduler().prefetch(vec![(sample.image(), whole)]);
    while host.scheduler().counters().joined < 200 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(1000);
    assert_eq!(drain(stream, &sample).await.len(), 200);
    assert_eq!(drain(other, &sample).await.len(), 200);
    let counters = host.scheduler().counters();
    assert_eq!(counters.prefetch_chunks, 200);
    assert!(
        counters.prefetch_requests < 20,
        "{} requests for 200 chunks",
        counters.prefetch_requests
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_chunk_is_fetched_once_and_demand_joins_prefetch() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 4, 30_000)
        .await;
    let host = bench.store().await;
    let gate = Arc::new(Semaphore::new(0));
    *bench.faults.gate.lock() = Some(gate.clone());
    let image = sample.image();
    host.open_image(image).await.unwrap();
    let stream = host.scheduler().prefetch(vec![(image, sample.extent(2))]);
    while bench.faults.ranges.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    let wanted = sample.extent(2);
    let demands: Vec<_> = (0..5)
        .map(|_| {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            let scheduler = host.scheduler().clone();
            // As a fault handler does it: from a thread that is not the runtime's.
            let thread = std::thread::spawn(move || {
                scheduler.demand(
                    image,
                    wanted,
                    false,
                    Box::new(|result| drop(sender.send(result))),
                );
            });
            thread.join().unwrap();
            receiver
        })
        .collect();
    while host.scheduler().counters().joined < 5 {
        tokio::task::yield_now().await;
    }
    gate.add_permits(100);
    for demand in demands {
        assert_eq!(
            demand.await.unwrap().unwrap(),
            sample.part(sample.extent(2))
        );
    }
    assert_eq!(drain(stream, &sample).await.len(), 1);
    assert_eq!(bench.faults.ranges.lock().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn demand_passes_a_blocked_prefetch() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 60, 200_000)
        .await;
    let (host, gate) = narrow_host(&bench).await;
    let image = sample.image();
    host.open_image(image).await.unwrap();
    let scheduler = host.scheduler();
    let whole = Extent::new(0, sample.bytes.len() as u64);
    let stream = scheduler.prefetch(vec![(image, whole)]);
    while bench.faults.ranges.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    // The only slot of prefetch is held, and stays so while the demand is answered.
    *bench.faults.gate.lock() = None;
    let last = sample.extent(59);
    let read = host
        .read_image(image, last, Priority::Demand)
        .await
        .unwrap();
    assert_eq!(read, sample.part(last));
    let counters = scheduler.counters();
    assert_eq!(
        (counters.prefetch_requests, counters.demand_requests),
        (0, 1)
    );
    gate.add_permits(1);
    assert_eq!(drain(stream, &sample).await.len(), 60);
    assert_eq!(scheduler.counters().demand_requests, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_stops() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 100, 300_000)
        .await;
    // One request at a time: the first is let through, the second is held at the gate.
    let one = Limits {
        prefetch_requests: 1,
        ..Limits::default()
    };
    let host = bench.store_with(&bench.dir.path().join("one"), one).await;
    let gate = Arc::new(Semaphore::new(1));
    *bench.faults.gate.lock() = Some(gate.clone());
    let whole = Extent::new(0, sample.bytes.len() as u64);
    let mut stream = host.scheduler().prefetch(vec![(sample.image(), whole)]);
    let first = stream.next().await;
    assert!(
        matches!(first, Some(PrefetchItem::Arrived { .. })),
        "{first:?}"
    );
    while bench.faults.ranges.lock().len() < 2 {
        tokio::task::yield_now().await;
    }
    drop(stream);
    gate.add_permits(1000);
    let held = bench.faults.ranges.lock()[1].1;
    while host.scheduler().counters().prefetch_requests < 2 {
        tokio::task::yield_now().await;
    }
    // Had anything been left in line, it would have gone before this.
    let last = sample.extent(99);
    let read = host.read_image(sample.image(), last, Priority::Demand);
    read.await.unwrap();
    assert_eq!(
        bench.faults.ranges.lock().len(),
        3,
        "a request after the drop"
    );
    assert!(held.len <= Limits::default().request_bytes);
    // What had been under way is good, and the rest can still be had.
    assert_eq!(
        drain(
            host.scheduler().prefetch(vec![(sample.image(), whole)]),
            &sample
        )
        .await
        .len(),
        100
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_gone_fails_alone() {
    let bench = Bench::new();
    let sample = bench.published(&bench.store().await, "app", 3, 4096).await;
    let host = bench.store().await;
    let gone = forelay_image::Digest::of(b"gone");
    let plan = vec![
        (gone, Extent::new(0, 4096)),
        (sample.image(), sample.extent(1)),
        (gone, Extent::new(0, 1)),
    ];
    let mut stream = host.scheduler().prefetch(plan);
    let mut arrived = Vec::new();
    let mut failed = Vec::new();
    while let Some(item) = stream.next().await {
        match item {
            PrefetchItem::Arrived { request, part } => arrived.push((request, part.bytes)),
            PrefetchItem::Failed { request, .. } => failed.push(request),
            PrefetchItem::Ended { .. } => {}
        }
    }
    let [(1, bytes)] = &arrived[..] else {
        panic!("{arrived:?}");
    };
    assert_eq!(bytes, sample.part(sample.extent(1)));
    assert_eq!(failed, [0, 2]);
    assert_eq!(bench.faults.calls_left.load(Ordering::SeqCst), -1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_demand_over_small_chunks_is_one_request_and_a_widened_one_brings_what_follows() {
    let bench = Bench::new();
    let sample = bench
        .published(&bench.store().await, "app", 120, 5_000)
        .await;
    let host = bench.store().await;
    let image = sample.image();
    let scheduler = host.scheduler();
    let demand = async |chunk: u64, widened| {
        let wanted = Extent::new(chunk * 5_000, 20_000);
        let (sender, receiver) = tokio::sync::oneshot::channel();
        scheduler.demand(
            image,
            wanted,
            widened,
            Box::new(|result| drop(sender.send(result))),
        );
        assert_eq!(receiver.await.unwrap().unwrap(), sample.part(wanted));
    };
    demand(0, false).await;
    let first = scheduler.counters();
    assert_eq!((first.demand_requests, first.demand_chunks), (1, 4));
    demand(4, true).await;
    let widened = scheduler.counters();
    let came = widened.demand_repository_bytes - first.demand_repository_bytes;
    assert_eq!(widened.demand_requests, 2);
    assert!((100 << 10..160 << 10).contains(&came), "{came} bytes");
    let ahead = widened.demand_chunks - 8;
    while !is_on_disk(&host, image, Extent::new(40_000, ahead * 5_000)) {
        tokio::task::yield_now().await;
    }
    assert!(!is_on_disk(
        &host,
        image,
        Extent::new(40_000 + ahead * 5_000, 1)
    ));
    demand(30, true).await;
    assert_eq!(scheduler.counters().demand_requests, 2, "it was there");
}
