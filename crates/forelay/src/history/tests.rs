//! Tests of the module above.

use std::path::PathBuf;

use forelay_image::{Extent, PAGE_BYTES};
use forelay_predict::time::{DAY_MS, HOUR_MS};
use forelay_predict::working_set::WorkingSets;
use tempfile::TempDir;

use super::*;

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

#[tokio::test]
async fn events_come_back_and_a_second_append_changes_nothing() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let mut events = life(5 * DAY_MS, 100, "web");
    events.extend(life(4 * DAY_MS, 200, "ci"));
    events.reverse();
    let done = history.append(&events).await.unwrap();
    assert_eq!((done.stored, done.duplicates, done.late), (16, 0, 0));
    let again = history.append(&events).await.unwrap();
    assert_eq!((again.stored, again.duplicates), (0, 16));

    let launches = history.launches(None, 10).await.unwrap();
    assert_eq!(launches.len(), 2);
    let first = &launches[0];
    assert_eq!((first.of.profile.as_str(), first.vm), ("web", 100));
    assert_eq!((first.ready_ms, first.ran_ms), (Some(1500), Some(60_000)));
    assert_eq!((first.demand_fetches, first.stall_ns), (3, 5_000_000));
    assert_eq!((first.prefetched_bytes, first.used_bytes), (9000, 8000));
    assert_eq!(history.launches(Some("ci"), 10).await.unwrap().len(), 1);

    let notes = replay(&history).await;
    let order: Vec<&str> = notes.launches.iter().map(|l| l.0.as_str()).collect();
    assert_eq!(order, ["ci", "web"]);
    assert_eq!((notes.touched, notes.samples, notes.stops), (2, 2, 2));
    assert_eq!(
        notes.vms[0].1,
        ["base", "nginx", "redis"],
        "what was attached is told after the launch"
    );

    history.close().await;
    let reopened = scratch.open().await;
    assert_eq!(replay(&reopened).await, notes);
    assert!(
        reopened
            .forget(&ProfileRef::new("ci", "ann"))
            .await
            .unwrap()
    );
    assert!(
        !reopened
            .forget(&ProfileRef::new("ci", "ann"))
            .await
            .unwrap()
    );
    assert_eq!(reopened.profiles().await.unwrap().len(), 1);
    reopened.verify().await.unwrap();
}

#[tokio::test]
async fn rolling_up_keeps_what_is_learned_and_closes_the_day() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    for day in 0..20 {
        let at = (100 + day) * DAY_MS + 9 * HOUR_MS;
        history
            .append(&life(at, 1000 + day as u64 * 100, "web"))
            .await
            .unwrap();
    }
    let now = Timestamp(120 * DAY_MS);
    let done = history.roll_up(now).await.unwrap();
    assert_eq!((done.days, done.events), (13, 13 * 8 + 6));
    assert_eq!(history.roll_up(now).await.unwrap().days, 0, "once");

    let late = history
        .append(&life(101 * DAY_MS, 5000, "web"))
        .await
        .unwrap();
    assert_eq!((late.stored, late.late), (0, 8));

    let notes = replay(&history).await;
    assert_eq!(notes.launches.len(), 20);
    let times: Vec<i64> = notes.launches.iter().map(|l| l.1).collect();
    assert!(times.is_sorted());
    assert!(
        times
            .iter()
            .all(|t| (t - 9 * HOUR_MS).rem_euclid(DAY_MS) <= 500)
    );
    assert_eq!(notes.sets.len(), 2);
    assert!(notes.sets.iter().all(|s| s.2 == 19), "{:?}", notes.sets);
    assert_eq!(notes.touched, 1);
    assert_eq!(notes.compositions[0].1, 13.0);
    assert_eq!((notes.compositions.len(), notes.vms.len()), (1, 7));
    let memory = notes.sketches[0] / f64::from(300 << 20);
    assert!((memory - 1.0).abs() < 0.03, "{memory}");
    let summary = &history.profiles().await.unwrap()[0];
    assert_eq!(summary.launches, 20);

    // Much later days share a row a week, and no launch is lost.
    let later = history.roll_up(Timestamp(200 * DAY_MS)).await.unwrap();
    assert_eq!(
        (later.days, later.weekly_merged),
        (6, 19),
        "the newest day stays raw"
    );
    let notes = replay(&history).await;
    let total: u32 = notes.launches.iter().map(|l| l.2).sum();
    assert_eq!(total, 20);
    assert_eq!(notes.launches[0].3, HOUR_MS);
    let gone = history.roll_up(Timestamp(900 * DAY_MS)).await.unwrap();
    assert!(gone.deleted > 0);
}

