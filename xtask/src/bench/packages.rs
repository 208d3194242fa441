//! `bench packages`: builds the packages that people put into images most, all in one run,
//! and says which fail and why; `bench packages --services` starts some of the services in
//! VMs and talks to them.
//!
//! Names after `packages` (and `--services`) restrict either to those.

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

/// A service that is started in a VM and asked something.
struct Service {
    package: &'static str,
    /// Packages that it does not depend on, and does not start without.
    besides: &'static [&'static str],
    /// Its command in the foreground, where the component names none.
    entrypoint: &'static [&'static str],
    /// Further lines of the manifest.
    manifest: &'static str,
    port: u16,
    /// What is said to it, as `printf` takes it; nothing if it speaks first.
    say: &'static str,
    /// What its answer has in it.
    expect: &'static str,
}

const fn service(
    package: &'static str,
    port: u16,
    say: &'static str,
    expect: &'static str,
) -> Service {
    Service {
        package,
        besides: &[],
        entrypoint: &[],
        manifest: "",
        port,
        say,
        expect,
    }
}

/// `version.bind` in class CH, as a question over TCP.
const DNS_VERSION: &str = concat!(
    "\\000\\036\\001\\002\\000\\000\\000\\001\\000\\000\\000\\000\\000\\000",
    "\\007version\\004bind\\000\\000\\020\\000\\003"
);
/// A client that introduces itself to a broker.
const MQTT_CONNECT: &str = "\\020\\016\\000\\004MQTT\\004\\002\\000\\074\\000\\002me";

const SERVICES: [Service; 22] = [
    service(
        "nginx",
        80,
        "GET / HTTP/1.0\\r\\n\\r\\n",
        "Welcome to nginx",
    ),
    service(
        "apache2",
        80,
        "GET / HTTP/1.0\\r\\n\\r\\n",
        "Server: Apache",
    ),
    service(
        "lighttpd",
        80,
        "GET / HTTP/1.0\\r\\n\\r\\n",
        "Server: lighttpd",
    ),
    service("caddy", 80, "GET / HTTP/1.0\\r\\n\\r\\n", "Server: Caddy"),
    Service {
        entrypoint: &[
            "/usr/sbin/privoxy",
            "--no-daemon",
            "--user",
            "privoxy",
            "/etc/privoxy/config",
        ],
        ..service(
            "privoxy",
            8118,
            "GET http://p.p/ HTTP/1.0\\r\\n\\r\\n",
            "Privoxy",
        )
    },
    service("redis-server", 6379, "PING\\r\\n", "+PONG"),
    service("memcached", 11211, "version\\r\\n", "VERSION 1."),
    // Asked for encryption: there is none, since the build's key is left out.
    service(
        "postgresql",
        5432,
        "\\000\\000\\000\\010\\004\\322\\026\\057",
        "N",
    ),
    service("mariadb-server", 3306, "", "MariaDB"),
    service("mosquitto", 1883, MQTT_CONNECT, "\u{20}\u{2}\0\0"),
    service("nats-server", 4222, "", "INFO {"),
    service(
        "etcd-server",
        2379,
        "GET /version HTTP/1.0\\r\\n\\r\\n",
        "etcdserver",
    ),
    service(
        "influxdb",
        8086,
        "GET /ping HTTP/1.0\\r\\n\\r\\n",
        "204 No Content",
    ),
    service("openssh-server", 22, "", "SSH-2.0-OpenSSH"),
    service("vsftpd", 21, "", "220 "),
    Service {
        entrypoint: &["/usr/sbin/postfix", "start-fg"],
        ..service("postfix", 25, "", "ESMTP Postfix")
    },
    Service {
        entrypoint: &["/usr/sbin/exim4", "-bdf", "-q30m"],
        ..service("exim4-daemon-light", 25, "", "ESMTP Exim")
    },
    service("dovecot-imapd", 143, "", "* OK"),
    service("bind9", 53, DNS_VERSION, "9."),
    Service {
        // Its configuration names the root's key.
        besides: &["dns-root-data"],
        ..service("unbound", 53, DNS_VERSION, "unbound")
    },
    service(
        "prometheus-node-exporter",
        9100,
        "GET /metrics HTTP/1.0\\r\\n\\r\\n",
        "200 OK",
    ),
    service("munin-node", 4949, "", "# munin node"),
];

/// Runs the benchmark and writes its figures to `out`.
pub fn run_bench(out: &Path, arguments: &[&str]) -> Result<()> {
    let services = arguments.first() == Some(&"--services");
    let names = &arguments[usize::from(services)..];
    crate::prerequisites::install()?;
    let programs = host::build()?;
    let settings = Settings {
        repository: target_dir().join("bench/packages/repository"),
        state: target_dir().join("build-state"),
        latency_ms: 0,
        bandwidth_bytes_per_s: 0,
        budget_bytes: 0,
        prefetch: true,
        ahead: false,
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
    let chosen = SERVICES.iter().filter(|service| wanted(service.package));
    let chosen: Vec<&Service> = chosen.collect();
    let words = |one: &&Service| [&["--deb", one.package], one.besides].concat();
    let packages: Vec<Vec<&str>> = chosen.iter().map(words).collect();
    let mut needed: Vec<(&[&str], &str)> = vec![(&["--kernel"], "linux-cloud")];
    needed.extend(packages.iter().map(|words| (&words[..], words[1])));
    demo::build_lacking(programs, &settings.repository, &needed)?;
    let state = target_dir().join("bench/packages-state");
    let mut host = Host::new(programs, &Settings { state, ..settings })?;
    host.start_daemon()?;
    let mut rows = Vec::new();
    for service in chosen {
        let began = Instant::now();
        let answer = ask(&host, service);
        let seconds = began.elapsed().as_secs_f64();
        let good = answer
            .as_ref()
            .is_ok_and(|answer| answer.contains(service.expect));
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
    let entrypoint = match service.entrypoint {
        [] => String::new(),
        words => format!("entrypoint = {words:?}\n"),
    };
    let text = format!(
        "base = \"debian\"\ncomponents = [{:?}]\n{entrypoint}ready = {{ tcp = {} }}\n{}\n\
         [vm]\nmemory_mib = 512\n",
        service.package, service.port, service.manifest
    );
    std::fs::write(&manifest, text)?;
    let name = service.package;
    host.launch(&manifest, name, &["--timeout", "240"])?;
    let script = "exec 3<>/dev/tcp/127.0.0.1/$1; printf \"$2\" >&3; \
                  timeout 120 dd bs=4096 count=1 <&3 2>/dev/null | od -An -v -tx1";
    let port = service.port.to_string();
    let mut asked = host.forelay(["exec", name, "--", "bash", "-c", script, "bash", &port]);
    let output = asked.arg(service.say).stderr(Stdio::inherit()).output()?;
    let hex = String::from_utf8(output.stdout).context("od prints text")?;
    let bytes: Vec<u8> = hex
        .split_whitespace()
        .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
