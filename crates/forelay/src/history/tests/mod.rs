//! Tests of the history: what they share.

use std::path::PathBuf;

use forelay_image::{Extent, PAGE_BYTES};
use forelay_predict::time::{DAY_MS, HOUR_MS};
use forelay_predict::working_set::WorkingSets;
use sqlx::Row as _;
use tempfile::TempDir;

use super::*;

mod files;
mod import;
mod keeping;
mod year;

struct Scratch {
    dir: TempDir,
}

impl Scratch {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("history.db")
    }

    async fn open(&self) -> SqliteHistory {
        self.open_with(Limits::default()).await
    }

    async fn open_with(&self, limits: Limits) -> SqliteHistory {
        let options = OpenOptions {
            limits,
            ..OpenOptions::default()
        };
        SqliteHistory::open(&self.path(), options).await.unwrap()
    }
}

/// Size of a history.
#[derive(Debug)]
struct HistorySize {
    bytes: u64,
    profiles: u64,
    raw_events: u64,
}

async fn size(history: &SqliteHistory) -> HistorySize {
    let mut db = history.pool.acquire().await.unwrap();
    let mut count = async |table: &str| {
        let sql = sqlx::AssertSqlSafe(format!("SELECT count(*) FROM {table}"));
        let row = sqlx::query(sql).fetch_one(&mut *db).await.unwrap();
        row.try_get::<i64, _>(0).unwrap().unsigned_abs()
    };
    let mut raw_events = 0;
    for table in append::raw_tables() {
        raw_events += count(table).await;
    }
    HistorySize {
        profiles: count("profile").await,
        raw_events,
        bytes: query::used_bytes(&mut db).await.unwrap(),
    }
}

fn image(name: &str) -> Digest {
    Digest::of(name.as_bytes())
}

fn component(name: &str) -> ComponentRef {
    ComponentRef {
        name: name.into(),
        image: image(name),
    }
}

fn event(at: i64, nonce: u64, profile: &str, what: What) -> Event {
    Event {
        id: EventId {
            at: Timestamp(at),
            nonce,
        },
        vm: nonce / 100 * 100,
        of: ProfileRef::new(profile, "ann"),
        what,
    }
}

/// All kinds of events of one VM launched at `at`; `nonce` is a multiple of 100.
fn life(at: i64, nonce: u64, profile: &str) -> Vec<Event> {
    let touch = |page: u64, ms| Touch {
        image: image("base"),
        extent: Extent::new(page * PAGE_BYTES, PAGE_BYTES),
        first_touch_ms: ms,
    };
    let all = [
        What::Launch {
            components: vec![component("base"), component("nginx")],
            count: 1,
        },
        What::Ready {
            mounted_ms: 900,
            ready_ms: 1500,
        },
        What::Attach {
            component: component("redis"),
        },
        What::Touched {
            images: vec![image("base"), image("nginx")],
            touches: vec![touch(7, 20), touch(3, 90)],
        },
        What::Sample(ResourceSample {
            since_launch_ms: 5000,
            cpu_ms: 70,
            memory_bytes: 300 << 20,
            ..ResourceSample::default()
        }),
        What::DemandFetch {
            image: image("base"),
            fetches: 3,
            bytes: 4096,
            stall_ns: 5_000_000,
        },
        What::Prefetch {
            image: image("base"),
            prefetched_bytes: 9000,
            used_bytes: 8000,
        },
        What::Stop { ran_ms: 60_000 },
    ];
    all.into_iter()
        .enumerate()
        .map(|(i, what)| event(at + i as i64 * 1000, nonce + i as u64, profile, what))
        .collect()
}

/// Writes down what a replay gives.
#[derive(Default, Debug, PartialEq)]
struct Notes {
    launches: Vec<(String, i64, u32, i64)>,
    compositions: Vec<(Vec<String>, f64)>,
    vms: Vec<(u64, Vec<String>)>,
    sets: Vec<(String, Digest, u32)>,
    touched: usize,
    touched_late: usize,
    samples: usize,
    stops: usize,
    sketches: Vec<f64>,
}

impl Sink for Notes {
    fn launches(&mut self, of: &ProfileRef, at: Timestamp, count: u32, resolution_ms: i64) {
        self.launches
            .push((of.profile.clone(), at.0, count, resolution_ms));
    }
    fn composition(
        &mut self,
        _: &ProfileRef,
        _: Timestamp,
        components: &[ComponentRef],
        weight: f64,
    ) {
        let names = components.iter().map(|c| c.name.clone()).collect();
        self.compositions.push((names, weight));
    }
    fn launched_with(
        &mut self,
        of: &ProfileRef,
        at: Timestamp,
        vm: u64,
        components: &[ComponentRef],
    ) {
        assert!(
            self.launches
                .iter()
                .any(|l| l.0 == of.profile && l.1 == at.0)
        );
        let names = components.iter().map(|c| c.name.clone()).collect();
        self.vms.push((vm, names));
    }
    fn attached(&mut self, _: &ProfileRef, _: Timestamp, vm: u64, component: &ComponentRef) {
        let known = self.vms.iter_mut().find(|one| one.0 == vm);
        let (_, names) = known.expect("attached to a VM that was launched before");
        names.push(component.name.clone());
    }
    fn working_set(&mut self, of: &ProfileRef, image: Digest, set: WorkingSet) {
        self.sets.push((of.profile.clone(), image, set.launches()));
    }
    fn touched(&mut self, _: &ProfileRef, images: &[Digest], touches: &[Touch]) {
        assert_eq!(touches.is_empty(), images.is_empty());
        self.touched += 1;
    }
    fn touched_late(&mut self, _: &ProfileRef, touches: &[Touch]) {
        assert!(!touches.is_empty());
        self.touched_late += 1;
    }
    fn memory_sketch(&mut self, _: &ProfileRef, sketch: Sketch) {
        self.sketches.push(sketch.quantile(0.5).unwrap());
    }
    fn sample(&mut self, _: &ProfileRef, _: Timestamp, _: u64, sample: &ResourceSample) {
        assert!(sample.memory_bytes >= 200 << 20);
        self.samples += 1;
    }
    fn stopped(&mut self, _: &ProfileRef, _: Timestamp, _: u64, ran_ms: u64) {
        assert!(ran_ms <= 600_000);
        self.stops += 1;
    }
}

async fn replay(history: &SqliteHistory) -> Notes {
    let mut notes = Notes::default();
    let done = history
        .replay(Timestamp(i64::MIN), &mut notes)
        .await
        .unwrap();
    assert_eq!(done.unreadable, 0);
    notes
}
