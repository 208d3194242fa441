//! The system calls of the guest binary: mounts, modules, network configuration, signals,
//! power. The only unsafe code of this crate.
//!
//! Knows no Forelay concepts but how much entropy a clone is given. Every wrapper returns `io::Error` with the call's errno.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use forelay_guest_protocol::snapshot::ENTROPY_BYTES;

fn c_string(text: impl AsRef<std::ffi::OsStr>) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(text.as_ref().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

pub use libc::{MS_BIND, MS_MOVE, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_RDONLY};

/// `mount(2)`.
pub fn mount(
    source: impl AsRef<Path>,
    target: impl AsRef<Path>,
    fs_type: &str,
    flags: libc::c_ulong,
    options: &str,
) -> io::Result<()> {
    let source = c_string(source.as_ref())?;
    let target = c_string(target.as_ref())?;
    let fs_type = c_string(fs_type)?;
    let options = c_string(options)?;
    // SAFETY: all pointers are NUL-terminated strings that outlive the call.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fs_type.as_ptr(),
            flags,
            options.as_ptr().cast(),
        )
    })
}

/// Time that this thread has spent outside the kernel.
pub fn user_time() -> std::time::Duration {
    // SAFETY: an all-zero rusage is a valid one.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is writable and outlives the call. It cannot fail with these arguments.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    let (seconds, micros) = (usage.ru_utime.tv_sec, usage.ru_utime.tv_usec);
    std::time::Duration::new(seconds as u64, micros as u32 * 1000)
}

/// `umount2(2)` without flags: fails with EBUSY while in use.
pub fn unmount(target: impl AsRef<Path>) -> io::Result<()> {
    let target = c_string(target.as_ref())?;
    // SAFETY: `target` is a NUL-terminated string that outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::UMOUNT_NOFOLLOW) })
}

/// `finit_module(2)`.
pub fn load_module(file: &std::fs::File) -> io::Result<()> {
    // SAFETY: a valid descriptor and an empty NUL-terminated parameter string.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Changes the root directory of this process.
pub fn chroot(path: &str) -> io::Result<()> {
    std::os::unix::fs::chroot(path)
}

/// Sets the host name.
pub fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe `name`.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })
}

/// Sets the wall clock: microseconds since the epoch.
pub fn set_clock(unix_time_us: u64) -> io::Result<()> {
    let time = libc::timespec {
        tv_sec: (unix_time_us / 1_000_000) as libc::time_t,
        tv_nsec: (unix_time_us % 1_000_000) as libc::c_long * 1000,
    };
    // SAFETY: `time` outlives the call.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) })
}

/// What the wall clock shows: microseconds since the epoch.
pub fn clock_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::try_from(now.unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
}

/// Mixes `entropy` into the kernel's random numbers and has it use that at once.
pub fn reseed(entropy: &[u8; ENTROPY_BYTES]) -> io::Result<()> {
    // From linux/random.h; the kernel's `rand_pool_info` with its buffer.
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: libc::c_int,
        bytes: libc::c_int,
        buffer: [u8; ENTROPY_BYTES],
    }
    let info = PoolInfo {
        entropy_bits: 8 * ENTROPY_BYTES as libc::c_int,
        bytes: ENTROPY_BYTES as libc::c_int,
        buffer: *entropy,
    };
    let device = std::fs::File::options().write(true).open("/dev/random")?;
    // SAFETY: the kernel reads `info`, which says how long its buffer is and outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY as _, &raw const info) })?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG as _) })
}

/// Gives an interface another MAC address; any socket will do.
pub fn set_mac(socket: &impl AsRawFd, name: &str, address: [u8; 6]) -> io::Result<()> {
    let mut data = [0 as libc::c_char; 14];
    for (to, from) in data.iter_mut().zip(address) {
        *to = from as libc::c_char;
    }
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_hwaddr = libc::sockaddr {
        sa_family: libc::ARPHRD_ETHER,
        sa_data: data,
    };
    interface_ioctl(socket, libc::SIOCSIFHWADDR, &mut request)
}

/// Sets the soft and hard limit of open files, for this process and all that it starts.
pub fn limit_open_files(soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `limit` outlives the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })
}

/// Flushes file systems.
pub fn sync() {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::sync() }
}

/// Powers the machine off; returns only on failure.
pub fn power_off() -> io::Error {
    sync();
    // SAFETY: a constant command; needs no memory.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    io::Error::last_os_error()
}

/// Wakes a thread that waits in [`poll`].
pub struct WakeUp(OwnedFd);

