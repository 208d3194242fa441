//! Tests of the module above.

#[path = "../../examples/density/sets.rs"]
mod density_sets;

use proptest::prelude::*;

use super::counts::{PairCounts, Prior};
use super::data::{Rows, Schema};
use super::fit::{FitLimits, fit};
use super::mixture::{EmSettings, Mixture, Random, Scratch};
use super::tree::{Tree, UNKNOWN};
use super::*;
use crate::time::{DAY_MS, HOUR_MS, Timestamp};
use density_sets::DensitySets;

fn uniform(random: &mut Random) -> f64 {
    (random.next() >> 11) as f64 / (1_u64 << 53) as f64
}

/// Rows of a known tree of binary variables: each copies its parent, flipped with probability
/// 0.15.
fn sample_tree(parents: &[Option<usize>], rows: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut random = Random(seed);
    (0..rows)
        .map(|_| {
            let mut values = vec![false; parents.len()];
            for v in 0..parents.len() {
                values[v] = match parents[v] {
                    None => uniform(&mut random) < 0.4,
                    Some(p) => values[p] ^ (uniform(&mut random) < 0.15),
                };
            }
            (0..values.len() as u32)
                .filter(|v| values[*v as usize])
                .collect()
        })
        .collect()
}

fn weighted(rows: Vec<Vec<u32>>, variables: usize) -> Rows {
    Rows::new(
        Schema::binary(variables),
        rows.into_iter().map(|r| (r, 1.0)),
    )
}

#[test]
fn chow_liu_recovers_the_tree_that_made_the_data() {
    let parents = [
        None,
        Some(0),
        Some(0),
        Some(1),
        Some(1),
        Some(2),
        Some(5),
        Some(6),
    ];
    let rows = weighted(sample_tree(&parents, 4000, 7), parents.len());
    let counts = PairCounts::of(&rows);
    let prior = Prior::Cells(1.0);
    let tree = Tree::learn(&counts, &rows.schema, prior, prior, 0.0);
    let mut found: Vec<(usize, usize)> = (0..parents.len())
        .filter_map(|v| tree.parent(v).map(|p| (v.min(p), v.max(p))))
        .collect();
    found.sort_unstable();
    let mut truth: Vec<(usize, usize)> = parents
        .iter()
        .enumerate()
        .filter_map(|(v, p)| p.map(|p| (p, v)))
        .collect();
    truth.sort_unstable();
    assert_eq!(found, truth);
}

#[test]
fn a_mixture_recovers_two_kinds_that_no_single_tree_can_tell() {
    // Two kinds of launches whose dependencies contradict each other.
    let mut random = Random(3);
    let mut make = |n: usize| {
        let rows = (0..n).map(|_| {
            let kind = random.below(2) == 0;
            let mut row = Vec::new();
            for v in 0..6_u32 {
                let bit = uniform(&mut random) < if kind { 0.85 } else { 0.1 };
                row.extend(bit.then_some(v));
                let agree = uniform(&mut random) < 0.95;
                row.extend((bit == (kind == agree)).then_some(v + 6));
            }
            row
        });
        weighted(rows.collect(), 12)
    };
    let (train, valid, test) = (make(3000), make(1000), make(2000));
    let single = Mixture::chow_liu(&train, 1.0).mean_log_likelihood(&test);
    let fitted = fit(&train, &valid, FitLimits::default());
    let mixed = fitted.mixture.mean_log_likelihood(&test);
    assert!(mixed > single + 0.3, "{mixed} against {single}");
    // Within tighter limits the search is smaller, and what it costs stays below them.
    for million_steps in [1.0, 4.0, 16.0] {
        let limits = FitLimits {
            million_steps,
            ..FitLimits::default()
        };
        let fitted = fit(&train, &valid, limits);
        assert!(fitted.million_steps <= million_steps, "{fitted:?}");
    }
}

