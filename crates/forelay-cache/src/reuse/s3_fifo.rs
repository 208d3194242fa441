//! S3-FIFO (Yang et al., SOSP 2023): a small queue of a tenth of the memory filters what
//! is used once, a main queue with two bits of frequency keeps the rest, a ghost queue
//! remembers what the filter dropped.
//!
//! Invariants: an object is in exactly one of small, main and ghost; small and main
//! together never exceed the capacity; ghosts stand for at most nine tenths of it.

use std::collections::{HashMap, VecDeque};

use super::{EvictionPolicy, ObjectRequest};

/// Uses in the small queue from which an object moves on to the main queue.
const PROMOTE_USES: u8 = 2;

/// Highest frequency that is counted.
const MOST_USES: u8 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueueOf {
    Small,
    Main,
    Ghost,
}

#[derive(Clone, Copy, Debug)]
struct Object {
    place: QueueOf,
    uses: u8,
    bytes: u64,
    /// Tells a ghost from an older entry of the same object in the ghost queue.
    ticket: u64,
}

#[derive(Clone, Debug, Default)]
struct Queue {
    objects: VecDeque<(u32, u64)>,
    bytes: u64,
}

/// The policy of the module's header.
#[derive(Clone, Debug)]
pub struct S3Fifo {
    capacity_bytes: u64,
    small_bytes: u64,
    ghost_bytes: u64,
    objects: HashMap<u32, Object>,
    small: Queue,
    main: Queue,
    ghost: Queue,
    tickets: u64,
}

impl S3Fifo {
    /// An empty memory of `capacity_bytes`.
    pub fn new(capacity_bytes: u64) -> Self {
        let small_bytes = (capacity_bytes / 10).max(1);
        Self {
            capacity_bytes,
            small_bytes,
            ghost_bytes: capacity_bytes.saturating_sub(small_bytes),
            objects: HashMap::new(),
            small: Queue::default(),
            main: Queue::default(),
            ghost: Queue::default(),
            tickets: 0,
        }
    }

    fn put(&mut self, object: u32, place: QueueOf, bytes: u64) {
        self.tickets += 1;
        let ticket = self.tickets;
        let entry = Object {
            place,
            uses: 0,
            bytes,
            ticket,
        };
        self.objects.insert(object, entry);
        let queue = match place {
            QueueOf::Small => &mut self.small,
            QueueOf::Main => &mut self.main,
            QueueOf::Ghost => &mut self.ghost,
        };
        queue.objects.push_back((object, ticket));
        queue.bytes += bytes;
        if place == QueueOf::Ghost {
            self.trim_ghosts();
        }
    }

    fn trim_ghosts(&mut self) {
        while self.ghost.bytes > self.ghost_bytes {
            let Some((object, ticket)) = self.ghost.objects.pop_front() else {
                return;
            };
            let Some(entry) = self.objects.get(&object) else {
                continue;
            };
            if entry.place == QueueOf::Ghost && entry.ticket == ticket {
                self.ghost.bytes -= entry.bytes;
                self.objects.remove(&object);
            }
        }
    }

    /// What left; nothing if all that was looked at moved on to the main queue.
    fn evict(&mut self) -> Option<u32> {
        if self.small.bytes > self.small_bytes || self.main.objects.is_empty() {
            self.evict_small()
        } else {
            self.evict_main()
        }
    }

    fn evict_small(&mut self) -> Option<u32> {
        while let Some((object, _)) = self.small.objects.pop_front() {
            let entry = self.objects[&object];
            self.small.bytes -= entry.bytes;
            if entry.uses >= PROMOTE_USES {
                self.put(object, QueueOf::Main, entry.bytes);
                continue;
            }
            self.put(object, QueueOf::Ghost, entry.bytes);
            return Some(object);
        }
        None
    }

    fn evict_main(&mut self) -> Option<u32> {
        while let Some((object, ticket)) = self.main.objects.pop_front() {
            let Some(entry) = self.objects.get_mut(&object) else {
                continue;
            };
            if entry.uses > 0 {
                entry.uses -= 1;
                self.main.objects.push_back((object, ticket));
                continue;
            }
            self.main.bytes -= entry.bytes;
            self.objects.remove(&object);
            return Some(object);
        }
        None
    }

    /// As [`Self::request`]; says what leaves.
    pub(super) fn request_telling(&mut self, request: &ObjectRequest, left: &mut Vec<u32>) -> bool {
        if let Some(entry) = self.objects.get_mut(&request.object)
            && entry.place != QueueOf::Ghost
        {
            entry.uses = (entry.uses + 1).min(MOST_USES);
            return true;
        }
        if request.bytes > self.capacity_bytes {
            return false;
        }
        while self.used_bytes() + request.bytes > self.capacity_bytes {
            left.extend(self.evict());
        }
        // Looked up only now: making room may have dropped the ghost.
        let ghost = self.objects.get(&request.object).map(|entry| entry.bytes);
        match ghost {
            Some(bytes) => {
                self.ghost.bytes -= bytes;
                self.put(request.object, QueueOf::Main, request.bytes);
            }
            None => self.put(request.object, QueueOf::Small, request.bytes),
        }
        false
    }
}

impl EvictionPolicy for S3Fifo {
    fn request(&mut self, request: &ObjectRequest) -> bool {
        self.request_telling(request, &mut Vec::new())
    }

    fn contains(&self, object: u32) -> bool {
        let entry = self.objects.get(&object);
        entry.is_some_and(|entry| entry.place != QueueOf::Ghost)
    }

    fn used_bytes(&self) -> u64 {
        self.small.bytes + self.main.bytes
    }

    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }
}
