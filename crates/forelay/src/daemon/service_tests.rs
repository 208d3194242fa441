//! The services of a launch and of `forelay memory`, each with the real store, shared memory
//! and planner of the spine's test; this process maps what a VMM would.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use forelay_cache::plan::{Eviction, PreparedLaunch, SharedExtent};
use forelay_cache::{Domain, PlannerEvent, SharedImage};
use forelay_guest_protocol::snapshot::Tier;
use forelay_image::lock::{Lock, LockedComponent};
use forelay_image::manifest::Manifest;
use forelay_image::{Component, Digest, Extent};
use forelay_import::BuiltComponent;
use forelay_memory::mapping::FileMapping;
use forelay_store::{DirectoryRepository, FetchConfig, Priority, Store, StoreConfig};
use forelay_vm::process::{Process, ProcessId};
use forelay_vm::qemu::QemuDriver;
use forelay_vm::{Accelerator, GuestMemory};
use tokio::sync::mpsc::unbounded_channel;

use super::api::accounts::MemoryAccounts;
use super::error::HostError;
use super::forecast::announced::{AnnouncedLaunches, ProfileId};
use super::launch::compose::Composer;
use super::launch::confinement::Confiner;
use super::launch::find::SnapshotFinder;
use super::launch::prepared::{Preparations, Preparer};
use super::launch::restore::clone_of;
use super::launch::standby::StandbyStarter;
use super::launch::start::{self, Starter};
use super::memory::executors::tests::told_of_eviction;
use super::memory::mapper::Mapper;
use super::order::{DeviceRecord, Order, PlannedDevice};
use super::snapshot::kept::NotResumed;
use super::snapshot::origin::{Runtime, origin};
use super::snapshot::samples::{damage_and_trust, of_origin, sharing, snapshot};
use super::snapshot::service::Snapshots;
use super::spine_tests::{Spine, can_run, domain, publish_directory, until, walk};
use super::vm::instance::{self, VmData, VmEnd};
use super::vm::registry::{VmRegistry, WantedName};
use super::vm::service::VmService;
use super::vm::supervise::Supervisor;
use crate::api::VmState;
use crate::config::Config;
use crate::recipe::KernelFiles;

impl Spine {
    fn mapper(&self) -> Arc<Mapper> {
        Arc::new(Mapper {
            store: self.store.clone(),
            domains: Arc::clone(&self.domains),
        })
    }

    fn composer(&self) -> Arc<Composer> {
        let kernels = self.dir.path().join("kernels");
        Arc::new(Composer::new(self.store.clone(), kernels))
    }

    fn snapshots(&self) -> Arc<Snapshots> {
        let dir = self.dir.path();
        Arc::new(Snapshots {
            dir: dir.join("snapshots"),
            timeout: Duration::from_secs(60),
            store: self.store.clone(),
            domains: Arc::clone(&self.domains),
            memory: Arc::clone(&self.memory),
            registry: Arc::default(),
            holders: Arc::new(Preparations::open(dir.join("prepared"))),
            shelves: Default::default(),
            saving: Default::default(),
        })
    }

    /// A component that a VM can be booted with, as far as files go.
    async fn publish_kernel(&self) -> Component {
        let files = self.kernel_files("kernel", "a kernel");
        publish_directory(&files, &self.store).await.component
    }

    fn kernel_files(&self, dir: &str, vmlinuz: &str) -> PathBuf {
        let files = self.dir.path().join(dir);
        std::fs::create_dir_all(files.join("boot")).unwrap();
        std::fs::write(files.join("boot/vmlinuz"), vmlinuz).unwrap();
        std::fs::write(files.join("boot/initrd.cpio"), "an initramfs").unwrap();
        files
    }

    /// A component with the bytes of `files` that claims to have the image of another. Another
    /// host publishes it.
    async fn publish_forged(&self, files: &Path, claimed: &Component) -> BuiltComponent {
        let config = Config {
            state_dir: self.dir.path().join("state"),
            ..Config::default()
        };
        let opening = Store::open(StoreConfig {
            repository: Arc::new(DirectoryRepository::open(config.repository_path())),
            cache_dir: files.with_extension("publisher"),
            cache_cap_bytes: 1 << 30,
            fetch: FetchConfig::default(),
        });
        let store = opening.await.unwrap();
        let mut built = publish_directory(files, &store).await;
        built.chunks.image = claimed.image.digest;
        built.component.image.digest = claimed.image.digest;
        built.component.image.chunk_index = built.chunks.digest();
        let published = store.publish(&built.component, &built.image, &built.chunks, &|_| {});
        published.await.unwrap();
        built
    }
}

