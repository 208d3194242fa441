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

/// CPU seconds of a process and of its descendants that run the same program.
pub fn of_family(root: u64) -> f64 {
    let Some((root, own)) = process(root).and_then(|root| Some((root.pid(), root.exe().ok()?)))
    else {
        return 0.0;
    };
    let alive = all_processes().into_iter().flatten().flatten();
    let alive = alive.filter_map(|process| {
        let stat = process.stat().ok()?;
        let same_program = process.exe().is_ok_and(|program| program == own);
        Some((stat, same_program))
    });
    let alive: Vec<(Stat, bool)> = alive.collect();
    let mut family = vec![root];
    let mut at = 0;
    while let Some(&member) = family.get(at) {
        at += 1;
        let children = alive.iter().filter(|(stat, _)| stat.ppid == member);
        let same = children.filter(|(_, same_program)| *same_program);
        family.extend(same.map(|(stat, _)| stat.pid));
    }
    let of_family = alive.iter().filter(|(stat, _)| family.contains(&stat.pid));
    of_family.map(|(stat, _)| cpu_s(stat)).sum()
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
