//! One page's way through the daemon, walked in this process in about a second: absent,
//! fetching, resident, touched, evicted, faulted back, learned, prefetched.
//!
//! Everything is the real thing (a component in a directory repository, the store, shared
//! memory on a FUSE mount, the planner and its executors, the history) but the VMM: this
//! process maps the component's file and reads it. At each stop the mapping table, the
//! kernel's residency, the counters and the history must tell the same story.

use std::collections::HashMap;
use std::fs::File;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use forelay_cache::budget::BudgetConfig;
use forelay_cache::mapping_table::{PageState, SharedTable};
use forelay_cache::plan::{
    LaunchRequested, PlanConfig, PlanCounters, PreparedLaunch, ProfileForecast, TouchReport,
};
use forelay_cache::{DeviceImage, Domain, Planner, PlannerEvent, SharedImage, VmName};
use forelay_image::pages::PageSet;
use forelay_image::{Component, Extent, PlannedExtent, Touch};
use forelay_import::dir::Ownership;
use forelay_import::{BuildRequest, BuildSource, Builder, BuiltComponent};
use forelay_memory::mapping::FileMapping;
use forelay_store::repository::{Body, Description, Object, Put};
use forelay_store::{
    DirectoryRepository, FetchConfig, Repository, RepositoryError, Store, StoreConfig,
};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::watch;

use super::events::Events;
use super::forecast::learning::{LaunchOutcome, Learner, NewLaunch};
use super::forecast::observer::Observer;
use super::memory::domains::{DomainMemory, Domains};
use super::memory::executors::Executors;
use super::memory::faults::Plan;
use super::memory::journal::{Journal, JournalWriter};
use super::memory::planner::{PlannerHandle, PlannerParts, PlannerSender, now_ms, planner_channel};
use super::memory::samples::Sampler;
use super::memory::sessions::Sessions;
use crate::api::WaitCauses;
use crate::config::{Config, ForecastConfig};
use crate::history::{ComponentRef, ProfileRef};

/// How long a stop may take before the walk has failed.
const PATIENCE: Duration = Duration::from_secs(240);
/// Most that shared memory may take while nothing is to leave.
const CAP_BYTES: u64 = 1 << 30;

/// A daemon without a VMM, and one component in its repository.
pub(super) struct Spine {
    pub(super) dir: tempfile::TempDir,
    pub(super) store: Store,
    pub(super) domains: Arc<Domains>,
    pub(super) sender: PlannerSender,
    pub(super) memory: Arc<PlannerHandle>,
    /// Whether the repository answers.
    answers: watch::Sender<bool>,
    pub(super) learner: Arc<Learner>,
    pub(super) component: Component,
    /// The component's image.
    pub(super) bytes: Vec<u8>,
    /// The one file's data in it: what the page's story is about.
    pub(super) data: Extent,
    _prepared: UnboundedReceiver<PreparedLaunch>,
}

/// The mounts go with the test, however it ends: threads of the daemon's services hold its
/// memory for as long as this process lives.
impl Drop for Spine {
    fn drop(&mut self) {
        let mounts = self.dir.path().join("run").join("memory");
        for memory in self.domains.all() {
            // As it is shown to VMMs, and as it can be opened for writing.
            let both = [mounts.join(".writable"), mounts.clone()];
            let unmounted = std::process::Command::new("umount")
                .arg("--lazy")
                .args(both.map(|dir| dir.join(memory.domain.as_str())))
                .status();
            assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
        }
    }
}

