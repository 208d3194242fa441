//! The page of one VM: its launch, waits, mapping table, console and use of the host.

use askama::Template;

use super::launches::{LEGEND, StageBar, stage_bar, words_of};
use super::{PageFrame, cut};
use crate::api::{MapDevice, Vm, VmMap, Waits};
use crate::daemon::Host;
use crate::daemon::vm::launch_figures::start_of;
use crate::host_stats::HostStats;
use crate::units::{bytes, seconds};

/// Files that are listed, those touched most.
const MOST_FILES: usize = 20;
/// Characters of the console's end that are shown.
const CONSOLE_BYTES: usize = 8_000;

#[derive(Template)]
#[template(path = "vm.html")]
pub struct VmPage {
    frame: PageFrame,
    name: String,
    state: &'static str,
    error: Option<String>,
    waiting: Option<String>,
    figures: Vec<(&'static str, String, String)>,
    legend: [(usize, &'static str); 7],
    bar: StageBar,
    launch_words: String,
    notes: Vec<String>,
    waits: String,
    causes: Vec<CauseRow>,
    devices: Vec<DeviceRow>,
    files: Vec<FileRow>,
    console: String,
}

/// Something that happened so often, and why.
pub struct CauseRow {
    pub count: String,
    pub name: &'static str,
    pub words: &'static str,
}

struct DeviceRow {
    slot: usize,
    component: String,
    /// From 0 to 8 each.
    parts: Vec<u8>,
    resident: String,
    touched: String,
    size: String,
}

struct FileRow {
    path: String,
    slot: usize,
    touched: String,
    size: String,
}

/// The page of `vm`, as far as its mapping table could be read.
pub fn page(host: &Host, vm: &Vm, map: Option<VmMap>, console: String) -> VmPage {
    let map = map.unwrap_or_else(|| VmMap {
        vm: vm.name.clone(),
        devices: Vec::new(),
        files: Vec::new(),
        touches: Vec::new(),
    });
    let mut files: Vec<_> = map
        .files
        .iter()
        .filter(|file| file.touched_bytes > 0)
        .collect();
    files.sort_by_key(|file| std::cmp::Reverse(file.touched_bytes));
    let files = files.into_iter().take(MOST_FILES).map(|file| FileRow {
        path: cut(&file.path, 200),
        slot: file.slot,
        touched: bytes(file.touched_bytes),
        size: bytes(file.bytes),
    });
    let launch = &vm.launch;
    let longest_s = launch
        .ready_s
        .unwrap_or_else(|| launch.timings.steps().iter().map(|(_, s)| s).sum());
    let notes = launch.snapshot_problems.iter().chain(&launch.notes);
    VmPage {
        frame: PageFrame::titled(host, "", vm.name.clone()),
        name: vm.name.clone(),
        state: vm.state.name(),
        error: vm.error.as_ref().map(|error| cut(error, 4_000)),
        waiting: vm.waiting.as_ref().map(ToString::to_string),
        figures: figures(host, vm),
        legend: LEGEND,
        bar: stage_bar(&launch.timings, longest_s),
        launch_words: launch_words(vm),
        notes: notes.take(20).map(|note| cut(note, 300)).collect(),
        waits: format!(
            "{} fetches, {} asked for, {} in all.",
            vm.waits.demand_fetches,
            bytes(vm.waits.demand_bytes),
            seconds(vm.waits.stall_s)
        ),
        causes: causes(&vm.waits),
        devices: map.devices.iter().map(device_row).collect(),
        files: files.collect(),
        console: tail(&console),
    }
}

fn figures(host: &Host, vm: &Vm) -> Vec<(&'static str, String, String)> {
    let mut figures = vec![(
        "Ready after",
        vm.launch.ready_s.map_or_else(|| "–".to_owned(), seconds),
        start_of(&vm.launch).to_owned(),
    )];
    let accounts = host.accounts.told_by_table().vms.into_iter();
    if let Some(account) = accounts.into_iter().find(|account| account.vm == vm.name) {
        let note = format!(
            "has touched {}, of it {} shared",
            bytes(account.mapped_bytes),
            bytes(account.shared_bytes)
        );
        figures.push((
            "Its share of components",
            bytes(account.charged_bytes),
            note,
        ));
    }
    if let Some(usage) = vm.pid.and_then(|pid| HostStats::default().usage(pid)) {
        let cpu = format!("CPU {}", seconds(usage.cpu_ms as f64 / 1e3));
        figures.push(("Private memory", bytes(usage.memory_bytes), cpu));
    }
    let ports = vm.forwards.iter().take(4);
    let ports = ports.map(|one| {
        format!(
            "{} → {}{}",
            one.host,
            one.guest,
            if one.udp { "/udp" } else { "" }
        )
    });
    let ports: Vec<String> = ports.collect();
    let shown = if ports.is_empty() {
        "none".to_owned()
    } else {
        ports.join(", ")
    };
    let owner = format!("profile {}, owner {}", vm.profile, vm.owner);
    figures.push(("Ports", shown, owner));
    figures
}

fn launch_words(vm: &Vm) -> String {
    let stages = vm.launch.timings.steps().into_iter();
    let stages: Vec<String> = stages
        .filter(|(_, took_s)| *took_s >= 0.001)
        .map(|(stage, took_s)| format!("{stage} {}", seconds(took_s)))
        .collect();
    format!("{} · {}", words_of(&vm.launch), stages.join(", "))
}

fn causes(waits: &Waits) -> Vec<CauseRow> {
    let words = |name| match name {
        "unforeseen" => "was in no plan of its launch",
        "late" => "was planned and not loaded in time",
        "evicted" => "had been in memory and was given back",
        _ => "had been in memory, and the kernel took it",
    };
    let named = waits.causes.named().into_iter();
    named
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| CauseRow {
            count: count.to_string(),
            name,
            words: words(name),
        })
        .collect()
}

fn device_row(device: &MapDevice) -> DeviceRow {
    DeviceRow {
        slot: device.slot,
        component: cut(&device.component, 60),
        parts: device.bar.clone(),
        resident: bytes(device.resident_bytes),
        touched: bytes(device.touched_bytes),
        size: bytes(device.image_bytes),
    }
}

/// The end of a console as text: lines, and what can be shown of them.
fn tail(console: &str) -> String {
    let from = console.len().saturating_sub(CONSOLE_BYTES);
    let text = &console[console.ceil_char_boundary(from)..];
    let shown = text
        .chars()
        .filter(|one| *one == '\n' || *one == '\t' || !one.is_control());
    shown.collect::<String>().trim().to_owned()
}