/// The order of a profile's launch with these components, in so many slots.
fn order(profile: &str, kernel: &Component, components: &[&Component], slots: usize) -> Order {
    order_of(
        &format!("profile = \"{profile}\"\nowner = \"me\"\n"),
        kernel,
        components,
        slots,
    )
}

/// The order of a manifest that says this besides its base.
fn order_of(text: &str, kernel: &Component, components: &[&Component], slots: usize) -> Order {
    let manifest = Manifest::parse(&format!("base = \"files\"\n{text}")).unwrap();
    let lock = Lock {
        format: 1,
        manifest_digest: manifest.digest(),
        kernel: kernel.into(),
        components: components
            .iter()
            .map(|one| LockedComponent::from(*one))
            .collect(),
    };
    Order::new(manifest, lock, 0.0, slots).unwrap()
}

#[test]
fn privileged_images_are_mapped_where_they_are_asked_for_and_one_that_is_gone_is_told() {
    let test = "privileged_images_are_mapped_where_they_are_asked_for_and_one_that_is_gone_is_told";
    if can_run(test) {
        walk(images_are_mapped());
    }
}

async fn images_are_mapped() {
    let spine = Spine::start().await;
    let (mapper, kernel) = (spine.mapper(), spine.publish_kernel().await);
    let one = order("web", &kernel, &[&spine.component], 8);
    // A lock says of components what it likes; what is mapped is as their metadata says.
    type Forge = fn(&mut Lock);
    let forges: [Forge; 3] = [
        |lock| lock.components[0].image_bytes += 2 << 20,
        |lock| lock.components[0].metadata_bytes += 4096,
        |lock| lock.kernel.image = Digest::of(b"another"),
    ];
    for forge in forges {
        let mut lock = one.lock.clone();
        forge(&mut lock);
        let forged = Order::new(one.manifest.clone(), lock, 0.0, 8).unwrap();
        let error = mapper.map_images(&forged).await.unwrap_err().to_string();
        assert!(error.contains("what its metadata says"), "{error}");
    }
    assert!(spine.domains.get(&domain()).is_none(), "mounted for nobody");
    let mapped = mapper.map_images(&one).await.unwrap();
    let [device] = &mapped[..] else {
        panic!("{mapped:?}");
    };
    assert_eq!(
        (device.image, device.members.len()),
        (spine.component.image.digest, 0)
    );
    assert_eq!(device.component, "files 0");
    let file = File::open(&device.path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), device.device_bytes);
    let mut bytes = vec![0; spine.bytes.len()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == spine.bytes, "wrong bytes");

    // Again, and in a domain that exists: the same file of the same mount.
    let memory = spine.domains.ensure(&domain()).unwrap();
    assert!(Arc::ptr_eq(&memory, &spine.domains.get(&domain()).unwrap()));
    assert_eq!(mapper.map_images(&one).await.unwrap()[0].path, device.path);

    // Two components in one slot are one file.
    let bundled = order("web", &kernel, &[&spine.component, &kernel], 2);
    let mapped = mapper.map_images(&bundled).await.unwrap();
    assert_eq!((mapped.len(), mapped[0].members.len()), (1, 2));
    let bundle = bundled.bundle.unwrap();
    let at = bundle.offset_of(&spine.component.image.digest).unwrap();
    let file = File::open(&mapped[0].path).unwrap();
    file.read_exact_at(&mut bytes, at).unwrap();
    assert!(bytes == spine.bytes, "wrong bytes in the bundle");

    // Another owner's VMs share no memory with these.
    let device = PlannedDevice::from(&one.lock.components[0]);
    let other = Domain::from("other");
    let theirs = mapper.map_component(&other, spine.component.id(), device);
    assert_ne!(theirs.await.unwrap().path, mapped[0].path);
    assert_eq!(spine.domains.all().len(), 2);

    let gone = gone(&spine.component);
    let refused = mapper.map_images(&order("web", &kernel, &[&gone], 8)).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("component gone 0"), "{error}");
    assert_eq!(spine.domains.last_repository_failure(), None);
}

