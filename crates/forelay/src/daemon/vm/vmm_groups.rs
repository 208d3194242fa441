//! Control groups that VMMs are put into: a limit on what each may take of the host, and the
//! place where the kernel refuses what it may not connect to.
//!
//! Owns a directory below the daemon's own group in each hierarchy that is used (memory and
//! process numbers; version 1, 2 or both), with one group for each VM. What a hierarchy does not
//! let us do is done without ([`VmmGroups::lacks`]), the filter of connections aside: a VM that
//! cannot have it has no way out of its network ([`VmmGroups::filters`]).
//!
//! Invariant: only groups in which nothing runs any more are removed.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use forelay_image::Digest;
use forelay_memory::connect_filter::ConnectFilter;
use parking_lot::RwLock;

use crate::host_stats::HostStats;

/// Controllers that limits are set in.
const CONTROLLERS: [&str; 2] = ["memory", "pids"];
/// Of a unit's group, the one that the daemon is in by itself (`DelegateSubgroup`).
const SUBGROUP: &str = "daemon";
/// What QEMU needs besides the guest's memory; under TCG up to 1 GiB of it is translated code.
const OVERHEAD_BYTES: u64 = 1536 << 20;
/// Most threads of a VMM besides its virtual CPUs; its disks' workers are at most 64.
const THREADS: u32 = 128;

/// One hierarchy in which each VMM has a group.
#[derive(Debug)]
struct Hierarchy {
    /// Where our groups are.
    dir: PathBuf,
    /// Version 2 takes the filter.
    unified: bool,
    /// Controllers in which limits can be set.
    controllers: Vec<&'static str>,
}

/// See the module's header.
#[derive(Debug)]
pub struct VmmGroups {
    hierarchies: Vec<Hierarchy>,
    lacks: Vec<String>,
    filters: bool,
    /// Held for reading while a group is made and nothing runs in it yet.
    being_filled: RwLock<()>,
}

/// What a VM may take, and where it may connect to.
#[derive(Clone, Debug)]
pub struct GroupLimits {
    /// Name for its group.
    pub name: String,
    /// Memory of the guest and all that it maps.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// `None` lets it connect to anything.
    pub filter: Option<ConnectFilter>,
}

impl VmmGroups {
    /// Those of the daemon that has `runtime_dir`; what ended VMs left goes.
    pub fn open(runtime_dir: &Path) -> Self {
        let name = Digest::of(runtime_dir.as_os_str().as_encoded_bytes());
        let name = format!("forelay-{}", &name.hex()[..12]);
        let mut groups = Self {
            hierarchies: Vec::new(),
            lacks: Vec::new(),
            filters: false,
            being_filled: RwLock::default(),
        };
        groups.find(&HostStats::default(), &name);
        for controller in CONTROLLERS {
            let has = |one: &Hierarchy| one.controllers.contains(&controller);
            if !groups.hierarchies.iter().any(has) {
                let lack = format!("no limit of {controller} for VMMs");
                groups.lacks.push(lack);
            }
        }
        if !groups.filters {
            let lack = "VMs have no way out of their network (cgroup v2 that takes a filter of \
                        connections)";
            groups.lacks.push(lack.to_owned());
        }
        groups.sweep();
        groups
    }

