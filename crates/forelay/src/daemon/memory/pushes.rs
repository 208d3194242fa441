//! Prefetched bytes on their way into shared memory: chunks arrive, are stored, and the
//! extents that the planner asked for end.
//!
//! Invariant: each extent of a batch ends in exactly one `Pushed` or `PushFailed`.

use forelay_cache::plan::Event;
use forelay_cache::{Domain, SharedImage};
use forelay_image::{Digest, Extent};
use forelay_store::PrefetchItem;

/// What became of one chunk of a batch.
pub(in crate::daemon) struct Pushed {
    image: Digest,
    /// Extents that are in shared memory now.
    here: Vec<Extent>,
    /// The image as a whole cannot be fetched.
    image_failed: bool,
}

/// Stores what has arrived of one chunk. May take a moment: not on async threads.
pub(in crate::daemon) fn push(shared: &forelay_memory::SharedMemory, item: PrefetchItem) -> Pushed {
    let image = item.image;
    match item.pieces {
        Ok(pieces) => {
            let mut here = Vec::new();
            for piece in pieces {
                match shared.push(&image, piece.extent.offset, &piece.bytes) {
                    Ok(()) => here.push(piece.extent),
                    Err(error) => tracing::warn!(%image, %error, "push failed"),
                }
            }
            Pushed {
                image,
                here,
                image_failed: false,
            }
        }
        Err(error) => {
            let image_failed = item.chunk_no == u32::MAX;
            tracing::warn!(%image, error = %crate::daemon::chain(&error), "prefetch failed");
            Pushed {
                image,
                here: Vec::new(),
                image_failed,
            }
        }
    }
}

/// The extents of a batch that have not arrived in full yet.
pub(in crate::daemon) struct OpenPushes {
    domain: Domain,
    /// Image, extent as planned, bytes still missing.
    open: Vec<(Digest, Extent, u64)>,
}

impl OpenPushes {
    /// A batch of which nothing has arrived.
    pub(in crate::daemon) fn new(domain: Domain, plan: Vec<(Digest, Extent)>) -> Self {
        let open = plan
            .into_iter()
            .map(|(image, extent)| (image, extent, extent.len))
            .collect();
        Self { domain, open }
    }

    /// Accounts for a chunk; returns the events of extents that are complete now.
    pub(in crate::daemon) fn take(&mut self, pushed: Pushed) -> Vec<Event> {
        for here in &pushed.here {
            for (image, extent, missing) in &mut self.open {
                if *image == pushed.image
                    && let Some(part) = extent.intersection(here)
                {
                    *missing = missing.saturating_sub(part.len);
                }
            }
        }
        let domain = self.domain.clone();
        let gone = |(image, _, missing): &mut (Digest, Extent, u64)| {
            *missing == 0 || (pushed.image_failed && *image == pushed.image)
        };
        let ended = self.open.extract_if(.., gone);
        ended
            .map(|(image, extent, missing)| outcome(&domain, image, extent, missing))
            .collect()
    }

    /// The events of extents that will not come any more.
    pub(in crate::daemon) fn fail_rest(self) -> Vec<Event> {
        let Self { domain, open } = self;
        let failed = open.into_iter();
        failed
            .map(|(image, extent, missing)| outcome(&domain, image, extent, missing))
            .collect()
    }
}

fn outcome(domain: &Domain, image: Digest, extent: Extent, missing: u64) -> Event {
    let image = SharedImage::new(domain.clone(), image);
    if missing == 0 {
        Event::Pushed { image, extent }
    } else {
        Event::PushFailed { image, extent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_over_several_chunks_ends_once_with_its_last_piece() {
        let image = Digest::of(b"image");
        let plan = vec![
            (image, Extent::new(0, 12288)),
            (image, Extent::new(16384, 4096)),
        ];
        let mut open = OpenPushes::new("d".into(), plan);
        let part = |offset, len| Pushed {
            image,
            here: vec![Extent::new(offset, len)],
            image_failed: false,
        };
        assert!(open.take(part(0, 8192)).is_empty());
        let events = open.take(part(8192, 4096));
        assert!(
            matches!(&events[..], [Event::Pushed { extent, .. }] if *extent == Extent::new(0, 12288))
        );
        let rest = open.fail_rest();
        assert!(matches!(&rest[..], [Event::PushFailed { extent, .. }] if extent.offset == 16384));
    }
}
