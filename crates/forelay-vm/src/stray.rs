//! VMMs that nobody knows: started in a VM's runtime directory, by a process that died
//! before it could write down which process that was.
//!
//! The mark is put into the VMM's environment before it is executed, so that a VMM
//! that runs can be found from its first instruction on, whatever its program is called.
//!
//! A VMM that was started before its VM was asked for has another directory's mark: it is
//! the one that the VM's state file names.
//!
//! What such a process has forked and what has not executed its program yet bears no mark: it
//! looks like the process itself, and is ended by that ([`end_unexecuted`]).
//!
//! Refuses to end anything else.

use std::path::Path;
use std::time::{Duration, Instant};

use procfs::FromRead as _;
use procfs::process::Stat;

use crate::process::{Process, ProcessId};
use crate::state::VmState;

/// The environment variable that names a VMM's runtime directory.
pub const RUNTIME_DIR_VARIABLE: &str = "FORELAY_VM_RUNTIME_DIR";

/// How long an execution may take from the moment at which a process looks like neither program.
const EXECUTION: Duration = Duration::from_secs(1);

/// Ends what a process with this one's command line has forked that died before that had executed
/// its program, and returns how many there were. After that each VMM which it started bears its
/// mark. A process of several threads is none of those.
pub fn end_unexecuted() -> std::io::Result<usize> {
    end_forks(&std::fs::read("/proc/self/cmdline")?)
}

fn end_forks(words: &[u8]) -> std::io::Result<usize> {
    let own = std::process::id();
    let is_fork = |pid: u32| {
        pid != own && command_line(pid).is_some_and(|one| one == words) && threads(pid) == Some(1)
    };
    let mut ended = 0;
    for pid in pids().filter(|pid| is_fork(*pid)) {
        let Ok(id) = ProcessId::of(pid) else { continue };
        let Some(process) = Process::hold(id)? else {
            continue;
        };
        // Held first and looked at again: the pid may be another's, or the program executed.
        if is_fork(pid) {
            process.kill()?;
            ended += 1;
        }
    }
    let deadline = Instant::now() + EXECUTION;
    while pids().any(executes) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(ended)
}

/// Whether a process is between two programs: it has one, and no command line.
fn executes(pid: u32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()
        && command_line(pid).is_some_and(|words| words.is_empty())
}

fn command_line(pid: u32) -> Option<Vec<u8>> {
    std::fs::read(format!("/proc/{pid}/cmdline")).ok()
}

fn threads(pid: u32) -> Option<i64> {
    let stat = Stat::from_file(format!("/proc/{pid}/stat"));
    stat.ok().map(|stat| stat.num_threads)
}

fn pids() -> impl Iterator<Item = u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|process| process.file_name().to_str()?.parse().ok())
}

/// Processes that are the VMM of `runtime_dir`, by their mark or its state file.
pub fn find(runtime_dir: &Path) -> Vec<ProcessId> {
    let pids = pids().filter(|pid| is_marked(*pid, runtime_dir));
    let mut found: Vec<ProcessId> = pids.filter_map(|pid| ProcessId::of(pid).ok()).collect();
    let recorded = recorded(runtime_dir).filter(|id| !found.contains(id));
    found.extend(recorded);
    found.retain(ProcessId::is_running);
    found
}

fn recorded(runtime_dir: &Path) -> Option<ProcessId> {
    VmState::read(runtime_dir).ok().map(|state| state.process)
}

/// Kills the VMMs of `runtime_dir`; returns those that there were, which take a moment to end.
pub fn end_all(runtime_dir: &Path) -> std::io::Result<Vec<Process>> {
    let mut ended = Vec::new();
    for id in find(runtime_dir) {
        // Held first and looked at again: the pid may be another's by now.
        let Some(process) = Process::hold(id)? else {
            continue;
        };
        if is_marked(id.pid, runtime_dir) || recorded(runtime_dir) == Some(id) {
            process.kill()?;
            ended.push(process);
        }
    }
    Ok(ended)
}

fn is_marked(pid: u32, runtime_dir: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let mut variables = environment.split(|&byte| byte == 0);
    variables.any(|variable| {
        let value = variable.strip_prefix(RUNTIME_DIR_VARIABLE.as_bytes());
        let value = value.and_then(|rest| rest.strip_prefix(b"="));
        value == Some(runtime_dir.as_os_str().as_bytes())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn sleeper(dir: &Path) -> Child {
        let mut command = Command::new("sleep");
        command.arg("600").env(RUNTIME_DIR_VARIABLE, dir);
        command.spawn().unwrap()
    }

    #[test]
    fn what_looks_like_a_process_that_died_is_ended_and_what_does_not_goes_on() {
        let spawn = |seconds: &str| Command::new("sleep").arg(seconds).spawn().unwrap();
        let (mut fork, mut other) = (spawn("4321.25"), spawn("4321.5"));
        while !(command_line(fork.id()).unwrap().starts_with(b"sleep")
            && command_line(other.id()).unwrap().starts_with(b"sleep"))
        {
            std::thread::yield_now();
        }
        let id = ProcessId::of(fork.id()).unwrap();
        assert_eq!(end_forks(b"sleep\x004321.25\0").unwrap(), 1);
        while id.is_running() {
            std::thread::yield_now();
        }
        let _ = fork.wait();
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
        // This process has several threads, and is itself.
        assert_eq!(end_unexecuted().unwrap(), 0);
    }

    #[test]
    fn a_vmm_is_found_by_its_mark_alone_whatever_its_program_is_called() {
        let dirs = tempfile::tempdir().unwrap();
        let (own, other) = (dirs.path().join("vm"), dirs.path().join("vm-2"));
        let (mut stray, mut neighbour) = (sleeper(&own), sleeper(&other));
        let marked = |child: &Child, dir: &Path| find(dir).iter().any(|id| id.pid == child.id());
        // The kernel shows an environment only at the end of the exec, which spawning does
        // not wait for.
        while !(marked(&stray, &own) && marked(&neighbour, &other)) {
            std::thread::yield_now();
        }
        let ended = end_all(&own).unwrap();
        let pids: Vec<u32> = ended.iter().map(|process| process.id().pid).collect();
        assert_eq!(pids, [stray.id()]);
        // Reaped here or by the thread that holds it; gone either way.
        let _ = stray.wait();
        assert_eq!(find(&own), []);
        assert!(neighbour.try_wait().unwrap().is_none(), "another VM's");
        neighbour.kill().unwrap();
        neighbour.wait().unwrap();
    }
}