    fn find(&mut self, host: &HostStats, name: &str) {
        let mounts = host.mounts();
        for (controllers, path) in host.control_groups(std::process::id()) {
            let mounted = mounts.iter().find(|mount| match mount.fs_vfstype.as_str() {
                "cgroup" => {
                    let has = |one: &String| mount.fs_mntops.contains_key(one);
                    !controllers.is_empty() && controllers.iter().all(has)
                }
                "cgroup2" => controllers.is_empty(),
                _ => false,
            });
            let Some(mount) = mounted.filter(|_| !path.split('/').any(|part| part == "..")) else {
                continue;
            };
            let mut own = Path::new(&mount.fs_file).join(path.trim_start_matches('/'));
            let unified = controllers.is_empty();
            // As systemd sets the daemon apart, so that its unit's group has groups alone.
            if unified && own.ends_with(SUBGROUP) {
                own.pop();
            }
            let wanted = |one: &&&str| controllers.iter().any(|other| other == **one);
            let limited: Vec<_> = match unified {
                true => CONTROLLERS.to_vec(),
                false => CONTROLLERS.iter().filter(wanted).copied().collect(),
            };
            if limited.is_empty() {
                continue;
            }
            match Hierarchy::open(&own, name, unified, limited) {
                Ok(hierarchy) => {
                    self.filters |= unified && hierarchy.takes_filters();
                    self.hierarchies.push(hierarchy);
                }
                Err(error) => {
                    let lack = format!("no group of a VMM in {}: {error}", own.display());
                    self.lacks.push(lack);
                }
            }
        }
    }

    /// What cannot be done on this host.
    pub fn lacks(&self) -> &[String] {
        &self.lacks
    }

    /// Whether connections can be refused.
    pub fn filters(&self) -> bool {
        self.filters
    }

    /// Makes the groups of a VM and has `start` put its VMM into them by their `cgroup.procs`.
    pub fn fill<T>(
        &self,
        limits: &GroupLimits,
        start: impl FnOnce(Vec<PathBuf>) -> io::Result<T>,
    ) -> io::Result<T> {
        let _kept = self.being_filled.read();
        let mut members = Vec::new();
        for hierarchy in &self.hierarchies {
            members.push(hierarchy.make(limits)?.join("cgroup.procs"));
        }
        start(members)
    }

    /// Removes groups of VMs that have ended.
    pub fn sweep(&self) {
        // While one is being filled it is empty: another time, then.
        let Some(_none) = self.being_filled.try_write() else {
            return;
        };
        for hierarchy in &self.hierarchies {
            let groups = std::fs::read_dir(&hierarchy.dir).into_iter().flatten();
            for group in groups.flatten() {
                if group.file_type().is_ok_and(|kind| kind.is_dir()) {
                    // Refused while something runs in it.
                    let _ = std::fs::remove_dir(group.path());
                }
            }
        }
    }
}

impl Drop for VmmGroups {
    /// The directories go with the last VM.
    fn drop(&mut self) {
        self.sweep();
        for hierarchy in &self.hierarchies {
            let _ = std::fs::remove_dir(&hierarchy.dir);
        }
    }
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match std::fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

impl Hierarchy {
    fn open(
        own: &Path,
        name: &str,
        unified: bool,
        mut controllers: Vec<&'static str>,
    ) -> io::Result<Self> {
        let dir = own.join(name);
        make_dir(&dir)?;
        if unified {
            // Version 2 hands controllers on only where no process is, its root aside.
            let hand_on = |dir: &Path, one: &str| {
                std::fs::write(dir.join("cgroup.subtree_control"), format!("+{one}"))
            };
            controllers.retain(|one| hand_on(own, one).and_then(|()| hand_on(&dir, one)).is_ok());
        }
        Ok(Self {
            dir,
            unified,
            controllers,
        })
    }

    /// Whether a filter can be put on a group here.
    fn takes_filters(&self) -> bool {
        let probe = self.dir.join("probe");
        let attached = make_dir(&probe).and_then(|()| ConnectFilter::default().attach(&probe));
        let _ = std::fs::remove_dir(&probe);
        if let Err(error) = &attached {
            tracing::warn!(%error, "connections of VMMs cannot be filtered");
        }
        attached.is_ok()
    }

