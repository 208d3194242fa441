//! CPU time of processes, as the kernel counts it.

use procfs::process::{Process, Stat, all_processes};

/// CPU seconds (user and system, all threads) of a process.
fn cpu_s(stat: &Stat) -> f64 {
    (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64
}

fn process(pid: u64) -> Option<Process> {
    Process::new(i32::try_from(pid).ok()?).ok()
}

/// CPU seconds that a process has used.
pub fn of_process(pid: u64) -> Option<f64> {
    Some(cpu_s(&process(pid)?.stat().ok()?))
}

/// CPU seconds that children of this process have used which have ended.
pub fn of_ended_children() -> f64 {
    let stat = process(u64::from(std::process::id())).and_then(|own| own.stat().ok());
    stat.map_or(0.0, |stat| {
        (stat.cutime + stat.cstime) as f64 / procfs::ticks_per_second() as f64
    })
}

/// CPU seconds of a process's [`family`].
pub fn of_family(root: u64) -> f64 {
    family(root).into_iter().filter_map(of_process).sum()
}

/// A process and its descendants that run the same program.
pub fn family(root: u64) -> Vec<u64> {
    let Some((root, own)) = process(root).and_then(|root| Some((root.pid(), root.exe().ok()?)))
    else {
        return Vec::new();
    };
    let alive = all_processes().into_iter().flatten().flatten();
    let same = alive.filter(|process| process.exe().is_ok_and(|program| program == own));
    let parents = same.filter_map(|process| Some((process.pid(), process.stat().ok()?.ppid)));
    let parents: Vec<(i32, i32)> = parents.collect();
    let mut family = vec![root];
    let mut at = 0;
    while let Some(&member) = family.get(at) {
        at += 1;
        let children = parents.iter().filter(|(_, parent)| *parent == member);
        family.extend(children.map(|(pid, _)| *pid));
    }
    family
        .into_iter()
        .filter_map(|pid| u64::try_from(pid).ok())
        .collect()
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