/// A component that no repository has.
fn gone(like: &Component) -> Component {
    let mut gone = like.clone();
    gone.name = "gone".to_owned();
    gone.image.digest = Digest::of(b"gone");
    gone
}

#[test]
fn privileged_a_kernel_that_claims_anothers_image_boots_in_no_ones_place() {
    let test = "privileged_a_kernel_that_claims_anothers_image_boots_in_no_ones_place";
    if can_run(test) {
        walk(kernels_are_kept_apart());
    }
}

async fn kernels_are_kept_apart() {
    let spine = Spine::start().await;
    let (composer, good) = (spine.composer(), spine.publish_kernel().await);
    let files = spine.kernel_files("evil", "an evil kernel");
    let evil = spine.publish_forged(&files, &good).await.component;
    assert_eq!(evil.image.digest, good.image.digest);
    let booted = async |kernel: &Component| {
        let files = composer.kernel(&kernel.into()).await.unwrap();
        std::fs::read_to_string(files.kernel).unwrap()
    };
    // As a daemon does that prepares the newest kernel before anybody asks for one.
    assert_eq!(booted(&evil).await, "an evil kernel");
    assert_eq!(booted(&good).await, "a kernel");
    let mut forged = LockedComponent::from(&good);
    forged.version = "9".to_owned();
    assert!(composer.kernel(&forged).await.is_err());
}

#[test]
fn privileged_an_image_is_what_its_lock_pins_of_all_that_claim_it() {
    let test = "privileged_an_image_is_what_its_lock_pins_of_all_that_claim_it";
    if can_run(test) {
        walk(images_are_what_is_pinned());
    }
}

async fn images_are_what_is_pinned() {
    let spine = Spine::start().await;
    let (mapper, kernel) = (spine.mapper(), spine.publish_kernel().await);
    let good = order("web", &kernel, &[&spine.component], 8);
    let image = spine.component.image;
    let read = |mapped: &[DeviceRecord], bytes: usize| {
        let mut read = vec![0; bytes];
        let file = File::open(&mapped[0].path).unwrap();
        file.read_exact_at(&mut read, 0).unwrap();
        read
    };
    // One of the same size, and one that is longer.
    for (name, bytes) in [("equal", 65_536), ("longer", 300_000)] {
        let files = spine.dir.path().join(name);
        std::fs::create_dir(&files).unwrap();
        std::fs::write(files.join("data"), vec![7; bytes]).unwrap();
        let forged = spine.publish_forged(&files, &spine.component).await;
        let evil = order("evil", &kernel, &[&forged.component], 8);
        let mapped = mapper.map_images(&evil).await.unwrap();
        let forged_bytes = std::fs::read(&forged.image).unwrap();
        assert!(read(&mapped, forged_bytes.len()) == forged_bytes);
        // While a VM may have it there is no room for the other...
        let refused = mapper.map_images(&good).await.unwrap_err();
        assert!(refused.to_string().contains("is in use"), "{refused}");
        drop(mapped);
        // ...which finds nothing of it then.
        let mapped = mapper.map_images(&good).await.unwrap();
        assert!(read(&mapped, spine.bytes.len()) == spine.bytes, "{name}");
        assert!(mapper.map_images(&evil).await.is_err());
        let memory = spine.domains.get(&domain()).unwrap();
        let at = spine.data.offset;
        let page = &spine.bytes[at as usize..][..4096];
        let late = forged.component.image.chunk_index;
        assert!(!memory.push(&image.digest, late, at, page), "{name}");
        assert!(memory.push(&image.digest, image.chunk_index, at, page));
    }
}

#[test]
fn privileged_a_likely_launch_is_composed_ahead_and_released_when_it_is_not() {
    let test = "privileged_a_likely_launch_is_composed_ahead_and_released_when_it_is_not";
    if can_run(test) {
        walk(launches_are_prepared());
    }
}

