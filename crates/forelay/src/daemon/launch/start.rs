//! Starting the VMM of a launch.
//!
//! Invariant: a VMM that was started ends with its guard, unless the launch commits it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forelay_cache::Domain;
use forelay_image::manifest::{Manifest, Scratch};
use forelay_memory::command_hints::Hints;
use forelay_memory::confine;
use forelay_vm::confined;
use forelay_vm::qemu::QemuDriver;
use forelay_vm::{Boot, Forward, Reach, Upper, VmHandle, VmSpec, VmmDriver as _, Wrap};
use parking_lot::Mutex;

use crate::daemon::error::HostError;
use crate::daemon::launch::compose::MapImage;
use crate::daemon::launch::confinement::Confiner;
use crate::daemon::order::{DeviceRecord, Order};
use crate::daemon::snapshot::origin::Runtime;
use crate::daemon::vm::directory::SCRATCH;
use crate::recipe::KernelFiles;

/// How long a VMM that was killed may take to end.
pub const KILL_LIMIT: Duration = Duration::from_secs(5);

/// First host port given to a forward that names none.
const FIRST_AUTO_PORT: u16 = 20_000;

/// Starts VMMs.
pub struct Starter {
    driver: Arc<QemuDriver>,
    confiner: Confiner,
    pub ports: Ports,
    /// The trust domain whose VMs' memory the kernel may merge.
    ksm: Option<Domain>,
    accelerator: Mutex<Option<String>>,
}

impl Starter {
    /// Starts them with `driver`; the kernel may merge the memory of one domain's.
    pub fn new(driver: Arc<QemuDriver>, confiner: Confiner, ksm: Option<Domain>) -> Self {
        Self {
            driver,
            confiner,
            ports: Ports::default(),
            ksm,
            accelerator: Mutex::default(),
        }
    }

    /// Whether the kernel may merge the memory of this domain's VMs.
    pub fn merges(&self, domain: &Domain) -> bool {
        self.ksm.as_ref() == Some(domain)
    }

    /// What VMs run under, as far as it is known.
    pub fn accelerator(&self) -> Option<String> {
        self.accelerator.lock().clone()
    }

    /// Has a kernel ready for VMs to boot, and learns what they run under.
    pub async fn prepare(&self, kernel: &Path) {
        let prepared = self.driver.prepare(kernel).await;
        *self.accelerator.lock() = Some(prepared.probe.accelerator.to_string());
    }

    /// How VMs of this kernel run.
    pub async fn runtime(&self, kernel: &Path) -> Result<Runtime, HostError> {
        let prepared = self.driver.prepare(kernel).await;
        Ok(Runtime {
            accelerator: prepared.probe.accelerator,
            vmm: self.driver.version().await.map_err(HostError::failed)?,
        })
    }

    /// Starts the VMM; returns when it runs, not when the guest does.
    pub async fn start(&self, spec: &VmSpec) -> Result<StartedVmm, HostError> {
        let spec = self.confiner.confine(spec).await?;
        let launching = self.driver.launch(&spec).await;
        let handle = launching.map_err(HostError::failed)?;
        *self.accelerator.lock() = Some(handle.state().accelerator.clone());
        Ok(StartedVmm(Some(handle)))
    }
}

/// A VMM that nobody supervises yet: killed when dropped.
pub struct StartedVmm(Option<VmHandle>);

impl StartedVmm {
    /// Its handle.
    pub fn handle(&self) -> &VmHandle {
        self.0.as_ref().expect("taken by `commit` and `end` alone")
    }

    /// Makes one that stands by the VMM of a launch.
    pub async fn launch_as(&mut self, spec: &VmSpec) -> Result<(), HostError> {
        self.move_in(spec)?;
        let launched = self.handle().launch_as(spec).await;
        self.0 = Some(launched.map_err(HostError::failed)?);
        Ok(())
    }

    /// Shows a confined VMM the directory of the VM that it becomes.
    fn move_in(&self, spec: &VmSpec) -> Result<(), HostError> {
        let handle = self.handle();
        let Some(user) = handle.state().user else {
            return Ok(());
        };
        if spec.forwards.iter().any(|forward| forward.udp) && spec.reach != Reach::Host {
            // They are let through a filter that was made before they were known.
            let text = "it cannot be given UDP ports";
            return Err(HostError::Failed(text.to_owned()));
        }
        confined::lend(spec, user).map_err(|(path, error)| {
            HostError::Failed(format!("{} is not lent: {error}", path.display()))
        })?;
        confine::show(handle.pid(), &spec.runtime_dir).map_err(HostError::failed)
    }

    /// Lets it live.
    pub fn commit(mut self) -> VmHandle {
        self.0.take().expect("taken by `commit` and `end` alone")
    }

