//! Candidates for eviction by what they are worth, for all that one message asks.
//!
//! A prefetch that finds memory full asks how much could go that is worth less than it, at
//! one [`Reach`] after another, and the next prefetch of the same message asks again. What
//! can go and what it is worth do not depend on who asks: each image is looked at once, a
//! reach is valued at its first use, and runs that are candidates at two reaches are valued
//! for the first alone.
//!
//! Refuses to know when to evict. Invariant: holds as long as nothing arrives, leaves, is
//! used or forecast, that is within one message once its event was taken; only
//! [`Ranking::take`] removes candidates.

use std::collections::BTreeMap;

use forelay_image::PAGE_BYTES;
use forelay_image::pages::{PageRun, PageSet, Pages};

use crate::names::SharedImage;

use super::victims::{Choice, Reach, Victims};
use super::worth::{Foreseen, Outlook, ValuedRun};

/// See the module's header.
#[derive(Default)]
pub(super) struct Ranking {
    /// The known images in order.
    rows: Option<Vec<Row>>,
    foreseen: Option<Foreseen>,
    /// The candidates of each reach asked for so far, with the number of their row.
    pools: BTreeMap<Reach, Vec<(ValuedRun, usize)>>,
}

struct Row {
    image: SharedImage,
    mapped: bool,
    /// What is unpinned and not on its way out already.
    free: Option<Vec<PageRun>>,
    outlook: Option<Outlook>,
    /// What was valued last.
    runs: Vec<PageRun>,
    valued: Vec<ValuedRun>,
}

impl Ranking {
    /// How many bytes could go that are worth less than `below` seconds per byte.
    pub(super) fn bytes_below(&mut self, choice: &Choice<'_>, reach: Reach, below: f64) -> u64 {
        let pool = self.pool(choice, reach).iter();
        let less = pool.filter(|(valued, _)| valued.seconds_per_byte < below);
        less.map(|(valued, _)| valued.run.extent().len).sum()
    }

    /// Takes the extents worth least per byte, but less than `below` seconds per byte, until
    /// `needed_bytes` are covered or there are no more.
    pub(super) fn take(
        &mut self,
        choice: &Choice<'_>,
        reach: Reach,
        needed_bytes: u64,
        below: f64,
    ) -> Victims {
        let mut pool = self.pool(choice, reach).to_vec();
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

    fn pool(&mut self, choice: &Choice<'_>, reach: Reach) -> &[(ValuedRun, usize)] {
        let rows = self.rows.get_or_insert_with(|| {
            let images = choice.table.known_images();
            images.map(|image| Row::new(choice, image)).collect()
        });
        let foreseen = self
            .foreseen
            .get_or_insert_with(|| choice.worth.foreseen(choice.now_ms));
        self.pools.entry(reach).or_insert_with(|| {
            let touched = match reach {
                Reach::Untouched => choice.table.touched_by_running(),
                _ => BTreeMap::new(),
            };
            let mut pool = Vec::new();
            for (at, row) in rows.iter_mut().enumerate() {
                if reach == Reach::Unmapped && row.mapped {
                    continue;
                }
                let touched = touched.get(&row.image);
                let valued = row.value(choice, reach, touched, foreseen);
                pool.extend(valued.iter().map(|valued| (*valued, at)));
            }
            pool
        })
    }
}

impl Row {
    fn new(choice: &Choice<'_>, image: &SharedImage) -> Self {
        Self {
            image: image.clone(),
            mapped: choice.table.mapped_by(image) > 0,
            free: None,
            outlook: None,
            runs: Vec::new(),
            valued: Vec::new(),
        }
    }

    /// The image's candidates at `reach`, valued.
    fn value(
        &mut self,
        choice: &Choice<'_>,
        reach: Reach,
        touched: Option<&PageSet>,
        foreseen: &mut Foreseen,
    ) -> &[ValuedRun] {
        let free = self.free.get_or_insert_with(|| choice.free(&self.image));
        let runs = choice.within_reach(&self.image, free, reach, touched);
        if runs != self.runs {
            let outlook = self.outlook.get_or_insert_with(|| {
                let steps = foreseen.take(&self.image);
                Outlook::of(choice.worth, &self.image, steps, choice.now_ms)
            });
            self.valued = choice
                .worth
                .value(&self.image, outlook, &runs, choice.now_ms);
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