async fn launches_are_prepared() {
    let spine = Spine::start().await;
    let (composer, kernel) = (spine.composer(), spine.publish_kernel().await);
    let order =
        |profile: &str, component: &Component| Arc::new(order(profile, &kernel, &[component], 8));
    let web = order("web", &spine.component);

    // What is composed depends on the lock and the host name alone.
    let compose = async |hostname: &str, file: &str| {
        let path = spine.dir.path().join(file);
        composer.compose(&web, hostname, path).await.unwrap()
    };
    let (one, same) = (compose("web", "one").await, compose("web", "same").await);
    assert_eq!((one.uuid, one.record.image), (same.uuid, same.record.image));
    assert_ne!(compose("web-2", "other").await.uuid, one.uuid);
    let file = std::fs::metadata(&one.record.path).unwrap();
    assert_eq!(file.len(), one.record.device_bytes);

    let announced = Arc::new(AnnouncedLaunches::new(spine.sender.clone()));
    let preparations = Preparations::open(spine.dir.path().join("prepared"));
    let preparations = Arc::new(preparations);
    // There are no snapshots, so no VMM is started.
    let driver = QemuDriver::new(spine.dir.path());
    let confiner = Confiner {
        domains: Arc::clone(&spine.domains),
        groups: None,
    };
    let starter = Arc::new(Starter::new(Arc::new(driver), confiner, None));
    let finder = Arc::new(SnapshotFinder {
        composer: Arc::clone(&composer),
        starter: Arc::clone(&starter),
        snapshots: Arc::new(Snapshots {
            dir: spine.dir.path().join("snapshots"),
            timeout: Duration::from_secs(60),
            store: spine.store.clone(),
            domains: Arc::clone(&spine.domains),
            memory: Arc::clone(&spine.memory),
            registry: Arc::default(),
            holders: Arc::clone(&preparations) as _,
            shelves: Default::default(),
            saving: Default::default(),
        }),
    });
    let standby = StandbyStarter {
        dir: spine.dir.path().join("standby"),
        most: 1,
        cpu_stall: 100.0,
        starter,
        memory: Arc::clone(&spine.memory),
        registry: Arc::default(),
        next: Default::default(),
    };
    let preparer = Preparer {
        preparations: Arc::clone(&preparations),
        announced: Arc::clone(&announced),
        mapper: spine.mapper(),
        composer: Arc::clone(&composer),
        registry: Arc::default(),
        finder: Arc::clone(&finder),
        standby: Arc::new(tokio::sync::Mutex::new(standby)),
    };
    let (planner, launches) = unbounded_channel();
    let running = tokio::spawn(preparer.run(launches));
    let prepare = |profile: &str| {
        planner
            .send(PreparedLaunch::Prepare(domain(), profile.into()))
            .unwrap();
    };
    // One that nobody announced, one that cannot be prepared, and one that can.
    announced.offer(&order("lost", &gone(&spine.component)));
    announced.offer(&web);
    for profile in ["unheard", "lost", "web"] {
        prepare(profile);
    }
    until("prepared", || preparations.len() == 1).await;
    assert!(
        preparations.take(&web, "web-2").is_none(),
        "of another host name"
    );
    prepare("web");
    until("prepared again", || preparations.len() == 1).await;
    let taken = preparations.take(&web, "web").unwrap();
    assert_eq!(taken.files.devices[0].image, spine.component.image.digest);
    assert_eq!(
        std::fs::read(&taken.files.kernel.kernel).unwrap(),
        b"a kernel"
    );
    assert_eq!(
        std::fs::read(&taken.files.kernel.initrd).unwrap(),
        b"an initramfs"
    );
    let map = taken.move_map(&spine.dir.path().join("map")).unwrap();
    assert_eq!(map.uuid, one.uuid);

    for release in [
        PreparedLaunch::ReleaseAll,
        PreparedLaunch::Release(domain(), "web".into()),
    ] {
        prepare("web");
        until("prepared once more", || preparations.len() == 1).await;
        planner.send(release).unwrap();
        until("released", || preparations.len() == 0).await;
    }
    let id = ProfileId::of(&web);
    until("forgotten", || announced.order(&id).is_none()).await;
    drop(planner);
    running.await.unwrap();
}

#[test]
fn privileged_what_is_resident_is_charged_to_who_touches_it() {
    if can_run("privileged_what_is_resident_is_charged_to_who_touches_it") {
        walk(memory_is_accounted_for());
    }
}

