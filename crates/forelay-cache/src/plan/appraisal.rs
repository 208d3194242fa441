//! What a forecast is worth, in the planner's own figures: the answer to `forelay forecast`.
//!
//! Refuses to change anything. Invariant: a request is queued with the very worth that is
//! told here of its bytes.

use forelay_image::PlannedExtent;

use crate::names::{DeviceImage, Domain, SharedImage};

use super::Planner;
use super::benefit::{Forecast, pieces};

/// Something that may come true and would touch parts of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct Prospect {
    /// The trust domain.
    pub domain: Domain,
    /// The image.
    pub device: DeviceImage,
    /// Probability that it comes true within the horizon.
    pub probability: f64,
    /// When, if anything can be said.
    pub expected_ms: Option<i64>,
    /// What would be touched then.
    pub working_set: Vec<PlannedExtent>,
}

/// Where the bytes of a prospect are, and what having them is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Appraisal {
    /// All of its bytes.
    pub bytes: u64,
    /// Those in shared memory.
    pub resident_bytes: u64,
    /// Those that are not, but in the disk cache.
    pub disk_bytes: u64,
    /// Seconds that loading what is missing is expected to save.
    pub seconds_saved: f64,
}

impl Appraisal {
    /// Seconds saved for each MiB.
    pub fn seconds_per_mib(&self) -> f64 {
        self.seconds_saved / self.bytes.max(1) as f64 * f64::from(1 << 20)
    }
}

impl Planner {
    /// Values a prospect as the queue of prefetches does.
    pub fn appraise(&self, prospect: &Prospect, now_ms: i64) -> Appraisal {
        let devices = [prospect.device];
        let forecast = Forecast {
            domain: prospect.domain.clone(),
            devices: devices.into(),
            probability: prospect.probability,
            expected_ms: prospect.expected_ms,
            working_set: Vec::new(),
            updated_ms: now_ms,
            prepared: false,
        };
        let probability = self.benefit.probability_now(&forecast, now_ms);
        let image = SharedImage::new(prospect.domain.clone(), prospect.device.image);
        let mut appraisal = Appraisal::default();
        let pieces = pieces(&devices, &prospect.working_set, self.config.piece_bytes);
        self.table.read(|table| {
            for planned in pieces {
                let need = probability * planned.probability;
                let absent = table.absent(&image, planned.extent);
                let absent_bytes: u64 = absent.iter().map(|part| part.extent.len).sum();
                let missing = absent.iter().filter(|part| !part.fetching);
                let missing_bytes: u64 = missing.map(|part| part.extent.len).sum();
                let extents = absent.iter().map(|part| part.extent);
                let on_disk = extents.filter(|part| self.benefit.is_on_disk(&image.image, *part));
                let wait = self.benefit.wait_per_byte(&image.image, planned.extent);
                appraisal.bytes += planned.extent.len;
                appraisal.resident_bytes += planned.extent.len - absent_bytes;
                appraisal.disk_bytes += on_disk.map(|part| part.len).sum::<u64>();
                appraisal.seconds_saved += need * wait * missing_bytes as f64;
            }
        });
        appraisal
    }
}
