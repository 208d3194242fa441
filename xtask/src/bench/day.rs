//! `bench day`: a compressed day of launches through the real daemon with real VMs, three times:
//! forecasting with all it has, the simpler rule (the working set is loaded when a launch is asked
//! for), and on demand.
//!
//! Each run begins alike: the same history of days before (imported), three launches of each
//! profile learned, empty disk cache, empty shared memory. The repository is throttled; neither memory nor
//! disk cache holds everything. The forecaster's clock runs [`SCALE`] times faster than the wall's.
//! VMs boot at their own pace, so a launch takes minutes of the compressed day: a forecast has less
//! time to act here than on a host that lives in real time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::draw::Draw;
use super::statistics::quantile;
use crate::demo;
use crate::host::{self, Host, Programs, Settings};
use crate::process::{output, run, target_dir};

/// How much faster the day passes.
const SCALE: f64 = 240.0;
const DAY_MIN: u32 = 24 * 60;
/// Launches of each profile that are learned before the day.
const LEARNED: usize = 3;
/// Days of history before the day.
const PAST_DAYS: u32 = 14;
/// A Monday's midnight, in milliseconds since the epoch: when the day begins.
const DAY_STARTS_MS: i64 = 1_789_344_000_000;
const DAY_MS: i64 = 86_400_000;
/// Memory for components: less than the working sets of all profiles.
const BUDGET_BYTES: u64 = 64 << 20;
/// Disk cache: less than the bytes of a day.
const CACHE_BYTES: u64 = 32 << 20;
/// How far ahead is looked: half an hour of the day is 7.5 s of the wall clock, a few times what
/// loading a profile takes.
const HORIZON_S: f64 = 1800.0;
/// How long a VM runs after it is ready before something is attached, and before it is stopped.
const LINGER: Duration = Duration::from_millis(1500);
/// How long it takes to learn what a VM touches of what it was given.
const LEARN: Duration = Duration::from_secs(7);

/// The ways of a day: name, prefetch at launch, prefetch ahead of it.
const WAYS: [(&str, bool, bool); 3] = [
    ("forecast", true, true),
    ("rule", true, false),
    ("on_demand", false, false),
];