async fn memory_is_accounted_for() {
    let spine = Spine::start().await;
    let kernel = spine.publish_kernel().await;
    let order = order("web", &kernel, &[&spine.component], 8);
    let devices = spine.mapper().map_images(&order).await.unwrap();
    let registry = Arc::new(VmRegistry::default());
    let preparations = Preparations::open(spine.dir.path().join("prepared"));
    let accounts = Arc::new(MemoryAccounts {
        store: spine.store.clone(),
        domains: Arc::clone(&spine.domains),
        memory: Arc::clone(&spine.memory),
        registry: Arc::clone(&registry),
        preparations: Arc::new(preparations),
        takeover: Arc::default(),
        accountant: Default::default(),
    });
    let report = async || accounts.report().await.unwrap();
    let empty = report().await;
    assert_eq!((empty.resident_bytes, empty.vms.len()), (0, 0));

    let memory = spine.domains.get(&domain()).unwrap();
    let (image, data) = (spine.component.image.digest, spine.data);
    let bytes = &spine.bytes[data.offset as usize..data.end() as usize];
    memory.shared.push(&image, data.offset, bytes).unwrap();
    let pushed = report().await;
    assert_eq!(
        (pushed.resident_bytes, pushed.unclaimed_bytes),
        (data.len, data.len)
    );
    assert_eq!(
        (pushed.charged_bytes, pushed.totals.pushed_bytes),
        (0, data.len)
    );

    // This process is the VMM of a VM that maps the component behind its map image.
    let claim = registry.claim(WantedName::Given("web-1"), |name| {
        let devices = [&devices[0], &devices[0]].map(Clone::clone).to_vec();
        let dir = spine.dir.path();
        Ok(VmData {
            devices,
            ..instance::tests::data(name, dir)
        })
    });
    let claim = claim.unwrap();
    claim.instance().started(std::process::id());
    let file = File::open(&devices[0].path).unwrap();
    let mapping = FileMapping::new(file, devices[0].device_bytes).unwrap();
    let mut read = vec![0; data.len as usize];
    mapping.read_at(&mut read, data.offset);
    assert!(read == bytes, "wrong bytes");
    let used = report().await;
    assert_eq!((used.resident_bytes, used.unclaimed_bytes), (data.len, 0));
    assert_eq!(
        (used.charged_bytes, used.vms[0].charged_bytes),
        (data.len, data.len)
    );
    assert_eq!(
        (used.vms[0].vm.as_str(), used.vms[0].shared_bytes),
        ("web-1", 0)
    );
    let component = &used.domains[0].components[0];
    assert_eq!(
        (component.component.as_str(), component.mapped_by),
        ("files 0", 1)
    );
    assert_eq!((component.mapped_bytes, component.image), (data.len, image));
}

#[test]
fn privileged_the_snapshot_that_was_made_stays_and_what_was_used_least_lately_goes() {
    let test = "privileged_the_snapshot_that_was_made_stays_and_what_was_used_least_lately_goes";
    if can_run(test) {
        walk(snapshots_are_kept_within());
    }
}

async fn snapshots_are_kept_within() {
    let spine = Spine::start().await;
    let dir = spine.dir.path();
    let snapshots = spine.snapshots();
    let shelf = snapshots.shelf(&domain()).await.unwrap();
    let publish = async |name: &str, made_ms| {
        let (component, image, chunks) = snapshot(dir, name, made_ms);
        let publishing = snapshots.publish(&shelf, &component, &image, &chunks);
        publishing.await.unwrap()
    };
    let used = publish("used", 1).await;
    let one_bytes = shelf.stored_bytes().await;
    shelf.note_use(used.id).await;
    publish("unused", 2).await;
    let made = publish("made", 3).await;
    let ids = || -> BTreeSet<_> { shelf.all().iter().map(|one| one.id).collect() };
    let within = snapshots.keep_within(&shelf, &made, one_bytes * 5 / 2);
    within.await.unwrap();
    assert_eq!(ids(), BTreeSet::from([used.id, made.id]));
    assert!(shelf.stored_bytes().await <= one_bytes * 5 / 2);

    // One that cannot fit goes, and no other for it.
    let refused = snapshots.keep_within(&shelf, &made, one_bytes / 2).await;
    let error = refused.unwrap_err();
    assert!(matches!(&error, HostError::Invalid(why) if why.contains("cap_bytes")));
    assert_eq!(ids(), BTreeSet::from([used.id]));
}

