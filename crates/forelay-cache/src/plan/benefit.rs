//! What an extent is worth: expected seconds that a VM would wait if it were not
//! resident, per byte, within the horizon. The only such figure: the queue's order, the context
//! of victims and `forelay forecast` all use it. How long a wait is depends on where the bytes
//! would come from, the disk cache or the repository.
//!
//! Two sources, both ageing: forecasts (profiles with a launch probability and a working
//! set) and observed uses, so that bytes no forecast speaks of still have a history: when
//! the component is used again ([`super::reuse`]; until that has learned, the rate of its
//! decayed count) and how often a use of it touches a segment of 256 KiB.
//!
//! Refuses to know what is resident or mapped. Invariant: every worth is finite and not
//! negative, whatever probabilities come in.

use std::collections::{BTreeMap, HashMap};

use forelay_image::pages::{PageNo, PageRun, PageSet, Pages};
use forelay_image::{Digest, Extent, PAGE_BYTES, PlannedExtent};

use crate::names::{DeviceImage, Domain, ProfileName, SharedImage};

use super::config::PlanConfig;
use super::message::{DiskContent, FetchCost};
use super::queue::ForecastKey;
use super::reuse::{Reuse, ReuseFit, ReuseSamples};

/// Size of a segment, the grain of observed uses.
const SEGMENT: Pages = Pages(64);

/// Demand comes in pieces of at most this size (1 MiB), each a round trip.
const LARGEST_PIECE: Pages = Pages(256);

/// What is forecast of one launch or of one VM's attachments.
#[derive(Clone, Debug)]
pub(super) struct Forecast {
    pub(super) domain: Domain,
    pub(super) devices: Vec<DeviceImage>,
    /// Of the launch, or of an attachment.
    pub(super) probability: f64,
    pub(super) expected_ms: Option<i64>,
    pub(super) working_set: Vec<PlannedExtent>,
    pub(super) updated_ms: i64,
    /// Whether a launch is mapped ahead.
    pub(super) prepared: bool,
}

/// A count that halves every half-life.
#[derive(Clone, Copy, Debug, Default)]
struct Decayed {
    count: f32,
    at_ms: i64,
}

impl Decayed {
    fn at(self, now_ms: i64, half_life_ms: i64) -> f64 {
        let age_ms = now_ms.saturating_sub(self.at_ms).max(0);
        f64::from(self.count) * (-(age_ms as f64) / half_life_ms.max(1) as f64).exp2()
    }

    fn bump(&mut self, now_ms: i64, half_life_ms: i64) {
        self.count = (self.at(now_ms, half_life_ms) + 1.0) as f32;
        self.at_ms = self.at_ms.max(now_ms);
    }
}

/// Observed uses of one image.
#[derive(Clone, Debug, Default)]
struct Uses {
    component: Decayed,
    segments: Vec<Decayed>,
}

/// The need of one image's segments, from observed uses.
pub(super) struct Needs<'a> {
    uses: Option<&'a Uses>,
    /// Learned probability that the component is used within the horizon.
    component: Option<f64>,
    half_life_ms: i64,
    horizon_ms: i64,
    now_ms: i64,
}

impl Needs<'_> {
    /// Whether launches have taught when the component is used again.
    #[cfg(test)]
    pub(super) const fn is_learned(&self) -> bool {
        self.component.is_some()
    }

    /// Probability of a use within the horizon.
    pub(super) fn of_segment(&self, segment: usize) -> f64 {
        let Some(uses) = self.uses else { return 0.0 };
        let Some(segment) = uses.segments.get(segment) else {
            return 0.0;
        };
        let count = segment.at(self.now_ms, self.half_life_ms);
        if let Some(component) = self.component {
            // The share of the component's uses that came here; both counts fade alike.
            let all = uses.component.at(self.now_ms, self.half_life_ms);
            return component * (count / all.max(1e-9)).min(1.0);
        }
        // A steady rate r leaves a decayed count of r * half-life / ln 2.
        let rate = count * std::f64::consts::LN_2 / self.half_life_ms.max(1) as f64;
        1.0 - (-rate * self.horizon_ms as f64).exp()
    }
}

/// Forecasts and uses of everything. See the module's header.
#[derive(Clone, Debug)]
pub(super) struct BenefitModel {
    pub(super) forecasts: BTreeMap<ForecastKey, Forecast>,
    uses: BTreeMap<SharedImage, Uses>,
    reuse: Reuse,
    repository: TierCost,
    disk: TierCost,
    /// What the disk cache lacks, of images of which anything is known.
    off_disk: HashMap<Digest, PageSet>,
    half_life_ms: i64,
    horizon_ms: i64,
}

