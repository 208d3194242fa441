//! `/metrics`: what the daemon counts, as Prometheus reads it.
//!
//! Owns names and units. Everything is read where it is counted at the moment of a scrape, so
//! that nothing is counted twice and a scrape holds no lock for long. Invariant: labels are few:
//! of profiles the most judged, nothing of VMs.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use forelay_store::fetch::FetchCounters;
use prometheus_client::encoding::prometheus_text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::api::{MemoryReport, Totals, VmState};
use crate::daemon::Host;
use crate::daemon::api::server::Failure;
use crate::daemon::error::HostError;

/// Media type of the exposition.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Profiles whose forecasts are told, those that were judged most often.
const MOST_PROFILES: usize = 200;

type Label = (&'static str, String);

/// `GET /metrics`.
pub async fn scrape(State(host): State<Arc<Host>>) -> Result<Response, Failure> {
    let work = tokio::task::spawn_blocking(move || exposition(&host));
    let text = work.await.map_err(HostError::failed)?;
    let text = text.map_err(HostError::failed)?;
    Ok(([(CONTENT_TYPE, TEXT)], text).into_response())
}

fn exposition(host: &Host) -> Result<String, std::fmt::Error> {
    let mut page = Page(Registry::with_prefix("forelay"));
    page.host(host);
    page.memory(&host.accounts.told_by_table());
    page.plan(host);
    page.demand(host);
    page.forecasts(host);
    page.launches(host);
    page.fetches(host);
    let mut text = String::new();
    prometheus_text::encode(&mut text, &page.0)?;
    Ok(text)
}

/// The page that is being written.
struct Page(Registry);

impl Page {
    fn counters(&mut self, name: &str, help: &str, unit: Option<Unit>, of: &[(Vec<Label>, u64)]) {
        let family = Family::<Vec<Label>, Counter>::default();
        for (labels, value) in of {
            family.get_or_create(labels).inc_by(*value);
        }
        match unit {
            Some(unit) => self.0.register_with_unit(name, help, unit, family),
            None => self.0.register(name, help, family),
        }
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.counters(name, help, None, &[(Vec::new(), value)]);
    }

    fn bytes_counter(&mut self, name: &str, help: &str, value: u64) {
        self.counters(name, help, Some(Unit::Bytes), &[(Vec::new(), value)]);
    }

    fn gauges(&mut self, name: &str, help: &str, of: &[(Vec<Label>, f64)]) {
        let family = Family::<Vec<Label>, Gauge<f64, AtomicU64>>::default();
        for (labels, value) in of {
            family.get_or_create(labels).set(*value);
        }
        self.0.register(name, help, family);
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<Unit>, value: u64) {
        let gauge = Gauge::<i64, AtomicI64>::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        match unit {
            Some(unit) => self.0.register_with_unit(name, help, unit, gauge),
            None => self.0.register(name, help, gauge),
        }
    }

    fn seconds_counter(&mut self, name: &str, help: &str, value: f64) {
        let counter = Counter::<f64, AtomicU64>::default();
        counter.inc_by(value);
        self.0
            .register_with_unit(name, help, Unit::Seconds, counter);
    }

    fn host(&mut self, host: &Host) {
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        self.gauges("build_info", "Version of the daemon", &[(version, 1.0)]);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let started_s = now
            .unwrap_or_default()
            .saturating_sub(host.uptime())
            .as_secs_f64();
        self.gauges(
            "start_time_seconds",
            "When the daemon's worker started, since the epoch",
            &[(Vec::new(), started_s)],
        );
        let degraded = host.degraded().into_iter();
        let degraded: Vec<_> = degraded
            .map(|one| (vec![("part", one.what)], 1.0))
            .collect();
        self.gauges("degraded", "Parts that the daemon does without", &degraded);
        let live = host.instances.all();
        let states = VmState::ALL.map(|state| {
            let count = live.iter().filter(|one| one.state() == state).count();
            (vec![("state", state.name().to_owned())], count as f64)
        });
        self.gauges(
            "vms",
            "VMs by state, those that ended lately among them",
            &states,
        );
        let watchers = host.events().watchers() as u64;
        self.gauge("event_streams", "Clients that watch events", None, watchers);
    }

    fn memory(&mut self, report: &MemoryReport) {
        let gauges = [
            (
                "memory_budget",
                "Most that components may take in shared memory now",
                report.budget_bytes,
            ),
            (
                "memory_resident",
                "What components take in shared memory",
                report.resident_bytes,
            ),
            (
                "memory_pinned",
                "Of it, what may not be evicted",
                report.pinned_bytes,
            ),
            (
                "memory_charged",
                "Of it, what VMs have touched",
                report.charged_bytes,
            ),
            (
                "memory_unclaimed",
                "Of it, what no VM has touched",
                report.unclaimed_bytes,
            ),
            (
                "memory_snapshots",
                "Of it, memory images of snapshots",
                report.snapshot_resident_bytes,
            ),
            (
                "memory_prefetched_unused",
                "Of it, what was prefetched and no VM has touched yet",
                report.prefetched_unused_bytes,
            ),
            (
                "memory_unshared",
                "What VMs would take of components if each had its own copy",
                report.mapped_sum_bytes,
            ),
            (
                "memory_available",
                "The host's available memory",
                report.available_bytes,
            ),
        ];
        for (name, help, value) in gauges {
            self.gauge(name, help, Some(Unit::Bytes), value);
        }
        let levels = ["plenty", "low", "critical"].map(|level| {
            let is = f64::from(u8::from(report.pressure == level));
            (vec![("level", level.to_owned())], is)
        });
        self.gauges(
            "memory_pressure",
            "1 for how short of memory the host is",
            &levels,
        );
        self.left(&report.totals);
    }

    /// What came into shared memory and what left it.
    fn left(&mut self, totals: &Totals) {
        let counters = [
            (
                "prefetch_pushed",
                "Pushed into shared memory ahead of any touch",
                totals.pushed_bytes,
            ),
            (
                "prefetch_used",
                "Of it, what a VM touched later",
                totals.pushed_used_bytes,
            ),
            ("evicted", "Given back by evictions", totals.evicted_bytes),
            (
                "refetched",
                "Evicted, and soon after fetched again because a VM wanted it",
                totals.refetched_bytes,
            ),
        ];
        for (name, help, value) in counters {
            self.bytes_counter(name, help, value);
        }
        let left = [
            ("budget", totals.budget_evicted_bytes),
            ("pressure", totals.pressure_evicted_bytes),
            ("kernel", totals.reclaimed_bytes),
        ];
        let left = left.map(|(reason, bytes)| (vec![("reason", reason.to_owned())], bytes));
        let help = "Asked to leave shared memory by the budget or under pressure, or reclaimed by \
                    the kernel";
        self.counters("left", help, Some(Unit::Bytes), &left);
    }

    fn plan(&mut self, host: &Host) {
        let status = host.memory.status();
        let planned = [
            ("launch", status.counters.launch_prefetch_bytes),
            ("forecast", status.counters.forecast_prefetch_bytes),
        ];
        let planned = planned.map(|(of, bytes)| (vec![("for", of.to_owned())], bytes));
        self.counters(
            "prefetch_planned",
            "Asked to be prefetched",
            Some(Unit::Bytes),
            &planned,
        );
        self.bytes_counter(
            "prefetch_refused",
            "Not prefetched because nothing worth less was resident",
            status.counters.refused_bytes,
        );
        let queued = status.queued_bytes;
        self.gauge(
            "prefetch_queue",
            "Prefetches that wait or are under way",
            Some(Unit::Bytes),
            queued,
        );
        let paused = u64::from(status.paused);
        self.gauge(
            "prefetch_paused",
            "1 while prefetching waits for memory",
            None,
            paused,
        );
        let prepared = host.accounts.preparations.len() as u64;
        let help = "Likely launches whose devices and map image are set up";
        self.gauge("prepared_launches", help, None, prepared);
    }

    fn demand(&mut self, host: &Host) {
        let totals = host.accounts.totals();
        let known = totals.demand_causes.named();
        let sum: u64 = known.iter().map(|(_, count)| count).sum();
        let others = [("unattributed", totals.demand_fetches.saturating_sub(sum))];
        let by_cause = |causes: &[(&'static str, u64)]| -> Vec<(Vec<Label>, u64)> {
            let labelled = causes.iter();
            labelled
                .map(|(cause, value)| (vec![("cause", (*cause).to_owned())], *value))
                .collect()
        };
        let fetches = by_cause(&[&known[..], &others].concat());
        self.counters(
            "demand_fetches",
            "Faults that waited for bytes, by why",
            None,
            &fetches,
        );
        let bytes = by_cause(&totals.demand_cause_bytes.named());
        let help = "Bytes that VMs waited for, by why: `late` are those that were planned and not \
                    loaded in time";
        self.counters("demand", help, Some(Unit::Bytes), &bytes);
        self.seconds_counter("stall", "Time that faults waited for bytes", totals.stall_s);
        let waiting = host.vms.waiting().len() as u64;
        let help = "VMs that wait for bytes for longer than a fetch takes";
        self.gauge("vms_waiting", help, None, waiting);
    }

    fn forecasts(&mut self, host: &Host) {
        let mut told = host.forecasts.learner.self_controls();
        told.sort_by(|(a, one), (b, other)| (other.judged, a).cmp(&(one.judged, b)));
        let labels = |of: &crate::history::ProfileRef| -> Vec<Label> {
            vec![("profile", of.profile.clone()), ("owner", of.owner.clone())]
        };
        let (mut judged, mut brier, mut regret) = (Vec::new(), Vec::new(), Vec::new());
        let (mut error, mut sum) = (0.0, 0.0);
        for (at, (of, control)) in told.iter().enumerate() {
            for (told, happened, forecasts) in &control.reliability {
                error += (told - happened).abs() * *forecasts as f64;
                sum += *forecasts as f64;
            }
            if at < MOST_PROFILES {
                judged.push((labels(of), control.judged as f64));
                brier.push((labels(of), control.brier_score));
                regret.push((labels(of), control.regret_cold_starts));
            }
        }
        let error = if sum > 0.0 { error / sum } else { 0.0 };
        let help = "Mean distance between the probability told of a launch and how often it came, \
                    over all forecasts judged";
        self.gauges(
            "forecast_calibration_error_ratio",
            help,
            &[(Vec::new(), error)],
        );
        let help = "Forecasts of launches that were judged; old ones fade";
        self.gauges("forecast_judged", help, &judged);
        let help = "Mean squared error of forecasts of launches";
        self.gauges("forecast_brier_score", help, &brier);
        let help =
            "Cold starts that forecasting cost more than the simpler rule; negative if it saves";
        self.gauges("forecast_regret_cold_starts", help, &regret);
    }

    fn launches(&mut self, host: &Host) {
        let launches = &host.supervisor.histograms;
        let histograms = [
            (
                "launch",
                "Time from the request until the guest was ready",
                &launches.ready,
            ),
            (
                "launch_stage",
                "Time of each stage of a launch",
                &launches.stages,
            ),
            (
                "launch_stall",
                "Time that a guest waited for bytes until it was ready",
                &launches.stalls,
            ),
        ];
        for (name, help, family) in histograms {
            self.0
                .register_with_unit(name, help, Unit::Seconds, family.clone());
        }
        self.counter(
            "launch_failures",
            "Launches that failed",
            launches.failures(),
        );
        let help = "Snapshots that a launch should have resumed from and did not";
        self.counter("snapshot_failures", help, launches.snapshot_failures());
    }

    fn fetches(&mut self, host: &Host) {
        let scheduler = host.store.scheduler();
        let FetchCounters {
            demand_requests,
            prefetch_requests,
            demand_repository_bytes,
            prefetch_repository_bytes,
            retries,
            failures,
            demands_in_trouble,
            latency_ns,
            bandwidth_bytes_per_s,
            ..
        } = scheduler.counters();
        let by_priority = |demand: u64, prefetch: u64| {
            let of = [("demand", demand), ("prefetch", prefetch)];
            of.map(|(priority, value)| (vec![("priority", priority.to_owned())], value))
        };
        let requests = by_priority(demand_requests, prefetch_requests);
        self.counters(
            "repository_requests",
            "Ranged reads of the repository",
            None,
            &requests,
        );
        let bytes = by_priority(demand_repository_bytes, prefetch_repository_bytes);
        let help = "Read from the repository, as stored there";
        self.counters("repository_read", help, Some(Unit::Bytes), &bytes);
        self.counter(
            "repository_retries",
            "Reads that failed and were repeated",
            retries,
        );
        self.counter("repository_failures", "Chunks given up on", failures);
        let help = "Demands that have failed often and are still being tried";
        self.gauge(
            "repository_demands_in_trouble",
            help,
            None,
            demands_in_trouble,
        );
        if let Some(latency_ns) = latency_ns {
            let latency_s = latency_ns as f64 / 1e9;
            let help = "Estimated time of a short read of the repository";
            self.gauges(
                "repository_latency_seconds",
                help,
                &[(Vec::new(), latency_s)],
            );
        }
        if let Some(bandwidth) = bandwidth_bytes_per_s {
            let help = "Estimated bandwidth of the repository in bytes per second";
            self.gauge(
                "repository_bandwidth_bytes_per_second",
                help,
                None,
                bandwidth,
            );
        }
        self.disk_cache(host);
    }

    fn disk_cache(&mut self, host: &Host) {
        let disk = host.store.disk_cache().counters();
        let help = "What chunks occupy in the disk cache";
        self.gauge(
            "disk_cache_used",
            help,
            Some(Unit::Bytes),
            disk.cached_bytes,
        );
        let cap = host.config.cache.cap_bytes;
        self.gauge(
            "disk_cache_cap",
            "Most that they may",
            Some(Unit::Bytes),
            cap,
        );
        let reads = [("hit", disk.hits), ("miss", disk.misses)];
        let reads = reads.map(|(result, count)| (vec![("result", result.to_owned())], count));
        self.counters("disk_cache_reads", "Reads of the disk cache", None, &reads);
        let help = "Chunks dropped because their bytes were not those that were written";
        self.counter("disk_cache_corrupt_chunks", help, disk.corrupt);
        let help = "Chunks dropped to stay under the cap";
        self.counter("disk_cache_evicted_chunks", help, disk.evicted);
    }
}