#[test]
fn privileged_what_shares_damaged_bytes_is_made_again_with_good_ones() {
    if can_run("privileged_what_shares_damaged_bytes_is_made_again_with_good_ones") {
        walk(damaged_bytes_are_not_shared());
    }
}

async fn damaged_bytes_are_not_shared() {
    let spine = Spine::start().await;
    let dir = spine.dir.path();
    let snapshots = spine.snapshots();
    let shelf = snapshots.shelf(&domain()).await.unwrap();
    let publish = async |name: &str| {
        let (component, image, chunks) = sharing(dir, name, 1, "both");
        let publishing = snapshots.publish(&shelf, &component, &image, &chunks);
        publishing.await
    };
    let first = publish("first").await.unwrap();
    // Its disk has other bytes now and says that the file is as it was.
    damage_and_trust(&shelf, first.id);
    let second = publish("second").await.unwrap();
    let [kept] = &shelf.all()[..] else {
        panic!("{:?}", shelf.all());
    };
    assert_eq!((kept.id, &kept.aside), (second.id, &None));
    let image = second.component.image;
    let reading =
        spine
            .store
            .read_image(image.digest, Extent::new(0, image.bytes), Priority::Demand);
    let written = std::fs::read(dir.join("second")).unwrap();
    assert!(reading.await.unwrap() == written[..], "wrong bytes");
}

#[test]
fn privileged_a_launch_finds_the_latest_snapshot_that_is_its_own_and_right() {
    if can_run("privileged_a_launch_finds_the_latest_snapshot_that_is_its_own_and_right") {
        walk(snapshots_are_found());
    }
}

async fn snapshots_are_found() {
    let spine = Spine::start().await;
    let (dir, snapshots, kernel) = (
        spine.dir.path(),
        spine.snapshots(),
        spine.publish_kernel().await,
    );
    let order = |owner: &str, at: &str| {
        let text =
            format!("owner = \"{owner}\"\n[vm]\nmemory_mib = 32\n[snapshot]\nat = \"{at}\"\n");
        order_of(&text, &kernel, &[&spine.component], 8)
    };
    let (web, other) = (order("me", "ready"), order("other", "ready"));
    let runtime = Runtime {
        accelerator: Accelerator::Tcg,
        vmm: "a VMM".to_owned(),
    };
    assert!(!snapshots.any(&web), "nothing is made to look");
    let shelf = snapshots.shelf(&domain()).await.unwrap();
    let publish = async |tier: Tier| {
        let origin = origin(&web, tier, &runtime);
        let name = format!("at {}", tier.name());
        let (component, image, chunks) = of_origin(dir, (&name, "both"), 1, origin);
        let publishing = snapshots.publish(&shelf, &component, &image, &chunks);
        publishing.await.unwrap()
    };
    publish(Tier::Kernel).await;
    let composed = publish(Tier::Composed).await;
    publish(Tier::Ready).await;
    let best = async |order: &Order, runtime: &Runtime| {
        let (found, problems) = snapshots.best(order, runtime).await.unwrap();
        (found.map(|found| found.tier()), problems.join("; "))
    };
    let found = async |at: &str| best(&order("me", at), &runtime).await;
    for tier in Tier::ALL {
        assert_eq!(found(tier.name()).await, (Some(tier), String::new()));
    }
    assert_eq!(found("off").await, (None, String::new()));
    assert!(!snapshots.any(&other), "another owner's launches see none");
    assert_eq!(best(&other, &runtime).await, (None, String::new()));
    let newer = Runtime {
        vmm: "a newer VMM".to_owned(),
        ..runtime.clone()
    };
    assert_eq!(best(&web, &newer).await, (None, String::new()));

    let (resumed, _) = snapshots.best(&web, &runtime).await.unwrap();
    let forecast = snapshots.memory_of(&web, &runtime).await.unwrap();
    assert_eq!(forecast.image, resumed.unwrap().memory.image);
    assert!(snapshots.memory_of(&web, &newer).await.is_none());

    is_in_use(&spine, &snapshots, &web, &runtime).await;

    // One that is wrong is passed over, for good.
    let wrong = NotResumed::Snapshot(HostError::Failed("wrong".to_owned()));
    assert!(snapshots.note_failure(&composed, &wrong).await);
    assert_eq!(found("composed").await, (Some(Tier::Kernel), String::new()));

    // Files that have changed are read before a VMM sees any of it.
    let packs = dir.join("snapshots/me/repository/packs");
    for pack in std::fs::read_dir(&packs).unwrap().flatten() {
        let file = File::options().write(true).open(pack.path()).unwrap();
        file.set_modified(std::time::UNIX_EPOCH).unwrap();
    }
    let (none, problems) = found("kernel").await;
    assert_eq!(
        (none, &*problems),
        (None, "the snapshot at kernel is not verified yet")
    );
    snapshots.verify_all().await;
    assert_eq!(found("kernel").await, (Some(Tier::Kernel), String::new()));

    // A disk that is gone for a while is told, and forgiven.
    let away = dir.join("away");
    std::fs::rename(&packs, &away).unwrap();
    for _ in 0..5 {
        let forecast = snapshots.memory_of(&web, &runtime).await;
        assert!(forecast.is_none(), "and forecasts say nothing against it");
    }
    let (none, problems) = found("kernel").await;
    assert_eq!(none, None);
    assert!(problems.contains("cannot find"), "{problems}");
    std::fs::rename(&away, &packs).unwrap();
    assert_eq!(found("kernel").await, (Some(Tier::Kernel), String::new()));
}

