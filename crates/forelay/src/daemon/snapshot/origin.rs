//! What a snapshot is made from, and so what a launch must have the same to resume from it.
//!
//! Invariant: whatever a clone's guest or VMM could notice is in the origin, names and ports of
//! the host aside: those it is told when it resumes.

use forelay_guest_protocol::snapshot::Tier;
use forelay_image::Digest;
use forelay_image::manifest::Scratch;
use forelay_image::snapshot::SnapshotOrigin;
use forelay_vm::Accelerator;
use forelay_vm::qemu::command_line::held_machine;

use crate::daemon::memory::planner::now_ms;
use crate::daemon::order::Order;

/// How VMs run here.
#[derive(Clone, Debug)]
pub struct Runtime {
    pub accelerator: Accelerator,
    /// The VMM and its version.
    pub vmm: String,
}

/// The latest tier of which a launch may have a snapshot: as its manifest says, and what is safe.
pub fn latest_tier(order: &Order) -> Option<Tier> {
    let manifest = &order.manifest;
    let bound = match manifest.vm.scratch {
        // A scratch disk has the writes of its VM, and is in no snapshot.
        Scratch::Disk { .. } => Tier::Kernel,
        // The image's own init cannot be frozen, nor told that it is another machine now.
        Scratch::Tmpfs if manifest.init.is_some() => Tier::Composed,
        Scratch::Tmpfs => Tier::Ready,
    };
    manifest.snapshot.at.map(|wanted| wanted.min(bound))
}

/// What a snapshot of this order's VM at this tier is made from.
pub fn origin(order: &Order, tier: Tier, runtime: &Runtime) -> SnapshotOrigin {
    let has_image = tier > Tier::Kernel;
    let cpus = order.manifest.vm.cpus;
    let memory_mib = order.memory_mib();
    // What no VM can be is refused when it is started.
    let mut machine = held_machine(tier, cpus, memory_mib, runtime.accelerator).unwrap_or_default();
    if runtime.accelerator == Accelerator::Kvm {
        machine.push_str(&host_cpu());
    }
    SnapshotOrigin {
        tier,
        kernel: order.lock.kernel.id,
        components: has_image.then(|| components(order)),
        manifest: has_image.then(|| order.manifest.machine_digest()),
        memory_mib,
        cpus,
        accelerator: runtime.accelerator.to_string(),
        machine: Digest::of(machine.as_bytes()).hex(),
        vmm: runtime.vmm.clone(),
        vm: None,
    }
}

/// What the snapshot of a VM is made from that runs: like no other's, nor its own of another time.
pub fn origin_of_running(order: &Order, runtime: &Runtime, vm: &str) -> SnapshotOrigin {
    SnapshotOrigin {
        vm: Some(format!("{vm} at {}", now_ms())),
        ..origin(order, Tier::Ready, runtime)
    }
}

/// The components of an order in their order.
fn components(order: &Order) -> Digest {
    let ids: Vec<Digest> = order.lock.components.iter().map(|one| one.id).collect();
    Digest::of(&serde_json::to_vec(&ids).expect("digests always serialise"))
}

/// Model and flags of this host's first CPU, which VMs under KVM have, as far as the host's kernel
/// has them.
fn host_cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = info.split("\n\n").next().unwrap_or_default();
    let named = |line: &&str| {
        ["model", "stepping", "microcode", "flags"]
            .iter()
            .any(|name| line.starts_with(name))
    };
    let mut told: Vec<&str> = first.lines().filter(named).collect();
    let kernel = rustix::system::uname();
    let release = kernel.release().to_string_lossy();
    told.push(&release);
    Digest::of(told.join("\n").as_bytes()).hex()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::daemon::order::tests::order;

    /// Of a small VM with this kernel, and no image.
    pub fn of_kernel(kernel: Digest) -> SnapshotOrigin {
        SnapshotOrigin {
            tier: Tier::Kernel,
            kernel,
            components: None,
            manifest: None,
            memory_mib: 2,
            cpus: 1,
            accelerator: "tcg".into(),
            machine: "q35".into(),
            vmm: "7.2".into(),
            vm: None,
        }
    }

    fn runtime() -> Runtime {
        Runtime {
            accelerator: Accelerator::Tcg,
            vmm: "QEMU 7.2".to_owned(),
        }
    }

    #[test]
    fn one_kernel_snapshot_serves_every_manifest_and_a_later_one_its_own_machine_alone() {
        let web = order("web", "", "base");
        let key = |order: &Order, tier| origin(order, tier, &runtime()).key();
        let others = [
            order("other", "", "base"),
            order("web", "env = { A = \"1\" }", "base"),
            order("web", "", "newer base"),
        ];
        let same: Vec<(bool, bool)> = others
            .iter()
            .map(|other| {
                let same = |tier| key(other, tier) == key(&web, tier);
                (same(Tier::Kernel), same(Tier::Composed))
            })
            .collect();
        assert_eq!(same, [(true, true), (true, false), (true, false)]);
        let newer = Runtime {
            vmm: "QEMU 8".to_owned(),
            ..runtime()
        };
        assert_ne!(
            origin(&web, Tier::Kernel, &newer).key(),
            key(&web, Tier::Kernel)
        );
        assert_ne!(key(&web, Tier::Ready), key(&web, Tier::Composed));
        let large = order("web", "[vm]\nmemory_mib = 1024", "base");
        assert_ne!(key(&large, Tier::Kernel), key(&web, Tier::Kernel));
    }

    #[test]
    fn what_is_not_safe_is_an_earlier_tier() {
        let tier = |further: &str| latest_tier(&order("web", further, "base"));
        assert_eq!(tier(""), Some(Tier::Composed));
        assert_eq!(tier("[snapshot]\nat = \"off\""), None);
        assert_eq!(tier("[snapshot]\nat = \"ready\""), Some(Tier::Ready));
        let ready = "\n[snapshot]\nat = \"ready\"";
        assert_eq!(tier(&format!("init = true{ready}")), Some(Tier::Composed));
        assert_eq!(
            tier(&format!("[vm]\nscratch = \"1G\"{ready}")),
            Some(Tier::Kernel)
        );
    }
}
