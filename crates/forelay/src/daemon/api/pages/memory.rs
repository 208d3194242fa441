//! The page of host memory: what components take, who shares them, what that saves.

use std::collections::{BTreeMap, HashMap};

use askama::Template;
use forelay_image::Digest;

use super::treemap::{Area, squarify};
use super::{PageFrame, cut, percent, px};
use crate::api::{ComponentMemory, ForecastEntry, MemoryReport};
use crate::daemon::api::accounts::MemoryAccounts;
use crate::daemon::vm::registry::VmRegistry;
use crate::host_stats::HostStats;
use crate::units::bytes;

/// Components and VMs that are listed, the largest; all are in the sums.
const MOST_ROWS: usize = 100;
/// Cells of the map.
const MOST_CELLS: usize = 60;
/// Names of VMs that are told of a component.
const MOST_NAMES: usize = 4;

#[derive(Template)]
#[template(path = "memory.html")]
pub struct MemoryPage {
    frame: PageFrame,
    resident: String,
    resident_note: String,
    saved: String,
    saved_note: String,
    expected: String,
    expected_note: String,
    available: String,
    available_note: String,
    pulse: String,
    maps: Vec<Map>,
    rows: Vec<ComponentRow>,
    more: usize,
    vms: Vec<VmRow>,
    more_vms: usize,
}

struct Map {
    class: &'static str,
    width: f64,
    height: f64,
    cells: Vec<Cell>,
}

struct Cell {
    title: String,
    x: f64,
    y: f64,
    width: f64,
    height: f64,
    fills: Vec<Fill>,
    labelled: bool,
    label: String,
    small: String,
    text_x: f64,
    text_y: f64,
    small_y: f64,
}

struct Fill {
    class: &'static str,
    y: f64,
    height: f64,
    rx: u8,
}

struct ComponentRow {
    name: String,
    snapshot: bool,
    shared: f64,
    own: f64,
    idle: f64,
    idle_x: f64,
    resident: String,
    size: String,
    pinned: String,
    expected: String,
    mapped_by: String,
}

struct VmRow {
    name: String,
    state: &'static str,
    private: String,
    charged: String,
    touched: String,
    shared: String,
}

/// Parts of a component in percent of its size: shared, touched by one, touched by none.
struct Shares {
    shared: f64,
    own: f64,
    idle: f64,
}

impl Shares {
    fn of(one: &ComponentMemory) -> Self {
        Self {
            shared: percent(one.shared_bytes, one.image_bytes),
            own: percent(
                one.mapped_bytes.saturating_sub(one.shared_bytes),
                one.image_bytes,
            ),
            idle: percent(
                one.resident_bytes.saturating_sub(one.mapped_bytes),
                one.image_bytes,
            ),
        }
    }
}

/// The page now.
pub fn page(
    frame: PageFrame,
    accounts: &MemoryAccounts,
    forecast: &[ForecastEntry],
    pulse: String,
) -> MemoryPage {
    let report = accounts.told_by_table();
    let live = &accounts.registry;
    let mut expected: HashMap<Digest, u64> = HashMap::new();
    for one in forecast.iter().filter(|one| one.probability >= 0.5) {
        let bytes = expected.entry(one.image).or_default();
        *bytes = (*bytes).max(one.bytes);
    }
    let mut components: Vec<&ComponentMemory> = report
        .domains
        .iter()
        .flat_map(|domain| &domain.components)
        .collect();
    components.sort_by_key(|one| std::cmp::Reverse((one.image_bytes, one.image)));
    let names = mapped_by(live);
    let rows = components.iter().take(MOST_ROWS);
    let rows = rows.map(|one| component_row(one, &names, &expected));
    let saved = report.mapped_sum_bytes.saturating_sub(report.charged_bytes);
    let expected_bytes: u64 = expected.values().sum();
    let (vms, more_vms) = vm_rows(live, &report);
    MemoryPage {
        resident: bytes(report.resident_bytes),
        resident_note: format!(
            "of a budget of {}; {} pinned, {} loaded ahead and not used yet",
            bytes(report.budget_bytes),
            bytes(report.pinned_bytes),
            bytes(report.prefetched_unused_bytes)
        ),
        saved: bytes(saved),
        saved_note: format!(
            "{} VMs use {} of components; a copy for each would take {}",
            vms.len() + more_vms,
            bytes(report.charged_bytes),
            bytes(report.mapped_sum_bytes)
        ),
        expected: bytes(expected_bytes),
        expected_note: format!("of {} components, more likely than not", expected.len()),
        available: bytes(report.available_bytes),
        available_note: match &*report.pressure {
            "plenty" => "memory is plentiful".to_owned(),
            level => format!("memory is {level}"),
        },
        maps: vec![
            map("wide", &components, 1160.0, 330.0),
            map("narrow", &components, 358.0, 420.0),
        ],
        more: components.len().saturating_sub(MOST_ROWS),
        rows: rows.collect(),
        more_vms,
        vms,
        pulse,
        frame,
    }
}