    /// The group of a VM, with its limits.
    fn make(&self, limits: &GroupLimits) -> io::Result<PathBuf> {
        let dir = self.dir.join(&limits.name);
        // One that a VM of the same name left may have other limits, and a filter.
        let _ = std::fs::remove_dir(&dir);
        make_dir(&dir)?;
        for controller in &self.controllers {
            let (file, limit) = match (*controller, self.unified) {
                ("memory", true) => ("memory.max", limits.memory_bytes + OVERHEAD_BYTES),
                ("memory", false) => (
                    "memory.limit_in_bytes",
                    limits.memory_bytes + OVERHEAD_BYTES,
                ),
                _ => ("pids.max", u64::from(limits.cpus + THREADS)),
            };
            std::fs::write(dir.join(file), limit.to_string())?;
        }
        if let Some(filter) = limits.filter.as_ref().filter(|_| self.unified) {
            filter.attach(&dir)?;
        }
        Ok(dir)
    }
}

/// Name servers of this host on its loopback, of those that QEMU would ask.
pub fn loopback_resolvers() -> Vec<Ipv4Addr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| words.next()?.parse::<Ipv4Addr>().ok())?
    });
    servers.filter(Ipv4Addr::is_loopback).take(3).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::net::{TcpListener, UdpSocket};
    use std::process::{Command, Stdio};

    use super::*;

    const CONNECTS: &str = r#"
use strict; use Socket; $| = 1;
my ($tcp, $udp) = @ARGV;
<STDIN>;
sub tcp { socket(my $s, PF_INET, SOCK_STREAM, 0); connect($s, sockaddr_in($tcp, inet_aton($_[0]))) ? 1 : 0 }
sub udp { socket(my $s, PF_INET, SOCK_DGRAM, 0); defined(send($s, 'x', 0, sockaddr_in($udp, inet_aton($_[0])))) ? 1 : 0 }
print join(' ', tcp('127.0.0.1'), tcp('0.0.0.0'), udp('127.0.0.1'), udp('127.9.9.9')), "\n";
<STDIN>;
"#;

    /// What a program in a group of its own reaches of this host's loopback, and the group.
    fn reached(groups: &VmmGroups, filter: Option<ConnectFilter>) -> (String, Vec<PathBuf>) {
        let tcp = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let udp = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        let port = |address: io::Result<std::net::SocketAddr>| address.unwrap().port().to_string();
        let mut command = Command::new("/usr/bin/perl");
        command.args([
            "-e",
            CONNECTS,
            &port(tcp.local_addr()),
            &port(udp.local_addr()),
        ]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let limits = GroupLimits {
            name: "vms-test".to_owned(),
            memory_bytes: 64 << 20,
            cpus: 1,
            filter,
        };
        let mut members = Vec::new();
        let filled = groups.fill(&limits, |files| {
            let child = command.spawn()?;
            for file in &files {
                std::fs::write(file, child.id().to_string())?;
            }
            members = files;
            Ok(child)
        });
        let mut child = filled.unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"go\n").unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        groups.sweep();
        let kept = members.iter().all(|file| file.exists());
        drop(input);
        child.wait().unwrap();
        assert!(kept, "a group in which something runs is not removed");
        (line, members)
    }

    #[test]
    fn privileged_a_group_limits_a_vmm_keeps_it_off_loopback_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let groups = VmmGroups::open(dir.path());
        if !groups.filters() {
            println!(
                "SKIPPED privileged_a_group_limits_a_vmm_keeps_it_off_loopback_and_goes_with_it: {:?}",
                groups.lacks()
            );
            return;
        }
        assert_eq!(
            reached(&groups, None).0,
            "1 1 1 1\n",
            "works without the filter"
        );
        let (reached, members) = reached(&groups, Some(ConnectFilter::default()));
        assert_eq!(reached, "0 0 0 0\n");
        groups.sweep();
        // The kernel takes a moment to forget a process that was reaped.
        while members.iter().any(|file| file.exists()) {
            std::thread::yield_now();
            groups.sweep();
        }
        let dirs: Vec<PathBuf> = groups
            .hierarchies
            .iter()
            .map(|one| one.dir.clone())
            .collect();
        drop(groups);
        assert!(dirs.iter().all(|dir| !dir.exists()));
    }
}