/// The working sets that a replay gives.
struct Sets(WorkingSets);

impl Sink for Sets {
    fn working_set(&mut self, of: &ProfileRef, image: Digest, set: WorkingSet) {
        self.0.insert(&of.profile, image, set);
    }
    fn touched(&mut self, of: &ProfileRef, images: &[Digest], touches: &[Touch]) {
        self.0.observe(&of.profile, images, touches);
    }
    fn touched_late(&mut self, of: &ProfileRef, touches: &[Touch]) {
        self.0.observe_late(&of.profile, touches);
    }
}

#[tokio::test]
async fn what_a_launch_touched_late_is_folded_as_it_is_replayed() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let late = What::TouchedLate {
        touches: vec![Touch {
            image: image("nginx"),
            extent: Extent::new(40 * PAGE_BYTES, 2 * PAGE_BYTES),
            first_touch_ms: 30_000,
        }],
    };
    for number in 0..8 {
        let at = 100 * DAY_MS + number * 2 * HOUR_MS;
        let nonce = 100 * number.unsigned_abs();
        history.append(&life(at, nonce, "web")).await.unwrap();
        if number < 6 {
            let late = event(at + 60_000, nonce + 50, "web", late.clone());
            history.append(&[late]).await.unwrap();
        }
    }
    let sets = async || {
        let mut sets = Sets(WorkingSets::new(Default::default()));
        history.replay(Timestamp(0), &mut sets).await.unwrap();
        let plan = sets.0.plan("web", &[image("base"), image("nginx")], None);
        let nginx = sets.0.get("web", &image("nginx")).unwrap().launches();
        (nginx, plan)
    };
    let (launches, raw) = sets().await;
    let late = raw.iter().find(|one| one.image == image("nginx")).unwrap();
    assert_eq!((launches, late.first_touch_ms), (8, 30_000));
    assert!((0.5..0.9).contains(&late.probability), "{late:?}");

    let notes = replay(&history).await;
    assert_eq!((notes.touched, notes.touched_late), (8, 6));
    history.roll_up(Timestamp(101 * DAY_MS)).await.unwrap();
    let notes = replay(&history).await;
    assert!(notes.touched_late < 6, "some are folded: {notes:?}");
    let (launches, folded) = sets().await;
    assert_eq!(launches, 8);
    // What is stored is rounded: a 256th of a launch, a millisecond.
    let close = |a: f32, b: f32| (a - b).abs() < 0.01;
    assert_eq!(folded.len(), raw.len());
    for (a, b) in folded.iter().zip(&raw) {
        assert_eq!((a.image, a.extent, a.basis), (b.image, b.extent, b.basis));
        assert!(close(a.probability, b.probability), "{a:?} {b:?}");
    }
}

#[tokio::test]
async fn a_clock_that_jumps_destroys_nothing() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    for day in 0..10 {
        history
            .append(&life((1000 + day) * DAY_MS, day as u64 * 100, "web"))
            .await
            .unwrap();
    }
    // The daemon believes it is 1970: nothing happens.
    let past = history.roll_up(Timestamp(0)).await.unwrap();
    assert!(past.clock_suspect);
    assert_eq!(history.size().await.unwrap().raw_events, 80);
    // One launch was dated ten years ahead: only it goes.
    history
        .append(&life(5000 * DAY_MS, 7700, "web"))
        .await
        .unwrap();
    let done = history.roll_up(Timestamp(1010 * DAY_MS)).await.unwrap();
    assert_eq!(
        (done.misdated, done.days, done.clock_suspect),
        (8, 3, false)
    );
    // The daemon believes it is ten years later: the newest day stays open.
    history.roll_up(Timestamp(5000 * DAY_MS)).await.unwrap();
    let today = history
        .append(&life(1009 * DAY_MS + HOUR_MS, 8800, "web"))
        .await
        .unwrap();
    assert_eq!((today.stored, today.late), (8, 0));
}

