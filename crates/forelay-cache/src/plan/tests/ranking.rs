//! One pass over the candidates against the plain rule: look at each image again for each
//! prefetch and each class.

use forelay_image::pages::{PageNo, PageRun, PageSet, Pages};
use proptest::prelude::*;

use super::random::{event_of, step};
use super::*;
use crate::plan::benefit::{ImageOutlook, ValuedRun};
use crate::plan::ranking::Ranking;
use crate::plan::victims::VictimClass;

const CLASSES: [VictimClass; 5] = [
    VictimClass::Unmapped,
    VictimClass::Untouched,
    VictimClass::Idle,
    VictimClass::Unused,
    VictimClass::All,
];

/// What forecasts say of one image, looked up in each of them.
fn steps(benefit: &BenefitModel, image: &SharedImage, now_ms: i64) -> Vec<(PageNo, f64)> {
    let mut changes: Vec<(PageNo, f64)> = Vec::new();
    for forecast in benefit.forecasts.values() {
        let launch = benefit.probability_now(forecast, now_ms);
        let of = |planned: &&PlannedExtent| {
            forecast.domain == image.domain && planned.image == image.image
        };
        for planned in forecast.working_set.iter().filter(of) {
            let run = PageRun::covering(planned.extent);
            let need = launch * planned.probability.clamp(0.0, 1.0);
            changes.extend([(run.start, need), (run.end, -need)]);
        }
    }
    changes.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut steps: BTreeMap<PageNo, f64> = BTreeMap::new();
    let mut sum = 0.0f64;
    for (page, change) in changes {
        sum += change;
        steps.insert(page, sum.max(0.0));
    }
    steps.into_iter().collect()
}

fn candidates(
    planner: &Planner,
    table: &MappingTable,
    image: &SharedImage,
    class: VictimClass,
) -> Vec<PageRun> {
    if class == VictimClass::Unmapped && table.mapped_by(image) > 0 {
        return Vec::new();
    }
    let bytes = table.image_bytes(image).unwrap();
    let runs = table.evictable(image, Extent::new(0, bytes)).into_iter();
    let runs = runs.map(PageRun::covering).collect();
    let without = |runs: Vec<PageRun>, set: Option<&PageSet>| match set {
        None => runs,
        Some(set) => {
            let gaps = runs.into_iter().flat_map(|run| set.gaps_within(run));
            gaps.collect()
        }
    };
    let mut runs = without(runs, planner.evicting.get(image));
    if matches!(
        class,
        VictimClass::Untouched | VictimClass::Idle | VictimClass::Unused
    ) {
        runs = planner.recently_used.without(image, runs);
    }
    if matches!(class, VictimClass::Untouched | VictimClass::Idle) {
        runs = planner.soon_used.without(image, runs);
    }
    match class {
        VictimClass::Untouched => without(runs, table.touched_by_running().get(image)),
        _ => runs,
    }
}

/// What is worth least, found for this question alone.
fn plain(
    planner: &Planner,
    table: &MappingTable,
    now_ms: i64,
    class: VictimClass,
    needed_bytes: u64,
    below: f64,
) -> Vec<(SharedImage, Vec<Extent>)> {
    let mut valued: Vec<(ValuedRun, SharedImage)> = Vec::new();
    for image in table.known_images() {
        let steps = steps(&planner.benefit, image, now_ms);
        let outlook = ImageOutlook::of(&planner.benefit, image, steps, now_ms);
        let runs = candidates(planner, table, image, class);
        let runs = planner.benefit.value(image, &outlook, &runs, now_ms);
        valued.extend(runs.into_iter().map(|run| (run, image.clone())));
    }
    valued.retain(|(valued, _)| valued.seconds_per_byte < below);
    valued.sort_by(|(a, of_a), (b, of_b)| {
        let by_worth = a.seconds_per_byte.total_cmp(&b.seconds_per_byte);
        by_worth.then((of_a, a.run).cmp(&(of_b, b.run)))
    });
    let mut left = Pages::covering(needed_bytes);
    let mut chosen: BTreeMap<SharedImage, PageSet> = BTreeMap::new();
    for (valued, image) in valued {
        let pages = valued.run.pages().min(left);
        left -= pages;
        if pages > Pages::NONE {
            let run = PageRun::new(valued.run.start, valued.run.start + pages);
            chosen.entry(image).or_default().insert(run);
        }
    }
    let extents = |set: PageSet| set.extents().collect();
    let chosen = chosen.into_iter().map(|(image, set)| (image, extents(set)));
    chosen.collect()
}

fn bytes_of(victims: &[(SharedImage, Vec<Extent>)]) -> u64 {
    let extents = victims.iter().flat_map(|(_, extents)| extents);
    extents.map(|extent| extent.len).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]
    #[test]
    fn one_pass_chooses_what_a_pass_for_each_question_would(
        steps in prop::collection::vec(step(), 20..100),
        questions in prop::collection::vec((0usize..5, 1u64..12 << 20, -9i32..0), 1..8),
    ) {
        let mut host = Host::new(config(12));
        for step in steps {
            if let Some(event) = event_of(step, &mut host) {
                host.tell(event);
            }
        }
        let (planner, now_ms) = (&mut host.planner, host.now_ms);
        let table = Arc::clone(planner.table());
        table.read(|table| -> Result<(), TestCaseError> {
            // As the prefetches of one message ask, none of which finds room.
            let mut ranking = Ranking::default();
            for &(class, _, exponent) in &questions {
                let (class, below) = (CLASSES[class], 10f64.powi(exponent));
                let all = plain(planner, table, now_ms, class, 1 << 40, below);
                let found = ranking.bytes_below(&planner.context(table, now_ms), class, below);
                prop_assert_eq!(found, bytes_of(&all), "{:?}", class);
            }
            // And as the one that does, and a shortage, after which more is on its way out.
            for (class, needed, exponent) in questions {
                let (class, below) = (CLASSES[class], 10f64.powi(exponent));
                let expected = plain(planner, table, now_ms, class, needed, below);
                let context = planner.context(table, now_ms);
                let taken = ranking.take(&context, class, needed, below);
                prop_assert_eq!(&taken, &expected, "{:?}", class);
                for (image, extents) in taken {
                    let evicting = planner.evicting.entry(image).or_default();
                    for extent in extents {
                        evicting.insert(PageRun::covering(extent));
                    }
                }
            }
            Ok(())
        })?;
    }
}