/// One that a launch resumes from, or a VM runs on, is not removed; and what its clones are.
async fn is_in_use(spine: &Spine, snapshots: &Arc<Snapshots>, web: &Order, runtime: &Runtime) {
    let (found, _) = snapshots.best(web, runtime).await.unwrap();
    let found = found.unwrap();
    let (shelf, named) = snapshots.named(&found.kept.id.hex()[..16]).await.unwrap();
    assert_eq!((named.id, found.tier()), (found.kept.id, Tier::Ready));
    for prefix in ["", "sha256:", "no digest"] {
        let refused = snapshots.named(prefix).await.err().unwrap();
        assert!(matches!(refused, HostError::Invalid(_)), "{refused}");
    }
    let remove = async || match snapshots.remove(&shelf, &named).await {
        Err(HostError::Busy(why)) => why,
        other => panic!("{other:?}"),
    };
    let why = remove().await;
    assert!(why.contains("resuming"), "{why}");

    let device = spine.mapper().map_images(web).await.unwrap().remove(0);
    let kernel = KernelFiles {
        kernel: "kernel".into(),
        initrd: "initrd".into(),
    };
    let place = ("web-1", spine.dir.path());
    let spec = start::spec(web, place, std::slice::from_ref(&device), None, kernel);
    let clone = clone_of(&spec, &found);
    let image = found.memory.path.clone();
    assert!(matches!(clone.memory, GuestMemory::Snapshot { path } if path == image));
    assert_eq!((clone.hold, clone.pmem.len()), (Some(Tier::Ready), 1));
    let at_kernel = order_at_kernel(web);
    let (of_kernel, _) = snapshots.best(&at_kernel, runtime).await.unwrap();
    let clone = clone_of(&spec, &of_kernel.unwrap());
    assert_eq!((clone.hold, clone.pmem.len()), (Some(Tier::Kernel), 0));

    let claim = snapshots
        .registry
        .claim(WantedName::Given("web-1"), |name| {
            Ok(VmData {
                devices: vec![device, found.memory.clone()],
                ..instance::tests::data(name, spine.dir.path())
            })
        });
    let claim = claim.unwrap();
    drop(found);
    let why = remove().await;
    assert!(
        why.contains("web-1") && why.contains("stop them first"),
        "{why}"
    );
    assert!(
        shelf.find(named.of.origin.key()).is_some(),
        "it is found again"
    );
    claim.end(VmEnd::Stopped { note: None });
    snapshots.remove(&shelf, &named).await.unwrap();
    assert!(shelf.find(named.of.origin.key()).is_none());
}

/// The same launch, if its manifest allowed the kernel's snapshot alone.
fn order_at_kernel(order: &Order) -> Order {
    let mut order = order.clone();
    order.manifest.snapshot.at = Some(Tier::Kernel);
    order
}