/// What a demand fetch from a tier takes.
#[derive(Clone, Copy, Debug)]
struct TierCost {
    /// Until the first byte.
    latency_s: f64,
    seconds_per_byte: f64,
}

impl TierCost {
    /// Of a latency in milliseconds and bytes a second.
    fn new(latency_ms: f64, bytes_per_s: f64) -> Self {
        let valid = |value: f64| value.is_finite() && value > 0.0;
        let latency_s = if valid(latency_ms) {
            latency_ms / 1e3
        } else {
            0.0
        };
        let bytes_per_s = if valid(bytes_per_s) {
            bytes_per_s
        } else {
            100e6
        };
        Self {
            latency_s,
            seconds_per_byte: 1.0 / bytes_per_s,
        }
    }

    /// Seconds that one demand fetch of `bytes` takes, per byte.
    fn wait_per_byte(self, bytes: u64) -> f64 {
        let piece = bytes.clamp(PAGE_BYTES, LARGEST_PIECE.bytes()) as f64;
        self.latency_s / piece + self.seconds_per_byte
    }
}

/// Step functions over the pages of images: from page `.0` on, a forecast launch needs them
/// with probability `.1`.
pub(super) struct ForecastSteps(HashMap<SharedImage, Vec<(PageNo, f64)>>);

/// What is expected of one image.
pub(super) struct ImageOutlook {
    /// As in [`ForecastSteps`].
    steps: Vec<(PageNo, f64)>,
    /// As in [`Needs`].
    component: Option<f64>,
}

impl ForecastSteps {
    /// Takes out what is forecast of one image.
    pub(super) fn take(&mut self, image: &SharedImage) -> Vec<(PageNo, f64)> {
        self.0.remove(image).unwrap_or_default()
    }
}

impl ImageOutlook {
    /// For an image of which forecasts say `steps`.
    pub(super) fn of(
        benefit: &BenefitModel,
        image: &SharedImage,
        steps: Vec<(PageNo, f64)>,
        now_ms: i64,
    ) -> Self {
        let component = benefit.needs(image, now_ms).component;
        Self { steps, component }
    }
}

/// A run of pages and what each of its bytes is worth, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct ValuedRun {
    pub(super) run: PageRun,
    pub(super) seconds_per_byte: f64,
}

/// Number of the segment that a page lies in.
const fn segment_of(page: PageNo) -> usize {
    (page.0 / SEGMENT.0) as usize
}

/// The page after the segment that `page` lies in.
const fn segment_end(page: PageNo) -> PageNo {
    PageNo((page.0 / SEGMENT.0 + 1).saturating_mul(SEGMENT.0))
}

fn probability(value: f64) -> f64 {
    if value.is_nan() {
        0.0
    } else {
        value.clamp(0.0, 1.0)
    }
}

impl BenefitModel {
    pub(super) fn new(config: &PlanConfig) -> Self {
        Self {
            forecasts: BTreeMap::new(),
            uses: BTreeMap::new(),
            reuse: Reuse::new(config.budget_bytes),
            repository: TierCost::new(config.latency_ms, config.bandwidth_bytes_per_s),
            disk: TierCost::new(config.disk_latency_ms, config.disk_bandwidth_bytes_per_s),
            off_disk: HashMap::new(),
            half_life_ms: config.half_life_ms,
            horizon_ms: config.horizon_ms,
        }
    }

    pub(super) fn set_fetch_cost(&mut self, cost: FetchCost) {
        self.repository = TierCost::new(cost.latency_ms, cost.bandwidth_bytes_per_s);
    }

    pub(super) fn set_disk_content(&mut self, content: DiskContent) {
        let absent = content.absent.into_iter().collect();
        self.off_disk.insert(content.image, absent);
    }

    /// Whether all of an extent is in the disk cache, as far as is known.
    pub(super) fn is_on_disk(&self, image: &Digest, extent: Extent) -> bool {
        let absent = self.off_disk.get(image);
        absent.is_some_and(|absent| !absent.intersects(PageRun::covering(extent)))
    }

    /// Where a demand fetch would go.
    fn tier(&self, image: &Digest, extent: Extent) -> TierCost {
        match self.is_on_disk(image, extent) {
            true => self.disk,
            false => self.repository,
        }
    }