#[tokio::test]
async fn size_is_bounded_whatever_is_appended() {
    let scratch = Scratch::new();
    let limits = Limits {
        max_bytes: 400 << 10,
        ..Limits::default()
    };
    let history = scratch.open_with(limits).await;
    for day in 0..40_i64 {
        let events: Vec<Event> = (0..200)
            .map(|i| {
                let what = What::Launch {
                    components: vec![],
                    count: 1,
                };
                let at = day * DAY_MS + i * 400_000;
                event(at, (day * 1000 + i) as u64, &format!("p{}", i % 50), what)
            })
            .collect();
        history.append(&events).await.unwrap();
        history
            .roll_up(Timestamp((day + 1) * DAY_MS))
            .await
            .unwrap();
        let size = history.size().await.unwrap();
        assert!(size.bytes <= limits.max_bytes, "day {day}: {size:?}");
    }
    let kept: u32 = replay(&history).await.launches.iter().map(|l| l.2).sum();
    assert!(kept >= 2000, "{kept} of 8000 launches are left");
}

#[tokio::test]
async fn damaged_and_foreign_files_are_refused_untouched() {
    let scratch = Scratch::new();
    let path = scratch.path();
    let open = async |on_corrupt| {
        let options = OpenOptions {
            on_corrupt,
            ..OpenOptions::default()
        };
        SqliteHistory::open(&path, options).await
    };
    // Not a database.
    std::fs::write(&path, vec![0x5a; 9000]).unwrap();
    let error = open(OnCorrupt::Refuse).await.err().unwrap();
    assert!(matches!(error, HistoryError::Corrupt { .. }), "{error:?}");
    assert_eq!(std::fs::read(&path).unwrap(), vec![0x5a; 9000]);
    // Moved aside when asked, never deleted.
    let history = open(OnCorrupt::MoveAside).await.unwrap();
    let aside = scratch.dir.path().join("history.db.corrupt-1");
    assert_eq!(std::fs::read(aside).unwrap().len(), 9000);
    for i in 0..50 {
        history
            .append(&life(i * HOUR_MS, i as u64 * 100, &format!("p{i}")))
            .await
            .unwrap();
    }
    history.close().await;
    // A page in the middle is overwritten.
    let good = std::fs::read(&path).unwrap();
    let mut bad = good.clone();
    let middle = bad.len() / 2 / 4096 * 4096;
    bad[middle..middle + 2048].fill(0xff);
    std::fs::write(&path, &bad).unwrap();
    let error = open(OnCorrupt::Refuse).await.err().unwrap();
    assert!(matches!(error, HistoryError::Corrupt { .. }), "{error:?}");
    assert!(error.to_string().contains("--history-reset"));
    assert_eq!(std::fs::read(&path).unwrap(), bad);
    // Cut short.
    std::fs::write(&path, &good[..good.len() / 2]).unwrap();
    let error = open(OnCorrupt::Refuse).await.err().unwrap();
    assert!(matches!(error, HistoryError::Corrupt { .. }), "{error:?}");
}

#[tokio::test]
async fn older_schemas_are_migrated_and_newer_or_foreign_ones_refused() {
    use sqlx::{Connection as _, SqliteConnection};
    let scratch = Scratch::new();
    let path = scratch.path();
    let url = format!("sqlite://{}?mode=rwc", path.display());
    // As step 1 left it, with one launch in it.
    let mut db = SqliteConnection::connect(&url).await.unwrap();
    let old = format!(
        "{}; PRAGMA application_id = {}; PRAGMA user_version = 1;
         INSERT INTO profile VALUES (4, 'web', 'ann');
         INSERT INTO launch VALUES (86400000, 7, 4, NULL, 2);
         INSERT INTO touched VALUES (86400001, 8, 4, 7, x'');",
        schema::STEPS[0],
        schema::APPLICATION_ID
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(old))
        .execute(&mut db)
        .await
        .unwrap();
    db.close().await.unwrap();
    let history = scratch.open().await;
    let notes = replay(&history).await;
    assert_eq!(notes.launches, [("web".to_owned(), DAY_MS, 2, 1)]);
    assert_eq!((notes.touched, notes.touched_late), (1, 0));
    history.roll_up(Timestamp(90 * DAY_MS)).await.unwrap();
    history.close().await;

    let set = async |sql: &'static str| {
        let mut db = SqliteConnection::connect(&url).await.unwrap();
        sqlx::raw_sql(sql).execute(&mut db).await.unwrap();
        db.close().await.unwrap();
        let before = std::fs::read(&path).unwrap();
        let error = SqliteHistory::open(&path, OpenOptions::default())
            .await
            .err()
            .unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), before, "untouched");
        error
    };
    let newer = set("PRAGMA user_version = 99").await;
    assert!(
        matches!(newer, HistoryError::Newer { found: 99, .. }),
        "{newer:?}"
    );
    let foreign = set("PRAGMA user_version = 1; PRAGMA application_id = 5").await;
    assert!(
        matches!(foreign, HistoryError::Foreign { .. }),
        "{foreign:?}"
    );
}

