//! What a launch costs the planner when memory is full: 10,000 segments of 256 KiB in 100
//! components, each segment with a past of its own, 40 forecasts over all of them.
//!
//! `cargo run --release -p forelay-cache --example bench_plan -- [OUT.json]`
//!
//! Three of five components are mapped by VMs that run and have touched half of them some
//! time ago. "refused" is a launch that is worth less than all that is there, "cold" one
//! that takes what no VM can reach, "idle" one for which nothing will do but what running
//! VMs have touched and use no more, "waiting" twenty refused ones that had to wait until
//! pressure was over. Told are the longest [`Planner::step`] of a launch and
//! all of its steps together; the table is locked while they last.

mod report;

use std::sync::Arc;
use std::time::Instant;

use forelay_cache::budget::{BudgetConfig, PressureLevel};
use forelay_cache::mapping_table::SharedTable;
use forelay_cache::plan::{
    Eviction, Fetch, FetchEnded, LaunchRequested, PlanConfig, Pressure, ProfileForecast,
    SharedExtent, TouchReport,
};
use forelay_cache::{DeviceImage, Planner, PlannerEvent, VmName};
use forelay_image::{Digest, Extent, PlannedExtent};
use serde_json::{Value, json};

const SEGMENT: u64 = 256 << 10;
const SEGMENTS: u64 = 100;
const COMPONENTS: u64 = 100;
const MAPPED: u64 = 60;
const PROFILES: u64 = 40;
const ROUNDS: u64 = 31;

struct Host {
    planner: Planner,
    now_ms: i64,
    evicted_bytes: u64,
    steps_ms: Vec<f64>,
}

impl Host {
    /// Tells an event; what is asked for is done at once.
    fn tell(&mut self, event: PlannerEvent) {
        let begun = Instant::now();
        let decisions = self.planner.step(event, self.now_ms);
        self.steps_ms.push(begun.elapsed().as_secs_f64() * 1e3);
        for Eviction { image, extents } in decisions.evictions {
            for extent in extents {
                self.evicted_bytes += extent.len;
                let evicted = SharedExtent::new(image.clone(), extent);
                self.tell(PlannerEvent::Evicted(evicted.clone()));
                self.tell(PlannerEvent::EvictionEnded(evicted));
            }
        }
        for Fetch { id, extent, .. } in decisions.fetches {
            let here = vec![extent];
            self.tell(PlannerEvent::FetchEnded(FetchEnded { id, here }));
        }
    }
}

fn device(component: u64) -> DeviceImage {
    DeviceImage {
        image: Digest::of(&component.to_le_bytes()),
        image_bytes: SEGMENTS * SEGMENT,
    }
}

fn planned(component: u64, segment: u64, probability: f64) -> PlannedExtent {
    PlannedExtent {
        image: device(component).image,
        extent: Extent::new(segment * SEGMENT, SEGMENT),
        probability,
        first_touch_ms: segment as u32,
    }
}

/// Between a half and one, another one for each segment.
fn likely(component: u64, segment: u64) -> f64 {
    let draw = (component * SEGMENTS + segment).wrapping_mul(7_919) % 10_007;
    1.0 - draw as f64 / 20_014.0
}

fn launch(vm: &VmName, component: u64, working_set: Vec<PlannedExtent>) -> PlannerEvent {
    PlannerEvent::LaunchRequested(LaunchRequested {
        vm: vm.clone(),
        domain: "tenant".into(),
        profile: format!("p{component}").into(),
        devices: vec![device(component)],
        working_set,
    })
}

