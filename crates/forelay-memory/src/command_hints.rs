//! How a VMM is started so that it outlives the daemon and faults in small pieces.
//!
//! QEMU asks for huge pages on every memory region. On a file in our mount that turns
//! each cold fault into megabytes of reads, so a seccomp filter makes
//! `madvise(.., MADV_HUGEPAGE)` succeed without effect, except for regions as long as
//! the guest's RAM, which keeps its huge pages. (A component image of exactly that
//! length would fault in large pieces: slower, never wrong.) Besides: an own session, and
//! no inherited descriptors: a VMM that held `/dev/fuse` could hang the mount.
//!
//! Knows nothing about VMMs' command lines. A hint that the kernel refuses is no error.

use std::os::fd::RawFd;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// Niceness of what gives way to others.
const BACKGROUND_NICENESS: libc::c_int = 10;

/// What a VMM is given on its way.
#[derive(Clone, Debug, Default)]
pub struct Hints {
    /// Length of the guest's RAM region: huge pages asked for on exactly that many bytes
    /// are granted.
    pub guest_ram_bytes: Option<u64>,
    /// The guest's memory is a private copy of a file. What the guest gives back is then
    /// dropped from the copy alone: the VMM also punches holes in the file, which would
    /// either fail and be logged each time, or destroy it for all others.
    pub copies_memory: bool,
    /// It gives way to others on a busy host.
    pub background: bool,
    /// Descriptors (above 2) that the VMM is to inherit; all others are closed.
    pub keep_fds: Vec<RawFd>,
}

impl Hints {
    /// Arranges for the child of `command` to run in an own session, without inherited
    /// descriptors, and with its huge-page wishes filtered.
    pub fn apply(&self, command: &mut Command) {
        let mut keep_fds = self.keep_fds.clone();
        keep_fds.sort_unstable();
        keep_fds.dedup();
        let filter = huge_page_filter(self.guest_ram_bytes);
        let holes = self.copies_memory.then(hole_filter);
        let niceness = if self.background {
            BACKGROUND_NICENESS
        } else {
            0
        };
        // SAFETY: the closure runs between fork and exec and makes only system calls on
        // memory allocated before the fork: no allocation, no locks.
        unsafe {
            command.pre_exec(move || {
                // Fails only for a group leader, which a fresh child is not.
                libc::setsid();
                close_on_exec_except(&keep_fds);
                if niceness > 0 {
                    // A wish: refused, it runs as all others do.
                    libc::setpriority(libc::PRIO_PROCESS, 0, niceness);
                }
                install(&filter);
                if let Some(holes) = &holes {
                    install(holes);
                }
                Ok(())
            });
        }
    }
}

/// Marks all descriptors above 2 but `keep` (sorted) to be closed by exec. Not closed
/// here: the standard library's own pipe must last until then.
fn close_on_exec_except(keep: &[RawFd]) {
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;
    let mut first: libc::c_uint = 3;
    let close = |first: libc::c_uint, last: libc::c_uint| {
        if first <= last {
            // SAFETY: changes flags of descriptors only; before Linux 5.11 it fails, and
            // descriptors stay as the standard library made them: closed by exec.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, CLOSE_RANGE_CLOEXEC) };
        }
    };
    for &fd in keep.iter().filter(|&&fd| fd >= 3) {
        let fd_number = fd as libc::c_uint;
        close(first, fd_number - 1);
        // SAFETY: clears the close-on-exec flag of a descriptor named by the caller.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
        first = fd_number + 1;
    }
    close(first, libc::c_uint::MAX);
}

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const ALLOW: u32 = 0x7fff_0000;
const SUCCEED: u32 = 0x0005_0000; // SECCOMP_RET_ERRNO with errno 0

fn load(offset: u32) -> libc::sock_filter {
    instruction(LOAD, 0, 0, offset)
}

/// A check that jumps `to_allow` instructions ahead if it fails.
fn require(value: u32, to_allow: u8) -> libc::sock_filter {
    instruction(JUMP_EQUAL, 0, to_allow, value)
}

/// Punching a hole succeeds and does nothing. Disks of such a VM take no discards, so that
/// it is never a disk's.
fn hole_filter() -> Vec<libc::sock_filter> {
    let hole = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    vec![
        load(4),
        require(AUDIT_ARCH, 5),
        load(0),
        require(libc::SYS_fallocate as u32, 3),
        load(24), // mode
        require(hole, 1),
        instruction(RETURN, 0, 0, SUCCEED),
        instruction(RETURN, 0, 0, ALLOW),
    ]
}

/// Classic BPF over `struct seccomp_data` (seccomp(2)): number at 0, architecture at 4,
/// arguments from 16, 8 bytes each, low half first (little endian).
fn huge_page_filter(guest_ram_bytes: Option<u64>) -> Vec<libc::sock_filter> {
    let ram = guest_ram_bytes.unwrap_or(0);
    vec![
        load(4),
        require(AUDIT_ARCH, 9),
        load(0),
        require(libc::SYS_madvise as u32, 7),
        load(32), // advice
        require(libc::MADV_HUGEPAGE as u32, 5),
        load(24), // length, low half
        require(ram as u32, 2),
        load(28), // length, high half
        instruction(JUMP_EQUAL, 1, 0, (ram >> 32) as u32),
        instruction(RETURN, 0, 0, SUCCEED),
        instruction(RETURN, 0, 0, ALLOW),
    ]
}

fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

fn install(filter: &[libc::sock_filter]) {
    let program = libc::sock_fprog {
        len: filter.len() as libc::c_ushort,
        filter: filter.as_ptr().cast_mut(),
    };
    let set = || {
        // SAFETY: `program` points to `filter`, which outlives the call; the kernel copies
        // and checks the program before it uses it.
        unsafe {
            libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                std::ptr::from_ref(&program),
            )
        }
    };
    if set() != 0 {
        // Without CAP_SYS_ADMIN a filter needs the promise to gain no rights by exec.
        // SAFETY: sets a flag of this process, no memory involved.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        set();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the filter as the kernel would.
    fn verdict(filter: &[libc::sock_filter], data: &[u8; 64]) -> u32 {
        let (mut at, mut accumulator) = (0usize, 0u32);
        loop {
            let step = filter[at];
            at += 1;
            match step.code {
                0x20 => {
                    let start = step.k as usize;
                    accumulator = u32::from_ne_bytes(data[start..start + 4].try_into().unwrap());
                }
                0x15 if accumulator == step.k => at += usize::from(step.jt),
                0x15 => at += usize::from(step.jf),
                0x06 => return step.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn call(nr: i64, len: u64, advice: i32) -> [u8; 64] {
        let mut data = [0; 64];
        data[..4].copy_from_slice(&(nr as u32).to_ne_bytes());
        data[4..8].copy_from_slice(&AUDIT_ARCH.to_ne_bytes());
        data[24..32].copy_from_slice(&len.to_ne_bytes());
        data[32..36].copy_from_slice(&advice.to_ne_bytes());
        data
    }

    #[test]
    fn only_holes_are_swallowed_where_memory_is_a_copy() {
        let filter = hole_filter();
        let call = |mode: i32| {
            let mut data = call(libc::SYS_fallocate, 0, 0);
            data[24..28].copy_from_slice(&mode.to_ne_bytes());
            data
        };
        let (hole, keep) = (libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_KEEP_SIZE);
        assert_eq!(verdict(&filter, &call(hole | keep)), SUCCEED);
        for mode in [0, keep, libc::FALLOC_FL_ZERO_RANGE | keep] {
            assert_eq!(verdict(&filter, &call(mode)), ALLOW, "{mode}");
        }
        let mut other = call(hole | keep);
        other[..4].copy_from_slice(&(libc::SYS_read as u32).to_ne_bytes());
        assert_eq!(verdict(&filter, &other), ALLOW);
    }

    #[test]
    fn only_huge_page_wishes_are_swallowed_and_guest_ram_keeps_them() {
        let ram = (5u64 << 32) | 0x2000_0000;
        let filter = huge_page_filter(Some(ram));
        let huge = libc::MADV_HUGEPAGE;
        assert_eq!(
            verdict(&filter, &call(libc::SYS_madvise, 4096, huge)),
            0x0005_0000
        );
        assert_eq!(verdict(&filter, &call(libc::SYS_madvise, ram, huge)), ALLOW);
        assert_eq!(
            verdict(&filter, &call(libc::SYS_madvise, ram & 0xffff_ffff, huge)),
            0x0005_0000
        );
        assert_eq!(
            verdict(&filter, &call(libc::SYS_madvise, 4096, libc::MADV_DONTNEED)),
            ALLOW
        );
        assert_eq!(verdict(&filter, &call(libc::SYS_read, 4096, huge)), ALLOW);
        let mut foreign = call(libc::SYS_madvise, 4096, huge);
        foreign[4] ^= 1;
        assert_eq!(verdict(&filter, &foreign), ALLOW);
    }

    #[test]
    fn a_detached_child_has_its_own_session_and_no_descriptors_of_ours() {
        use std::os::fd::AsRawFd as _;
        let leak = std::fs::File::open("/dev/null").unwrap();
        let kept = std::fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "ls /proc/$$/fd; cut -d' ' -f6 /proc/$$/stat; echo $$"]);
        let hints = Hints {
            keep_fds: vec![kept.as_raw_fd()],
            ..Hints::default()
        };
        hints.apply(&mut command);
        let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let words: Vec<&str> = output.split_whitespace().collect();
        let (fds, ids) = words.split_at(words.len() - 2);
        assert!(
            fds.contains(&kept.as_raw_fd().to_string().as_str()),
            "{fds:?}"
        );
        assert!(
            !fds.contains(&leak.as_raw_fd().to_string().as_str()),
            "{fds:?}"
        );
        assert_eq!(ids[0], ids[1], "session id is its own pid");
    }
}
