//! Which profile will an owner launch next: the forecaster against simple rules.
//!
//! `cargo run --release -p forelay-predict --example next_profile -- TRACE.csv.gz [OUT.json]`
//! (columns time_s, profile, owner). Everything is learned online from the trace's start; the later
//! half (by time) is judged, overall and on switches (launches of another profile than the owner's
//! last). A profile's first launch counts as a miss for all.

mod processor_time;

use std::collections::HashMap;
use std::io::BufRead as _;

use forelay_predict::needs::next_profile::NextProfile;
use forelay_predict::time::Timestamp;

const NAMES: [&str; 4] = ["popularity", "most_recent", "markov_1", "forelay"];

/// Launches counted, and when last seen.
type Counts = HashMap<u32, (u32, u64)>;

#[derive(Default)]
struct Simple {
    counts: Counts,
    recent: Vec<u32>,
    after: HashMap<u32, Counts>,
    launches: u64,
}

/// The five most counted, among equals the more recent.
fn top(counts: &Counts) -> Vec<u32> {
    let mut best: Vec<(u32, u64, u32)> = Vec::with_capacity(6);
    for (id, (count, seen)) in counts {
        let entry = (*count, *seen, *id);
        if best.len() == 5 && entry < best[4] {
            continue;
        }
        let at = best.partition_point(|b| *b > entry);
        best.insert(at, entry);
        best.truncate(5);
    }
    best.into_iter().map(|(_, _, id)| id).collect()
}

impl Simple {
    /// The five likeliest by popularity, most recent, Markov-1 (popularity where that runs out).
    fn rankings(&self) -> [Vec<u32>; 3] {
        let popular = top(&self.counts);
        let last = self.recent.first();
        let mut markov = last
            .and_then(|last| self.after.get(last))
            .map(top)
            .unwrap_or_default();
        for id in &popular {
            if markov.len() < 5 && !markov.contains(id) {
                markov.push(*id);
            }
        }
        let recent = self.recent.iter().take(5).copied().collect();
        [popular, recent, markov]
    }

    fn observe(&mut self, profile: u32) {
        self.launches += 1;
        let count = |counts: &mut Counts| {
            let entry = counts.entry(profile).or_default();
            *entry = (entry.0 + 1, self.launches);
        };
        if let Some(last) = self.recent.first() {
            count(self.after.entry(*last).or_default());
        }
        count(&mut self.counts);
        self.recent.retain(|r| *r != profile);
        self.recent.insert(0, profile);
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let Some(trace) = args.next() else {
        eprintln!("usage: next_profile TRACE.csv.gz [OUT.json]");
        std::process::exit(2);
    };
    let file = std::fs::File::open(&trace).unwrap_or_else(|e| panic!("{trace}: {e}"));
    let lines = std::io::BufReader::new(flate2::read::GzDecoder::new(file)).lines();
    let mut launches: Vec<(f64, String, String)> = lines
        .skip(1)
        .filter_map(|line| {
            let line = line.ok()?;
            let mut fields = line.split(',');
            let time = fields.next()?.parse().ok()?;
            Some((time, fields.next()?.to_owned(), fields.next()?.to_owned()))
        })
        .collect();
    launches.sort_by(|a, b| a.0.total_cmp(&b.0));
    let half = launches.last().map_or(0.0, |l| l.0) / 2.0;
    let mut model = NextProfile::new();
    let mut ids: HashMap<String, u32> = HashMap::new();
    let mut simple: HashMap<String, Simple> = HashMap::new();
    // [all, switches][rule][hits at 1, 3, 5]
    let mut hits = [[[0_u64; 3]; 4]; 2];
    let mut totals = [0_u64; 2];
    let started = processor_time::seconds();
    let mut ours = Vec::with_capacity(launches.len());
    for (time, profile, owner) in &launches {
        ours.push(if *time >= half {
            model.rank(owner, 5)
        } else {
            Vec::new()
        });
        model.observe(owner, profile, Timestamp::from_seconds(*time));
    }
    let micros = (processor_time::seconds() - started) * 1e6 / launches.len() as f64;
    for ((time, profile, owner), ours) in launches.iter().zip(ours) {
        let next = ids.len() as u32;
        let id = *ids.entry(profile.clone()).or_insert(next);
        let rules = simple.entry(owner.clone()).or_default();
        if *time >= half {
            let [popular, recent, markov] = rules.rankings();
            let ours: Vec<u32> = ours
                .iter()
                .filter_map(|(n, _)| ids.get(&**n).copied())
                .collect();
            let switch = rules.recent.first() != Some(&id);
            for group in 0..=usize::from(switch) {
                totals[group] += 1;
                for (rule, ranking) in [&popular, &recent, &markov, &ours].iter().enumerate() {
                    let at = ranking.iter().position(|r| *r == id);
                    for (slot, k) in [1, 3, 5].into_iter().enumerate() {
                        hits[group][rule][slot] += u64::from(at.is_some_and(|at| at < k));
                    }
                }
            }
        }
        rules.observe(id);
    }
    let mut json = serde_json::Map::new();
    for (group, name) in ["all", "switches"].into_iter().enumerate() {
        println!("{name}: {} launches", totals[group]);
        let mut rows = serde_json::Map::new();
        for (rule, rule_name) in NAMES.iter().enumerate() {
            let share = hits[group][rule].map(|h| h as f64 / totals[group].max(1) as f64);
            println!(
                "  {rule_name:<12} hit@1 {:.4}  hit@3 {:.4}  hit@5 {:.4}",
                share[0], share[1], share[2]
            );
            rows.insert((*rule_name).to_owned(), serde_json::json!(share));
        }
        json.insert(name.to_owned(), rows.into());
    }
    println!("{micros:.1} us of processor time a launch");
    println!("weights {:.3?}", model.weights());
    if let Some(out) = args.next() {
        let text = serde_json::to_string_pretty(&json).expect("results serialise");
        std::fs::write(&out, text).unwrap_or_else(|e| panic!("{out}: {e}"));
    }
}