#[test]
fn privileged_how_a_vm_is_stopped_depends_on_what_it_is() {
    if can_run("privileged_how_a_vm_is_stopped_depends_on_what_it_is") {
        walk(vms_are_stopped());
    }
}

async fn vms_are_stopped() {
    let spine = Spine::start().await;
    let registry = Arc::new(VmRegistry::default());
    let supervisor = Supervisor {
        groups: None,
        store: spine.store.clone(),
        domains: Arc::clone(&spine.domains),
        memory: Arc::clone(&spine.memory),
        learner: Arc::clone(&spine.learner),
        learning_tasks: Arc::default(),
        histograms: Arc::default(),
        window: Duration::ZERO,
    };
    let service = VmService {
        registry: Arc::clone(&registry),
        domains: Arc::clone(&spine.domains),
        supervisor: Arc::new(supervisor),
    };
    let claim = |name: &str| {
        let make = |name: &str| Ok(instance::tests::data(name, spine.dir.path()));
        registry.claim(WantedName::Given(name), make).unwrap()
    };
    let unknown = service.stop("nobody").await.unwrap_err();
    assert!(matches!(unknown, HostError::NoSuchVm(name) if name == "nobody"));

    // A launch is told to end, and has ended when that returns.
    let launching = claim("launching");
    let undone = async {
        launching.instance().cancelled().await;
        launching.end(VmEnd::Stopped {
            note: Some("cancelled".to_owned()),
        });
    };
    let (stopped, ()) = tokio::join!(service.stop("launching"), undone);
    assert_eq!(stopped.unwrap().state, VmState::Stopped);
    let again = service.stop("launching").await.unwrap();
    assert_eq!(
        again.error.as_deref(),
        Some("cancelled"),
        "it stays as it is"
    );

    // One that cannot be asked is killed, and those who try to reach it see that it is gone.
    let unreachable = claim("unreachable");
    let instance = Arc::clone(unreachable.instance());
    unreachable.keep();
    let mut vmm = tokio::process::Command::new("sleep");
    let vmm = vmm
        .arg("600")
        .env(
            forelay_vm::stray::RUNTIME_DIR_VARIABLE,
            instance.vm().runtime_dir,
        )
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = vmm.id().unwrap();
    // Who kills it may reap it as well, so it is not waited for as a child.
    let id = ProcessId::of(pid).unwrap();
    let process = Process::hold(id).unwrap().unwrap();
    instance.started(pid);
    instance.unreachable("no answer".to_owned());
    let gone = async {
        process.wait().await;
        instance.end(VmEnd::Failed {
            error: "gone".to_owned(),
        });
    };
    let (stopped, ()) = tokio::join!(service.stop("unreachable"), gone);
    assert_eq!(stopped.unwrap().state, VmState::Failed);
    assert!(!id.is_running());
}

#[test]
fn privileged_an_eviction_is_told_before_it_is_tried_and_its_end_only_if_it_was() {
    if can_run("privileged_an_eviction_is_told_before_it_is_tried_and_its_end_only_if_it_was") {
        walk(evictions_are_told());
    }
}

async fn evictions_are_told() {
    let spine = Spine::start().await;
    let kernel = spine.publish_kernel().await;
    let order = order("web", &kernel, &[&spine.component], 8);
    spine.mapper().map_images(&order).await.unwrap();
    let memory = spine.domains.get(&domain()).unwrap();
    let (image, data) = (spine.component.image.digest, spine.data);
    let bytes = &spine.bytes[data.offset as usize..data.end() as usize];
    memory.shared.push(&image, data.offset, bytes).unwrap();
    let domains = Arc::clone(&spine.domains);
    let told = tokio::task::spawn_blocking(move || {
        [image, Digest::of(b"nobody's")].map(|image| {
            let image = SharedImage::new(domain(), image);
            let extents = vec![data];
            told_of_eviction(&domains, Eviction { image, extents })
        })
    });
    let [done, failed] = told.await.unwrap();
    let whole = |image| SharedExtent::new(SharedImage::new(domain(), image), data);
    assert_eq!(
        done,
        [
            PlannerEvent::Evicted(whole(image)),
            PlannerEvent::EvictionEnded(whole(image))
        ]
    );
    assert_eq!(
        failed,
        [PlannerEvent::Evicted(whole(Digest::of(b"nobody's")))]
    );
}
