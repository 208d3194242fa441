//! Who carries out the planner's decisions: each list of [`Decisions`] has one executor.
//!
//! Pins and evictions have a thread each, for pins may be slow; fetches go to the
//! [`Prefetcher`], launches to prepare to the one who does, fits to a thread of their own.
//! Refuses to decide. Invariant: within one list things are done in order.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use forelay_cache::plan::{Decisions, Eviction, PinChange, PreparedLaunch, SharedExtent};
use forelay_cache::{PlannerEvent, SharedImage};
use forelay_image::Extent;
use forelay_store::Scheduler;
use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedSender;

use crate::daemon::memory::domains::Domains;
use crate::daemon::memory::planner::{PlannerSender, spawn};
use crate::daemon::memory::prefetcher::Prefetcher;

/// See the module's header.
pub struct Executors {
    prefetcher: Prefetcher,
    pins: Sender<PinChange>,
    evictions: Sender<Eviction>,
    launches: UnboundedSender<PreparedLaunch>,
    planner: PlannerSender,
    runtime: Handle,
}

impl Executors {
    /// Starts the executors; launches to be prepared go to `launches`.
    pub fn start(
        domains: &Arc<Domains>,
        scheduler: Scheduler,
        planner: &PlannerSender,
        launches: UnboundedSender<PreparedLaunch>,
    ) -> io::Result<Self> {
        let (pins, changes) = channel();
        let (of, tell) = (Arc::clone(domains), planner.clone());
        spawn("forelay-pins", move || {
            changes
                .into_iter()
                .for_each(|change| change_pin(&of, change, &tell));
        })?;
        let (evictions, victims) = channel();
        let (of, tell) = (Arc::clone(domains), planner.clone());
        spawn("forelay-evict", move || {
            victims
                .into_iter()
                .for_each(|victim| evict(&of, victim, &tell));
        })?;
        Ok(Self {
            prefetcher: Prefetcher::new(Arc::clone(domains), scheduler, planner.clone()),
            pins,
            evictions,
            launches,
            planner: planner.clone(),
            runtime: Handle::current(),
        })
    }

    /// Hands each decision to its executor.
    pub fn carry_out(&self, decisions: Decisions) {
        let Decisions {
            cancels,
            fetches,
            pins,
            evictions,
            launches,
            fit,
        } = decisions;
        // What cannot be handed over is not wanted any more: the daemon ends.
        for id in cancels {
            self.prefetcher.cancel(id);
        }
        self.prefetcher.start(fetches);
        for change in pins {
            let _ = self.pins.send(change);
        }
        for eviction in evictions {
            let _ = self.evictions.send(eviction);
        }
        for launch in launches {
            let _ = self.launches.send(launch);
        }
        if let Some(samples) = fit {
            let planner = self.planner.clone();
            self.runtime.spawn_blocking(move || {
                planner.tell(PlannerEvent::ReuseFitted(Box::new(samples.fit())));
            });
        }
    }
}

fn tell_all(
    planner: &PlannerSender,
    image: &SharedImage,
    extents: &[Extent],
    event: fn(SharedExtent) -> PlannerEvent,
) {
    for &extent in extents {
        planner.tell(event(SharedExtent::new(image.clone(), extent)));
    }
}

/// Executes one change of pins. A failure is logged and not reported: the planner asks again
/// if it still wants it.
fn change_pin(domains: &Domains, change: PinChange, planner: &PlannerSender) {
    let PinChange {
        image,
        extents,
        pinned,
    } = change;
    let Some(memory) = domains.get(&image.domain) else {
        return;
    };
    if let Err(error) = memory.set_pinned(&image.image, &extents, pinned) {
        let error = forelay_host::error_chain(&error);
        tracing::warn!(image = %image.image, error, pinned, "pins are not changed");
        return;
    }
    let event = match pinned {
        true => PlannerEvent::Pinned,
        false => PlannerEvent::Unpinned,
    };
    tell_all(planner, &image, &extents, event);
}

/// Executes one eviction. A failure is logged, and its end not told.
fn evict(domains: &Domains, eviction: Eviction, planner: &PlannerSender) {
    let Eviction { image, extents } = eviction;
    let Some(memory) = domains.get(&image.domain) else {
        return;
    };
    // First: a VM that uses them may have them back before the last of them is gone.
    domains.attribution().evicted(&image, &extents);
    tell_all(planner, &image, &extents, PlannerEvent::Evicted);
    if let Err(error) = memory.shared.evict(&image.image, &extents) {
        let error = forelay_host::error_chain(&error);
        tracing::warn!(image = %image.image, error, "not evicted");
        return;
    }
    tell_all(planner, &image, &extents, PlannerEvent::EvictionEnded);
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::daemon::memory::planner::planner_channel;

    /// What the planner is told of an eviction.
    pub fn told_of_eviction(domains: &Domains, eviction: Eviction) -> Vec<PlannerEvent> {
        let (planner, inbox) = planner_channel();
        evict(domains, eviction, &planner);
        inbox.events()
    }
}
