//! VMMs that nobody knows: started in a VM's runtime directory, by a process that died
//! before it could write down which process that was.
//!
//! The mark is put into the VMM's environment before it is executed, so that a VMM
//! that runs can be found from its first instruction on, whatever its program is called.
//!
//! A VMM that was started before its VM was asked for has another directory's mark: it is
//! the one that the VM's state file names.
//!
//! Refuses to end anything else.

use std::path::Path;

use crate::process::{Process, ProcessId};
use crate::state::VmState;

/// The environment variable that names a VMM's runtime directory.
pub const RUNTIME_DIR_VARIABLE: &str = "FORELAY_VM_RUNTIME_DIR";

/// Processes that are the VMM of `runtime_dir`, by their mark or its state file.
pub fn find(runtime_dir: &Path) -> Vec<ProcessId> {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = processes.flatten().filter_map(|process| {
        let pid: u32 = process.file_name().to_str()?.parse().ok()?;
        is_marked(pid, runtime_dir).then_some(pid)
    });
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