#[tokio::test]
async fn csv_imports_once_and_reports_bad_rows_by_line() {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let file = "time_s,profile,owner,duration_s\n\
        4.046,app-1,user-1,69.5\n\
        5,app-1,user-1,\n\
        5,app-1,user-1,\n\
        oops,app-1,user-1,3\n\
        \n\
        6,,user-1,3\n\
        3,\"a,\"\"b\",user-2,0\n\
        7,app-2\n";
    let import = async |text: &str, on_bad_row| {
        let options = ImportOptions {
            origin: Timestamp(DAY_MS),
            on_bad_row,
        };
        import_csv(&history, text.as_bytes(), options).await
    };
    let report = import(file, OnBadRow::Skip).await.unwrap();
    assert_eq!((report.rows, report.bad_rows), (7, 3));
    let lines: Vec<u64> = report.bad.iter().map(|b| b.line).collect();
    assert_eq!(lines, [5, 7, 9]);
    assert_eq!(report.appended.stored, 4 + 2, "four launches, two stops");
    let longer = format!("{file}9,app-9,user-1,\n");
    let report = import(&longer, OnBadRow::Skip).await.unwrap();
    assert_eq!((report.appended.stored, report.appended.duplicates), (1, 6));
    let names: Vec<String> = history
        .profiles()
        .await
        .unwrap()
        .into_iter()
        .map(|p| p.of.profile)
        .collect();
    assert_eq!(names, ["app-1", "app-9", "a,\"b"]);
    let stopped = import(file, OnBadRow::Stop).await.err().unwrap();
    assert!(
        matches!(stopped, HistoryError::BadRow { line: 5, .. }),
        "{stopped}"
    );
    let counts = "profile,owner,time_s,count\nf,o,60,3\n";
    import(counts, OnBadRow::Stop).await.unwrap();
    let latest = history.launches(Some("f"), 1).await.unwrap();
    assert_eq!(
        (latest[0].count, latest[0].at),
        (3, Timestamp(DAY_MS + 60_000))
    );
    assert!(import("a,b,c\n", OnBadRow::Skip).await.is_err());
    assert!(import("", OnBadRow::Skip).await.is_err());
}