/// A profile of the day: components, entrypoint, port that says that it is ready, and a component
/// with a command that a person attaches and runs a little after the launch.
struct Profile {
    name: &'static str,
    components: &'static str,
    entrypoint: &'static str,
    port: u16,
    attach: Option<(&'static str, &'static [&'static str])>,
}

const PROFILES: [Profile; 5] = [
    Profile {
        name: "report",
        components: r#"["python3"]"#,
        entrypoint: r#"["python3", "-m", "http.server", "8000"]"#,
        port: 8000,
        attach: None,
    },
    Profile {
        name: "ci",
        components: r#"["nodejs"]"#,
        entrypoint: r#"["node", "-e", "require('http').createServer().listen(3000, '0.0.0.0')"]"#,
        port: 3000,
        attach: None,
    },
    Profile {
        name: "web",
        components: r#"["nginx"]"#,
        entrypoint: r#"["nginx", "-g", "daemon off;"]"#,
        port: 80,
        attach: Some(("redis", &["redis-server", "--version"])),
    },
    Profile {
        name: "cache",
        components: r#"["redis"]"#,
        entrypoint: r#"["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]"#,
        port: 6379,
        attach: None,
    },
    Profile {
        name: "nightly",
        components: r#"["python3", "redis"]"#,
        entrypoint: r#"["python3", "-m", "http.server", "8000"]"#,
        port: 8000,
        attach: None,
    },
];

impl Profile {
    fn manifest(&self) -> String {
        format!(
            "name = \"{}\"\nowner = \"demo\"\nbase = \"debian\"\ncomponents = {}\nentrypoint = {}\n\
             ready = {{ tcp = {} }}\n\n[vm]\nmemory_mib = 256\n",
            self.name, self.components, self.entrypoint, self.port
        )
    }
}

/// The thirty launches of a day: minute and profile, in order. `day` seeds what is random.
fn launches(day: u32) -> Vec<(u32, &'static str)> {
    let mut draw = Draw(u64::from(day).wrapping_mul(7919).wrapping_add(17));
    let mut all = Vec::new();
    // Periodic: every three hours, at ten past.
    for hour in (0..24).step_by(3) {
        all.push((hour * 60 + 10 + draw.below(3), "report"));
    }
    // Bursty: three bursts of three at any time, a quarter of an hour between launches.
    for burst in 0..3 {
        let start = burst * 480 + 30 + draw.below(390);
        all.extend((0..3).map(|i| (start + i * 15, "ci")));
    }
    // Diurnal: once an hour of office time, at any minute of it.
    for hour in 9..17 {
        all.push((hour * 60 + draw.below(60), "web"));
    }
    // Random: any time.
    for _ in 0..4 {
        all.push((draw.below(DAY_MIN), "cache"));
    }
    // Rare: once in the night.
    all.push((205 + draw.below(5), "nightly"));
    all.sort_unstable();
    all
}

/// Launches of the days before, as a trace that begins `PAST_DAYS` before the day.
fn trace() -> String {
    let mut text = "time_s,profile,owner,duration_s\n".to_owned();
    for day in 0..PAST_DAYS {
        for (minute, profile) in launches(day) {
            let second = (day * DAY_MIN + minute) * 60;
            text.push_str(&format!("{second},{profile},demo,600\n"));
        }
    }
    text
}

struct DayBench {
    programs: Programs,
    repository: PathBuf,
    dir: PathBuf,
}

/// Runs the benchmark and writes its figures to `out`. Arguments name ways; none means all.
/// `first=N` ends the day after so many launches.
pub fn run_bench(out: &Path, arguments: &[&str]) -> Result<()> {
    let (limits, ways_asked): (Vec<&str>, Vec<&str>) = arguments
        .iter()
        .partition(|argument| argument.starts_with("first="));
    let limit = limits.first().and_then(|text| text.strip_prefix("first="));
    let limit = limit.map_or(Ok(usize::MAX), str::parse)?;
    crate::prerequisites::install()?;
    let bench = DayBench {
        programs: host::build()?,
        repository: target_dir().join("demo/repository"),
        dir: target_dir().join("bench/day"),
    };
    demo::build_components(&bench.programs, &bench.repository)?;
    let _ = std::fs::remove_dir_all(&bench.dir);
    bench.learn()?;
    let mut ways = serde_json::Map::new();
    for (way, prefetch, ahead) in WAYS {
        if ways_asked.is_empty() || ways_asked.contains(&way) {
            let day = bench.day(way, prefetch, ahead, limit)?;
            ways.insert(way.to_owned(), day);
        }
    }
    let document = json!({
        "scale": SCALE,
        "launches": launches(PAST_DAYS).len().min(limit),
        "profiles": PROFILES.len(),
        "past_days": PAST_DAYS,
        "learned_launches_of_each_profile": LEARNED,
        "budget_bytes": BUDGET_BYTES,
        "disk_cache_bytes": CACHE_BYTES,
        "horizon_s": HORIZON_S,
        "latency_ms": demo::LATENCY_MS,
        "bandwidth_bytes_per_s": demo::BANDWIDTH_BYTES_PER_S,
        "ways": ways,
    });
    super::write(out, &document)
}

fn wall_ms() -> Result<i64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis() as i64)
}

impl DayBench {
    fn host(&self, state: PathBuf, prefetch: bool, ahead: bool) -> Result<Host> {
        let settings = Settings {
            budget_bytes: BUDGET_BYTES,
            prefetch,
            ahead,
            ..Settings::throttled(self.repository.clone(), state)
        };
        let host = Host::new(&self.programs, &settings)?;
        host.configure("cache", &format!("cap_bytes = {CACHE_BYTES}"))?;
        let forecast = format!("window_s = 1.0\nhorizon_s = {HORIZON_S:?}");
        host.configure("forecast", &forecast)?;
        for profile in &PROFILES {
            std::fs::write(manifest(&host, profile.name), profile.manifest())?;
        }
        Ok(host)
    }

