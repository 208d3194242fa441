//! Commands that read the daemon's state: memory, map, forecast, history.

use anyhow::Result;

use super::output::{self, bytes, optional, seconds};
use crate::api::{ForecastEntry, HistoryEntry, MapDevice, MemoryReport, SelfControl, VmMap};
use crate::client::{Client, vm_path};

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
    for domain in &report.domains {
        say!("\ntrust domain {}", domain.domain);
        let rows = domain.components.iter().map(|component| {
            vec![
                component.component.clone(),
                component.image.short(),
                bytes(component.image_bytes),
                bytes(component.resident_bytes),
                bytes(component.pinned_bytes),
                component.mapped_by.to_string(),
                bytes(component.mapped_bytes),
                bytes(component.shared_bytes),
            ]
        });
        let headings = [
            "component",
            "image",
            "size",
            "resident",
            "pinned",
            "vms",
            "mapped",
            "shared",
        ];
        output::table(&headings, rows.collect());
    }
    if !report.vms.is_empty() {
        say!();
        let rows = report.vms.iter();
        let rows = rows.map(|vm| {
            vec![
                vm.vm.clone(),
                bytes(vm.mapped_bytes),
                bytes(vm.charged_bytes),
            ]
        });
        output::table(&["vm", "maps", "charged"], rows.collect());
    }
    Ok(())
}

/// `forelay map`.
pub async fn map(client: &Client, name: &str, json: bool) -> Result<()> {
    let map: VmMap = client.get(&vm_path(name, "/map")?).await?;
    if json {
        return output::json(&map);
    }
    let rows = map.devices.iter().map(|device| {
        vec![
            device.slot.to_string(),
            device.component.clone(),
            device.image.short(),
            bytes(device.image_bytes),
            bytes(device.resident_bytes),
            bytes(device.touched_bytes),
            bar(device),
        ]
    });
    let headings = [
        "slot",
        "component",
        "image",
        "size",
        "resident",
        "touched",
        "in memory",
    ];
    output::table(&headings, rows.collect());
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
    let rows = touched.iter().take(20).map(|file| {
        vec![
            file.path.clone(),
            format!("{}+{:#x}", file.slot, file.offset),
            bytes(file.bytes),
            bytes(file.resident_bytes),
            bytes(file.touched_bytes),
        ]
    });
    output::table(
        &["guest file", "slot+offset", "size", "resident", "touched"],
        rows.collect(),
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
    let rows = entries.iter().map(|entry| {
        vec![
            entry.profile.clone(),
            entry.vm.clone().unwrap_or_else(|| "next launch".to_owned()),
            entry.component.clone(),
            format!("{:.2}", entry.probability),
            optional(entry.expected_in_s, seconds),
            bytes(entry.bytes),
            bytes(entry.resident_bytes),
            entry.reasons.join("; "),
        ]
    });
    let headings = [
        "profile",
        "for",
        "component",
        "p",
        "expected in",
        "needs",
        "resident",
        "because",
    ];
    output::table(&headings, rows.collect());
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
    let rows = entries.iter().map(|entry| {
        vec![
            entry.profile.clone(),
            entry.owner.clone(),
            entry.launches.to_string(),
            format!("{:.0}%", 100.0 * entry.warm_share),
            optional(entry.ready_p50_s, seconds),
            bytes(entry.working_set_bytes),
        ]
    });
    let headings = [
        "profile",
        "owner",
        "launches",
        "warm",
        "ready p50",
        "working set",
    ];
    output::table(&headings, rows.collect());
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
