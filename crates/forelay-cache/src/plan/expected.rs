//! What launches and forecasts ask of the plan: pieces to prefetch in their order, rows
//! mapped ahead, and what is no longer wanted taken back.
//!
//! Refuses to know what is short. Invariants: a forecast has at most one row mapped ahead;
//! a launch takes that row over if its devices are the same, else the row goes.

use forelay_image::PlannedExtent;
use forelay_image::pages::PageRun;

use crate::mapping_table::{MappingTable, Phase, TableError};
use crate::names::{DeviceImage, Domain, ProfileName, SharedImage, VmName};

use super::message::{Action, PrefetchClass, Urgency};
use super::queue::{Piece, Reason};
use super::worth::{Forecast, Worth, pieces};
use super::{Launch, PageSetByImage, Planner};

impl Planner {
    #[allow(clippy::too_many_arguments, reason = "the fields of one event")]
    pub(super) fn launch_requested(
        &mut self,
        table: &mut MappingTable,
        vm: VmName,
        domain: &Domain,
        profile: &ProfileName,
        devices: &[DeviceImage],
        working_set: &[PlannedExtent],
        now_ms: i64,
    ) -> Result<(), TableError> {
        let ahead = ahead_name(domain, profile);
        let forecast = self
            .worth
            .forecasts
            .get_mut(&(domain.clone(), profile.clone()));
        let reserved = forecast.is_some_and(|forecast| std::mem::take(&mut forecast.reserved));
        if reserved && table.devices(ahead.as_str()).eq(devices.iter().copied()) {
            table.rename(&ahead, &vm)?;
        } else {
            if reserved {
                table.unmap(&ahead)?;
            }
            table.map(&vm, domain, profile, devices, Phase::Premapped)?;
        }
        let forecast_reason = Reason::Forecast(domain.clone(), profile.clone());
        self.queue.drop_reason(&forecast_reason);
        for planned in pieces(devices, working_set, self.config.piece_bytes) {
            if planned.probability < self.config.prefetch_probability {
                continue;
            }
            let image = SharedImage::new(domain.clone(), planned.image);
            // What is resident already should not go just before its touch.
            self.awaited.used(&image, PageRun::covering(planned.extent));
            let wait = self.worth.wait_per_byte(planned.extent.len);
            self.queue.push(Piece {
                image,
                image_bytes: Worth::image_bytes(devices, &planned.image).unwrap_or(0),
                extent: planned.extent,
                urgency: Urgency {
                    class: PrefetchClass::Launch,
                    // Later launches do not overtake the tail of earlier ones for free.
                    order: (now_ms.max(0) as u64).saturating_add(planned.first_touch_ms.into()),
                },
                reason: Reason::Launch(vm.clone()),
                seconds_per_byte: planned.probability * wait,
                pin: planned.probability >= self.config.pin_probability,
            });
        }
        self.launches.insert(vm, Launch::default());
        Ok(())
    }

    /// Queues what a forecast wants. Returns under which name, and the probability now.
    pub(super) fn forecast_changed(
        &mut self,
        table: &mut MappingTable,
        domain: Domain,
        profile: ProfileName,
        forecast: &mut Forecast,
        now_ms: i64,
        actions: &mut Vec<Action>,
    ) -> ((Domain, ProfileName), f64) {
        let key = (domain.clone(), profile.clone());
        let reason = Reason::Forecast(domain.clone(), profile.clone());
        self.queue.drop_reason(&reason);
        let launch = self.worth.launch_probability(forecast, now_ms);
        let before = self.worth.forecasts.get(&key);
        forecast.reserved = before.is_some_and(|before| before.reserved);
        let mut wanted = PageSetByImage::new();
        for planned in pieces(
            &forecast.devices,
            &forecast.working_set,
            self.config.piece_bytes,
        ) {
            let need = launch * planned.probability;
            if need < self.config.prefetch_probability {
                continue;
            }
            let seconds_per_byte = need * self.worth.wait_per_byte(planned.extent.len);
            let image = SharedImage::new(domain.clone(), planned.image);
            wanted
                .entry(image.clone())
                .or_default()
                .insert(PageRun::covering(planned.extent));
            self.queue.push(Piece {
                image,
                image_bytes: Worth::image_bytes(&forecast.devices, &planned.image).unwrap_or(0),
                extent: planned.extent,
                urgency: Urgency {
                    class: PrefetchClass::Forecast,
                    order: descending(seconds_per_byte),
                },
                reason: reason.clone(),
                seconds_per_byte,
                pin: false,
            });
        }
        self.cancel_unwanted(table, &reason, &wanted, actions);
        (key, launch)
    }