    /// A few launches of each profile, long before the day, and the history of the days before it.
    fn learn(&self) -> Result<()> {
        let mut host = self.host(self.dir.join("learned"), true, false)?;
        let starts_ms = DAY_STARTS_MS - i64::from(PAST_DAYS + 5) * DAY_MS;
        host.configure("forecast", &clock(SCALE, wall_ms()?, starts_ms))?;
        host.start_daemon()?;
        // The first launch on a host unpacks the kernel; the others need not wait for that.
        let first = DayLaunch {
            name: PROFILES[0].name.to_owned(),
            profile: &PROFILES[0],
        };
        first.run(&host, LINGER)?;
        for round in 1..=LEARNED {
            println!("learning, round {round} of {LEARNED}");
            let host = &host;
            std::thread::scope(|scope| {
                let launches = PROFILES.iter().map(|profile| {
                    let launch = DayLaunch {
                        name: profile.name.to_owned(),
                        profile,
                    };
                    scope.spawn(move || launch.run(host, LEARN))
                });
                let launches: Vec<_> = launches.collect();
                let mut ended = launches.into_iter().map(|launch| launch.join());
                ended.try_for_each(|ended| match ended {
                    Ok(result) => result.map(drop),
                    Err(_) => bail!("a launch panicked"),
                })
            })?;
        }
        host.stop_daemon()?;
        let csv = host.scratch().join("trace.csv");
        std::fs::write(&csv, trace())?;
        let origin_ms = DAY_STARTS_MS - i64::from(PAST_DAYS) * DAY_MS;
        run(host
            .forelay(["history", "import"])
            .arg(&csv)
            .arg(format!("--origin-ms={origin_ms}")))
    }

    fn day(&self, way: &str, prefetch: bool, ahead: bool, limit: usize) -> Result<Value> {
        let state = self.dir.join(way);
        run(Command::new("cp")
            .arg("-a")
            .arg(self.dir.join("learned"))
            .arg(&state))?;
        let _ = std::fs::remove_dir_all(state.join("cache"));
        let mut host = self.host(state, prefetch, ahead)?;
        // The daemon has started by then.
        let origin_ms = wall_ms()? + 3_000;
        host.configure("forecast", &clock(SCALE, origin_ms, DAY_STARTS_MS))?;
        host.start_daemon()?;
        let origin = Instant::now() + Duration::from_millis((origin_ms - wall_ms()?).max(0) as u64);
        let results = replay(&host, origin, limit)?;
        for result in &results {
            println!("{way}: {}", line(result));
        }
        let totals = host.json(["memory"])?["totals"].clone();
        let history = host.json(["history"])?;
        host.stop_daemon()?;
        let mut figures = figures(&results, &totals, &history);
        if !prefetch {
            // Nothing is planned, so nothing can be missing.
            figures["summary"]["at_hand_at_request_share"] = Value::Null;
            figures["summary"]["missing_at_request_bytes"] = Value::Null;
        }
        println!(
            "{way}: {}",
            serde_json::to_string_pretty(&figures["summary"])?
        );
        Ok(figures)
    }
}

fn clock(scale: f64, origin_ms: i64, starts_ms: i64) -> String {
    format!("time_scale = {scale:?}\ntime_origin_ms = {origin_ms}\ntime_starts_ms = {starts_ms}")
}

fn manifest(host: &Host, profile: &str) -> PathBuf {
    host.scratch().join(format!("{profile}.toml"))
}