    /// Seconds that a demand fetch of `extent` takes, per byte.
    pub(super) fn wait_per_byte(&self, image: &Digest, extent: Extent) -> f64 {
        self.tier(image, extent).wait_per_byte(extent.len)
    }

    /// The same if it is fetched together with its neighbours.
    pub(super) fn least_wait_per_byte(&self, image: &Digest, extent: Extent) -> f64 {
        let tier = self.tier(image, extent);
        tier.wait_per_byte(LARGEST_PIECE.bytes())
    }

    /// Probability, now, that `forecast` comes true within the horizon.
    pub(super) fn probability_now(&self, forecast: &Forecast, now_ms: i64) -> f64 {
        let age_ms = now_ms.saturating_sub(forecast.updated_ms).max(0);
        let mut fresh = (-(age_ms as f64) / self.half_life_ms.max(1) as f64).exp2();
        if let Some(next_ms) = forecast.expected_ms {
            // A launch beyond the horizon is worth less, the further away it is.
            let beyond_ms = next_ms
                .saturating_sub(now_ms)
                .saturating_sub(self.horizon_ms)
                .max(0);
            fresh *= (-(beyond_ms as f64) / self.horizon_ms.max(1) as f64).exp2();
        }
        probability(forecast.probability) * fresh
    }

    /// A VM has touched `run` of an image; `first` says whether it is its first touch of
    /// this image at all, which counts as one use of the component.
    pub(super) fn used(&mut self, image: &SharedImage, run: PageRun, first: bool, now_ms: i64) {
        let half_life_ms = self.half_life_ms;
        if !self.uses.contains_key(image) {
            self.uses.insert(image.clone(), Uses::default());
        }
        let Some(uses) = self.uses.get_mut(image) else {
            return;
        };
        if first {
            uses.component.bump(now_ms, half_life_ms);
        }
        if run.is_empty() {
            return;
        }
        let (from, to) = (
            segment_of(run.start),
            run.end.0.div_ceil(SEGMENT.0) as usize,
        );
        if uses.segments.len() < to {
            uses.segments.resize(to, Decayed::default());
        }
        for segment in &mut uses.segments[from..to] {
            segment.bump(now_ms, half_life_ms);
        }
    }

    /// How often a component was used, the past fading.
    #[cfg(test)]
    pub(super) fn component_uses(&self, image: &SharedImage, now_ms: i64) -> f64 {
        let uses = self.uses.get(image);
        uses.map_or(0.0, |uses| uses.component.at(now_ms, self.half_life_ms))
    }

    /// A VM is launched with these devices: a use of each.
    pub(super) fn launched(
        &mut self,
        domain: &Domain,
        profile: &ProfileName,
        devices: &[DeviceImage],
        now_ms: i64,
    ) {
        let TierCost {
            latency_s,
            seconds_per_byte,
        } = self.repository;
        let cost = (latency_s, seconds_per_byte);
        self.reuse.launched(domain, profile, devices, cost, now_ms);
        for device in devices {
            let image = SharedImage::new(domain.clone(), device.image);
            self.used(&image, PageRun::from(0..0), true, now_ms);
        }
    }

    /// Samples of launches to fit a model to, if enough is new.
    pub(super) fn samples(&mut self) -> Option<ReuseSamples> {
        self.reuse.samples()
    }

    /// Estimates by a fitted model from now on.
    pub(super) fn install(&mut self, fit: ReuseFit) {
        self.reuse.install(fit);
    }

