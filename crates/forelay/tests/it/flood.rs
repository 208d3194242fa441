//! A guest that prints without an end fills nothing of the host, and is not held up.

use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;

use super::fixture::{Host, Settings, bench, idle, signal};

/// What is kept, and what one that writes meanwhile may have written more.
const LOG_BYTES: u64 = 64 << 10;
const ROOM_BYTES: u64 = 512 << 10;

#[test]
fn privileged_a_console_that_is_flooded_keeps_its_newest_lines_and_takes_no_more_room() {
    let test = "privileged_a_console_that_is_flooded_keeps_its_newest_lines_and_takes_no_more_room";
    let Some(bench) = bench(test) else { return };
    let mut host = Host::new(&bench, &Settings::default());
    let config = std::fs::File::options()
        .append(true)
        .open(host.dir().join("forelay.toml"));
    writeln!(config.unwrap(), "log_bytes = {LOG_BYTES}").unwrap();
    host.start();
    let manifest = host.write("flood.toml", &idle("flood", "[]", ""));
    host.launch(&manifest, "flood", &[]);
    let script = "i=0; while :; do i=$((i+1)); echo \"line $i of a flood\"; done >/dev/console";
    let flood = format!("setsid sh -c '{script}' </dev/null >/dev/null 2>&1 & echo $!");
    let flood = host.sh("flood", &flood);
    let log = host.dir().join("run/vms/flood/console.log");
    let size = || {
        let found = std::fs::metadata(&log).unwrap();
        (found.len(), found.blocks() * 512)
    };
    let bounded_after = |host: &Host, bytes: u64| {
        host.until("the log is long, and takes little room", |_| {
            let (long, taken) = size();
            long > bytes && taken <= ROOM_BYTES
        });
        size().0
    };
    let long = bounded_after(&host, 3 * ROOM_BYTES / 2);
    // The guest goes on while nobody looks, and the next worker looks again.
    let worker = host.worker().unwrap();
    signal("KILL", worker);
    host.until("another worker serves", |host| {
        host.worker().is_some_and(|now| now != worker) && host.run(["ps"]).code == Some(0)
    });
    bounded_after(&host, long + ROOM_BYTES);
    assert_eq!(host.sh("flood", "echo alive").trim(), "alive");
    host.sh("flood", &format!("kill -9 -{}", flood.trim()));

    let ran = host.run(["logs", "flood"]);
    assert!(
        ran.stderr.contains("older lines are gone"),
        "{}",
        ran.stderr
    );
    let numbers: Vec<u64> = ran
        .stdout
        .lines()
        .filter_map(|line| {
            let rest = line.trim_end().strip_prefix("line ")?;
            rest.strip_suffix(" of a flood")?.parse().ok()
        })
        .collect();
    assert!(!ran.stdout.contains('\0') && ran.stdout.starts_with("line "));
    assert!(
        ran.stdout.len() as u64 >= LOG_BYTES / 2,
        "{}",
        ran.stdout.len()
    );
    assert!(numbers.len() > 1000 && numbers[0] > 1, "{}", numbers.len());
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
    host.ok(["stop", "flood"]);
}
