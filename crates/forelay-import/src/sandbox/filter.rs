//! System calls that what a build runs has no business with, refused by the kernel.
//!
//! A list of what is refused, not of what is allowed: packages bring programs of every kind.
//! Most of it needs capabilities that a build does not have; this keeps the kernel's code
//! behind it out of reach, too. Numbers are those of x86-64, the one architecture that
//! components are built for; programs of another (32 bit, x32) are not run.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter, sock_filter,
};

/// Refused as not permitted.
const FORBIDDEN: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_modify_ldt,
    libc::SYS_nfsservctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setdomainname,
    libc::SYS_sethostname,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];
/// Refused as unknown, so that programs take the older way.
const UNKNOWN: &[i64] = &[
    libc::SYS_clone3,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_fspick,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    OPEN_TREE_ATTR,
];
/// Since Linux 6.15.
const OPEN_TREE_ATTR: i64 = 467;
/// The one way of mounting that is left: our own way of mounting `/proc`, before anything else
/// runs. A build lacks the capability for it.
pub(super) const MOUNT_FLAGS: u64 = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
/// New namespaces, in the flags of `clone`.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;
/// Kinds of sockets that stay within the build's network and file tree.
const FAMILIES: [i32; 4] = [
    libc::AF_UNIX,
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_NETLINK,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Puts the filters on this thread, and so on all that it starts from now on.
pub(super) fn install() -> Result<(), String> {
    let programs = programs().map_err(|error| error.to_string())?;
    for program in &programs {
        apply_filter(program).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn programs() -> Result<Vec<BpfProgram>, seccompiler::BackendError> {
    let all = |calls: &[i64]| -> Rules { calls.iter().map(|call| (*call, Vec::new())).collect() };
    let mut forbidden = all(FORBIDDEN);
    let equal = |argument, value| {
        let length = SeccompCmpArgLen::Qword;
        SeccompCondition::new(argument, length, SeccompCmpOp::Ne, value)
    };
    let mount = SeccompRule::new(vec![equal(3, MOUNT_FLAGS)?])?;
    forbidden.insert(libc::SYS_mount, vec![mount]);
    // Into a user namespace, which our own way in takes: that of the build, for a build.
    let kind = SeccompCmpArgLen::Dword;
    let user = libc::CLONE_NEWUSER as u64;
    let other = SeccompCondition::new(1, kind, SeccompCmpOp::Ne, user)?;
    forbidden.insert(libc::SYS_setns, vec![SeccompRule::new(vec![other])?]);
    let mut namespaces = Vec::new();
    for bit in (0..64)
        .map(|bit| 1u64 << bit)
        .filter(|bit| NAMESPACES & bit != 0)
    {
        let set = SeccompCmpOp::MaskedEq(bit);
        let condition = SeccompCondition::new(0, SeccompCmpArgLen::Qword, set, bit)?;
        namespaces.push(SeccompRule::new(vec![condition])?);
    }
    forbidden.insert(libc::SYS_clone, namespaces);
    let mut families = Vec::new();
    for family in FAMILIES {
        let length = SeccompCmpArgLen::Dword;
        let other = SeccompCondition::new(0, length, SeccompCmpOp::Ne, family as u64)?;
        families.push(other);
    }
    let families = vec![SeccompRule::new(families)?];
    let sockets = [libc::SYS_socket, libc::SYS_socketpair].map(|call| (call, families.clone()));
    Ok(vec![
        without_x32(),
        refuse(forbidden, libc::EPERM)?,
        refuse(all(UNKNOWN), libc::ENOSYS)?,
        refuse(sockets.into_iter().collect(), libc::EAFNOSUPPORT)?,
    ])
}

fn refuse(rules: Rules, error: i32) -> Result<BpfProgram, seccompiler::BackendError> {
    let refused = SeccompAction::Errno(error.unsigned_abs());
    let architecture = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, SeccompAction::Allow, refused, architecture)?.try_into()
}

/// Calls of x32 have other numbers (`__X32_SYSCALL_BIT`), which the lists do not know.
fn without_x32() -> BpfProgram {
    let instruction = |code: u32, jt, jf, k| sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let refused = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    vec![
        // The number is the first field of what a filter sees.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(
            libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K,
            0,
            1,
            0x4000_0000,
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, refused),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}