/// A host whose memory is full, with forecasts of this probability for the components that
/// `forecast` names.
fn full_host(probability: f64, forecast: impl Fn(u64, u64) -> bool) -> Host {
    let config = PlanConfig {
        budget_bytes: COMPONENTS * SEGMENTS * SEGMENT,
        inflight_bytes: 1 << 30,
        ..PlanConfig::default()
    };
    let budget = BudgetConfig {
        cap_bytes: config.budget_bytes,
        ..BudgetConfig::default()
    };
    let mut host = Host {
        planner: Planner::new(config, budget, Arc::new(SharedTable::default())),
        now_ms: 1_000_000_000,
        evicted_bytes: 0,
        steps_ms: Vec::new(),
    };
    for component in 0..COMPONENTS {
        let vm = VmName::from(format!("vm{component}"));
        let all = (0..SEGMENTS).map(|segment| planned(component, segment, 1.0));
        host.tell(launch(&vm, component, all.collect()));
        host.tell(PlannerEvent::VmStarted(vm.clone()));
        for segment in (0..SEGMENTS).filter(|segment| segment % 2 == 0) {
            host.now_ms += 1_000;
            host.tell(PlannerEvent::Touched(TouchReport {
                vm: vm.clone(),
                image: device(component).image,
                extents: vec![Extent::new(segment * SEGMENT, SEGMENT)],
            }));
        }
        if component >= MAPPED {
            host.tell(PlannerEvent::VmStopped(vm));
        }
    }
    for _ in 0..6 {
        host.now_ms += 60_000;
        host.tell(PlannerEvent::Tick);
    }
    for profile in 0..PROFILES {
        let of = (0..5).map(|at| (profile * 5 + at) % COMPONENTS);
        let all = of
            .clone()
            .flat_map(|at| (0..SEGMENTS).map(move |segment| (at, segment)));
        let told = all.filter(|(component, segment)| forecast(*component, *segment));
        host.tell(PlannerEvent::ProfileForecast(ProfileForecast {
            domain: "tenant".into(),
            profile: format!("soon{profile}").into(),
            devices: of.map(device).collect(),
            launch_probability: probability,
            next_launch_ms: None,
            working_set: told
                .map(|(at, segment)| planned(at, segment, likely(at, segment)))
                .collect(),
        }));
    }
    host
}

/// Quantiles over launches of 20 MiB.
fn measure(name: &str, mut host: Host, probability: f64, evicts: bool) -> (String, Value) {
    let (mut longest_ms, mut all_ms) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let component = COMPONENTS + round;
        let vm = VmName::from(format!("new{round}"));
        let set = (0..80).map(|segment| planned(component, segment, probability));
        host.evicted_bytes = 0;
        host.steps_ms.clear();
        host.tell(launch(&vm, component, set.collect()));
        assert_eq!(host.evicted_bytes > 0, evicts, "{name}");
        longest_ms.push(host.steps_ms.iter().copied().fold(0.0, f64::max));
        all_ms.push(host.steps_ms.iter().sum());
        host.tell(PlannerEvent::VmStarted(vm));
        host.now_ms += 10;
    }
    let median = |mut of: Vec<f64>| {
        of.sort_unstable_by(f64::total_cmp);
        of[of.len() / 2]
    };
    let (longest_ms, all_ms) = (median(longest_ms), median(all_ms));
    println!("{name:8} longest step {longest_ms:7.2} ms   all steps {all_ms:7.2} ms");
    (
        name.to_owned(),
        json!({ "longest_step_ms": longest_ms, "all_steps_ms": all_ms }),
    )
}

/// Twenty launches are asked for while prefetching is paused; told is the step that resumes.
fn measure_waiting(mut host: Host, probability: f64) -> (String, Value) {
    let pressure = |level| {
        let deficit_bytes = 0;
        PlannerEvent::Pressure(Pressure {
            level,
            deficit_bytes,
        })
    };
    host.tell(pressure(PressureLevel::Critical));
    for round in 0..20 {
        let component = COMPONENTS + round;
        let vm = VmName::from(format!("new{round}"));
        let set = (0..80).map(|segment| planned(component, segment, probability));
        host.tell(launch(&vm, component, set.collect()));
    }
    host.tell(pressure(PressureLevel::Plenty));
    host.now_ms += 10_000;
    host.steps_ms.clear();
    host.tell(PlannerEvent::Tick);
    assert_eq!((host.evicted_bytes, host.planner.queued_bytes()), (0, 0));
    let longest_ms = host.steps_ms[0];
    println!("waiting  longest step {longest_ms:7.2} ms");
    (
        "waiting".to_owned(),
        json!({ "longest_step_ms": longest_ms }),
    )
}

fn main() {
    let mut steps = serde_json::Map::new();
    let all = full_host(0.9, |_, _| true);
    steps.extend([measure("refused", all, 0.11, false)]);
    let all = full_host(0.9, |_, _| true);
    steps.extend([measure_waiting(all, 0.11)]);
    let cold = full_host(0.05, |_, _| true);
    steps.extend([measure("cold", cold, 1.0, true)]);
    let touched = |component, segment| component < MAPPED && segment % 2 == 0;
    let idle = full_host(0.9, |component, segment| !touched(component, segment));
    steps.extend([measure("idle", idle, 1.0, true)]);
    report::write(&json!({
        "components": COMPONENTS,
        "segments": COMPONENTS * SEGMENTS,
        "forecasts": PROFILES,
        "steps": steps,
    }));
}
