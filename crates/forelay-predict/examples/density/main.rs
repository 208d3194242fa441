//! Judges the fit of needs on thirteen standard binary data sets.
//!
//! `cargo run --release -p forelay-predict --example density -- DIR [OUT.json [SET...]]`, where
//! DIR holds `<set>.{train,valid,test}.data.gz`. Prints mean test log-likelihoods in nats: the
//! plain Chow-Liu tree (alpha = 1, on the training rows) and the very function that the daemon
//! fits its model with, within the same limits (fitted to the training rows, chosen by the
//! validation rows).

mod processor_time;
mod sets;

use std::path::Path;

use forelay_predict::needs::fit::{FitLimits, fit};
use forelay_predict::needs::mixture::Mixture;

use sets::DensitySets;

const SETS: [&str; 13] = [
    "nltcs",
    "plants",
    "baudio",
    "jester",
    "bnetflix",
    "accidents",
    "mushrooms",
    "pumsb_star",
    "dna",
    "nips",
    "moviereview",
    "bbc",
    "voting",
];

fn main() {
    let mut args = std::env::args().skip(1);
    let Some(dir) = args.next() else {
        eprintln!("usage: density DIR [OUT.json [SET...]]");
        std::process::exit(2);
    };
    let sets = DensitySets::open(Path::new(&dir));
    let out = args.next();
    let named: Vec<String> = args.collect();
    println!(
        "{:<12} {:>10} {:>10} {:>8} {:>6} {:>6} {:>9} {:>6}",
        "set", "chow_liu", "forelay", "seconds", "Msteps", "trees", "strength", "tried",
    );
    let mut results = Vec::new();
    for name in SETS {
        if !named.is_empty() && !named.iter().any(|n| n == name) {
            continue;
        }
        let set = sets.load(name);
        let chow_liu = Mixture::chow_liu(&set.train, 1.0).mean_log_likelihood(&set.test);
        let started = processor_time::seconds();
        let fitted = fit(&set.train, &set.valid, FitLimits::default());
        let seconds = processor_time::seconds() - started;
        let forelay = fitted.mixture.mean_log_likelihood(&set.test);
        let trees = fitted.trees * fitted.averaged;
        println!(
            "{name:<12} {chow_liu:>10.4} {forelay:>10.4} {seconds:>8.2} {:>6.0} {trees:>6} \
             {:>9} {:>6}",
            fitted.million_steps, fitted.strength, fitted.tried
        );
        results.push(serde_json::json!({
            "set": set.name, "chow_liu": chow_liu, "forelay": forelay, "seconds": seconds,
            "million_steps": fitted.million_steps, "trees": trees, "strength": fitted.strength,
            "settings_tried": fitted.tried,
        }));
    }
    if let Some(out) = out {
        let text = serde_json::to_string_pretty(&results).expect("results serialise");
        std::fs::write(&out, text).unwrap_or_else(|e| panic!("{out}: {e}"));
    }
}