    /// Cancels prefetches under way for `reason` that are not among what is still `wanted`.
    pub(super) fn cancel_unwanted(
        &mut self,
        table: &mut MappingTable,
        reason: &Reason,
        wanted: &PageSetByImage,
        actions: &mut Vec<Action>,
    ) {
        let still = |piece: &Piece| {
            let run = PageRun::covering(piece.extent);
            wanted
                .get(&piece.image)
                .is_some_and(|set| set.intersects(run))
        };
        let gone = self
            .queue
            .take_under_way(|piece| piece.reason == *reason && !still(piece));
        for piece in gone {
            // Refused only if the image is gone meanwhile, and then nothing is under way.
            let _ = table.abort_fetch(&piece.image, piece.extent);
            actions.push(Action::CancelPrefetch {
                image: piece.image,
                extent: piece.extent,
            });
        }
    }

    /// Forgets what a VM that is gone was expected to be given.
    pub(super) fn forget_attachments(
        &mut self,
        table: &mut MappingTable,
        vm: &VmName,
        actions: &mut Vec<Action>,
    ) {
        let name = attach_name(vm);
        let domain = table.vm_identity(vm.as_str());
        let key = domain.map(|(domain, _)| (domain.clone(), name));
        if let Some(key) = key.filter(|key| self.worth.forecasts.remove(key).is_some()) {
            let reason = Reason::Forecast(key.0, key.1);
            self.queue.drop_reason(&reason);
            self.cancel_unwanted(table, &reason, &PageSetByImage::new(), actions);
        }
    }

    /// Maps a likely launch ahead, or releases one that is not likely any more.
    pub(super) fn reserve(
        &mut self,
        table: &mut MappingTable,
        (domain, profile): &(Domain, ProfileName),
        forecast: &mut Forecast,
        launch: f64,
        actions: &mut Vec<Action>,
    ) -> Result<(), TableError> {
        let ahead = ahead_name(domain, profile);
        let stale = forecast.reserved
            && !table
                .devices(ahead.as_str())
                .eq(forecast.devices.iter().copied());
        if forecast.reserved && (stale || launch < self.config.reserve_probability / 2.0) {
            forecast.reserved = false;
            table.unmap(&ahead)?;
            let (domain, profile) = (domain.clone(), profile.clone());
            actions.push(Action::Release { domain, profile });
        }
        if !forecast.reserved && launch >= self.config.reserve_probability {
            table.map(&ahead, domain, profile, &forecast.devices, Phase::Premapped)?;
            forecast.reserved = true;
            let (domain, profile) = (domain.clone(), profile.clone());
            let devices = forecast.devices.clone();
            actions.push(Action::Reserve {
                domain,
                profile,
                devices,
            });
        }
        Ok(())
    }
}

/// The name under which a launch is mapped ahead.
fn ahead_name(domain: &Domain, profile: &ProfileName) -> VmName {
    VmName::from(format!("~{domain}/{profile}"))
}

/// The name under which a running VM's next attachments are forecast; no profile has it.
pub(super) fn attach_name(vm: &VmName) -> ProfileName {
    ProfileName::from(format!("+{vm}"))
}

/// An order in which larger values come first.
fn descending(value: f64) -> u64 {
    // Bits of non-negative floats sort like the floats.
    u64::MAX - value.max(0.0).to_bits()
}
