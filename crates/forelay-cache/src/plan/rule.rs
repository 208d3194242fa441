//! The planner's rule by worth as an eviction policy, so that the simulator holds it to the same
//! contract as others and compares it on the same traces.
//!
//! Objects are components, each one extent; only observed uses count, since a trace of
//! requests carries no forecasts of launches.

use std::collections::BTreeMap;

use forelay_image::Digest;
use forelay_image::pages::PageRun;

use crate::names::{DeviceImage, Domain, ProfileName, SharedImage};
use crate::reuse::{EvictionPolicy, ObjectRequest};

use super::benefit::BenefitModel;
use super::config::PlanConfig;

/// One object in memory.
#[derive(Clone, Debug)]
struct Held {
    image: SharedImage,
    bytes: u64,
    load_s: f64,
}

/// See the module's header.
#[derive(Clone, Debug)]
pub struct ByWorth {
    benefit: BenefitModel,
    domain: Domain,
    capacity_bytes: u64,
    used_bytes: u64,
    held: BTreeMap<u32, Held>,
}

impl ByWorth {
    /// An empty memory of `capacity_bytes` under the planner's usual settings.
    pub fn new(capacity_bytes: u64) -> Self {
        let config = PlanConfig {
            budget_bytes: capacity_bytes,
            ..PlanConfig::default()
        };
        Self {
            benefit: BenefitModel::new(&config),
            domain: "all".into(),
            capacity_bytes,
            used_bytes: 0,
            held: BTreeMap::new(),
        }
    }

    /// Takes out what is worth least per byte until `bytes` fit.
    fn make_room(&mut self, bytes: u64, now_ms: i64) {
        if self.used_bytes + bytes <= self.capacity_bytes {
            return;
        }
        let worth = |held: &Held| {
            let need = self.benefit.needs(&held.image, now_ms).of_segment(0);
            need * held.load_s.max(0.0) / held.bytes.max(1) as f64
        };
        let valued = self
            .held
            .iter()
            .map(|(object, held)| (worth(held), *object));
        let mut valued: Vec<(f64, u32)> = valued.collect();
        valued.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for (_, object) in valued {
            if self.used_bytes + bytes <= self.capacity_bytes {
                return;
            }
            if let Some(gone) = self.held.remove(&object) {
                self.used_bytes -= gone.bytes;
            }
        }
    }
}

impl EvictionPolicy for ByWorth {
    fn request(&mut self, request: &ObjectRequest) -> bool {
        let digest = Digest::of(&request.object.to_le_bytes());
        let image = SharedImage::new(self.domain.clone(), digest);
        let device = DeviceImage {
            image: digest,
            image_bytes: request.bytes,
        };
        let profile = ProfileName::from(request.owner.to_string());
        let domain = self.domain.clone();
        self.benefit
            .launched(&domain, &profile, &[device], request.now_ms);
        if let Some(samples) = self.benefit.samples() {
            self.benefit.install(samples.fit());
        }
        self.benefit
            .used(&image, PageRun::from(0..1), false, request.now_ms);
        if self.held.contains_key(&request.object) {
            return true;
        }
        if request.bytes <= self.capacity_bytes {
            self.make_room(request.bytes, request.now_ms);
            let held = Held {
                image,
                bytes: request.bytes,
                load_s: request.load_s,
            };
            self.used_bytes += request.bytes;
            self.held.insert(request.object, held);
        }
        false
    }

    fn contains(&self, object: u32) -> bool {
        self.held.contains_key(&object)
    }

    fn used_bytes(&self) -> u64 {
        self.used_bytes
    }

    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }
}