impl Spine {
    pub(super) async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state_dir: dir.path().join("state"),
            runtime_dir: dir.path().join("run"),
            ..Config::default()
        };
        assert!(config.repository_path().starts_with(dir.path()));
        std::fs::create_dir_all(&config.state_dir).unwrap();
        std::fs::create_dir_all(&config.runtime_dir).unwrap();
        let (answers, answering) = watch::channel(true);
        let repository = DirectoryRepository::create(config.repository_path()).unwrap();
        let store = Store::open(StoreConfig {
            repository: Arc::new(Valve(repository, answering)),
            cache_dir: config.cache_path(),
            cache_cap_bytes: config.cache.cap_bytes,
            fetch: FetchConfig::default(),
        });
        let store = store.await.unwrap();
        store.initialise().await.unwrap();
        let (component, bytes, data) = publish(dir.path(), &store).await;
        store.hold_component(component.id()).await.unwrap();
        let (sender, inbox) = planner_channel();
        let scheduler = store.scheduler().clone();
        let domains = Arc::new(Domains::new(
            &config.mounts_dir(),
            None,
            scheduler.clone(),
            sender.clone(),
            Sessions::connect().unwrap(),
            Events::default(),
        ));
        let journal = config.runtime_dir.join("mapping-table.journal");
        let (journal, table, _) = Journal::open(journal).unwrap();
        let table = Arc::new(SharedTable::new(table));
        // Nothing is pinned: what is pinned is mapped by this process, as if touched.
        let plan = PlanConfig {
            pin_probability: 2.0,
            budget_bytes: CAP_BYTES,
            ..PlanConfig::default()
        };
        let (launches, prepared) = unbounded_channel();
        let executors = Executors::start(&domains, scheduler.clone(), &sender, launches);
        let parts = PlannerParts {
            planner: Planner::new(plan, BudgetConfig::default(), Arc::clone(&table)),
            domains: Arc::clone(&domains),
            scheduler,
            sampler: Sampler::new(),
            executors: executors.unwrap(),
            journal: Some(JournalWriter::start(journal, table).unwrap()),
        };
        let memory = PlannerHandle::start(parts, sender.clone(), inbox).unwrap();
        let forecast = ForecastConfig::default();
        let learner = Learner::new(&config.state_dir, &forecast, HashMap::new());
        learner.open_history().await.unwrap();
        Self {
            learner: Arc::new(learner),
            dir,
            store,
            domains,
            sender,
            memory: Arc::new(memory),
            answers,
            component,
            bytes,
            data,
            _prepared: prepared,
        }
    }

    fn image(&self) -> SharedImage {
        SharedImage::new(domain(), self.component.image.digest)
    }

    fn device(&self) -> DeviceImage {
        DeviceImage {
            image: self.component.image.digest,
            image_bytes: self.component.image.bytes,
        }
    }

    fn state(&self) -> PageState {
        let table = self.memory.table();
        table.read(|table| table.state(&self.image(), self.data.offset))
    }

    fn new_launch<'a>(&self, of: &'a ProfileRef) -> NewLaunch<'a> {
        NewLaunch {
            of,
            vm: "web-1",
            launched_ms: now_ms(),
            components: vec![ComponentRef {
                name: self.component.name.clone(),
                image: self.component.image.digest,
            }],
            memory_mib: 256,
        }
    }

    fn counters(&self) -> PlanCounters {
        self.memory.status().counters
    }

    fn launch_requested(&self, working_set: Vec<PlannedExtent>) {
        let launch = LaunchRequested {
            vm: vm_name(),
            domain: domain(),
            profile: "web".into(),
            devices: vec![self.device()],
            working_set,
        };
        self.memory.tell(PlannerEvent::LaunchRequested(launch));
    }

    fn forecast_changed(&self, working_set: Vec<PlannedExtent>) {
        let forecast = ProfileForecast {
            domain: domain(),
            profile: "web".into(),
            devices: vec![self.device()],
            launch_probability: 1.0,
            next_launch_ms: Some(now_ms() + 1_000),
            working_set,
        };
        self.memory.tell(PlannerEvent::ProfileForecast(forecast));
    }

    /// Changes the most that shared memory may take; what is beyond it must leave.
    fn cap(&self, budget_bytes: u64) {
        self.memory.tell(PlannerEvent::BudgetChanged(budget_bytes));
    }
}

/// The directory repository, which answers when it is let.
struct Valve(DirectoryRepository, watch::Receiver<bool>);

#[async_trait::async_trait]
impl Repository for Valve {
    fn describe(&self) -> Description {
        self.0.describe()
    }

    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        self.0.get(key, most_bytes).await
    }

    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        let mut answers = self.1.clone();
        answers
            .wait_for(|answers| *answers)
            .await
            .expect("the test holds the valve");
        self.0.get_range(key, extent).await
    }

    async fn put_if_absent(&self, key: &str, body: Body) -> Result<Put, RepositoryError> {
        self.0.put_if_absent(key, body).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        self.0.list(prefix).await
    }

    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError> {
        self.0.inspect(key).await
    }

    async fn delete(&self, key: &str) -> Result<(), RepositoryError> {
        self.0.delete(key).await
    }
}

/// Builds a component of the directory `files` and publishes it.
pub(super) async fn publish_directory(files: &Path, store: &Store) -> BuiltComponent {
    let built = build_directory(files);
    let published = store.publish(&built.component, &built.image, &built.chunks, &|_| {});
    published.await.unwrap();
    built
}

pub(super) fn build_directory(files: &Path) -> BuiltComponent {
    let source = BuildSource::Directory {
        path: files.to_path_buf(),
        ownership: Ownership::Keep,
    };
    let builder = Builder::new(&files.with_file_name("build")).unwrap();
    let built = builder.build(&BuildRequest::new(source), &|_| {});
    built.unwrap().main
}

