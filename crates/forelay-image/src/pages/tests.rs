//! Sets of pages against a plain set.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Insert(u32, u32),
    Remove(u32, u32),
    Compact,
}

fn op() -> impl Strategy<Value = Op> {
    let short = (0u32..400, 0u32..6);
    let long = (0u32..400, 0u32..200);
    prop_oneof![
        6 => short.clone().prop_map(|(start, len)| Op::Insert(start, start + len)),
        2 => long.clone().prop_map(|(start, len)| Op::Insert(start, start + len)),
        4 => short.prop_map(|(start, len)| Op::Remove(start, start + len)),
        1 => long.prop_map(|(start, len)| Op::Remove(start, start + len)),
        1 => Just(Op::Compact),
    ]
}

fn runs_of(model: &BTreeSet<u32>, window: PageRun) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    let end = window.end.max(window.start);
    for &page in model.range(window.start.0..end.0) {
        match runs.last_mut() {
            Some(run) if run.end.0 == page => run.end.0 += 1,
            _ => runs.push(PageRun::from(page..page + 1)),
        }
    }
    runs
}

/// A set and its model after `ops`; fails where one step's counts differ.
fn built(ops: Vec<Op>) -> Result<(PageSet, BTreeSet<u32>), TestCaseError> {
    let mut set = PageSet::new();
    let mut model = BTreeSet::new();
    for op in ops {
        let before = model.len();
        match op {
            Op::Insert(start, end) => {
                model.extend(start..end);
                let added = set.insert(PageRun::from(start..end));
                prop_assert_eq!(added.0 as usize, model.len() - before);
            }
            Op::Remove(start, end) => {
                model.retain(|page| !(start..end).contains(page));
                let removed = set.remove(PageRun::from(start..end));
                prop_assert_eq!(removed.0 as usize, before - model.len());
            }
            Op::Compact => set.compact(),
        }
        set.validate().map_err(TestCaseError::fail)?;
        prop_assert_eq!(set.len().0 as usize, model.len());
    }
    Ok((set, model))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn agrees_with_a_plain_set(ops in prop::collection::vec(op(), 1..120),
                               from in 0u32..600, len in 0u32..300) {
        let (set, model) = built(ops)?;
        let window = PageRun::from(from..from + len);
        let expected = runs_of(&model, window);
        prop_assert_eq!(set.runs_within(window).collect::<Vec<_>>(), expected);
        let everything: BTreeSet<u32> = (from..from + len).collect();
        let absent = everything.difference(&model).copied().collect();
        prop_assert_eq!(set.gaps_within(window).collect::<Vec<_>>(), runs_of(&absent, window));
        let within = everything.intersection(&model).count();
        prop_assert_eq!(set.count_within(window).0 as usize, within);
        prop_assert_eq!(set.intersects(window), within > 0);
        let inside = model.contains(&from);
        prop_assert_eq!(set.contains(PageNo(from)), inside);
        let mut around = from..from + 1;
        while around.start > 0 && model.contains(&(around.start - 1)) == inside {
            around.start -= 1;
        }
        while around.end < 700 && model.contains(&around.end) == inside {
            around.end += 1;
        }
        let whole = PageRun::from(0..700);
        prop_assert_eq!(set.run_around(PageNo(from), whole), PageRun::from(around));
    }

    #[test]
    fn operators_agree_with_a_plain_set(a in prop::collection::vec(op(), 1..60),
                                        b in prop::collection::vec(op(), 1..60)) {
        let ((a, model_a), (b, model_b)) = (built(a)?, built(b)?);
        let is = |set: &PageSet, model: BTreeSet<u32>| {
            set.validate().map_err(TestCaseError::fail)?;
            prop_assert_eq!(set.runs().collect::<Vec<_>>(), runs_of(&model, PageRun::ALL));
            Ok(())
        };
        is(&(&a & &b), &model_a & &model_b)?;
        is(&(&a - &b), &model_a - &model_b)?;
        let mut both = a.clone();
        both |= &b;
        is(&both, &model_a | &model_b)?;
        both -= &a;
        is(&both, &model_b - &model_a)?;
        prop_assert_eq!(both.extents().collect::<PageSet>(), both);
    }
}

#[test]
fn bytes_are_widened_to_pages_and_cut_at_the_last_number() {
    assert_eq!(PageNo::containing(8191), PageNo(1));
    assert_eq!(Pages::covering(8193), Pages(3));
    let run = PageRun::covering(Extent::new(4095, 2));
    assert_eq!((run, run.pages()), (PageRun::from(0..2), Pages(2)));
    assert_eq!(run.extent(), Extent::new(0, 8192));
    assert!(PageRun::covering(Extent::new(5000, 0)).is_empty());
    assert_eq!(PageRun::whole(4097), PageRun::from(0..2));
    let beyond = PageRun::covering(Extent::new(u64::MAX - 1, 1));
    assert_eq!((beyond.end, beyond.pages()), (PageNo::END, Pages::NONE));
    assert_eq!(PageNo::END + Pages(1), PageNo::END);
}

#[test]
fn fully_fragmented_costs_a_bit_a_page() {
    let every_other = (0..64 * 1024).step_by(2);
    let mut set: PageSet = every_other
        .map(|page| PageRun::from(page..page + 1))
        .collect();
    set.compact();
    assert_eq!(set.len(), Pages(32 * 1024));
    assert!(set.heap_bytes() <= 64 * 1024 / 8);
    let mut whole = PageSet::new();
    whole.insert(PageRun::from(0..1 << 20));
    assert!(whole.heap_bytes() <= 64);
}
