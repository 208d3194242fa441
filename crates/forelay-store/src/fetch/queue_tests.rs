//! Tests of the queue: its rules one by one, then all of them under random operations.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn pack(number: u8) -> Digest {
    Digest::of(&[b'p', number])
}

/// Chunk `number` of pack 0: 64 KiB each, without gaps.
fn source(number: u32) -> ChunkSource {
    source_at(0, number, number * (64 << 10))
}

fn source_at(in_pack: u8, number: u32, offset: u32) -> ChunkSource {
    ChunkSource {
        image: ImageRef {
            digest: Digest::of(b"image"),
            bytes: 1 << 30,
            metadata_bytes: 0,
            inodes: 0,
            chunk_index: Digest::of(b"index"),
        },
        chunk_no: number,
        chunk: Digest::of(&[in_pack, number as u8]),
        chunk_bytes: 64 << 10,
        pack: pack(in_pack),
        offset,
        stored_bytes: 64 << 10,
    }
}

fn limits() -> Limits {
    Limits {
        demand_requests: 2,
        prefetch_requests: 8,
        prefetch_bytes: 256 << 10,
        request_bytes: 128 << 10,
        gap_bytes: 4096,
    }
}

/// A queue in which the tests' groups may ask.
fn queue<W>() -> Queue<W> {
    let mut queue = Queue::new(limits());
    for group in 1..9 {
        queue.open(group);
    }
    queue
}

fn numbers(request: &RangeRequest) -> Vec<u32> {
    request.parts.iter().map(|part| part.chunk_no).collect()
}

#[test]
fn one_flight_per_chunk_and_late_comers_are_answered() {
    let mut queue = queue();
    assert_eq!(
        queue.submit(source(1), Priority::Prefetch, 1, 'a'),
        Submitted::Queued
    );
    assert_eq!(
        queue.submit(source(1), Priority::Prefetch, 2, 'b'),
        Submitted::Joined
    );
    let request = queue.next_request().unwrap();
    assert_eq!(
        queue.submit(source(1), Priority::Demand, 0, 'c'),
        Submitted::Joined
    );
    assert!(queue.is_demanded(source(1).chunk));
    assert!(queue.next_request().is_none());
    queue.request_ended(&request);
    assert_eq!(
        queue.delivered(source(1).chunk, Bytes::from_static(b"x")),
        ['a', 'b', 'c']
    );
    let here = queue.submit(source(1), Priority::Demand, 0, 'd');
    assert_eq!(here, Submitted::Here('d', Bytes::from_static(b"x")));
    queue.finished(source(1).chunk);
    assert_eq!(
        queue.submit(source(1), Priority::Demand, 0, 'e'),
        Submitted::Queued
    );
}

#[test]
fn what_comes_along_is_fetched_with_a_demand_but_waited_for_by_nobody() {
    let mut queue = queue();
    queue.submit(source(1), Priority::Demand, NO_GROUP, 'a');
    queue.submit(source(2), Priority::Demand, ALONG, 'b');
    let request = queue.next_request().unwrap();
    assert_eq!(numbers(&request), [1, 2]);
    assert!(queue.is_demanded(source(1).chunk));
    assert!(!queue.is_demanded(source(2).chunk));
    // Until somebody does.
    queue.submit(source(2), Priority::Demand, NO_GROUP, 'c');
    assert!(queue.is_demanded(source(2).chunk));
    // And it makes no demand of a prefetch.
    queue.submit(source(9), Priority::Prefetch, 1, 'd');
    queue.submit(source(9), Priority::Demand, ALONG, 'e');
    assert!(!queue.is_demanded(source(9).chunk));
}

#[test]
fn only_what_lies_behind_a_chunk_and_near_it_follows() {
    let (last, next) = (source(5), source(6));
    let bytes = u64::from(next.stored_bytes);
    assert!(next.follows(&last, bytes));
    assert!(!next.follows(&last, bytes - 1), "too far");
    assert!(!next.follows(&last, 0), "nothing is asked for");
    assert!(!source(4).follows(&last, 1 << 40), "before it in the pack");
    assert!(!last.follows(&last, 1 << 40), "the chunk itself");
    let elsewhere = ChunkSource {
        pack: Digest::of(b"another pack"),
        ..next
    };
    assert!(!elsewhere.follows(&last, 1 << 40), "in another pack");
}

#[test]
fn demand_overtakes_promotes_and_has_its_own_slots() {
    let mut queue = queue();
    for number in 0..20 {
        queue.submit(source(number * 2), Priority::Prefetch, 1, number);
    }
    let mut started = Vec::new();
    while let Some(request) = queue.next_request() {
        started.push(request);
    }
    assert_eq!(
        started
            .iter()
            .map(|request| request.extent.len)
            .sum::<u64>(),
        256 << 10
    );
    assert_eq!(
        queue.submit(source(38), Priority::Demand, 0, 99),
        Submitted::Promoted
    );
    let demand = queue.next_request().unwrap();
    assert_eq!(
        (demand.priority, numbers(&demand)),
        (Priority::Demand, vec![38])
    );
    // While it is in flight, prefetch keeps to a quarter.
    for request in &started[..3] {
        queue.request_ended(request);
    }
    assert!(queue.next_request().is_none());
    queue.request_ended(&demand);
    assert!(queue.next_request().is_some());
}