/// Publishes a component of one file: the component, its image, and where the file's data is
/// in that.
async fn publish(dir: &Path, store: &Store) -> (Component, Vec<u8>, Extent) {
    let content: Vec<u8> = (0..16_384_u32)
        .flat_map(|n| n.wrapping_mul(n).to_le_bytes())
        .collect();
    let files = dir.join("files");
    std::fs::create_dir(&files).unwrap();
    std::fs::write(files.join("data"), &content).unwrap();
    let built = publish_directory(&files, store).await;
    let bytes = std::fs::read(&built.image).unwrap();
    let of_data = |extent: &Extent| bytes[extent.offset as usize..].starts_with(&content[..4096]);
    let mut chunks = built.chunks.chunks.iter().map(|chunk| chunk.extent());
    let data = chunks.find(of_data).expect("the file's data is one chunk");
    (built.component, bytes, data)
}

pub(super) fn domain() -> Domain {
    "me".into()
}

fn vm_name() -> VmName {
    "web-1".into()
}

/// Waits until the page, or what is told of it, has got there.
pub(super) async fn until(what: &str, arrived: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !arrived() {
        assert!(Instant::now() < deadline, "never seen: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A VMM of this test's own: the file mapped, and watched like a VMM's.
struct Mapper {
    mapping: FileMapping,
    observer: Observer,
}

impl Mapper {
    fn start(spine: &Spine, path: &Path, device_bytes: u64) -> Self {
        let mapping = FileMapping::new(File::open(path).unwrap(), device_bytes).unwrap();
        let mut observer = Observer::new(std::process::id());
        observer.watch(spine.component.image.digest, path).unwrap();
        Self { mapping, observer }
    }

    /// Reads the bytes as a guest would.
    fn read(&self, extent: Extent) -> Vec<u8> {
        let mut bytes = vec![0; extent.len as usize];
        self.mapping.read_at(&mut bytes, extent.offset);
        bytes
    }

    /// What was touched since the scan before.
    fn new_touches(&mut self) -> Vec<Extent> {
        let found = self.observer.scan();
        found.into_iter().flat_map(|new| new.extents).collect()
    }
}

/// What the kernel has of the image; blocks.
fn resident(memory: &DomainMemory, spine: &Spine) -> PageSet {
    let found = memory.shared.resident(&spine.component.image.digest);
    found.unwrap().into_iter().collect()
}

fn pages(extent: Extent) -> PageSet {
    [extent].into_iter().collect()
}

fn covers(found: &PageSet, extent: Extent) -> bool {
    (&pages(extent) - found).is_empty()
}

/// Whether this can run here; says so if not.
pub(super) fn can_run(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root || !Path::new("/dev/fuse").exists() {
        println!("SKIPPED {test}: needs root and /dev/fuse");
        return false;
    }
    true
}

/// Runs the walk on a runtime of its own, whose end takes the mount down.
pub(super) fn walk<F: Future<Output = ()>>(steps: F) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(steps);
}

#[test]
fn privileged_a_page_walks_from_absent_to_prefetched() {
    if can_run("privileged_a_page_walks_from_absent_to_prefetched") {
        walk(page_walk());
    }
}

async fn page_walk() {
    let spine = Spine::start().await;
    let (image, data) = (spine.image(), spine.data);
    let of = ProfileRef {
        profile: "web".into(),
        owner: "me".into(),
    };
    let memory = spine.domains.ensure(&domain()).unwrap();
    let (path, device_bytes) = spine
        .domains
        .add_image(&memory, &spine.component.image)
        .unwrap();

    // Absent: nobody has asked for anything.
    assert_eq!(spine.state(), PageState::Absent);
    assert!(resident(&memory, &spine).is_empty());
    assert!(spine.learner.entries(None).await.unwrap().is_empty());

    // Fetching: a launch is asked for, and the repository does not answer yet.
    spine.answers.send_replace(false);
    let expected = PlannedExtent {
        image: image.image,
        extent: data,
        probability: 1.0,
        first_touch_ms: 1,
    };
    let launch_id = spine.learner.launched(spine.new_launch(&of)).await;
    spine.launch_requested(vec![expected]);
    until("fetching", || spine.state() == PageState::Fetching).await;
    assert!(resident(&memory, &spine).is_empty());
    let asked = || spine.counters().launch_prefetch_bytes == data.len;
    until("asked for", asked).await;

    // Resident: pushed ahead of any touch, exactly what was asked for.
    spine.answers.send_replace(true);
    until("resident", || spine.state() == PageState::Resident).await;
    assert_eq!(resident(&memory, &spine), pages(data));
    let counters = memory.shared.counters();
    assert_eq!(
        (counters.pushed_bytes, counters.demand_faults),
        (data.len, 0)
    );

    // Touched: seen in the page tables, and nobody waited.
    let planned = [(image.image, data)];
    let waits =
        spine
            .domains
            .attribution()
            .add(std::process::id(), "web-1", Plan::new(planned, planned));
    spine.memory.tell(PlannerEvent::VmStarted(vm_name()));
    let mut mapper = Mapper::start(&spine, &path, device_bytes);
    assert_eq!(mapper.new_touches(), []);
    let content = &spine.bytes[data.offset as usize..data.end() as usize];
    assert!(mapper.read(data) == content, "wrong bytes");
    let touched = mapper.new_touches();
    assert_eq!(touched.iter().copied().collect::<PageSet>(), pages(data));
    spine.memory.tell(PlannerEvent::Touched(TouchReport {
        vm: vm_name(),
        image: image.image,
        extents: touched.clone(),
    }));
    let seen = || {
        let table = spine.memory.table();
        table.read(|table| {
            table
                .touched_by_running()
                .get(&image)
                .is_some_and(|seen| covers(seen, data))
        })
    };
    until("touched", seen).await;
    assert_eq!(waits.figures().fetches, 0);

    // Evicted: under a running VM, since nothing may stay.
    spine.cap(0);
    until("gone", || {
        memory.shared.counters().evicted_bytes >= data.len
    })
    .await;
    until("evicted", || spine.state() != PageState::Resident).await;
    assert!(resident(&memory, &spine).is_empty());
    let told = || spine.counters().budget_evicted_bytes == data.len;
    until("counted as evicted", told).await;
    spine.cap(CAP_BYTES);

    // Faulted back: the reader waits for the same bytes; it was told to be late, since the
    // page was not here when the launch was asked for.
    assert!(
        mapper.read(data) == content,
        "wrong bytes after an eviction"
    );
    until("back", || spine.state() == PageState::Resident).await;
    assert!(covers(&resident(&memory, &spine), data));
    let figures = waits.figures();
    assert!(
        figures.fetches > 0 && figures.bytes >= data.len,
        "{figures:?}"
    );
    let late = WaitCauses {
        late: figures.fetches,
        ..WaitCauses::default()
    };
    assert_eq!(figures.causes, late);
    until("refetched", || spine.counters().refetched_bytes >= data.len).await;

    // Learned: the history has the launch, and the next one is expected to touch the page.
    assert!(spine.learner.plan(&of, &[image.image]).is_empty());
    let touch = |extent| Touch {
        image: image.image,
        extent,
        first_touch_ms: 5,
    };
    let outcome = LaunchOutcome {
        launch_id,
        of: of.clone(),
        images: vec![image.image],
        touches: touched.into_iter().map(touch).collect(),
        waits: figures,
        planned: planned.to_vec(),
        mounted_ms: Some(5),
        ready_ms: Some(10),
    };
    spine.learner.observed(outcome).await;
    spine.learner.stopped(&of, launch_id, 20).await;
    let history = spine.learner.entries(Some("web")).await.unwrap();
    assert_eq!(history.len(), 1);
    assert_eq!((history[0].launches, history[0].warm_share), (1, 0.0));
    assert_eq!(history[0].working_set_bytes, data.len);
    let plan = spine.learner.plan(&of, &[image.image]);
    assert!(
        covers(&plan.iter().map(|one| one.extent).collect(), data),
        "{plan:?}"
    );

    // Prefetched: the VM is gone and the page with it; the forecast brings it back.
    drop(mapper);
    spine.domains.attribution().remove(std::process::id());
    spine.memory.tell(PlannerEvent::VmStopped(vm_name()));
    spine.cap(0);
    until("evicted again", || spine.state() == PageState::Absent).await;
    // What the kernel read ahead behind the image's end may stay.
    let gone = || (&resident(&memory, &spine) & &pages(data)).is_empty();
    until("gone again", gone).await;
    spine.cap(CAP_BYTES);
    let faults = memory.shared.counters().demand_faults;
    spine.forecast_changed(plan);
    until("prefetched", || spine.state() == PageState::Resident).await;
    assert!(covers(&resident(&memory, &spine), data));
    let counted = || spine.counters().forecast_prefetch_bytes >= data.len;
    until("counted as forecast", counted).await;
    assert_eq!(memory.shared.counters().demand_faults, faults);
    assert_eq!(spine.counters().refused_events, 0);
    spine.memory.table().read(|table| table.validate()).unwrap();
}