/// One launch in a line, with the causes of its demand fetches.
fn line(result: &Value) -> String {
    let causes = &result["demand_causes"];
    format!(
        "minute {:>4} {:<8} {:<9} missing {:>8} bytes, {:>3} demand fetches ({} unforeseen, \
         {} not loaded in time, {} evicted, {} reclaimed by the kernel), stall {:.3} s",
        result["minute"],
        result["profile"].as_str().unwrap_or("?"),
        result["mode"].as_str().unwrap_or("?"),
        result["missing_at_request_bytes"],
        result["demand_fetches"],
        causes["unforeseen"],
        causes["late"],
        causes["evicted"],
        causes["reclaimed"],
        result["stall_s"].as_f64().unwrap_or(f64::NAN),
    )
}

/// Launches everything when it is due, but no more than `limit`, and waits for the day's end.
fn replay(host: &Host, origin: Instant, limit: usize) -> Result<Vec<Value>> {
    let results = Mutex::new(Vec::new());
    let wait_until = |minute: u32| {
        let after = Duration::from_secs_f64(f64::from(minute) * 60.0 / SCALE);
        std::thread::sleep((origin + after).saturating_duration_since(Instant::now()));
    };
    std::thread::scope(|scope| {
        let day = launches(PAST_DAYS).into_iter().enumerate();
        for (number, (minute, name)) in day.take(limit) {
            let Some(profile) = PROFILES.iter().find(|one| one.name == name) else {
                continue;
            };
            wait_until(minute);
            let launch = DayLaunch {
                name: format!("{name}-{number}"),
                profile,
            };
            let results = &results;
            scope.spawn(move || {
                let result = launch.run(host, LINGER);
                if let Ok(mut results) = results.lock() {
                    results.push((number, minute, result));
                }
            });
        }
        if limit >= launches(PAST_DAYS).len() {
            wait_until(DAY_MIN);
        }
    });
    let mut results = results.into_inner().unwrap_or_default();
    results.sort_by_key(|(number, ..)| *number);
    let mut values = Vec::new();
    for (number, minute, result) in results {
        let mut value = result.with_context(|| format!("launch {number} of the day"))?;
        value["minute"] = json!(minute);
        values.push(value);
    }
    Ok(values)
}

/// One launch, its attachment if it has one, and its end.
struct DayLaunch<'a> {
    name: String,
    profile: &'a Profile,
}

impl DayLaunch<'_> {
    fn run(&self, host: &Host, stay: Duration) -> Result<Value> {
        let vm = host.launch(&manifest(host, self.profile.name), &self.name, &[])?;
        std::thread::sleep(LINGER);
        let mut attach = Value::Null;
        if let Some((component, command)) = self.profile.attach {
            let before = self.look(host)?;
            let started = Instant::now();
            output(&mut host.forelay(["attach", &self.name, component]))?;
            let mut words = vec!["exec", &self.name, "--"];
            words.extend(command);
            output(&mut host.forelay(words))?;
            let took_s = started.elapsed().as_secs_f64();
            let after = self.look(host)?;
            let grown = |field: &str| {
                let of = |vm: &Value| vm["waits"][field].as_f64().unwrap_or(0.0);
                of(&after) - of(&before)
            };
            attach = json!({
                "took_s": took_s,
                "demand_fetches": grown("demand_fetches"),
                "stall_s": grown("stall_s"),
            });
            std::thread::sleep(stay);
        }
        let end = self.look(host)?;
        host.stop(&[&self.name])?;
        let launch = &end["launch"];
        Ok(json!({
            "profile": self.profile.name,
            "mode": launch["mode"],
            "ready_s": vm["launch"]["ready_s"],
            "demand_fetches": launch["demand_fetches"],
            "stall_s": launch["stall_s"],
            "demand_causes": launch["demand_causes"],
            "missing_at_request_bytes": launch["prefetched_bytes"],
            "attach": attach,
        }))
    }

    /// The VM as `ps` shows it.
    fn look(&self, host: &Host) -> Result<Value> {
        let all = host.json(["ps"])?;
        let found = all.as_array().into_iter().flatten();
        let mut found = found.filter(|vm| vm["name"] == self.name.as_str());
        let vm = found.next().cloned();
        vm.with_context(|| format!("VM {} is not listed", self.name))
    }
}

