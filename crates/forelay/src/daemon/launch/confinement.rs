//! What a VMM may reach of this host: its runtime directory, its trust domain's mount, what it
//! boots from, and QEMU's own files.
//!
//! Refuses to know how that is enforced (`forelay_memory::confine`) and what a VM needs
//! ([`forelay_vm::VmmNeeds`]); here the two meet.

use std::ffi::OsStr;
use std::io;
use std::process::Command;
use std::sync::Arc;

use forelay_cache::Domain;
use forelay_memory::confine::Confinement;
use forelay_memory::connect_filter::ConnectFilter;
use forelay_vm::{Confined, Reach, VmSpec, VmmNeeds};

use crate::daemon::error::HostError;
use crate::daemon::memory::domains::Domains;
use crate::daemon::vm::vmm_groups::{GroupLimits, VmmGroups, loopback_resolvers};

/// Confines VMMs to their trust domains.
pub struct Confiner {
    /// Whose users and mounts they are confined to.
    pub domains: Arc<Domains>,
    /// Limits of each; `None` where VMMs are not confined.
    pub groups: Option<Arc<VmmGroups>>,
}

impl Confiner {
    /// The VM of `spec` with its VMM confined to its trust domain; as it is where VMMs are not
    /// confined.
    pub async fn confine(&self, spec: &VmSpec) -> Result<VmSpec, HostError> {
        let domain = Domain::from(spec.trust_domain.as_str());
        let mut spec = spec.clone();
        let user = self.domains.user_of(&domain)?;
        let (Some(user), Some(groups)) = (user, self.groups.clone()) else {
            return Ok(spec);
        };
        if spec.reach == Reach::Network && !groups.filters() {
            spec.reach = Reach::Nothing;
        }
        let limits = limits(&spec);
        // Of all its components: more may be attached later, also to a VM that begins without any.
        let mount = self.domains.mountpoint(&domain);
        let domains = Arc::clone(&self.domains);
        let mounting = tokio::task::spawn_blocking(move || domains.ensure(&domain).map(drop));
        mounting.await.map_err(HostError::failed)??;
        let spawn = move |command: &mut Command, needs: VmmNeeds| {
            let VmmNeeds {
                mut read,
                write,
                devices,
                fds,
            } = needs;
            read.push(mount.clone());
            groups.fill(&limits, |groups| {
                let confinement = Confinement {
                    user,
                    read,
                    write,
                    devices,
                    fds,
                    groups,
                };
                confinement.spawn(command).map_err(io::Error::other)
            })
        };
        spec.confined = Some(Confined {
            user,
            spawn: Arc::new(spawn),
        });
        Ok(spec)
    }
}

/// What a VMM may take of the host, and where it may connect to.
fn limits(spec: &VmSpec) -> GroupLimits {
    let files: u64 = spec.pmem.iter().map(|device| device.bytes).sum();
    let udp = spec.forwards.iter().filter(|forward| forward.udp);
    let filter = ConnectFilter {
        resolvers: loopback_resolvers(),
        udp_ports: udp.map(|forward| forward.host).collect(),
    };
    let mut parts = spec.runtime_dir.iter().rev().take(2);
    let (name, kind) = (parts.next(), parts.next());
    let part = |part: Option<&OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    GroupLimits {
        // VMs and makers may be called the same.
        name: format!("{}-{}", part(kind), part(name)),
        memory_bytes: (u64::from(spec.memory_mib) << 20) + files,
        cpus: spec.cpus,
        filter: (spec.reach == Reach::Network).then_some(filter),
    }
}