/// Names of the live VMs that have each image.
fn mapped_by(registry: &VmRegistry) -> BTreeMap<Digest, Vec<String>> {
    let mut names: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
    for instance in registry.live() {
        instance.read(|vm| {
            for device in &vm.devices {
                let names = names.entry(device.image).or_default();
                names.push(instance.name().to_owned());
            }
        });
    }
    names
}

fn component_row(
    one: &ComponentMemory,
    names: &BTreeMap<Digest, Vec<String>>,
    expected: &HashMap<Digest, u64>,
) -> ComponentRow {
    let shares = Shares::of(one);
    let names = names.get(&one.image).map_or(&[][..], Vec::as_slice);
    let first: Vec<String> = names
        .iter()
        .take(MOST_NAMES)
        .map(|name| cut(name, 24))
        .collect();
    let mapped_by = match names.len() {
        0 => "none".to_owned(),
        count if count > MOST_NAMES => {
            format!("{} and {} more", first.join(", "), count - MOST_NAMES)
        }
        _ => first.join(", "),
    };
    let or_dash = |count: u64| {
        if count == 0 {
            "–".to_owned()
        } else {
            bytes(count)
        }
    };
    ComponentRow {
        name: cut(&one.component, 60),
        snapshot: one.snapshot,
        idle_x: px(shares.shared + shares.own),
        shared: shares.shared,
        own: shares.own,
        idle: shares.idle,
        resident: bytes(one.resident_bytes),
        size: bytes(one.image_bytes),
        pinned: or_dash(one.pinned_bytes),
        expected: or_dash(expected.get(&one.image).copied().unwrap_or(0)),
        mapped_by,
    }
}

/// The VMs that pay most, and how many others there are.
fn vm_rows(registry: &VmRegistry, report: &MemoryReport) -> (Vec<VmRow>, usize) {
    let stats = HostStats::default();
    // Launches that are set up ahead have rows in the table, too, and are nobody's yet.
    let vms = report.vms.iter().filter_map(|account| {
        let instance = registry.get(&account.vm)?;
        Some((account, instance))
    });
    let mut vms: Vec<_> = vms.collect();
    vms.sort_by(|(a, _), (b, _)| (b.charged_bytes, &a.vm).cmp(&(a.charged_bytes, &b.vm)));
    let more = vms.len().saturating_sub(MOST_ROWS);
    let rows = vms.into_iter().take(MOST_ROWS).map(|(account, instance)| {
        let usage = instance.pid().and_then(|pid| stats.usage(pid));
        VmRow {
            name: account.vm.clone(),
            state: instance.state().name(),
            private: usage.map_or_else(|| "–".to_owned(), |usage| bytes(usage.memory_bytes)),
            charged: bytes(account.charged_bytes),
            touched: bytes(account.mapped_bytes),
            shared: bytes(account.shared_bytes),
        }
    });
    (rows.collect(), more)
}

fn map(class: &'static str, components: &[&ComponentMemory], width: f64, height: f64) -> Map {
    let shown: Vec<_> = components
        .iter()
        .filter(|one| one.image_bytes > 0)
        .take(MOST_CELLS)
        .collect();
    let sizes: Vec<f64> = shown.iter().map(|one| one.image_bytes as f64).collect();
    let within = Area {
        x: 0.0,
        y: 0.0,
        width,
        height,
    };
    let areas = squarify(&sizes, within);
    let cells = areas
        .into_iter()
        .zip(shown)
        .map(|(area, one)| cell(area, one));
    Map {
        class,
        width,
        height,
        cells: cells.collect(),
    }
}

fn cell(area: Area, one: &ComponentMemory) -> Cell {
    let shares = Shares::of(one);
    let mut bottom = area.y + area.height;
    let parts = [
        ("c-shared", shares.shared),
        ("c-own", shares.own),
        ("c-idle", shares.idle),
    ];
    let fills = parts.into_iter().filter(|(_, share)| *share > 0.0);
    let fills = fills.map(|(class, share)| {
        let height = area.height * share / 100.0;
        bottom -= height;
        Fill {
            class,
            y: px(bottom),
            height: px(height),
            rx: 4,
        }
    });
    let (resident, size) = (bytes(one.resident_bytes), bytes(one.image_bytes));
    let letters = ((area.width - 22.0) / 9.4).max(0.0) as usize;
    Cell {
        title: format!(
            "{}: {resident} of {size} in memory, mapped by {}",
            one.component, one.mapped_by
        ),
        fills: fills.collect(),
        x: px(area.x),
        y: px(area.y),
        width: px(area.width),
        height: px(area.height),
        labelled: letters >= 6 && area.height >= 46.0,
        label: cut(&one.component, letters),
        small: cut(&format!("{resident} of {size}"), letters + 2),
        text_x: px(area.x + 11.0),
        text_y: px(area.y + 22.0),
        small_y: px(area.y + 38.0),
    }
}