/// A year of 10,000 profiles, from the real size of a year of twenty of them: twenty launches a
/// day each (200,000 a day on the host), four images with scattered working sets. Touches are
/// appended once a day, as a working set does not grow with their number, but for every launch of
/// the last day, when they are there in raw form.
#[tokio::test]
async fn a_year_of_ten_thousand_profiles_fits_in_a_gibibyte() {
    const PROFILES: u64 = 20;
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let mut seed = 1_u64;
    let mut random = move |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let images: Vec<ComponentRef> = (0..40).map(|i| component(&format!("c{i}"))).collect();
    for day in 0..365_u64 {
        let mut events = Vec::new();
        for profile in 0..PROFILES {
            let name = format!("profile-{profile}");
            let mine = [0, 1, 2, 3].map(|i| &images[((profile * 7 + i * 11) % 40) as usize]);
            for launch in 0..20_u64 {
                let at = day as i64 * DAY_MS + random(DAY_MS as u64) as i64;
                let nonce = random(1 << 50) * 100;
                let components = mine.iter().map(|c| (*c).clone()).collect();
                let mut add = |i, what| events.push(event(at, nonce + i, &name, what));
                add(
                    0,
                    What::Launch {
                        components,
                        count: 1,
                    },
                );
                add(
                    1,
                    What::Stop {
                        ran_ms: random(600_000),
                    },
                );
                add(
                    2,
                    What::Sample(ResourceSample {
                        cpu_ms: random(60_000),
                        memory_bytes: (200 << 20) + random(300 << 20),
                        read_bytes: random(1 << 30),
                        ..ResourceSample::default()
                    }),
                );
                if launch == 0 || day == 364 {
                    let images: Vec<Digest> = mine.iter().map(|c| c.image).collect();
                    let touches = (0..200)
                        .map(|i| {
                            let page = (i * 37 + profile) * 16 + random(3);
                            Touch {
                                image: images[i as usize % 4],
                                extent: Extent::new(
                                    page * PAGE_BYTES,
                                    (1 + random(8)) * PAGE_BYTES,
                                ),
                                first_touch_ms: random(4000) as u32,
                            }
                        })
                        .collect();
                    add(3, What::Touched { images, touches });
                }
            }
        }
        history.append(&events).await.unwrap();
        if day % 7 == 0 || day == 364 {
            let now = Timestamp((day as i64 + 1) * DAY_MS);
            history.roll_up(now).await.unwrap();
        }
    }
    let size = history.size().await.unwrap();
    let gib = size.bytes as f64 * (10_000 / PROFILES) as f64 / f64::from(1 << 30);
    println!("{size:?}: a year of 10,000 profiles is {gib:.3} GiB");
    let notes = replay(&history).await;
    let launches: u32 = notes.launches.iter().map(|l| l.2).sum();
    assert_eq!(
        u64::from(launches),
        365 * 20 * PROFILES,
        "no launch is lost"
    );
    assert!(gib < 1.0, "{gib} GiB");
}

/// A trace of so many launches, made as it is read.
struct Lines {
    rows: u64,
    next: u64,
    line: Vec<u8>,
    at: usize,
}

impl Lines {
    fn new(rows: u64) -> std::io::BufReader<Self> {
        let lines = Self {
            rows,
            next: 0,
            line: Vec::new(),
            at: 0,
        };
        std::io::BufReader::with_capacity(1 << 20, lines)
    }
}

impl std::io::Read for Lines {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.at == self.line.len() {
            self.at = 0;
            let i = self.next;
            self.next += 1;
            self.line = match i {
                0 => b"time_s,profile,owner,duration_s\n".to_vec(),
                _ if i <= self.rows => {
                    let profile = i * 7919 % 10_000;
                    format!("{}.5,app-{profile},user-{},\n", i / 100, profile % 500).into()
                }
                _ => Vec::new(),
            };
        }
        let n = out.len().min(self.line.len() - self.at);
        out[..n].copy_from_slice(&self.line[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

/// What a large import leaves: all launches, in about as many bytes each as a larger one.
async fn import_many(rows: u64) -> HistorySize {
    let scratch = Scratch::new();
    let history = scratch.open().await;
    let started = std::time::Instant::now();
    let report = import_csv(&history, Lines::new(rows), ImportOptions::default())
        .await
        .unwrap();
    let peak = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = peak.lines().find(|l| l.starts_with("VmHWM"));
    let size = history.size().await.unwrap();
    println!(
        "{:?} in {:?}; {}; {size:?}",
        report.appended,
        started.elapsed(),
        peak.unwrap_or("")
    );
    assert_eq!((report.appended.stored, report.bad_rows), (rows, 0));
    assert_eq!(size.raw_events, rows);
    size
}

#[tokio::test]
async fn a_hundred_thousand_events_of_ten_thousand_profiles_are_imported() {
    let size = import_many(100_000).await;
    assert_eq!(size.profiles, 10_000);
    assert!(size.bytes < 100_000 * 64, "{size:?}");
}

/// `cargo test --release -p forelay --lib -- --ignored ten_million --nocapture`.
#[tokio::test]
#[ignore = "takes minutes"]
async fn ten_million_events_are_imported_in_bounded_memory() {
    let size = import_many(10_000_000).await;
    assert!(size.bytes < 10_000_000 * 64, "{size:?}");
}
