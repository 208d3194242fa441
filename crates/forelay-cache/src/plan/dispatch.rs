//! The start of prefetches, and their end.
//!
//! Refuses to know why a prefetch is wanted. Invariant: a fetch is started only within the
//! budget; its bytes count from then until its end was told, cancelled or not, so that what
//! arrives of a cancelled fetch was never without a place.

use forelay_image::Extent;
use forelay_image::pages::PageRun;

use crate::budget::PressureLevel;
use crate::mapping_table::{Arrival, TableError};
use crate::names::DeviceImage;

use super::decisions::{Fetch, PinChange};
use super::message::FetchEnded;
use super::queue::{PrefetchClass, PrefetchRequest, Requester};
use super::ranking::Ranking;
use super::{Planner, Step};

impl Planner {
    /// Starts waiting prefetches as far as budget and in-flight bytes allow.
    pub(super) fn dispatch(&mut self, step: &mut Step<'_>) {
        // Nothing below arrives or leaves before its event is told.
        let mut ranking = Ranking::default();
        while !self.paused {
            let only_launches = self.level != PressureLevel::Plenty;
            match self.queue.first_class() {
                None => return,
                Some(PrefetchClass::Forecast) if only_launches => return,
                Some(_) => {}
            }
            let Some(request) = self.queue.pop() else {
                return;
            };
            if !self.dispatch_one(step, &mut ranking, request) {
                return;
            }
        }
    }

    /// Starts, refuses or puts off one request; whether the next one may be looked at.
    fn dispatch_one(
        &mut self,
        step: &mut Step<'_>,
        ranking: &mut Ranking,
        request: PrefetchRequest,
    ) -> bool {
        let absent = step.table.absent(&request.image, request.extent);
        if absent.is_empty() {
            // Here already.
            self.pin_for_launch(step, &request);
            return true;
        }
        let missing = absent.iter().filter(|part| !part.fetching);
        let missing: Vec<Extent> = missing.map(|part| part.extent).collect();
        let bytes: u64 = missing.iter().map(|extent| extent.len).sum();
        let overlapping = self.queue.overlapping(&request.image, request.extent);
        if let Some(id) = overlapping.filter(|id| bytes == 0 || self.queue.is_cancelled(*id)) {
            // On its way for somebody else, who may yet give it up, or has.
            self.queue.defer(id, request);
            return true;
        }
        if bytes == 0 {
            return true;
        }
        let under_way = self.queue.under_way_bytes();
        if under_way > 0 && under_way + bytes > self.config.inflight_bytes {
            self.queue.unpop(request);
            return false;
        }
        let taken = step.table.resident_bytes() + step.table.fetching_bytes();
        let lacking = (taken + bytes).saturating_sub(self.budget_bytes);
        if lacking == 0 {
            self.start(step, &request, &missing);
            return true;
        }
        let forecast = request.urgency.class == PrefetchClass::Forecast;
        if forecast && !self.may_displace(ranking, step.now_ms) {
            // Nothing waits behind them.
            self.queue.unpop(request);
            return false;
        }
        if self.make_room(step, ranking, &request, lacking) {
            self.queue.unpop(request);
            return false;
        }
        self.counters.refused_bytes += bytes;
        match request.urgency.class {
            // They come in falling worth: none of the rest fits either.
            PrefetchClass::Forecast => self.queue.drop_class(PrefetchClass::Forecast),
            PrefetchClass::Launch => self.queue.drop_requester(&request.requester),
        }
        true
    }

    fn start(&mut self, step: &mut Step<'_>, request: &PrefetchRequest, missing: &[Extent]) {
        let device = DeviceImage {
            image: request.image.image,
            image_bytes: request.image_bytes,
        };
        let domain = &request.image.domain;
        if step.table.add_image(domain, &device).is_err() {
            self.counters.refused_events += 1;
            return;
        }
        for &extent in missing {
            if step.table.begin_fetch(&request.image, extent).is_err() {
                self.counters.refused_events += 1;
                continue;
            }
            match request.urgency.class {
                PrefetchClass::Launch => self.counters.launch_prefetch_bytes += extent.len,
                PrefetchClass::Forecast => self.counters.forecast_prefetch_bytes += extent.len,
            }
            let image = request.image.clone();
            let started = PrefetchRequest {
                extent,
                ..request.clone()
            };
            let id = self.queue.start(started);
            step.out.fetches.push(Fetch { id, image, extent });
        }
    }

    /// Accounts for what a fetch has brought, and forgets it.
    pub(super) fn fetch_ended(
        &mut self,
        step: &mut Step<'_>,
        ended: FetchEnded,
    ) -> Result<(), TableError> {
        let Some(fetch) = self.queue.ended(ended.id) else {
            return Ok(());
        };
        let request = fetch.request;
        let image = &request.image;
        for &extent in &ended.here {
            step.table
                .complete_fetch(image, extent, Arrival::Prefetch)?;
            if let Some(ghost) = self.ghosts.get_mut(image) {
                ghost.remove(PageRun::covering(extent));
            }
        }
        // What has not arrived; nothing else is on its way there.
        step.table.abort_fetch(image, request.extent)?;
        if fetch.cancelled {
            self.give_back_unwanted(step, image, ended.here);
        } else if ended.here.as_slice() == [request.extent] {
            self.pin_for_launch(step, &request);
        }
        Ok(())
    }

    /// Pins what is here for a launch that will touch it soon: until then nothing tells the
    /// kernel that these pages are wanted.
    fn pin_for_launch(&mut self, step: &mut Step<'_>, request: &PrefetchRequest) {
        let Requester::Launch(vm) = &request.requester else {
            return;
        };
        let most = (self.budget_bytes as f64 * self.config.pin_share.clamp(0.0, 1.0)) as u64;
        let room = self.pinned_by_plan_bytes.saturating_add(request.extent.len) <= most;
        let calm = self.level == PressureLevel::Plenty;
        let Some(launch) = self.launches.get_mut(vm) else {
            return;
        };
        if request.pin && room && calm {
            self.pinned_by_plan_bytes += request.extent.len;
            launch.pinned.push((request.image.clone(), request.extent));
            step.out.pins.push(PinChange {
                image: request.image.clone(),
                extents: vec![request.extent],
                pinned: true,
            });
        }
    }
}
