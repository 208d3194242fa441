//! Tests of the module above.

use super::*;
use forelay_image::{Extent, PAGE_BYTES};
use proptest::prelude::*;

fn image(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn pages(start: u64, count: u64) -> Extent {
    Extent::new(start * PAGE_BYTES, count * PAGE_BYTES)
}

fn touch(name: &str, start: u64, count: u64, ms: u32) -> Touch {
    Touch {
        image: image(name),
        extent: pages(start, count),
        first_touch_ms: ms,
    }
}

#[test]
fn plan_is_ordered_by_first_touch() {
    let mut sets = WorkingSets::new(WorkingSetConfig::default());
    for launch in 0..40 {
        let mut touches = vec![touch("a", 100, 4, 10), touch("a", 0, 2, 500)];
        if launch % 2 == 0 {
            touches.push(touch("a", 50, 1, 100));
        }
        sets.observe("web", &[image("a")], &touches);
    }
    let plan = sets.plan("web", &[image("a")]);
    let starts: Vec<u64> = plan
        .iter()
        .map(|p| p.planned.extent.offset / PAGE_BYTES)
        .collect();
    assert_eq!(starts, [100, 50, 0]);
    assert!(plan[0].planned.probability > 0.95 && plan[2].planned.probability > 0.95);
    assert!((plan[1].planned.probability - 0.5).abs() < 0.06, "{plan:?}");
    assert_eq!(
        plan[1].basis,
        Basis::Own {
            hits: 20,
            launches: 40
        }
    );
}

#[test]
fn overlapping_touches_keep_the_earliest_time() {
    let mut sets = WorkingSets::new(WorkingSetConfig::default());
    let touches = [
        touch("a", 0, 10, 300),
        touch("a", 2, 3, 20),
        touch("a", 4, 8, 100),
    ];
    sets.observe("p", &[image("a")], &touches);
    let set = sets.get("p", &image("a")).unwrap();
    let first: Vec<(Extent, f32)> = set.extents().map(|(e, _, ms)| (e, ms)).collect();
    assert_eq!(
        first,
        [
            (pages(0, 2), 300.0),
            (pages(2, 3), 20.0),
            (pages(5, 7), 100.0)
        ]
    );
}

#[test]
fn a_plan_is_made_once_until_something_is_learned() {
    let mut sets = WorkingSets::new(WorkingSetConfig::default());
    let (images, one) = ([image("a"), image("b")], touch("a", 3, 2, 10));
    sets.observe("web", &images, &[one]);
    let mut plans = Plans::default();
    let first = plans.plan(&sets, "web", &images);
    assert!(Arc::ptr_eq(&first, &plans.plan(&sets, "web", &images)));
    assert_eq!(*first, *sets.plan("web", &images));
    assert!(!Arc::ptr_eq(
        &first,
        &plans.plan(&sets, "web", &images[..1])
    ));
    let other = sets.get("web", &image("a")).unwrap().clone();
    let changes: [&dyn Fn(&mut WorkingSets); 3] = [
        &|sets| sets.observe("ci", &images, &[touch("b", 7, 1, 5)]),
        &|sets| sets.observe_late("web", &[touch("a", 40, 1, 5)]),
        &|sets| sets.insert("new", image("a"), other.clone()),
    ];
    for (number, change) in changes.iter().enumerate() {
        let before = plans.plan(&sets, "web", &images);
        change(&mut sets);
        let after = plans.plan(&sets, "web", &images);
        assert!(!Arc::ptr_eq(&before, &after), "change {number}");
        assert_eq!(*after, *sets.plan("web", &images), "change {number}");
    }
}

#[test]
fn what_a_launch_touches_later_counts_to_that_launch() {
    let late = [touch("a", 50, 2, 30_000), touch("a", 0, 1, 31_000)];
    let launch = |sets: &mut WorkingSets| {
        sets.observe("web", &[image("a")], &[touch("a", 0, 4, 10)]);
    };
    let (mut sets, mut at_once) = (
        WorkingSets::new(WorkingSetConfig::default()),
        WorkingSets::new(WorkingSetConfig::default()),
    );
    for number in 0..10 {
        launch(&mut sets);
        if number % 2 == 0 {
            sets.observe_late("web", &late);
            let all = [touch("a", 0, 4, 10), touch("a", 50, 2, 30_000)];
            at_once.observe("web", &[image("a")], &all);
        } else {
            launch(&mut at_once);
        }
    }
    // Page 0 was touched at the launch: in no more launches for being told again, though its
    // mean time is later.
    let told = |sets: &WorkingSets| -> Vec<(Extent, f64, u32)> {
        let plan = sets.plan("web", &[image("a")]);
        let mut told: Vec<_> = plan
            .iter()
            .map(|one| match one.basis {
                Basis::Own { hits, launches: 10 } => {
                    (one.planned.extent, one.planned.probability, hits)
                }
                other => panic!("{other:?}"),
            })
            .collect();
        told.sort_by_key(|(extent, ..)| *extent);
        told
    };
    let late_pages = |told: Vec<(Extent, f64, u32)>| {
        told.into_iter()
            .find(|(extent, ..)| *extent == pages(50, 2))
            .unwrap()
    };
    assert_eq!(late_pages(told(&sets)), late_pages(told(&at_once)));
    assert!(
        told(&sets)
            .iter()
            .all(|(_, p, hits)| *p <= 1.0 && *hits <= 10)
    );

    // What was never observed, or is touched beyond the window, stays out.
    sets.observe_late("other", &late);
    sets.observe_late("web", &[touch("b", 0, 1, 5), touch("a", 900, 1, 600_001)]);
    assert!(sets.get("other", &image("a")).is_none());
    assert!(sets.get("web", &image("b")).is_none());
    assert_eq!(told(&sets).last().unwrap().0, pages(50, 2));
}

#[test]
fn old_habits_fade_and_new_ones_win() {
    let mut sets = WorkingSets::new(WorkingSetConfig::default());
    for _ in 0..100 {
        sets.observe("p", &[image("a")], &[touch("a", 0, 1, 0)]);
    }
    for _ in 0..64 {
        sets.observe("p", &[image("a")], &[touch("a", 9, 1, 0)]);
    }
    let plan = sets.plan("p", &[image("a")]);
    let probability = |page| {
        plan.iter()
            .find(|e| e.planned.extent == pages(page, 1))
            .map_or(0.0, |e| e.planned.probability)
    };
    assert!(probability(9) > 0.7, "{plan:?}");
    assert!(probability(0) < 0.25, "{plan:?}");
}

#[test]
fn what_one_owner_touches_tells_no_other_unless_an_operator_wants_it() {
    for pool_across_owners in [false, true] {
        let mut sets = WorkingSets::new(WorkingSetConfig {
            pool_across_owners,
            ..WorkingSetConfig::default()
        });
        for _ in 0..10 {
            sets.observe("alice/web", &[image("a")], &[touch("a", 0, 8, 5)]);
        }
        assert!(!sets.plan("alice/api", &[image("a")]).is_empty());
        let others = sets.plan("zoe/web", &[image("a")]);
        assert_eq!(others.is_empty(), !pool_across_owners, "{others:?}");
    }
}

#[test]
fn an_unseen_component_follows_the_profiles_that_are_most_alike() {
    let mut sets = WorkingSets::new(WorkingSetConfig::default());
    let (base, lib) = (image("base"), image("lib"));
    for _ in 0..10 {
        let twin = [touch("base", 0, 8, 5), touch("lib", 0, 4, 50)];
        sets.observe("twin", &[base, lib], &twin);
        let alien = [touch("base", 100, 8, 5), touch("lib", 40, 4, 50)];
        sets.observe("alien", &[base, lib], &alien);
        sets.observe("new", &[base], &[touch("base", 0, 8, 5)]);
    }
    let plan = sets.plan("new", &[lib]);
    // Without images in common both count alike; with the base known the twin leads.
    let both = sets.plan("new", &[base, lib]);
    let find = |plan: &[Expectation], page| {
        plan.iter()
            .find(|e| e.planned.image == lib && e.planned.extent == pages(page, 4))
            .map_or(0.0, |e| e.planned.probability)
    };
    assert!((find(&plan, 0) - find(&plan, 40)).abs() < 0.01, "{plan:?}");
    assert!(find(&both, 0) > 0.75, "{both:?}");
    assert!(find(&both, 40) < 0.2, "{both:?}");
    assert!(
        both.iter()
            .filter(|e| e.planned.image == lib)
            .all(|e| matches!(e.basis, Basis::OtherProfiles { profiles: 2, .. }))
    );
}

#[test]
fn a_patched_component_inherits_by_path() {
    let mut sets = WorkingSets::new(WorkingSetConfig::default());
    for _ in 0..20 {
        let touches = [
            touch("v1", 10, 2, 7),  // /bin/x pages 0..2
            touch("v1", 22, 3, 40), // /lib/y pages 2..5
            touch("v1", 60, 1, 90), // /gone
        ];
        sets.observe("p", &[image("v1")], &touches);
    }
    let (x, y, gone) = ([pages(10, 4)], [pages(20, 8)], [pages(60, 2)]);
    let old = [
        FileLayout {
            path: b"/bin/x",
            extents: &x,
        },
        FileLayout {
            path: b"/lib/y",
            extents: &y,
        },
        FileLayout {
            path: b"/gone",
            extents: &gone,
        },
    ];
    // In v2 /lib/y lies first, in two extents, and is only four pages long.
    let (y2, x2, fresh) = ([pages(1, 3), pages(30, 1)], [pages(5, 4)], [pages(9, 9)]);
    let new = [
        FileLayout {
            path: b"/lib/y",
            extents: &y2,
        },
        FileLayout {
            path: b"/bin/x",
            extents: &x2,
        },
        FileLayout {
            path: b"/fresh",
            extents: &fresh,
        },
    ];
    let versions = || [image("v2"), image("v0"), image("v1")].into_iter();
    let predecessor =
        |sets: &WorkingSets, profile: &str| sets.predecessor(profile, &image("v2"), versions());
    assert_eq!(predecessor(&sets, "p"), Some(image("v1")));
    assert_eq!(
        predecessor(&sets, "stranger"),
        Some(image("v1")),
        "others' will do"
    );
    assert_eq!(sets.inherit(&image("v1"), &old, &image("v2"), &new), 1);
    assert_eq!(predecessor(&sets, "p"), None, "it has one of its own now");
    assert_eq!(predecessor(&sets, "stranger"), None, "pooled from others");
    let plan = sets.plan("p", &[image("v2")]);
    let extents: Vec<Extent> = plan.iter().map(|p| p.planned.extent).collect();
    assert_eq!(extents, [pages(5, 2), pages(3, 1), pages(30, 1)]);
    assert!(
        plan.iter().all(|p| p.planned.probability > 0.85),
        "{plan:?}"
    );
    let inherited = Basis::Predecessor {
        image: image("v1"),
        hits: 20,
        launches: 20,
    };
    assert_eq!(plan[0].basis, inherited);
    // Six launches of the new version that no longer touch it overrule what was inherited.
    for _ in 0..6 {
        sets.observe("p", &[image("v2")], &[touch("v2", 5, 2, 7)]);
    }
    let plan = sets.plan("p", &[image("v2")]);
    assert!(plan[0].planned.probability > 0.9 && plan[0].planned.extent == pages(5, 2));
    assert!(
        plan[1..].iter().all(|p| p.planned.probability < 0.5),
        "{plan:?}"
    );
    assert_eq!(
        sets.inherit(&image("v1"), &old, &image("v2"), &new),
        0,
        "once"
    );
}

#[test]
fn hostile_touches_are_bounded() {
    let config = WorkingSetConfig {
        max_spans: 64,
        ..WorkingSetConfig::default()
    };
    let mut sets = WorkingSets::new(config);
    let mut touches: Vec<Touch> = (0..10_000)
        .map(|i| touch("a", i * 7, 1, (i % 600) as u32))
        .collect();
    touches.push(Touch {
        image: image("a"),
        extent: Extent::new(u64::MAX - 5, u64::MAX),
        first_touch_ms: 0,
    });
    touches.push(touch("not attached", 0, 1, 0));
    for _ in 0..3 {
        sets.observe("p", &[image("a")], &touches);
    }
    let set = sets.get("p", &image("a")).unwrap();
    assert!(set.spans.len() <= 64);
    assert!(sets.get("p", &image("not attached")).is_none());
}

fn any_launches() -> impl Strategy<Value = Vec<Vec<(u64, u64, u32)>>> {
    prop::collection::vec(
        prop::collection::vec((0_u64..60, 0_u64..9, 0_u32..900), 0..12),
        1..8,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Every page's count equals that of a naive per-page model, and a snapshot keeps it.
    #[test]
    fn spans_agree_with_a_page_by_page_model(launches in any_launches()) {
        let config = WorkingSetConfig { half_life_launches: 8.0, ..WorkingSetConfig::default() };
        let decay = 0.5_f32.powf(1.0 / 8.0);
        let mut sets = WorkingSets::new(config);
        let mut naive = vec![0.0_f32; 80];
        for launch in &launches {
            let touches: Vec<Touch> =
                launch.iter().map(|(s, n, ms)| touch("a", *s, *n, *ms)).collect();
            sets.observe("p", &[image("a")], &touches);
            for (page, weight) in naive.iter_mut().enumerate() {
                let hit = launch.iter().any(|(s, n, _)| (*s..s + n).contains(&(page as u64)));
                *weight = *weight * decay + if hit { 1.0 } else { 0.0 };
            }
        }
        let set = sets.get("p", &image("a")).unwrap();
        for pair in set.spans.windows(2) {
            prop_assert!(pair[0].end <= pair[1].start);
        }
        for (page, weight) in naive.iter().enumerate() {
            let found = set.spans.iter().find(|s| (s.start..s.end).contains(&(page as u32)));
            prop_assert!((found.map_or(0.0, |s| s.weight) - weight).abs() < 5e-3);
        }
        let copy = WorkingSet::from_bytes(&set.to_bytes()).unwrap();
        prop_assert_eq!(copy.spans.len(), set.spans.len());
        for (a, b) in copy.spans.iter().zip(&set.spans) {
            prop_assert_eq!((a.start, a.end, a.hits), (b.start, b.end, b.hits));
            prop_assert!((a.weight - b.weight).abs() < 0.01);
        }
    }

    /// Damaged snapshots are refused or decode to something whole; they never panic.
    #[test]
    fn damaged_snapshots_do_not_panic(cut in 0_usize..60, flip in 0_usize..60, bit in 0_u8..8) {
        let mut sets = WorkingSets::new(WorkingSetConfig::default());
        sets.observe("p", &[image("a")], &[touch("a", 3, 4, 5), touch("a", 900, 4, 700)]);
        let mut bytes = sets.get("p", &image("a")).unwrap().to_bytes();
        bytes.truncate(bytes.len().saturating_sub(cut % 9));
        if let Some(byte) = bytes.get_mut(flip) {
            *byte ^= 1 << bit;
        }
        if let Ok(set) = WorkingSet::from_bytes(&bytes) {
            for pair in set.spans.windows(2) {
                prop_assert!(pair[0].end <= pair[1].start);
            }
        }
    }
}