    /// Kills it and waits until it is gone, for as long as one may take.
    pub async fn end(mut self) {
        if let Some(handle) = self.0.take() {
            kill(&handle);
            let ended = tokio::time::timeout(KILL_LIMIT, handle.wait_ended()).await;
            if ended.is_err() {
                tracing::error!(vm = handle.name(), "its VMM was killed and does not end");
            }
        }
    }
}

impl Drop for StartedVmm {
    fn drop(&mut self) {
        if let Some(handle) = &self.0 {
            kill(handle);
        }
    }
}

fn kill(handle: &VmHandle) {
    if let Err(error) = handle.kill() {
        let error = forelay_host::error_chain(&error);
        tracing::error!(
            vm = handle.name(),
            error,
            "a VMM that nobody wants lives on"
        );
    }
}

/// Host ports that forwards without one get.
#[derive(Debug, Default)]
pub struct Ports {
    next: Mutex<u16>,
}

impl Ports {
    /// The forwards of a manifest, with a free host port where it names none.
    pub fn forwards(&self, manifest: &Manifest) -> Result<Vec<Forward>, HostError> {
        let mut forwards = Vec::new();
        for forward in &manifest.vm.forward {
            let host = match forward.host {
                0 => self.free_port(forward.udp)?,
                port => port,
            };
            forwards.push(Forward {
                host,
                guest: forward.guest,
                udp: forward.udp,
            });
        }
        Ok(forwards)
    }

    /// One that is free at this moment.
    pub fn free_port(&self, udp: bool) -> Result<u16, HostError> {
        let mut next = self.next.lock();
        for _ in 0..10_000 {
            let port = (*next).max(FIRST_AUTO_PORT);
            *next = port.checked_add(1).unwrap_or(FIRST_AUTO_PORT);
            let address = ("127.0.0.1", port);
            let free = if udp {
                std::net::UdpSocket::bind(address).is_ok()
            } else {
                std::net::TcpListener::bind(address).is_ok()
            };
            if free {
                return Ok(port);
            }
        }
        Err(HostError::Failed("no port is free on 127.0.0.1".to_owned()))
    }
}

/// The VM to start, with its pmem devices, the map image first; no ports lead into it yet.
/// Without a map image it is one that is held before it needs one.
pub fn spec(
    order: &Order,
    (name, runtime_dir): (&str, &Path),
    devices: &[DeviceRecord],
    map: Option<&MapImage>,
    kernel: KernelFiles,
) -> VmSpec {
    let settings = &order.manifest.vm;
    let uuid = map.map_or_else(|| "0".repeat(32), |map| map.uuid.to_string());
    let boot = Boot::Map { uuid };
    let mut spec = VmSpec::new(name, kernel.kernel, kernel.initrd, boot);
    spec.trust_domain = order.domain.as_str().to_owned();
    spec.memory_mib = u32::try_from(settings.memory_mib).unwrap_or(u32::MAX);
    spec.cpus = settings.cpus;
    spec.reach = match order.manifest.network.host_loopback {
        true => Reach::Host,
        false => Reach::Network,
    };
    spec.console_log = runtime_dir.join("console.log");
    spec.runtime_dir = runtime_dir.to_owned();
    spec.upper = match settings.scratch {
        Scratch::Tmpfs => Upper::Tmpfs,
        Scratch::Disk { bytes } => Upper::Scratch {
            path: runtime_dir.join(SCRATCH),
            bytes,
        },
    };
    spec.pmem = devices.iter().map(DeviceRecord::pmem).collect();
    spec.wrap = Some(wrapped(Hints {
        guest_ram_bytes: Some(settings.memory_mib << 20),
        ..Hints::default()
    }));
    spec
}

/// Has a VMM start with these hints.
pub fn wrapped(hints: Hints) -> Wrap {
    Wrap(Arc::new(move |command| hints.apply(command)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_keep_the_port_that_they_name_and_get_a_free_one_else() {
        let taken = std::net::TcpListener::bind(("127.0.0.1", FIRST_AUTO_PORT));
        let text = "base = \"debian\"\n[vm]\nforward = [\"8080:80\", \":81\", \":82/udp\"]\n";
        let manifest = Manifest::parse(text).unwrap();
        let forwards = Ports::default().forwards(&manifest).unwrap();
        let [named, first, second] = forwards[..] else {
            panic!("{forwards:?}");
        };
        assert_eq!((named.host, named.guest), (8080, 80));
        assert!(first.host > FIRST_AUTO_PORT || taken.is_err(), "{first:?}");
        assert!(second.udp && second.host > first.host, "{second:?}");
    }
}