#[test]
fn neighbours_share_a_request_up_to_its_size() {
    let mut queue = queue();
    queue.submit(source_at(0, 1, 64 << 10), Priority::Prefetch, 1, ());
    queue.submit(source_at(1, 7, 0), Priority::Prefetch, 1, ());
    queue.submit(source_at(0, 5, 10 << 20), Priority::Prefetch, 1, ());
    queue.submit(source_at(0, 0, 0), Priority::Prefetch, 1, ());
    queue.submit(source_at(0, 2, 128 << 10), Priority::Prefetch, 1, ());
    let first = queue.next_request().unwrap();
    assert_eq!(
        (numbers(&first), first.extent),
        (vec![1, 2], Extent::new(64 << 10, 128 << 10))
    );
    assert_eq!(numbers(&queue.next_request().unwrap()), [7]);
    assert_eq!(numbers(&queue.next_request().unwrap()), [5]);
    assert_eq!(queue.queued(), 1);
}

#[test]
fn cancelling_hands_out_who_waits_whether_it_has_started_or_not() {
    let mut queue = queue();
    queue.submit(source(1), Priority::Prefetch, 7, 'a');
    queue.submit(source(1), Priority::Prefetch, 8, 'b');
    queue.submit(source(9), Priority::Prefetch, 7, 'c');
    let mut cancelled = queue.cancel(&[7]);
    cancelled.sort_unstable();
    assert_eq!(cancelled, ['a', 'c']);
    assert!(queue.cancel(&[7]).is_empty(), "once");
    let request = queue.next_request().unwrap();
    assert_eq!(numbers(&request), [1]);
    queue.submit(source(1), Priority::Demand, NO_GROUP, 'e');
    assert_eq!(queue.cancel(&[8]), ['b'], "its bytes come for others alone");
    // Who asks a step too late is told, and starts nothing.
    let late = queue.submit(source(20), Priority::Prefetch, 7, 'd');
    assert_eq!(late, Submitted::Cancelled('d'));
    assert_eq!(queue.queued(), 0);
    assert!(queue.next_request().is_none());
    assert_eq!(queue.failed(source(1).chunk), ['e']);
}

#[derive(Clone, Debug)]
enum Operation {
    Submit(u32, bool, u64),
    Start,
    Deliver(usize),
    Fail(usize),
    Cancel(u64),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        6 => (0..30u32, any::<bool>(), 1..4u64).prop_map(|(number, demand, group)| Operation::Submit(number, demand, group)),
        4 => Just(Operation::Start),
        3 => any::<prop::sample::Index>().prop_map(|index| Operation::Deliver(index.index(64))),
        1 => any::<prop::sample::Index>().prop_map(|index| Operation::Fail(index.index(64))),
        1 => (1..4u64).prop_map(Operation::Cancel),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_waiter_is_handed_out_once_and_limits_hold(operations in prop::collection::vec(operation(), 1..120)) {
        let mut queue: Queue<usize> = queue();
        let mut waiting: BTreeSet<usize> = BTreeSet::new();
        let mut running: Vec<RangeRequest> = Vec::new();
        let mut next = 0;
        let end = |queue: &mut Queue<usize>, running: &mut Vec<RangeRequest>, waiting: &mut BTreeSet<usize>, index: usize, well: bool| {
            if running.is_empty() {
                return;
            }
            let request = running.remove(index % running.len());
            queue.request_ended(&request);
            for part in &request.parts {
                let waiters = if well { queue.delivered(part.chunk, Bytes::new()) } else { queue.failed(part.chunk) };
                for waiter in waiters {
                    assert!(waiting.remove(&waiter), "{waiter} was handed out twice");
                }
                queue.finished(part.chunk);
            }
        };
        for operation in operations {
            match operation {
                Operation::Submit(number, demand, group) => {
                    let priority = if demand { Priority::Demand } else { Priority::Prefetch };
                    waiting.insert(next);
                    queue.submit(source(number), priority, group, next);
                    next += 1;
                }
                Operation::Start => running.extend(queue.next_request()),
                Operation::Deliver(index) => end(&mut queue, &mut running, &mut waiting, index, true),
                Operation::Fail(index) => end(&mut queue, &mut running, &mut waiting, index, false),
                Operation::Cancel(group) => {
                    let cancelled = queue.cancel(&[group]);
                    queue.open(group);
                    for waiter in cancelled {
                        prop_assert!(waiting.remove(&waiter));
                    }
                }
            }
            let mut chunks: Vec<Digest> = running.iter().flat_map(|request| &request.parts).map(|part| part.chunk).collect();
            let count = chunks.len();
            chunks.sort_unstable();
            chunks.dedup();
            prop_assert_eq!(chunks.len(), count, "two flights of one chunk");
            let (demand, prefetch) = queue.active();
            prop_assert_eq!(demand + prefetch, running.len());
            prop_assert!(demand <= limits().demand_requests && prefetch <= limits().prefetch_requests);
        }
        while !running.is_empty() || queue.queued() > 0 {
            running.extend(queue.next_request());
            end(&mut queue, &mut running, &mut waiting, 0, true);
        }
        prop_assert!(waiting.is_empty(), "forgotten: {:?}", waiting);
    }
}