/// A small random mixture over variables of two and three values.
fn random_mixture(seed: u64, trees: usize) -> Mixture {
    let schema = Schema::new([2, 3, 2, 4, 2]);
    let mut random = Random(seed);
    let rows = (0..60).map(|_| {
        let row = (0..5).filter_map(|v| schema.indicator(v, random.below(schema.card(v))));
        (row.collect(), 1.0)
    });
    let rows = Rows::new(schema.clone(), rows.collect::<Vec<_>>());
    let counts = PairCounts::of(&rows);
    let how = EmSettings {
        trees,
        strength: 1.0,
        rounds: 3,
        seed,
    };
    Mixture::fit(&rows, &rows, &counts, how).mixture
}

/// Every complete assignment of the schema with its probability.
fn enumerate(mixture: &Mixture) -> Vec<(Vec<u32>, f64)> {
    let schema = mixture.schema();
    let mut all: Vec<Vec<u32>> = vec![vec![]];
    for v in 0..schema.variables() {
        let grown = all.iter().flat_map(|row| {
            (0..schema.card(v) as u32).map(move |value| [row.as_slice(), &[value]].concat())
        });
        all = grown.collect();
    }
    let mut scratch = Scratch::default();
    all.into_iter()
        .map(|values| {
            let row: Vec<u32> = values
                .iter()
                .enumerate()
                .filter_map(|(v, value)| schema.indicator(v, *value as usize))
                .collect();
            let p = mixture.log_likelihood(&row, &mut scratch).exp();
            (values, p)
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Belief propagation in a mixture of trees equals summing over all assignments.
    #[test]
    fn inference_is_exact(
        seed in 0_u64..500,
        trees in 1_usize..4,
        known in prop::collection::vec(prop::option::of(0_u32..4), 5),
    ) {
        let mixture = random_mixture(seed, trees);
        let schema = mixture.schema().clone();
        let evidence: Vec<u32> = known.iter().enumerate()
            .map(|(v, e)| e.map_or(UNKNOWN, |e| e % schema.card(v) as u32)).collect();
        let all = enumerate(&mixture);
        let total: f64 = all.iter().map(|(_, p)| p).sum();
        prop_assert!((total - 1.0).abs() < 1e-4, "sums to {}", total);
        let fits = |values: &[u32]| values.iter().zip(&evidence)
            .all(|(value, e)| *e == UNKNOWN || value == e);
        let mass: f64 = all.iter().filter(|(v, _)| fits(v)).map(|(_, p)| p).sum();
        let posterior = mixture.posterior(&evidence);
        for v in 0..schema.variables() {
            for value in 0..schema.card(v) {
                let joint: f64 = all.iter()
                    .filter(|(row, _)| fits(row) && row[v] == value as u32)
                    .map(|(_, p)| p).sum();
                let got = posterior[mixture.slot(v) + value];
                prop_assert!((got - joint / mass).abs() < 1e-4, "{} {} {}", v, got, joint / mass);
            }
        }
    }
}

fn context(profile: &str, at: i64) -> Context {
    Context {
        profile: profile.into(),
        owner: "ann".into(),
        at: Timestamp(at),
        memory_mib: 512,
    }
}

fn fit_now(model: &mut Model) {
    let fitted = model.training_set().fit();
    model.install(fitted);
}

fn fit_if_due(model: &mut Model) {
    if model.fit_due() {
        fit_now(model);
    }
}

fn probability(ranked: &[(std::sync::Arc<str>, f64)], name: &str) -> f64 {
    ranked
        .iter()
        .find(|(n, _)| &**n == name)
        .map_or(0.0, |(_, p)| *p)
}

#[test]
fn components_follow_the_profile_the_hour_and_each_other() {
    let mut model = Model::new(NeedsConfig::default());
    for i in 0..600_i64 {
        let at = i * HOUR_MS;
        let web = ["debian", "nginx"];
        // CI needs the compiler; with the compiler come its headers; at night also the docs.
        let night = Timestamp(at).hour_of_day() < 3;
        let mut ci = vec!["debian", "git"];
        if (i * 7919) % 64 < 32 {
            ci.extend(["gcc", "headers"]);
        }
        if night {
            ci.push("docs");
        }
        model.observe(&context("web", at), web);
        model.observe(&context("ci", at), ci);
        fit_if_due(&mut model);
    }
    let day = 1000 * DAY_MS + 14 * HOUR_MS;
    let web = model.rank(&context("web", day), &["debian"]);
    assert_eq!(&*web[0].0, "nginx");
    assert!(web[0].1 > 0.9 && probability(&web, "git") < 0.1, "{web:?}");
    let ci = model.rank(&context("ci", day), &["debian"]);
    assert!((probability(&ci, "headers") - 0.5).abs() < 0.15, "{ci:?}");
    assert!(probability(&ci, "debian") == 0.0, "present already");
    // The mixture has found that headers come with gcc, and docs with the night.
    assert!(model.mixture_share() > 0.5, "{}", model.mixture_share());
    let with_gcc = model.rank(&context("ci", day), &["debian", "gcc"]);
    assert!(probability(&with_gcc, "headers") > 0.8, "{with_gcc:?}");
    let night = model.rank(&context("ci", day + 11 * HOUR_MS), &["debian"]);
    assert!(
        probability(&night, "docs") > probability(&ci, "docs") + 0.4,
        "{night:?}"
    );
    // A profile never seen gets what everyone has.
    let new = model.rank(&context("never", day), &[]);
    assert_eq!(&*new[0].0, "debian");
}

#[test]
fn a_change_of_habit_is_followed() {
    let mut model = Model::new(NeedsConfig::default());
    for i in 0..400_i64 {
        model.observe(&context("web", i * HOUR_MS), ["debian", "apache"]);
        fit_if_due(&mut model);
    }
    for i in 400..520_i64 {
        model.observe(&context("web", i * HOUR_MS), ["debian", "nginx"]);
        fit_if_due(&mut model);
    }
    let ranked = model.rank(&context("web", 520 * HOUR_MS), &["debian"]);
    assert!(probability(&ranked, "nginx") > 0.6, "{ranked:?}");
}

#[test]
fn hostile_vocabularies_are_bounded() {
    let config = NeedsConfig {
        max_components: 40,
        max_profiles: 20,
        max_owners: 5,
        max_rows: 64,
        fit_every: 32,
        ..NeedsConfig::default()
    };
    let mut model = Model::new(config);
    let mut random = Random(9);
    for i in 0..300_i64 {
        let names: Vec<String> = (0..30).map(|_| format!("c{}", random.next())).collect();
        let mut ctx = context(&format!("p{i}"), random.next() as i64);
        ctx.owner = format!("o{i}");
        ctx.memory_mib = random.next() as u32;
        model.observe(&ctx, names.iter().map(String::as_str));
        fit_if_due(&mut model);
    }
    let ranked = model.rank(&context("p299", 0), &[]);
    assert!(ranked.len() <= 40);
    assert!(ranked.iter().all(|(_, p)| (0.0..=1.0).contains(p)));
}

/// The reference figures that come with the data sets: a plain Chow-Liu tree, alpha 1.
#[test]
fn chow_liu_agrees_with_the_reference_figures() {
    let Some(sets) = DensitySets::find("chow_liu_agrees_with_the_reference_figures") else {
        return;
    };
    for (set, expected) in [
        ("nltcs", -6.7590),
        ("plants", -16.5240),
        ("baudio", -44.3749),
        ("jester", -58.2265),
        ("bnetflix", -60.2503),
        ("accidents", -33.1881),
        ("pumsb_star", -30.8070),
        ("dna", -87.7348),
        ("bbc", -261.8563),
    ] {
        let set = sets.load(set);
        let got = Mixture::chow_liu(&set.train, 1.0).mean_log_likelihood(&set.test);
        assert!(
            (got - expected).abs() < 5e-4,
            "{}: {got} against {expected}",
            set.name
        );
    }
}

/// What the daemon calls finds more than one tree can say, within its limits.
#[test]
fn the_daemons_fit_beats_one_tree_on_real_data() {
    let Some(sets) = DensitySets::find("the_daemons_fit_beats_one_tree_on_real_data") else {
        return;
    };
    let set = sets.load("nltcs");
    let tree = Mixture::chow_liu(&set.train, 1.0).mean_log_likelihood(&set.test);
    let fitted = fit(&set.train, &set.valid, FitLimits::default());
    let got = fitted.mixture.mean_log_likelihood(&set.test);
    assert!(got > tree + 0.7, "{}: {got} against {tree}", set.name);
}

#[test]
fn what_is_observed_during_a_fit_is_kept_and_a_model_of_an_older_training_set_is_not_installed() {
    let mut model = Model::new(NeedsConfig {
        max_rows: 40,
        ..NeedsConfig::default()
    });
    let context = |hour: i64| Context {
        profile: "web".into(),
        owner: "ann".into(),
        at: Timestamp(hour * HOUR_MS),
        memory_mib: 256,
    };
    for hour in 0..40 {
        model.observe(&context(hour), ["base", "old"]);
    }
    let training = model.training_set();
    assert!(!model.fit_due(), "one is being fitted");
    // All of the rows that used "old" are gone before the model fitted to them is installed.
    for hour in 40..80 {
        model.observe(&context(hour), ["base", "new"]);
    }
    let later = model.training_set();
    model.install(training.fit());
    assert_eq!(model.mixture_share(), 0.0, "a later training set was taken");
    model.install(later.fit());
    assert!(model.mixture_share() > 0.0);
    assert_eq!(model.observed(), 80);
    let p_of = |model: &Model, name: &str| {
        let ranked = model.rank(&context(81), &["base"]);
        probability(&ranked, name)
    };
    assert!(p_of(&model, "new") > 0.5, "{}", p_of(&model, "new"));
    assert_eq!(p_of(&model, "old"), 0.0, "nothing uses its number");

    // Fitted while launches went on, a training set gives what it would have given at once, and
    // what came meanwhile is known besides.
    let mut at_once = model.clone();
    fit_now(&mut at_once);
    let training = model.training_set();
    model.observe(&context(82), ["base", "newest"]);
    model.install(training.fit());
    assert!(p_of(&model, "newest") > 0.0 && p_of(&at_once, "newest") == 0.0);
    at_once.observe(&context(82), ["base", "newest"]);
    let ranked = |model: &Model| model.rank(&context(83), &["base"]);
    let names = |model: &Model| -> Vec<_> { ranked(model).into_iter().map(|one| one.0).collect() };
    assert_eq!(names(&model), names(&at_once));
}

/// Names at the bounds, compositions without any order: the longest that a fit can take.
#[test]
fn a_fit_to_hostile_launches_stays_within_its_limits() {
    let mut model = Model::new(NeedsConfig::default());
    let mut random = Random(11);
    for i in 0..2_048_i64 {
        let names: Vec<String> = (0..20).map(|_| format!("c{}", random.below(256))).collect();
        let mut ctx = context(&format!("p{}", random.below(127)), i * HOUR_MS);
        ctx.owner = format!("o{}", random.below(63));
        model.observe(&ctx, names.iter().map(String::as_str));
    }
    let (train, valid) = model.training_set().split();
    let limits = FitLimits {
        million_steps: 100.0,
        ..FitLimits::default()
    };
    let fitted = fit(&train, &valid, limits);
    assert!(fitted.million_steps <= limits.million_steps, "{fitted:?}");
    assert!(fitted.trees > 1);
}
