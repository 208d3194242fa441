//! CPU time of processes, from the kernel's own `/proc/PID/stat`.

use std::path::Path;

/// Clock ticks a second, as the kernel tells them to programs on every architecture in use.
const TICKS_PER_S: f64 = 100.0;

/// Parent and CPU seconds (user and system, all threads) of a process.
fn stat(pid: u64) -> Option<(u64, f64)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in brackets, may hold anything.
    let rest = text.get(text.rfind(')')? + 2..)?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    // Numbers in proc(5): state 3, ppid 4, utime 14, stime 15.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some((field(4)?, (field(14)? + field(15)?) as f64 / TICKS_PER_S))
}

/// CPU seconds that a process has used.
pub fn of_process(pid: u64) -> Option<f64> {
    stat(pid).map(|(_, cpu_s)| cpu_s)
}

/// CPU seconds of a process and of its descendants that run the same program.
pub fn of_family(root: u64) -> f64 {
    let program = |pid: u64| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    let Some(own) = program(root) else {
        return 0.0;
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
    let alive: Vec<(u64, u64, f64)> = pids
        .filter_map(|pid| stat(pid).map(|(parent, cpu_s)| (pid, parent, cpu_s)))
        .collect();
    let mut family = vec![root];
    let mut at = 0;
    while let Some(&member) = family.get(at) {
        at += 1;
        let children = alive.iter().filter(|(_, parent, _)| *parent == member);
        let same = children.filter(|(pid, ..)| program(*pid).as_deref() == Some(Path::new(&own)));
        family.extend(same.map(|(pid, ..)| *pid));
    }
    let of_family = alive.iter().filter(|(pid, ..)| family.contains(pid));
    of_family.map(|(.., cpu_s)| cpu_s).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_what_its_family_has_and_a_process_that_is_not_there_nothing() {
        let own = u64::from(std::process::id());
        let one = of_process(own).expect("this process runs");
        assert!(of_family(own) >= one);
        assert_eq!(of_process(u64::from(u32::MAX)), None);
        assert_eq!(of_family(u64::from(u32::MAX)), 0.0);
    }
}