    /// What observed uses say of an image's need within the horizon.
    pub(super) fn needs(&self, image: &SharedImage, now_ms: i64) -> Needs<'_> {
        let component = self.reuse.probability(image, self.horizon_ms);
        self.needs_given(image, component, now_ms)
    }

    fn needs_given(&self, image: &SharedImage, component: Option<f64>, now_ms: i64) -> Needs<'_> {
        Needs {
            uses: self.uses.get(image),
            component,
            half_life_ms: self.half_life_ms,
            horizon_ms: self.horizon_ms,
            now_ms,
        }
    }

    /// Values the pages of `runs` of one image, splitting runs where the value changes.
    pub(super) fn value(
        &self,
        image: &SharedImage,
        outlook: &ImageOutlook,
        runs: &[PageRun],
        now_ms: i64,
    ) -> Vec<ValuedRun> {
        let steps = &outlook.steps;
        let needs = self.needs_given(image, outlook.component, now_ms);
        let mut parts: Vec<(PageRun, f64)> = Vec::new();
        for &run in runs {
            let mut page = run.start;
            let mut step = steps.partition_point(|step| step.0 <= page);
            while page < run.end {
                let forecast = if step == 0 { 0.0 } else { steps[step - 1].1 };
                let segment = segment_of(page);
                let mut end = run.end.min(segment_end(page));
                if let Some(next) = steps.get(step) {
                    end = end.min(next.0);
                }
                let observed = needs.of_segment(segment);
                let need = 1.0 - (1.0 - probability(forecast)) * (1.0 - observed);
                match parts.last_mut() {
                    Some((last, known))
                        if last.end == page
                            && last.pages() < LARGEST_PIECE
                            && (*known - need).abs() <= *known * 1e-3 =>
                    {
                        last.end = end;
                    }
                    _ => parts.push((PageRun::new(page, end), need)),
                }
                page = end;
                while steps.get(step).is_some_and(|next| next.0 <= page) {
                    step += 1;
                }
            }
        }
        let value = |(run, need): (PageRun, f64)| ValuedRun {
            run,
            seconds_per_byte: need * self.wait_per_byte(&image.image, run.extent()),
        };
        parts.into_iter().map(value).collect()
    }

    /// What forecasts say of every image that they name, in one pass.
    pub(super) fn forecast(&self, now_ms: i64) -> ForecastSteps {
        let mut by_image: HashMap<(&Domain, &Digest), Vec<(PageNo, f64)>> = HashMap::new();
        for forecast in self.forecasts.values() {
            let domain = &forecast.domain;
            let launch = self.probability_now(forecast, now_ms);
            for same in forecast.working_set.chunk_by(|a, b| a.image == b.image) {
                let changes = by_image.entry((domain, &same[0].image)).or_default();
                for planned in same {
                    let run = PageRun::covering(planned.extent);
                    let need = launch * probability(planned.probability);
                    changes.extend([(run.start, need), (run.end, -need)]);
                }
            }
        }
        let steps = by_image.into_iter().map(|((domain, image), changes)| {
            let image = SharedImage::new(domain.clone(), *image);
            (image, steps_of(changes))
        });
        ForecastSteps(steps.collect())
    }

    /// Forgets images without uses worth keeping; called now and then.
    pub(super) fn forget_stale(&mut self, now_ms: i64) {
        let half_life_ms = self.half_life_ms;
        let alive = |uses: &Uses| uses.component.at(now_ms, half_life_ms) > 1e-3;
        self.uses.retain(|_, uses| alive(uses));
        let old_ms = half_life_ms.saturating_mul(20);
        let fresh = |forecast: &Forecast| now_ms.saturating_sub(forecast.updated_ms) < old_ms;
        self.forecasts
            .retain(|_, forecast| forecast.prepared || fresh(forecast));
    }

    /// Images named by a forecast, with their sizes.
    pub(super) fn image_bytes(devices: &[DeviceImage], image: &Digest) -> Option<u64> {
        let device = devices.iter().find(|device| device.image == *image);
        device.map(|device| device.image_bytes)
    }
}

/// The steps of a sum of which `changes` tells where it changes and by how much.
fn steps_of(mut changes: Vec<(PageNo, f64)>) -> Vec<(PageNo, f64)> {
    changes.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut steps: Vec<(PageNo, f64)> = Vec::new();
    let mut sum = 0.0f64;
    for (page, change) in changes {
        sum += change;
        match steps.last_mut() {
            Some(last) if last.0 == page => last.1 = sum.max(0.0),
            _ => steps.push((page, sum.max(0.0))),
        }
    }
    steps
}

/// The extents of `working_set` cut to `piece_bytes`, page-aligned and within their image.
pub(super) fn pieces(
    devices: &[DeviceImage],
    working_set: &[PlannedExtent],
    piece_bytes: u64,
) -> Vec<PlannedExtent> {
    let piece_bytes = (piece_bytes / PAGE_BYTES).max(1) * PAGE_BYTES;
    let mut pieces = Vec::with_capacity(working_set.len());
    for planned in working_set {
        let Some(image_bytes) = BenefitModel::image_bytes(devices, &planned.image) else {
            continue;
        };
        let whole = Extent::new(0, image_bytes).page_aligned();
        let Some(extent) = planned.extent.page_aligned().intersection(&whole) else {
            continue;
        };
        let mut offset = extent.offset;
        while offset < extent.end() {
            let len = piece_bytes.min(extent.end() - offset);
            pieces.push(PlannedExtent {
                extent: Extent::new(offset, len),
                probability: probability(planned.probability),
                ..*planned
            });
            offset += len;
        }
    }
    pieces
}
