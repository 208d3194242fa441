//! What launches and forecasts ask of the plan: requests to prefetch in their order, rows
//! mapped ahead, and what is no longer wanted taken back.
//!
//! Refuses to know what is short. Invariants: a forecast has at most one row mapped ahead;
//! a launch takes that row over if its devices are the same, else the row goes.

use std::collections::BTreeMap;

use forelay_image::Digest;
use forelay_image::pages::{PageRun, PageSet};

use crate::mapping_table::{Phase, TableError};
use crate::names::{DeviceImage, SharedImage, VmName};

use super::benefit::{BenefitModel, Forecast, pieces};
use super::decisions::PreparedLaunch;
use super::message::{AttachForecast, LaunchRequested, ProfileForecast};
use super::queue::{ForecastKey, PrefetchClass, PrefetchRequest, Requester, Urgency};
use super::{Launch, Planner, Step};

type PageSetByImage = BTreeMap<SharedImage, PageSet>;

impl Planner {
    pub(super) fn launch_requested(
        &mut self,
        step: &mut Step<'_>,
        launch: LaunchRequested,
    ) -> Result<(), TableError> {
        self.map_launch(step, &launch)?;
        let LaunchRequested {
            vm,
            domain,
            profile,
            devices,
            working_set,
        } = launch;
        let forecast = ForecastKey::Launch(domain.clone(), profile);
        self.queue.drop_requester(&Requester::Forecast(forecast));
        for planned in pieces(&devices, &working_set, self.config.piece_bytes) {
            if planned.probability < self.config.prefetch_probability {
                continue;
            }
            let image = SharedImage::new(domain.clone(), planned.image);
            // What is resident already should not go just before its touch.
            self.soon_used
                .used(&image, PageRun::covering(planned.extent));
            let wait = self.benefit.wait_per_byte(&planned.image, planned.extent);
            // Later launches do not overtake the tail of earlier ones for free.
            let asked_ms = step.now_ms.max(0) as u64;
            self.queue.push(PrefetchRequest {
                image,
                image_bytes: BenefitModel::image_bytes(&devices, &planned.image).unwrap_or(0),
                extent: planned.extent,
                urgency: Urgency {
                    class: PrefetchClass::Launch,
                    order: asked_ms.saturating_add(planned.first_touch_ms.into()),
                },
                requester: Requester::Launch(vm.clone()),
                displaces_below: planned.probability * wait / self.config.displace_factor.max(1.0),
                pin: planned.probability >= self.config.pin_probability,
            });
        }
        self.launches.insert(vm, Launch::default());
        Ok(())
    }

    /// Maps a launch's devices, or takes over the row that was mapped ahead for it.
    fn map_launch(
        &mut self,
        step: &mut Step<'_>,
        launch: &LaunchRequested,
    ) -> Result<(), TableError> {
        let (domain, profile) = (&launch.domain, &launch.profile);
        let ahead = VmName::prepared(domain, profile);
        let key = ForecastKey::Launch(domain.clone(), profile.clone());
        let forecast = self.benefit.forecasts.get_mut(&key);
        let prepared = forecast.is_some_and(|forecast| std::mem::take(&mut forecast.prepared));
        let devices = launch.devices.iter().copied();
        if prepared && step.table.devices(ahead.as_str()).eq(devices) {
            return step.table.rename(&ahead, &launch.vm);
        }
        if prepared {
            step.table.unmap(&ahead)?;
        }
        let devices = &launch.devices;
        let phase = Phase::Premapped;
        step.table.map(&launch.vm, domain, profile, devices, phase)
    }

    /// Takes what is forecast of a profile's next launch.
    pub(super) fn profile_forecast(
        &mut self,
        step: &mut Step<'_>,
        forecast: ProfileForecast,
    ) -> Result<(), TableError> {
        let key = ForecastKey::Launch(forecast.domain.clone(), forecast.profile);
        let mut forecast = Forecast {
            domain: forecast.domain,
            devices: forecast.devices,
            probability: forecast.launch_probability,
            expected_ms: forecast.next_launch_ms,
            working_set: forecast.working_set,
            updated_ms: step.now_ms,
            prepared: false,
        };
        self.request_forecast(step, &key, &forecast);
        let before = self.benefit.forecasts.get(&key);
        forecast.prepared = before.is_some_and(|before| before.prepared);
        let result = self.prepare(step, &key, &mut forecast);
        self.benefit.forecasts.insert(key, forecast);
        result
    }

    /// Takes what is forecast of a running VM's next attachments, instead of what was.
    pub(super) fn attach_forecast(&mut self, step: &mut Step<'_>, forecast: AttachForecast) {
        let AttachForecast {
            vm,
            domain,
            attachments,
        } = forecast;
        let stays = |image: &Digest| attachments.iter().any(|one| one.device.image == *image);
        self.forget_attachments(step, &vm, |image| !stays(image));
        for attachment in attachments {
            let key = ForecastKey::Attach(vm.clone(), attachment.device.image);
            let forecast = Forecast {
                domain: domain.clone(),
                devices: vec![attachment.device],
                probability: attachment.probability,
                expected_ms: attachment.expected_ms,
                working_set: attachment.working_set,
                updated_ms: step.now_ms,
                prepared: false,
            };
            self.request_forecast(step, &key, &forecast);
            self.benefit.forecasts.insert(key, forecast);
        }
    }

