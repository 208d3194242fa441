//! Commands that read the daemon's state: memory, map, forecast, history.

use anyhow::{Context as _, Result};

use super::output::{self, bytes, optional, seconds};
use crate::api::{
    ComponentMemory, ForecastEntry, Health, HistoryEntry, MapDevice, MapFile, MemoryReport,
    SelfControl, VmMap, VmMemory, dashboard_name,
};
use crate::client::{Client, vm_path};
use crate::config::Config;

/// `forelay memory`.
pub async fn memory(client: &Client, drop_idle: bool, json: bool) -> Result<()> {
    let report: MemoryReport = if drop_idle {
        client.post("/v1/memory/drop", &()).await?
    } else {
        client.get("/v1/memory").await?
    };
    if json {
        return output::json(&report);
    }
    say!(
        "components take {} of {} ({} pinned, {} prefetched and not used yet)",
        bytes(report.resident_bytes),
        bytes(report.budget_bytes),
        bytes(report.pinned_bytes),
        bytes(report.prefetched_unused_bytes),
    );
    say!(
        "VMs map {} of them; host has {} available, pressure {}",
        bytes(report.mapped_sum_bytes),
        bytes(report.available_bytes),
        report.pressure,
    );
    if report.standby_vmms > 0 {
        say!(
            "{} VMM(s) stand by for likely launches, with {} of their own",
            report.standby_vmms,
            bytes(report.standby_private_bytes),
        );
    }
    for domain in &report.domains {
        say!("\ntrust domain {}", domain.domain);
        output::table(
            &domain.components,
            &[
                ("component", |one: &ComponentMemory| one.component.clone()),
                ("image", |one| one.image.short()),
                ("size", |one| bytes(one.image_bytes)),
                ("resident", |one| bytes(one.resident_bytes)),
                ("pinned", |one| bytes(one.pinned_bytes)),
                ("vms", |one| one.mapped_by.to_string()),
                ("mapped", |one| bytes(one.mapped_bytes)),
                ("shared", |one| bytes(one.shared_bytes)),
            ],
        );
    }
    if !report.vms.is_empty() {
        say!();
        output::table(
            &report.vms,
            &[
                ("vm", |one: &VmMemory| one.vm.clone()),
                ("maps", |one| bytes(one.mapped_bytes)),
                ("charged", |one| bytes(one.charged_bytes)),
            ],
        );
    }
    Ok(())
}

/// `forelay dashboard`.
pub async fn dashboard(client: &Client, config: &Config, json: bool) -> Result<()> {
    let health: Health = client.get("/v1/health").await?;
    let address = health.dashboard.context(
        "the dashboard is served on the daemon's socket alone: put `listen = \"127.0.0.1:8900\"` \
         into [api] of the configuration and send SIGHUP to the daemon (`forelay doctor` tells if \
         that port is taken)",
    )?;
    let path = config.api_token_path();
    let token = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read the token {}", path.display()))?;
    let (name, port) = (dashboard_name(token.trim()), address.port());
    let url = format!("http://{name}:{port}/?token={}", token.trim());
    if json {
        return output::json(&serde_json::json!({ "url": url }));
    }
    say!("{url}");
    Ok(())
}

/// `forelay map`.
pub async fn map(client: &Client, name: &str, json: bool) -> Result<()> {
    let map: VmMap = client.get(&vm_path(name, "/map")?).await?;
    if json {
        return output::json(&map);
    }
    output::table(
        &map.devices,
        &[
            ("slot", |one: &MapDevice| one.slot.to_string()),
            ("component", |one| one.component.clone()),
            ("image", |one| one.image.short()),
            ("size", |one| bytes(one.image_bytes)),
            ("resident", |one| bytes(one.resident_bytes)),
            ("touched", |one| bytes(one.touched_bytes)),
            ("in memory", bar),
        ],
    );
    let mut touched: Vec<_> = map
        .files
        .iter()
        .filter(|file| file.touched_bytes > 0)
        .collect();
    touched.sort_by_key(|file| std::cmp::Reverse(file.touched_bytes));
    say!(
        "\n{} files, {} touched; the most touched:",
        map.files.len(),
        touched.len()
    );
    output::table(
        touched.into_iter().take(20),
        &[
            ("guest file", |one: &MapFile| one.path.clone()),
            ("slot+offset", |one| {
                format!("{}+{:#x}", one.slot, one.offset)
            }),
            ("size", |one| bytes(one.bytes)),
            ("resident", |one| bytes(one.resident_bytes)),
            ("touched", |one| bytes(one.touched_bytes)),
        ],
    );
    Ok(())
}

