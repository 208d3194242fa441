//! `bench repository`: a cold launch over each kind of repository, each behind 20 ms and
//! 100 MB/s: requests, bytes moved beside bytes touched, time beside the directory's.
//!
//! Every launch starts with an empty disk cache, empty shared memory and no history. The
//! directory is behind the daemon's own throttle, servers behind a line that carries all that
//! their protocols say, so that theirs are the honest figures.

use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::draw::Draw;
use super::far_line::FarLine;
use super::statistics::{Paired, VmSamples};
use crate::backend::{self, Backend};
use crate::demo;
use crate::host::{Host, Programs, Settings};
use crate::servers::Server;

const PROFILE: &str = "web";
const ROUNDS: usize = 5;

/// A server, filled, at the far end of a line.
struct Far {
    line: FarLine,
    url: String,
    _server: Server,
}

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path) -> Result<()> {
    let (programs, settings) = super::prepare("repository")?;
    let mut far = Vec::new();
    for backend in Backend::ALL {
        far.push(match backend.start()? {
            None => None,
            Some(server) => {
                backend::fill(&programs, &settings.repository, &backend.url(&server))?;
                let line = FarLine::to(server.address)?;
                let url = backend.url_at(&server, line.address);
                Some(Far {
                    line,
                    url,
                    _server: server,
                })
            }
        });
    }
    let mut samples: [VmSamples; Backend::ALL.len()] = Default::default();
    let mut draw = Draw(1);
    for round in 1..=ROUNDS {
        let mut order: Vec<usize> = (0..Backend::ALL.len()).collect();
        draw.shuffle(&mut order);
        for way in order {
            let figures = launch(&programs, &settings, far[way].as_ref())?;
            println!(
                "round {round}: {:<10} ready {:.2} s, {} requests, {} bytes moved, {} touched",
                Backend::ALL[way].name(),
                figures["ready_s"].as_f64().unwrap_or(f64::NAN),
                figures["requests"],
                figures["moved_bytes"],
                figures["touched_bytes"],
            );
            samples[way].0.push(figures);
        }
    }
    let ready = |samples: &VmSamples| samples.all("/ready_s", f64::NAN);
    let ways = Backend::ALL.iter().zip(&samples).map(|(backend, own)| {
        let to_directory = Paired::new(&ready(own), &ready(&samples[0]));
        let median = |field| own.median(field);
        let figures = json!({
            "ready_median_s": median("/ready_s"),
            "ready_ratio_to_directory": to_directory.median(),
            "ready_ratio_to_directory_interval": to_directory.interval(),
            "requests_median": median("/requests"),
            "moved_bytes_median": median("/moved_bytes"),
            "touched_bytes_median": median("/touched_bytes"),
            "moved_to_touched": median("/moved_bytes") / median("/touched_bytes"),
        });
        (backend.name().to_owned(), figures)
    });
    let document = json!({
        "rounds": ROUNDS,
        "ways": ways.collect::<serde_json::Map<_, _>>(),
    });
    super::write(out, &document)
}

/// A launch of a host that has nothing yet.
fn launch(programs: &Programs, settings: &Settings, far: Option<&Far>) -> Result<Value> {
    super::remove_all(&settings.state)?;
    let mut settings = settings.clone();
    if let Some(far) = far {
        settings.url = Some(far.url.clone());
        (settings.latency_ms, settings.bandwidth_bytes_per_s) = (0, 0);
    }
    let mut host = Host::new(programs, &settings)?;
    host.start_daemon()?;
    host.wait_for_kernel()?;
    let before = host.json(["memory"])?;
    if let Some(far) = far {
        far.line.taken();
    }
    let vm = host.launch(&demo::manifest(PROFILE), PROFILE, &[])?;
    let mut figures = vm["launch"].clone();
    ensure!(figures["ready_s"].is_f64(), "a ready VM has a time");
    let after = host.json(["memory"])?;
    let requests = |report: &Value| {
        report["totals"]["repository_requests"]
            .as_u64()
            .unwrap_or(0)
    };
    let (requests, bytes) = match far {
        Some(far) => far.line.taken(),
        None => (
            requests(&after) - requests(&before),
            figures["repository_bytes"].as_u64().unwrap_or(0),
        ),
    };
    figures["requests"] = json!(requests);
    figures["moved_bytes"] = json!(bytes);
    host.stop_all()?;
    host.stop_daemon()?;
    Ok(figures)
}
