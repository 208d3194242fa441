//! Greedy-Dual-Size-Frequency (Cherkasova 1998): rank = clock + uses x load time / size;
//! the clock moves up to the rank of what leaves, so that value ages.

use super::ranked::Ranked;
use super::{Policy, Request};

/// The policy of the module's header.
#[derive(Clone, Debug)]
pub struct Gdsf {
    /// Ranks are bits of non-negative floats, which sort like the floats.
    objects: Ranked<(u64, u64)>,
    uses: std::collections::HashMap<u32, u32>,
    clock: f64,
    requests: u64,
}

impl Gdsf {
    /// An empty memory of `capacity_bytes`.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            objects: Ranked::new(capacity_bytes),
            uses: std::collections::HashMap::new(),
            clock: 0.0,
            requests: 0,
        }
    }

    fn rank(&self, request: &Request, uses: u32) -> (u64, u64) {
        let worth = f64::from(uses) * request.load_s.max(0.0) / request.bytes.max(1) as f64;
        ((self.clock + worth).to_bits(), self.requests)
    }
}

impl Policy for Gdsf {
    fn name(&self) -> &'static str {
        "gdsf"
    }

    fn request(&mut self, request: &Request) -> bool {
        self.requests += 1;
        if self.objects.contains(request.object) {
            let uses = self.uses.entry(request.object).or_insert(0);
            *uses += 1;
            let uses = *uses;
            self.objects
                .set_rank(request.object, self.rank(request, uses));
            return true;
        }
        if request.bytes <= self.objects.capacity_bytes() {
            while !self.objects.fits(request.bytes) {
                let Some(((rank, _), object)) = self.objects.pop() else {
                    break;
                };
                self.clock = f64::from_bits(rank);
                self.uses.remove(&object);
            }
            self.uses.insert(request.object, 1);
            self.objects
                .insert(request.object, self.rank(request, 1), request.bytes);
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
