//! Candidates for eviction by what they are worth, for all that one message asks.
//!
//! A prefetch that finds memory full asks how much could go that is worth less than it, at
//! one [`VictimClass`] after another, and the next prefetch of the same message asks again. What
//! can go and what it is worth do not depend on who asks: each image is looked at once, a
//! class is valued at its first use, and runs that are candidates at two classes are valued
//! for the first alone.
//!
//! Refuses to know when to evict. Invariant: holds as long as nothing arrives, leaves, is
//! used or forecast, that is within one message once its event was taken; only
//! [`Ranking::take`] removes candidates.

use std::collections::BTreeMap;

use forelay_image::PAGE_BYTES;
use forelay_image::pages::{PageRun, PageSet, Pages};

use crate::names::SharedImage;

use super::benefit::{ForecastSteps, ImageOutlook, ValuedRun};
use super::victims::{EvictionContext, VictimClass, Victims};

/// See the module's header.
#[derive(Default)]
pub(super) struct Ranking {
    /// The known images in order.
    rows: Option<Vec<Row>>,
    forecast: Option<ForecastSteps>,
    /// The candidates of each class asked for so far, with the number of their row.
    pools: BTreeMap<VictimClass, Vec<(ValuedRun, usize)>>,
}

struct Row {
    image: SharedImage,
    mapped: bool,
    /// What is unpinned and not on its way out already.
    free: Option<Vec<PageRun>>,
    outlook: Option<ImageOutlook>,
    /// What was valued last.
    runs: Vec<PageRun>,
    valued: Vec<ValuedRun>,
}

impl Ranking {
    /// Whether anybody has asked in this message.
    pub(super) const fn is_used(&self) -> bool {
        self.rows.is_some()
    }

    /// How many bytes could go that are worth less than `below` seconds per byte.
    pub(super) fn bytes_below(
        &mut self,
        context: &EvictionContext<'_>,
        class: VictimClass,
        below: f64,
    ) -> u64 {
        let pool = self.pool(context, class).iter();
        let less = pool.filter(|(valued, _)| valued.seconds_per_byte < below);
        less.map(|(valued, _)| valued.run.extent().len).sum()
    }

    /// Takes the extents worth least per byte, but less than `below` seconds per byte, until
    /// `needed_bytes` are covered or there are no more.
    pub(super) fn take(
        &mut self,
        context: &EvictionContext<'_>,
        class: VictimClass,
        needed_bytes: u64,
        below: f64,
    ) -> Victims {
        let mut pool = self.pool(context, class).to_vec();
        pool.retain(|(valued, _)| valued.seconds_per_byte < below);
        pool.sort_unstable_by(|(a, row_a), (b, row_b)| {
            let by_worth = a.seconds_per_byte.total_cmp(&b.seconds_per_byte);
            by_worth.then((row_a, a.run).cmp(&(row_b, b.run)))
        });
        let mut left_pages = needed_bytes.div_ceil(PAGE_BYTES);
        let mut chosen: BTreeMap<usize, PageSet> = BTreeMap::new();
        for (valued, row) in pool {
            if left_pages == 0 {
                break;
            }
            // Stop as soon as it is safe: the last run is cut.
            let pages = u64::from(valued.run.pages().0).min(left_pages);
            left_pages -= pages;
            let run = PageRun::new(valued.run.start, valued.run.start + Pages(pages as u32));
            chosen.entry(row).or_default().insert(run);
        }
        self.pools.clear();
        let rows = self.rows.as_deref_mut().unwrap_or_default();
        let victims = chosen.into_iter().map(|(row, set)| {
            let row = &mut rows[row];
            row.without(&set);
            (row.image.clone(), set.extents().collect())
        });
        victims.collect()
    }

    fn pool(&mut self, context: &EvictionContext<'_>, class: VictimClass) -> &[(ValuedRun, usize)] {
        let rows = self.rows.get_or_insert_with(|| {
            let images = context.table.known_images();
            images.map(|image| Row::new(context, image)).collect()
        });
        let forecast = self
            .forecast
            .get_or_insert_with(|| context.benefit.forecast(context.now_ms));
        self.pools.entry(class).or_insert_with(|| {
            let touched = match class {
                VictimClass::Untouched => context.table.touched_by_running(),
                _ => BTreeMap::new(),
            };
            let mut pool = Vec::new();
            for (at, row) in rows.iter_mut().enumerate() {
                if class == VictimClass::Unmapped && row.mapped {
                    continue;
                }
                let touched = touched.get(&row.image);
                let valued = row.value(context, class, touched, forecast);
                pool.extend(valued.iter().map(|valued| (*valued, at)));
            }
            pool
        })
    }
}

impl Row {
    fn new(context: &EvictionContext<'_>, image: &SharedImage) -> Self {
        Self {
            image: image.clone(),
            mapped: context.table.mapped_by(image) > 0,
            free: None,
            outlook: None,
            runs: Vec::new(),
            valued: Vec::new(),
        }
    }

    /// The image's candidates at `class`, valued.
    fn value(
        &mut self,
        context: &EvictionContext<'_>,
        class: VictimClass,
        touched: Option<&PageSet>,
        forecast: &mut ForecastSteps,
    ) -> &[ValuedRun] {
        let free = self.free.get_or_insert_with(|| context.free(&self.image));
        let runs = context.of_class(&self.image, free, class, touched);
        if runs != self.runs {
            let outlook = self.outlook.get_or_insert_with(|| {
                let steps = forecast.take(&self.image);
                ImageOutlook::of(context.benefit, &self.image, steps, context.now_ms)
            });
            self.valued = context
                .benefit
                .value(&self.image, outlook, &runs, context.now_ms);
            self.runs = runs;
        }
        &self.valued
    }

    /// Pages that were taken are no candidates any more.
    fn without(&mut self, taken: &PageSet) {
        if let Some(free) = &mut self.free {
            *free = free
                .iter()
                .flat_map(|run| taken.gaps_within(*run))
                .collect();
        }
    }
}
