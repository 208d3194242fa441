//! Judges the learner of needs on thirteen standard binary data sets.
//!
//! `cargo run --release -p forelay-predict --example density -- DIR [OUT.json [SET...]]`, where
//! DIR holds `<set>.{train,valid,test}.data.gz`. Prints mean test log-likelihoods in nats: the
//! plain Chow-Liu tree (alpha = 1, on the training rows) and the learner that Forelay uses (trained
//! on the training rows, chosen by the validation rows).

mod processor_time;

use std::io::Read as _;
use std::path::Path;

use forelay_predict::needs::data::{Rows, binary_rows, commonest};
use forelay_predict::needs::learn::{Search, learn};
use forelay_predict::needs::mixture::{Mixture, Scratch};

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

fn load(dir: &Path, set: &str, part: &str) -> Vec<Vec<bool>> {
    let path = dir.join(format!("{set}.{part}.data.gz"));
    let file = std::fs::File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut text = String::new();
    flate2::read::GzDecoder::new(file)
        .read_to_string(&mut text)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| line.split(',').map(|cell| cell.trim() == "1").collect())
        .collect()
}

/// Share of present items that are among the five likeliest once hidden: each is hidden in turn,
/// the rest of the row is known, and what the row has otherwise does not compete. Every fourth row.
fn hit_at_5(rows: &[Vec<bool>], flip: &[bool], score: &mut dyn FnMut(&[u32]) -> Vec<f64>) -> f64 {
    let (mut hits, mut all) = (0_u64, 0_u64);
    for row in rows.iter().step_by(4) {
        let mut hidden_row = row.clone();
        for item in (0..row.len()).filter(|i| row[*i]) {
            hidden_row[item] = false;
            let sparse: Vec<u32> = (0..row.len())
                .filter(|i| hidden_row[*i] != flip[*i])
                .map(|i| i as u32)
                .collect();
            let scores = score(&sparse);
            let of = |i: usize| if flip[i] { 1.0 - scores[i] } else { scores[i] };
            let above = (0..row.len())
                .filter(|i| !hidden_row[*i] && *i != item && of(*i) > of(item))
                .count();
            hits += u64::from(above < 5);
            all += 1;
            hidden_row[item] = true;
        }
    }
    hits as f64 / all.max(1) as f64
}

fn main() {
    let mut args = std::env::args().skip(1);
    let Some(dir) = args.next() else {
        eprintln!("usage: density DIR [OUT.json [SET...]]");
        std::process::exit(2);
    };
    let dir = Path::new(&dir);
    let out = args.next();
    let named: Vec<String> = args.collect();
    println!(
        "{:<12} {:>10} {:>10} {:>7} {:>5} {:>8} {:>5}  {:>5} {:>5} {:>5}",
        "set",
        "chow_liu",
        "forelay",
        "seconds",
        "trees",
        "strength",
        "tried",
        "pop@5",
        "cl@5",
        "fl@5"
    );
    let mut results = Vec::new();
    for set in SETS {
        if !named.is_empty() && !named.iter().any(|n| n == set) {
            continue;
        }
        let (train, test) = (load(dir, set, "train"), load(dir, set, "test"));
        let flip = commonest(&train, train[0].len());
        let rows = |raw: &[Vec<bool>]| -> Rows { binary_rows(raw, &flip) };
        let (train_rows, test_rows) = (rows(&train), rows(&test));
        let valid_rows = rows(&load(dir, set, "valid"));
        let chow_liu = Mixture::chow_liu(&train_rows, 1.0);
        let base = chow_liu.mean_log_likelihood(&test_rows);
        let started = processor_time::seconds();
        let learned = learn(&train_rows, &valid_rows, Search::default());
        let seconds = processor_time::seconds() - started;
        let ours = learned.mixture.mean_log_likelihood(&test_rows);
        let hits = ["plants", "accidents", "jester"].contains(&set).then(|| {
            let popularity: Vec<f64> = (0..flip.len())
                .map(|i| {
                    let share = train.iter().filter(|row| row[i]).count() as f64;
                    let share = share / train.len() as f64;
                    if flip[i] { 1.0 - share } else { share }
                })
                .collect();
            let mut scratch = Scratch::default();
            let popular = hit_at_5(&test, &flip, &mut |_| popularity.clone());
            let tree = hit_at_5(&test, &flip, &mut |row| {
                chow_liu.full_conditionals(row, &mut scratch)
            });
            let mixed = hit_at_5(&test, &flip, &mut |row| {
                learned.mixture.full_conditionals(row, &mut scratch)
            });
            [popular, tree, mixed]
        });
        let trees = learned.components * learned.averaged;
        let shown = hits.map_or(String::new(), |[a, b, c]| format!("{a:.3}  {b:.3}  {c:.3}"));
        println!(
            "{set:<12} {base:>10.4} {ours:>10.4} {seconds:>7.1} {trees:>5} {:>8} {:>5}  {shown}",
            learned.strength, learned.tried
        );
        results.push(serde_json::json!({
            "set": set, "chow_liu": base, "forelay": ours, "seconds": seconds, "trees": trees,
            "strength": learned.strength, "settings_tried": learned.tried,
            "hit_at_5": hits.map(|[popularity, chow_liu, forelay]| serde_json::json!({
                "popularity": popularity, "chow_liu": chow_liu, "forelay": forelay,
            })),
        }));
    }
    if let Some(out) = out {
        let text = serde_json::to_string_pretty(&results).expect("results serialise");
        std::fs::write(&out, text).unwrap_or_else(|e| panic!("{out}: {e}"));
    }
}