fn bar(device: &MapDevice) -> String {
    const LEVELS: [char; 9] = ['·', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    device
        .bar
        .iter()
        .map(|&level| LEVELS[usize::from(level).min(8)])
        .collect()
}

fn of_profile(path: &str, profile: Option<&str>) -> String {
    match profile {
        Some(profile) => format!("{path}?profile={profile}"),
        None => path.to_owned(),
    }
}

/// `forelay forecast`.
pub async fn forecast(client: &Client, profile: Option<&str>, json: bool) -> Result<()> {
    let entries: Vec<ForecastEntry> = client.get(&of_profile("/v1/forecast", profile)).await?;
    if json {
        return output::json(&entries);
    }
    output::table(
        &entries,
        &[
            ("profile", |one: &ForecastEntry| one.profile.clone()),
            ("for", |one| {
                one.vm.clone().unwrap_or_else(|| "next launch".to_owned())
            }),
            ("component", |one| one.component.clone()),
            ("p", |one| format!("{:.2}", one.probability)),
            ("expected in", |one| optional(one.expected_in_s, seconds)),
            ("needs", |one| bytes(one.bytes)),
            ("resident", |one| bytes(one.resident_bytes)),
            ("because", |one| one.reasons.join("; ")),
        ],
    );
    let mut profiles: Vec<&ForecastEntry> = entries.iter().collect();
    profiles.sort_by_key(|entry| (&entry.owner, &entry.profile));
    profiles.dedup_by_key(|entry| (&entry.owner, &entry.profile));
    say!();
    for entry in profiles {
        say!("{}: {}", entry.profile, account(&entry.control));
    }
    Ok(())
}

/// How forecasting does for a profile, in words.
fn account(control: &SelfControl) -> String {
    let rule = if control.switched_off {
        "forecasting is switched off; bytes are loaded when a launch is asked for"
    } else if control.fallen_back {
        "forecasting did harm: fell back to loading when a launch is asked for"
    } else {
        "loaded ahead of launches"
    };
    let judged = match control.judged {
        0 => "no forecast judged yet".to_owned(),
        count => format!(
            "{count} forecasts judged, Brier score {:.3}",
            control.brier_score
        ),
    };
    format!(
        "{rule}; {judged}; {:+.1} cold starts against the simpler rule",
        control.regret_cold_starts
    )
}

/// `forelay history`.
pub async fn history(client: &Client, profile: Option<&str>, json: bool) -> Result<()> {
    let entries: Vec<HistoryEntry> = client.get(&of_profile("/v1/history", profile)).await?;
    if json {
        return output::json(&entries);
    }
    output::table(
        &entries,
        &[
            ("profile", |one: &HistoryEntry| one.profile.clone()),
            ("owner", |one| one.owner.clone()),
            ("launches", |one| one.launches.to_string()),
            ("warm", |one| format!("{:.0}%", 100.0 * one.warm_share)),
            ("ready p50", |one| optional(one.ready_p50_s, seconds)),
            ("working set", |one| bytes(one.working_set_bytes)),
        ],
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fallback_and_a_switch_are_said_in_words() {
        let mut control = SelfControl::default();
        assert!(account(&control).starts_with("loaded ahead of launches; no forecast"));
        control.fallen_back = true;
        control.regret_cold_starts = 4.25;
        let words = account(&control);
        assert!(
            words.contains("did harm") && words.contains("+4.2 cold starts"),
            "{words}"
        );
        control.switched_off = true;
        assert!(account(&control).contains("switched off"));
    }
}
