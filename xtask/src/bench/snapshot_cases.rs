//! Launches of `bench snapshot` apart from its rounds: the first of a daemon behind the throttled
//! line, of manifests that never ran, of the other examples.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::boot::WebBench;
use super::peers::forelay::launch_served;
use super::snapshot::{TIERS, create, manifest};
use super::statistics::median;
use crate::host::Host;

/// Rounds of each.
const ROUNDS: usize = 5;
/// How long a daemon may take to verify the snapshots that it finds.
const VERIFY_LIMIT: Duration = Duration::from_secs(60);

/// Seconds until ready, repository bytes and demand fetches of one launch.
struct Cost {
    ready_s: f64,
    bytes: f64,
    demand_fetches: f64,
}

impl Cost {
    /// Of a launch that is to have resumed from `tier`.
    fn of(vm: &Value, tier: &str) -> Result<Self> {
        let launch = &vm["launch"];
        let resumed = launch["resumed"].as_str().unwrap_or("off");
        ensure!(resumed == tier, "resumed from {resumed}: {launch}");
        let figure = |name: &str| launch[name].as_f64().with_context(|| name.to_owned());
        Ok(Self {
            ready_s: figure("ready_s")?,
            bytes: figure("repository_bytes")?,
            demand_fetches: figure("demand_fetches")?,
        })
    }
}

fn of_all(costs: &[Cost], figure: fn(&Cost) -> f64) -> f64 {
    median(&costs.iter().map(figure).collect::<Vec<_>>())
}

/// The first launch of a daemon whose disk cache and shared memory are empty: snapshots are on this
/// host, all else comes over the throttled line.
pub fn first_over_line(bench: &WebBench) -> Result<Value> {
    let mut ways: Vec<(&str, Vec<Cost>)> = ["off"]
        .into_iter()
        .chain(TIERS)
        .map(|tier| (tier, Vec::new()))
        .collect();
    for round in 0..ROUNDS {
        for (tier, costs) in &mut ways {
            let mut host = bench.start()?;
            wait_until_verified(&host)?;
            let path = manifest(&host, "web", tier, false)?;
            let (vm, _) = launch_served(&host, &path)?;
            let cost = Cost::of(&vm, tier)?;
            println!(
                "first over the line, round {round}: {tier:<8} {:5.2} s, {:.1} MiB",
                cost.ready_s,
                cost.bytes / 1048576.0
            );
            costs.push(cost);
            host.stop_all()?;
            host.stop_daemon()?;
        }
    }
    let boot_s = of_all(&ways[0].1, |one| one.ready_s);
    let rows = ways.iter().map(|(tier, costs)| {
        let name = if *tier == "off" { "booted" } else { tier };
        let ready_s = of_all(costs, |one| one.ready_s);
        let row = json!({
            "ready_s": ready_s,
            "ratio_to_boot": ready_s / boot_s,
            "bytes": of_all(costs, |one| one.bytes),
            "demand_fetches": of_all(costs, |one| one.demand_fetches),
        });
        (name.to_owned(), row)
    });
    Ok(rows.collect::<Map<_, _>>().into())
}

fn wait_until_verified(host: &Host) -> Result<()> {
    let deadline = Instant::now() + VERIFY_LIMIT;
    loop {
        let listed = host.json(["snapshot", "list"])?;
        let all = listed.as_array().context("a list")?;
        if all.iter().all(|one| one["verified"] == true) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "snapshots are not verified");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Manifests that nobody launched before, of components that are resident: from the kernel's
/// snapshot, and booted.
pub fn never_ran(host: &Host) -> Result<Value> {
    let mut ways = [("kernel", Vec::new()), ("off", Vec::new())];
    for round in 0..ROUNDS {
        for (tier, costs) in &mut ways {
            let usual = std::fs::read_to_string(manifest(host, "web", tier, false)?)?;
            let profile = format!("new-{tier}-{round}");
            let text = usual.replacen("name = \"web\"", &format!("name = {profile:?}"), 1);
            let text = text.replace("composed VM", &format!("composed VM, number {round}"));
            let path = host.scratch().join(format!("{profile}.toml"));
            std::fs::write(&path, text)?;
            let (vm, _) = launch_served(host, &path)?;
            costs.push(Cost::of(&vm, tier)?);
            host.stop_all()?;
        }
    }
    let [kernel_s, boot_s] = ways.map(|(_, costs)| of_all(&costs, |one| one.ready_s));
    println!("never ran: kernel {kernel_s:.2} s, booted {boot_s:.2} s");
    Ok(json!({ "kernel_s": kernel_s, "boot_s": boot_s, "ratio_to_boot": kernel_s / boot_s }))
}

/// The other examples: booted and from each tier, in seconds until ready and over the boot's.
pub fn other_examples(host: &Host) -> Result<Value> {
    let mut examples = Map::new();
    for profile in ["cache", "python", "node"] {
        let mut ways = Vec::new();
        for tier in ["off"].into_iter().chain(TIERS) {
            let path = manifest(host, profile, tier, true)?;
            if tier != "off" {
                create(host, &path, tier)?;
            }
            ways.push((tier, path, Vec::new()));
        }
        // The first round finds out what launches touch.
        for round in 0..=ROUNDS {
            for (tier, path, costs) in &mut ways {
                let vm = host.launch(path, profile, &[])?;
                let cost = Cost::of(&vm, tier)?;
                if round > 0 {
                    costs.push(cost);
                }
                host.stop_all()?;
            }
        }
        let boot_s = of_all(&ways[0].2, |one| one.ready_s);
        let mut rows = Map::new();
        for (tier, _, costs) in &ways {
            let name = if *tier == "off" { "booted" } else { tier };
            let ready_s = of_all(costs, |one| one.ready_s);
            println!("{profile} {name}: {ready_s:.2} s");
            let row = json!({ "ready_s": ready_s, "ratio_to_boot": ready_s / boot_s });
            rows.insert(name.to_owned(), row);
        }
        examples.insert(profile.to_owned(), rows.into());
    }
    Ok(examples.into())
}