impl WakeUp {
    /// One that is not set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        check(fd)?;
        // SAFETY: the call gave a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sets it.
    pub fn set(&self) {
        let one = 1_u64;
        // SAFETY: the kernel reads eight bytes of `one`, which outlives the call.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Takes it back.
    pub fn clear(&self) {
        let mut count = 0_u64;
        // SAFETY: the kernel writes eight bytes to `count`, which outlives the call.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

impl AsFd for WakeUp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Waits until one of the descriptors has an event, at most `limit`; which of them have.
pub fn poll(
    watched: &[(Option<BorrowedFd<'_>>, i16)],
    limit: Option<std::time::Duration>,
) -> Vec<bool> {
    let list = watched.iter().map(|&(fd, events)| libc::pollfd {
        // The kernel skips what is negative.
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events,
        revents: 0,
    });
    let mut list: Vec<_> = list.collect();
    let limit_ms = limit.map_or(-1, |limit| {
        i32::try_from(limit.as_millis()).unwrap_or(i32::MAX)
    });
    // SAFETY: the kernel reads and writes the entries of `list`.
    let found = unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, limit_ms) };
    let has_event = |entry: &libc::pollfd| found > 0 && entry.revents != 0;
    list.iter().map(has_event).collect()
}

/// Makes reads and writes fail instead of wait.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads one integer, which outlives the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO as _, &raw const on) })
}

/// Bytes that can be read from a pipe now.
pub fn readable_bytes(fd: BorrowedFd<'_>) -> u64 {
    let mut count: libc::c_int = 0;
    // SAFETY: the kernel writes one integer, which outlives the call.
    unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD as _, &raw mut count) };
    u64::try_from(count).unwrap_or(0)
}

/// A new terminal: the side of who shows it, and the program's.
pub fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: no memory is passed; a descriptor that is new is nobody else's.
    let shown = unsafe {
        let shown = libc::posix_openpt(flags);
        check(shown)?;
        OwnedFd::from_raw_fd(shown)
    };
    // SAFETY: no memory is passed.
    check(unsafe { libc::unlockpt(shown.as_raw_fd()) })?;
    // By no path: whatever is mounted in the image, it is this terminal's.
    // SAFETY: as above.
    let programs = unsafe {
        let programs = libc::ioctl(shown.as_raw_fd(), libc::TIOCGPTPEER, flags);
        check(programs)?;
        OwnedFd::from_raw_fd(programs)
    };
    Ok((shown, programs))
}

/// Gives a terminal a size; what runs in front in it is told.
pub fn set_terminal_size(terminal: BorrowedFd<'_>, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads one structure, which outlives the call.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
}

/// Waits until a terminal has sent what was written to it.
pub fn drain(terminal: BorrowedFd<'_>) {
    // SAFETY: no memory is passed.
    unsafe { libc::tcdrain(terminal.as_raw_fd()) };
}

/// Sends a signal; a negative `pid` names a process group.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::kill(pid, signal) })
}

/// The signal by which systemd is told to power off.
pub fn systemd_poweroff_signal() -> i32 {
    libc::SIGRTMIN() + 4
}

/// What the kernel's time was when this machine began: not 0 in a clone.
static BEGINNING_US: AtomicU64 = AtomicU64::new(0);

/// Counts the uptime from now on: this is a clone, and what was before is its maker's.
pub fn count_uptime_from_now() {
    BEGINNING_US.store(kernel_time_us(), Ordering::Relaxed);
}

/// When this machine began, for [`set_beginning_us`] of a child.
pub fn beginning_us() -> u64 {
    BEGINNING_US.load(Ordering::Relaxed)
}

/// Counts the uptime from there on.
pub fn set_beginning_us(beginning_us: u64) {
    BEGINNING_US.store(beginning_us, Ordering::Relaxed);
}

/// Microseconds since the kernel started, or the clone was resumed.
pub fn uptime_us() -> u64 {
    kernel_time_us().saturating_sub(beginning_us())
}

fn kernel_time_us() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

/// Blocks SIGCHLD in this thread and those it starts, so that [`wait_sigchld`] gets it.
pub fn block_sigchld() {
    // SAFETY: `set` is initialised by sigemptyset before use.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

/// Waits for SIGCHLD, at most one second if there is to be a look soon.
pub fn wait_sigchld(soon: bool) {
    let second = libc::timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    let limit = if soon {
        &raw const second
    } else {
        std::ptr::null()
    };
    // SAFETY: `set` is initialised by sigemptyset before use; `limit` is null, or `second`, which
    // outlives the call.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        libc::sigtimedwait(&set, std::ptr::null_mut(), limit);
    }
}