    /// Queues what a forecast wants, and cancels what it wants no more.
    fn request_forecast(&mut self, step: &mut Step<'_>, key: &ForecastKey, forecast: &Forecast) {
        let requester = Requester::Forecast(key.clone());
        self.queue.drop_requester(&requester);
        let probability = self.benefit.probability_now(forecast, step.now_ms);
        let devices = &forecast.devices;
        let mut wanted = PageSetByImage::new();
        for planned in pieces(devices, &forecast.working_set, self.config.piece_bytes) {
            let need = probability * planned.probability;
            if need < self.config.prefetch_probability {
                continue;
            }
            let wait = self.benefit.wait_per_byte(&planned.image, planned.extent);
            // By what it is worth beside its neighbours once it is here, so that of two that
            // cannot both stay neither displaces the other again and again.
            let least_wait = self
                .benefit
                .least_wait_per_byte(&planned.image, planned.extent);
            let image = SharedImage::new(forecast.domain.clone(), planned.image);
            let pages = wanted.entry(image.clone()).or_default();
            pages.insert(PageRun::covering(planned.extent));
            self.queue.push(PrefetchRequest {
                image,
                image_bytes: BenefitModel::image_bytes(devices, &planned.image).unwrap_or(0),
                extent: planned.extent,
                urgency: Urgency {
                    class: PrefetchClass::Forecast,
                    order: descending(need * wait),
                },
                requester: requester.clone(),
                displaces_below: need * least_wait / self.config.displace_factor.max(1.0),
                pin: false,
            });
        }
        self.cancel_unwanted(step, &requester, &wanted);
    }

    /// Cancels fetches on behalf of `requester` that are not among what is still `wanted`.
    fn cancel_unwanted(
        &mut self,
        step: &mut Step<'_>,
        requester: &Requester,
        wanted: &PageSetByImage,
    ) {
        let still = |request: &PrefetchRequest| {
            let pages = wanted.get(&request.image);
            pages.is_some_and(|pages| pages.intersects(PageRun::covering(request.extent)))
        };
        let gone = self
            .queue
            .cancel(|request| request.requester == *requester && !still(request));
        step.out.cancels.extend(gone.into_iter().map(|(id, _)| id));
    }

    /// Drops all that is fetched on behalf of `requester`.
    pub(super) fn withdraw(&mut self, step: &mut Step<'_>, requester: &Requester) {
        self.queue.drop_requester(requester);
        self.cancel_unwanted(step, requester, &PageSetByImage::new());
    }

    /// Drops those attach forecasts of a VM that are of `unwanted` images.
    pub(super) fn forget_attachments(
        &mut self,
        step: &mut Step<'_>,
        vm: &VmName,
        unwanted: impl Fn(&Digest) -> bool,
    ) {
        let is_unwanted = |key: &ForecastKey| match key {
            ForecastKey::Attach(of, image) => of == vm && unwanted(image),
            ForecastKey::Launch(..) => false,
        };
        let forecasts = &mut self.benefit.forecasts;
        let gone = forecasts.extract_if(.., |key, _| is_unwanted(key));
        let gone: Vec<ForecastKey> = gone.map(|(key, _)| key).collect();
        for key in gone {
            self.withdraw(step, &Requester::Forecast(key));
        }
    }

    /// Maps a likely launch ahead, or releases one that is not likely any more.
    fn prepare(
        &mut self,
        step: &mut Step<'_>,
        key: &ForecastKey,
        forecast: &mut Forecast,
    ) -> Result<(), TableError> {
        let ForecastKey::Launch(domain, profile) = key else {
            return Ok(());
        };
        let probability = self.benefit.probability_now(forecast, step.now_ms);
        let ahead = VmName::prepared(domain, profile);
        let devices = || forecast.devices.iter().copied();
        let stale = forecast.prepared && !step.table.devices(ahead.as_str()).eq(devices());
        let least = self.config.prepare_probability;
        if forecast.prepared && (stale || probability < least / 2.0) {
            forecast.prepared = false;
            step.table.unmap(&ahead)?;
            let release = PreparedLaunch::Release(domain.clone(), profile.clone());
            step.out.launches.push(release);
        }
        if !forecast.prepared && probability >= least {
            let devices: &[DeviceImage] = &forecast.devices;
            let phase = Phase::Premapped;
            step.table.map(&ahead, domain, profile, devices, phase)?;
            forecast.prepared = true;
            let prepare = PreparedLaunch::Prepare(domain.clone(), profile.clone());
            step.out.launches.push(prepare);
        }
        Ok(())
    }
}

/// An order in which larger values come first.
fn descending(value: f64) -> u64 {
    // Bits of non-negative floats sort like the floats.
    u64::MAX - value.max(0.0).to_bits()
}
