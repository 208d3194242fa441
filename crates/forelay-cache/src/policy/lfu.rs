//! Least frequently used leaves first; counts start anew when an object returns, ties go
//! to the one used longest ago.

use super::ranked::Ranked;
use super::{Policy, Request};

/// The policy of the module's header.
#[derive(Clone, Debug)]
pub struct Lfu {
    objects: Ranked<(u64, u64)>,
    requests: u64,
}

impl Lfu {
    /// An empty memory of `capacity_bytes`.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            objects: Ranked::new(capacity_bytes),
            requests: 0,
        }
    }
}

impl Policy for Lfu {
    fn name(&self) -> &'static str {
        "lfu"
    }

    fn request(&mut self, request: &Request) -> bool {
        self.requests += 1;
        if let Some((count, _)) = self.objects.rank(request.object) {
            self.objects
                .set_rank(request.object, (count + 1, self.requests));
            return true;
        }
        if request.bytes <= self.objects.capacity_bytes() {
            while !self.objects.fits(request.bytes) && self.objects.pop().is_some() {}
            self.objects
                .insert(request.object, (1, self.requests), request.bytes);
        }
        false
    }

    fn contains(&self, object: u32) -> bool {
        self.objects.contains(object)
    }

    fn used_bytes(&self) -> u64 {
        self.objects.used_bytes()
    }

    fn capacity_bytes(&self) -> u64 {
        self.objects.capacity_bytes()
    }
}