fn figures(results: &[Value], totals: &Value, history: &Value) -> Value {
    let mut by_profile: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for result in results {
        let profile = result["profile"].as_str().unwrap_or("?");
        by_profile.entry(profile).or_default().push(result);
    }
    let all: Vec<&Value> = results.iter().collect();
    let profiles = by_profile.iter();
    let profiles: serde_json::Map<String, Value> = profiles
        .map(|(name, results)| ((*name).to_owned(), summary(results)))
        .collect();
    let mut whole = summary(&all);
    let pushed = totals["pushed_bytes"].as_f64().unwrap_or(0.0);
    let used = totals["pushed_used_bytes"].as_f64().unwrap_or(0.0);
    whole["prefetched_bytes"] = json!(pushed);
    whole["prefetched_used_share"] = json!(used / pushed.max(1.0));
    whole["repository_bytes"] = totals["repository_bytes"].clone();
    json!({
        "summary": whole,
        "profiles": profiles,
        "launches": results,
        "totals": totals,
        "history": history,
    })
}

fn summary(results: &[&Value]) -> Value {
    let numbers = |results: &[&Value], path: &str| -> Vec<f64> {
        let found = results.iter().filter_map(|result| result.pointer(path));
        found.filter_map(Value::as_f64).collect()
    };
    let count = results.len().max(1) as f64;
    let none = |path: &str| {
        let zero = numbers(results, path).iter().filter(|n| **n == 0.0).count();
        zero as f64 / count
    };
    let total = |path: &str| -> f64 { numbers(results, path).iter().sum() };
    let ready = numbers(results, "/ready_s");
    let attaches = numbers(results, "/attach/took_s");
    json!({
        "launches": results.len(),
        "without_demand_fetch_share": none("/demand_fetches"),
        "at_hand_at_request_share": none("/missing_at_request_bytes"),
        "demand_fetches": total("/demand_fetches"),
        "stall_s": total("/stall_s"),
        "demand_causes": {
            "unforeseen": total("/demand_causes/unforeseen"),
            "late": total("/demand_causes/late"),
            "evicted": total("/demand_causes/evicted"),
            "reclaimed": total("/demand_causes/reclaimed"),
        },
        "missing_at_request_bytes": total("/missing_at_request_bytes"),
        "ready_p50_s": quantile(&ready, 0.5),
        "ready_p95_s": quantile(&ready, 0.95),
        "attaches": attaches.len(),
        "attach_p50_s": quantile(&attaches, 0.5),
        "attach_demand_fetches": total("/attach/demand_fetches"),
        "attach_stall_s": total("/attach/stall_s"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_has_thirty_launches_of_five_profiles_and_days_differ() {
        let day = launches(PAST_DAYS);
        assert_eq!(day.len(), 30);
        assert!(day.is_sorted() && day.iter().all(|(minute, _)| *minute < DAY_MIN));
        for profile in &PROFILES {
            assert!(day.iter().any(|(_, name)| *name == profile.name));
        }
        assert_eq!(launches(3), launches(3));
        assert_ne!(launches(3), launches(4));
        assert_eq!(trace().lines().count(), 1 + 30 * PAST_DAYS as usize);
    }

    #[test]
    fn a_summary_counts_shares_and_ignores_what_is_absent() {
        let one = json!({"demand_fetches": 0, "missing_at_request_bytes": 7, "ready_s": 2.0,
                         "stall_s": 0.5, "attach": null});
        let two = json!({"demand_fetches": 3, "missing_at_request_bytes": 0, "ready_s": 4.0,
                         "stall_s": 0.25, "attach": {"took_s": 1.5, "stall_s": 0.125}});
        let summary = summary(&[&one, &two]);
        assert_eq!(summary["without_demand_fetch_share"], 0.5);
        assert_eq!(summary["stall_s"], 0.75);
        assert_eq!(
            (&summary["attaches"], &summary["attach_stall_s"]),
            (&json!(1), &json!(0.125))
        );
    }
}
