//! `bench packages`: builds the packages that people put into images most, all in one run,
//! and says which fail and why; `bench packages --services` starts some of the services in
//! VMs and talks to them.
//!
//! Names after `packages` (and `--services`) restrict either to those.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::demo;
use crate::host::{self, Host, Programs, Settings};
use crate::process::target_dir;

/// The packages, one a line.
const PACKAGES: &str = include_str!("packages.txt");
/// So many of them may fail to build.
const MAY_FAIL: usize = 5;

/// The services, and what they are asked.
const SERVICES: &str = include_str!("services.toml");

/// A service that is started in a VM and asked something.
#[derive(serde::Deserialize)]
struct Service {
    package: String,
    /// Packages that it does not depend on, and does not start without.
    #[serde(default)]
    besides: Vec<String>,
    port: u16,
    /// Its command in the foreground, where the component names none.
    #[serde(default)]
    entrypoint: Vec<String>,
    /// What is said to it, as `printf` takes it; nothing if it speaks first.
    #[serde(default)]
    say: String,
    /// What its answer has in it.
    expect: String,
}

impl Service {
    /// What `component build` is told.
    fn words(&self) -> Vec<&str> {
        let besides = self.besides.iter().map(String::as_str);
        ["--deb", &self.package]
            .into_iter()
            .chain(besides)
            .collect()
    }
}

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path, arguments: &[&str]) -> Result<()> {
    let services = arguments.first() == Some(&"--services");
    let names = &arguments[usize::from(services)..];
    crate::prerequisites::install()?;
    let programs = host::build()?;
    let settings = Settings {
        ahead: false,
        ..Settings::local(
            target_dir().join("bench/packages/repository"),
            target_dir().join("build-state"),
        )
    };
    let base: (&[&str], &str) = (&["--base", "debian"], "debian");
    demo::build_lacking(&programs, &settings.repository, &[base])?;
    let wanted = |name: &str| names.is_empty() || names.contains(&name);
    let document = match services {
        true => start_all(&programs, settings, wanted)?,
        false => build_all(&Host::new(&programs, &settings)?, wanted)?,
    };
    super::write(out, &document)?;
    let failed = document["failed"].as_u64().unwrap_or(u64::MAX);
    let allowed = if services { 0 } else { MAY_FAIL as u64 };
    ensure!(failed <= allowed, "{failed} failed; at most {allowed} may");
    Ok(())
}

fn build_all(host: &Host, wanted: impl Fn(&str) -> bool) -> Result<Value> {
    let names = PACKAGES.lines().map(str::trim);
    let names = names.filter(|name| !name.is_empty() && !name.starts_with('#') && wanted(name));
    let mut rows = Vec::new();
    for name in names {
        let began = Instant::now();
        let built = build(host, name)?;
        let seconds = began.elapsed().as_secs_f64();
        let row = match built {
            Ok(component) => json!({
                "package": name,
                "built": true,
                "seconds": seconds,
                "bytes": component["image"]["bytes"],
                "packages": component["sbom"].as_array().map_or(0, Vec::len),
            }),
            Err(why) => json!({"package": name, "built": false, "seconds": seconds, "why": why}),
        };
        println!(
            "{name:<28} {:>6.1} s {:>8.1} MiB {}",
            seconds,
            row["bytes"].as_f64().unwrap_or(0.0) / 1_048_576.0,
            row["why"].as_str().map_or("built", |why| why),
        );
        rows.push(row);
    }
    Ok(summary(rows, "built"))
}

/// Builds one package: its metadata, or why it failed.
fn build(host: &Host, name: &str) -> Result<Result<Value, String>> {
    let output = host
        .forelay(["component", "build", "--json", "--deb", name])
        .output()?;
    if output.status.success() {
        return Ok(Ok(serde_json::from_slice(&output.stdout)?));
    }
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    let from = errors.find("error:").unwrap_or(0);
    Ok(Err(errors[from..].trim_end().to_owned()))
}

fn summary(rows: Vec<Value>, done: &str) -> Value {
    let good = |row: &&Value| row[done] == true;
    let sum = |key: &str| rows.iter().filter_map(|row| row[key].as_f64()).sum::<f64>();
    json!({
        done: rows.iter().filter(good).count(),
        "failed": rows.iter().filter(|row| row[done] != true).count(),
        "seconds": sum("seconds"),
        "bytes": sum("bytes"),
        "rows": rows,
    })
}

/// Starts the services one after the other.
fn start_all(
    programs: &Programs,
    settings: Settings,
    wanted: impl Fn(&str) -> bool,
) -> Result<Value> {
    let mut services: BTreeMap<String, Vec<Service>> = toml::from_str(SERVICES)?;
    let mut chosen = services.remove("service").unwrap_or_default();
    chosen.retain(|service| wanted(&service.package));
    let packages: Vec<Vec<&str>> = chosen.iter().map(Service::words).collect();
    let mut needed: Vec<(&[&str], &str)> = vec![(&["--kernel"], "linux-cloud")];
    needed.extend(packages.iter().map(|words| (&words[..], words[1])));
    demo::build_lacking(programs, &settings.repository, &needed)?;
    let state = target_dir().join("bench/packages-state");
    let mut host = Host::new(programs, &Settings { state, ..settings })?;
    host.start_daemon()?;
    let mut rows = Vec::new();
    for service in &chosen {
        let began = Instant::now();
        let answer = ask(&host, service);
        let seconds = began.elapsed().as_secs_f64();
        let good = answer
            .as_ref()
            .is_ok_and(|answer| answer.contains(&service.expect));
        let said = match &answer {
            Ok(answer) => answer.clone(),
            Err(error) => format!("{error:#}"),
        };
        let line = said.lines().next().unwrap_or_default().escape_debug();
        let verdict = if good { "answers" } else { "FAILED" };
        println!("{:<28} {seconds:>6.1} s {verdict}: {line}", service.package);
        rows.push(json!({
            "package": service.package,
            "answers": good,
            "seconds": seconds,
            "said": said,
        }));
        host.stop_all()?;
    }
    host.stop_daemon()?;
    Ok(summary(rows, "answers"))
}

/// Starts a service in a VM of its own and asks it, from within.
fn ask(host: &Host, service: &Service) -> Result<String> {
    let manifest = host.scratch().join(format!("{}.toml", service.package));
    let entrypoint = match &service.entrypoint[..] {
        [] => String::new(),
        words => format!("entrypoint = {words:?}\n"),
    };
    let text = format!(
        "base = \"debian\"\ncomponents = [{:?}]\n{entrypoint}ready = {{ tcp = {} }}\n\n\
         [vm]\nmemory_mib = 512\n",
        service.package, service.port
    );
    std::fs::write(&manifest, text)?;
    let name = &service.package;
    host.launch(&manifest, name, &["--timeout", "240"])?;
    let script = "exec 3<>/dev/tcp/127.0.0.1/$1; printf \"$2\" >&3; \
                  timeout 120 dd bs=4096 count=1 <&3 2>/dev/null | od -An -v -tx1";
    let port = service.port.to_string();
    let mut asked = host.forelay(["exec", name, "--", "bash", "-c", script, "bash", &port]);
    let output = asked.arg(&service.say).stderr(Stdio::inherit()).output()?;
    let hex = String::from_utf8(output.stdout).context("od prints text")?;
    let bytes: Vec<u8> = hex
        .split_whitespace()
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
