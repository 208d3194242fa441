//! What this host's kernel offers of what shared memory would like: for `doctor`.
//!
//! Everything here is tried, not concluded from a version number. Only what is
//! `required` must be there; each other gap costs what its `without` says.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use crate::{mapping, observe};

/// One thing a host has or lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// What it is.
    pub name: &'static str,
    /// Whether it works here.
    pub present: bool,
    /// Whether Forelay cannot run without.
    pub required: bool,
    /// What happens without.
    pub without: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

/// Tries everything. Quick, and changes nothing.
pub fn probe() -> Vec<Capability> {
    let capability = |name, present, without, remedy| Capability {
        name,
        present,
        required: false,
        without,
        remedy,
    };
    vec![
        Capability {
            required: true,
            ..capability(
                "FUSE",
                File::options()
                    .read(true)
                    .write(true)
                    .open("/dev/fuse")
                    .is_ok(),
                "no VM can be served",
                "modprobe fuse, and run as root",
            )
        },
        capability(
            "session takeover",
            kernel_at_least(6, 9),
            "requests in flight when a daemon dies are never answered",
            "use Linux 6.9 or newer (FUSE_NOTIFY_RESEND)",
        ),
        capability(
            "canary threads",
            canary_works(),
            "a daemon that hangs in its death delays the next one",
            "use Linux 6.9 or newer (PIDFD_THREAD)",
        ),
        capability(
            "page table scans",
            observe::scan_works(),
            "observation reads whole pagemaps: slower",
            "use Linux 6.7 or newer (PAGEMAP_SCAN)",
        ),
        capability(
            "page cache statistics",
            mapping::cachestat_works(),
            "residency looks at every page: slower for big, empty files",
            "use Linux 6.5 or newer (cachestat)",
        ),
        capability(
            "pressure-stall information",
            std::path::Path::new("/proc/pressure/memory").exists(),
            "pressure is seen by polling MemAvailable and cgroup limits only",
            "boot with psi=1",
        ),
    ]
}

fn kernel_at_least(major: u32, minor: u32) -> bool {
    let Ok(release) = std::fs::read_to_string("/proc/sys/kernel/osrelease") else {
        return false;
    };
    let mut numbers = release
        .split(|character: char| !character.is_ascii_digit())
        .map_while(|digits| digits.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

fn canary_works() -> bool {
    let thread = rustix::thread::gettid();
    let flags = rustix::process::PidfdFlags::from_bits_retain(libc::O_EXCL as u32);
    rustix::process::pidfd_open(thread, flags).is_ok_and(|fd| fd.as_raw_fd() >= 0)
}

/// Whether an error says that the kernel does not know the call at all.
pub(crate) fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::ENOTTY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_answers_for_each_and_agrees_with_the_kernel() {
        let found = probe();
        assert_eq!(
            found
                .iter()
                .filter(|capability| capability.required)
                .count(),
            1
        );
        assert!(kernel_at_least(3, 0) && !kernel_at_least(999, 0));
        let by_name = |name| {
            found
                .iter()
                .find(|capability| capability.name == name)
                .unwrap()
        };
        if kernel_at_least(6, 9) {
            assert!(by_name("canary threads").present);
            assert!(by_name("page table scans").present);
            assert!(by_name("page cache statistics").present);
        }
    }
}