/// A child that has ended, left waitable.
pub fn peek_ended_child() -> Option<i32> {
    // SAFETY: `info` is a valid place for the result; WNOHANG leaves it zeroed if no child
    // has ended.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        if libc::waitid(libc::P_ALL, 0, &mut info, flags) < 0 {
            return None;
        }
        Some(info.si_pid()).filter(|&pid| pid > 0)
    }
}

/// True if this process has no children, neither running nor ended.
pub fn no_children() -> bool {
    // SAFETY: a null info pointer is allowed; WNOHANG and WNOWAIT change nothing.
    let result = unsafe {
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        libc::waitid(libc::P_ALL, 0, std::ptr::null_mut(), flags)
    };
    result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD)
}

/// Reaps one ended child; returns the raw wait status.
pub fn reap(pid: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    let reaped = unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) };
    (reaped == pid).then_some(status)
}

/// What a child does between fork and exec.
#[derive(Clone, Debug, Default)]
pub struct ChildSetup {
    /// User, group and supplementary groups to become.
    pub credentials: Option<(u32, u32, Vec<u32>)>,
    /// Make standard input the controlling terminal.
    pub controlling_terminal: bool,
    /// The open `cgroup.procs` of the control group to be in.
    pub processes: Option<RawFd>,
}

/// Makes `command` start in its own session with an empty signal mask.
pub fn prepare_child(command: &mut std::process::Command, setup: ChildSetup) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure makes only async-signal-safe system calls on memory that was
    // allocated before the fork.
    unsafe {
        command.pre_exec(move || {
            libc::setsid();
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
            if setup.controlling_terminal {
                libc::ioctl(0, libc::TIOCSCTTY, 0);
            }
            if let Some(processes) = setup.processes {
                let itself = b"0";
                let written = libc::write(processes, itself.as_ptr().cast(), itself.len());
                check(written as libc::c_int)?;
            }
            if let Some((uid, gid, groups)) = &setup.credentials {
                check(libc::setgroups(groups.len(), groups.as_ptr()))?;
                check(libc::setgid(*gid))?;
                check(libc::setuid(*uid))?;
            }
            Ok(())
        });
    }
}

/// Makes a start of `command` hang until there is something in `pipe`.
#[cfg(test)]
pub fn hang_before_exec(command: &mut std::process::Command, pipe: io::PipeReader) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure makes one system call, on memory of its own.
    unsafe {
        command.pre_exec(move || {
            let mut byte = 0_u8;
            libc::read(pipe.as_raw_fd(), (&raw mut byte).cast(), 1);
            Ok(())
        });
    }
}

/// Brings an interface up with an IPv4 address; `None` brings it up as it is.
pub fn configure_interface(
    name: &str,
    address: Option<(std::net::Ipv4Addr, u8)>,
) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    if let Some((address, prefix)) = address {
        let mask = u32::MAX
            .checked_shl(32 - u32::from(prefix.min(32)))
            .unwrap_or(0);
        interface_address(&socket, name, libc::SIOCSIFADDR, address)?;
        interface_address(&socket, name, libc::SIOCSIFNETMASK, mask.into())?;
    }
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    interface_ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)
}

/// Adds the default route.
pub fn default_route(gateway: std::net::Ipv4Addr) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let any = socket_address(std::net::Ipv4Addr::UNSPECIFIED);
    // SAFETY: rtentry is plain data for which zero is a valid value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = any;
    route.rt_genmask = any;
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the kernel reads one rtentry, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT as _, &raw mut route) })
}

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: ifreq is plain data for which zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn interface_address(
    socket: &std::net::UdpSocket,
    name: &str,
    call: libc::c_ulong,
    address: std::net::Ipv4Addr,
) -> io::Result<()> {
    let mut request = interface_request(name)?;
    request.ifr_ifru.ifru_addr = socket_address(address);
    interface_ioctl(socket, call, &mut request)
}

fn interface_ioctl(
    socket: &impl AsRawFd,
    call: libc::c_ulong,
    request: &mut libc::ifreq,
) -> io::Result<()> {
    // SAFETY: the kernel reads and writes one ifreq, which outlives the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), call as _, request as *mut libc::ifreq) })
}

fn socket_address(address: std::net::Ipv4Addr) -> libc::sockaddr {
    let mut data = [0 as libc::c_char; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as u16,
        sa_data: data,
    }
}
