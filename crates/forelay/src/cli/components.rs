//! Commands on components and the repository: build, list, show, remove, gc, verify.
//!
//! They work on the repository directly; a daemon that uses the same one sees what was
//! published with its next launch.

use std::cmp::Ordering;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use forelay_image::component::{Component, Role};
use forelay_image::solve::preference;
use forelay_import::base::BaseOptions;
use forelay_import::dir::Ownership;
use forelay_import::kernel::KernelOptions;
use forelay_import::packages::PackageOptions;
use forelay_import::users::UserRange;
use forelay_import::{
    BuildPhase, BuildRequest, BuildSource, Builder, BuiltComponent, ImageOptions, ImageSource,
    Progress,
};
use forelay_store::Store;
use forelay_store::gc::GcOptions;
use forelay_store::publish::{PublishProgress, Published};
use indicatif::{ProgressBar, ProgressStyle};
use parking_lot::Mutex;

use super::layers::{self, RepositoryLayers};
use super::output::{self, bytes};
use super::{copy, images};
use crate::config::Config;
use crate::daemon::{create_store, images_in_use, open_first_store, open_other_store, open_store};
use crate::recipe::Reader;

/// `forelay component ...`.
#[derive(Debug, clap::Subcommand)]
pub enum ComponentCommand {
    /// Build a component and publish it.
    Build(Box<BuildArguments>),
    /// List components.
    List {
        #[arg(long)]
        json: bool,
    },
    /// Show a component's metadata.
    Show {
        /// Name, `name@version` or id.
        component: String,
        #[arg(long)]
        json: bool,
    },
    /// Copy components from the repository to another.
    Push(Box<copy::PushArguments>),
    /// Copy components from another repository into the repository.
    Pull(Box<copy::PullArguments>),
    /// Copy components between two other repositories.
    Copy(Box<copy::BetweenArguments>),
    /// Make a component invisible; `forelay gc` then frees what nothing else uses.
    Remove {
        /// Name, `name@version` or id.
        component: String,
    },
}

/// Arguments of `forelay component build`. Exactly one source must be given.
#[derive(Debug, clap::Args)]
#[group(id = "source", required = true, multiple = true)]
pub struct BuildArguments {
    /// Debian packages, resolved by apt on the base, minus what the base has.
    #[arg(long, value_name = "PACKAGE", num_args = 1.., conflicts_with_all = ["deb_file", "dir", "tar", "base_suite", "kernel", "oci"])]
    deb: Vec<String>,
    /// With --deb: shared libraries that come along become components of their own, which
    /// other components can share.
    #[arg(long, requires = "deb")]
    split: bool,
    /// One .deb file, unpacked; its maintainer scripts are not run.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dir", "tar", "base_suite", "kernel", "oci"])]
    deb_file: Option<PathBuf>,
    /// A directory of the host.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["tar", "base_suite", "kernel", "oci"])]
    dir: Option<PathBuf>,
    /// A tar archive, compressed or not.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["base_suite", "kernel", "oci"])]
    tar: Option<PathBuf>,
    /// A base; `debian` is the one known.
    #[arg(long = "base", value_name = "DISTRIBUTION", conflicts_with_all = ["kernel", "oci"])]
    base_suite: Option<String>,
    /// Debian's cloud kernel with an initramfs that holds the guest init.
    #[arg(long, conflicts_with = "oci")]
    kernel: bool,
    /// A container image: a registry's (`nginx:1.25`), docker-archive:FILE, oci-archive:FILE
    /// or oci:DIR. Each of its layers becomes a component.
    #[arg(long, value_name = "IMAGE")]
    oci: Option<String>,
    /// With --oci: the registry speaks HTTP without TLS (those on this host do anyway).
    #[arg(long, requires = "oci")]
    plain_http: bool,
    /// With --oci: certificates (PEM) of who signed the registry's, beside the host's.
    #[arg(long, requires = "oci", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// With --oci: fetch layers that the repository has, too, and publish what of them it lost.
    #[arg(long, requires = "oci")]
    refetch: bool,
    /// Base that --deb packages are installed on: name or name@version.
    #[arg(long, value_name = "COMPONENT", default_value = "debian")]
    on: String,
    /// Debian release of --base and --kernel.
    #[arg(long, default_value = "bookworm")]
    suite: String,
    /// With --base: systemd as init.
    #[arg(long)]
    systemd: bool,
    /// With --base: further packages.
    #[arg(long, value_name = "PACKAGE", num_args = 1..)]
    include: Vec<String>,
    /// With --base: keep documentation and translations.
    #[arg(long)]
    full: bool,
    /// With --kernel: the guest init (built with the project; see README).
    #[arg(long, env = "FORELAY_GUEST", value_name = "FILE")]
    guest: Option<PathBuf>,
    /// Name of the component.
    #[arg(long)]
    name: Option<String>,
    /// Version of the component.
    #[arg(long, id = "component-version", value_name = "VERSION")]
    component_version: Option<String>,
    /// Its function in one line.
    #[arg(long)]
    description: Option<String>,
    /// Its role.
    #[arg(long, value_parser = parse_role)]
    role: Option<Role>,
    /// Print the component's metadata as JSON.
    #[arg(long)]
    json: bool,
}

fn parse_role(text: &str) -> Result<Role, String> {
    serde_json::from_value(serde_json::Value::String(text.to_owned()))
        .ok()
        .filter(|role| *role != Role::Snapshot)
        .ok_or_else(|| "one of base, kernel, runtime, package, library, config, layer".to_owned())
}

/// Runs a `component` command.
pub async fn run(command: ComponentCommand, config: &Config) -> Result<()> {
    match command {
        ComponentCommand::Build(arguments) => {
            build(*arguments, &create_store(config).await?, config).await
        }
        ComponentCommand::List { json } => list(&open_store(config).await?, json).await,
        ComponentCommand::Show { component, json } => {
            let found = find(&open_store(config).await?, &component).await?;
            if json {
                return output::json(&described(&found));
            }
            show(&found);
            Ok(())
        }
        ComponentCommand::Push(arguments) => {
            let from = open_store(config).await?;
            let to = open_other_store(config, &arguments.to, true).await?;
            copy::run(&arguments.what, &from, &to).await
        }
        ComponentCommand::Pull(arguments) => {
            let from = open_other_store(config, &arguments.from, false).await?;
            copy::run(&arguments.what, &from, &create_store(config).await?).await
        }
        ComponentCommand::Copy(arguments) => {
            let from = open_other_store(config, &arguments.from, false).await?;
            let to = open_other_store(config, &arguments.to, true).await?;
            copy::run(&arguments.what, &from, &to).await
        }
        ComponentCommand::Remove { component } => {
            let _turn = images::turn(config).await?;
            let store = open_first_store(config).await?;
            let found = find(&store, &component).await?;
            images::remove(&store, &found).await?;
            say!("{} {} removed", found.name, found.version);
            Ok(())
        }
    }
}

/// Metadata with the id that it hashes to.
fn described(component: &Component) -> serde_json::Value {
    let mut value = serde_json::to_value(component).unwrap_or_default();
    value["id"] = serde_json::Value::String(component.id().to_string());
    value
}

async fn list(store: &Store, json: bool) -> Result<()> {
    let components = store.components().await?;
    if json {
        let all: Vec<_> = components
            .iter()
            .map(|component| described(component))
            .collect();
        return output::json(&all);
    }
    output::table(
        components.iter().map(|component| &**component),
        &[
            ("name", |one: &Component| one.name.clone()),
            ("version", |one| one.version.clone()),
            ("role", |one| format!("{:?}", one.role).to_lowercase()),
            ("id", |one| one.id().short()),
            ("size", |one| bytes(one.image.bytes)),
            ("inodes", |one| one.image.inodes.to_string()),
            ("function", |one| one.description.clone()),
        ],
    );
    Ok(())
}

fn show(component: &Component) {
    say!(
        "{} {}  ({:?})",
        component.name,
        component.version,
        component.role
    );
    say!("  {}", component.description);
    say!("  id     {}", component.id());
    say!(
        "  image  {} {}",
        component.image.digest,
        bytes(component.image.bytes)
    );
    let names = |list: &[forelay_image::component::NameRange]| {
        let words = list.iter().map(|one| match one.range.as_str() {
            "" => one.name.clone(),
            range => format!("{} ({range})", one.name),
        });
        words.collect::<Vec<_>>().join(" | ")
    };
    for requirement in &component.requires {
        say!("  requires  {}", names(requirement));
    }
    for conflict in &component.conflicts {
        say!("  conflicts {}", names(std::slice::from_ref(conflict)));
    }
    let image = component.container.as_ref();
    let arguments = image.map(|image| image.command.as_slice());
    let command = [&component.entrypoint[..], arguments.unwrap_or_default()].concat();
    if !command.is_empty() {
        say!("  runs   {}", command.join(" "));
    }
    if let Some(image) = image {
        images::show(image);
    }
    say!("  built from {} packages", component.sbom.len());
    for note in &component.notes {
        say!("  note: {note}");
    }
}

/// The newest component that `wanted` names.
pub async fn find(store: &Store, wanted: &str) -> Result<Arc<Component>> {
    let components = store.components().await?;
    let (name, version) = match wanted.split_once('@') {
        Some((name, version)) => (name, Some(version)),
        None => (wanted, None),
    };
    let matches = |component: &Component| {
        component.id().to_string() == wanted
            || (component.name == name && version.is_none_or(|v| v == component.version))
    };
    let found = components.iter().rev().find(|component| matches(component));
    found.cloned().with_context(|| {
        let known = components.iter().map(|component| component.name.as_str());
        let near = forelay_image::manifest::nearest(name, known)
            .map_or_else(String::new, |near| format!("; did you mean {near}?"));
        format!("no component {wanted:?} in the repository{near} (`forelay component list`)")
    })
}

async fn build(arguments: BuildArguments, store: &Store, config: &Config) -> Result<()> {
    let json = arguments.json;
    let mut builder = builder(config)?;
    if arguments.oci.is_some() && !arguments.refetch {
        builder = builder.known_layers(Arc::new(RepositoryLayers::list(store).await?));
    }
    let request = request(arguments, store, &builder).await?;
    let component = make(request, builder, config, store, json).await?;
    match json {
        true => output::json(&described(&component)),
        false => Ok(()),
    }
}

/// A builder with the host's cache.
pub fn builder(config: &Config) -> Result<Builder> {
    let builder = Builder::new(&config.state_dir.join("build"))?;
    let users = UserRange::new(config.build.first_user);
    Ok(builder.confined(users, config.build.limits()))
}

/// Builds and publishes what is asked for, and says so unless `quiet`.
pub async fn make(
    request: BuildRequest,
    builder: Builder,
    config: &Config,
    store: &Store,
    quiet: bool,
) -> Result<Component> {
    let bar = Arc::new(Bar::new());
    let shown = Arc::clone(&bar);
    let started = Instant::now();
    let built = tokio::task::spawn_blocking(move || {
        builder.build(&request, &|progress| shown.show(progress))
    });
    let built = built.await??;
    // Until all of it is there.
    let _turn = match built.main.component.container {
        Some(_) => Some(images::turn(config).await?),
        None => None,
    };
    images::check_free(store, &built.main.component).await?;
    layers::check_present(store, &built.at_hand).await?;
    let mut began = started;
    let mut layers = Layers {
        all: built.at_hand.len(),
        ..Layers::default()
    };
    for one in built.in_order() {
        let published = publish(store, one, &bar).await?;
        if one.component.role == Role::Layer {
            layers.add(&published);
            continue;
        }
        if !quiet {
            say!("{}", told(one, &published, began));
        }
        if let Some(text) = other_builds(&one.component, &store.components().await?) {
            complain!("{text}");
        }
        began = Instant::now();
    }
    let component = built.main.component;
    if component.container.is_some() {
        images::replace(store, &component).await?;
        if !quiet {
            say!(
                "  {layers}, {:.1} s in all",
                started.elapsed().as_secs_f64()
            );
        }
    }
    Ok(component)
}

/// What there is to say of other builds that are called like a component, such as a kernel with the
/// guest agent of another Forelay: launches take one of them, which need not be the newer. (A
/// container image takes the place of the one before it.)
fn other_builds(built: &Component, all: &[Arc<Component>]) -> Option<String> {
    let is_other = |one: &&Component| {
        images::is_called(built, one) && one.id() != built.id() && one.container.is_none()
    };
    let others: Vec<&Component> = all.iter().map(|one| &**one).filter(is_other).collect();
    let first = others.iter().copied().min_by(|a, b| preference(a, b))?;
    let taken = match preference(built, first) {
        Ordering::Greater => format!("that with the id {}, not this one", first.id()),
        _ => "this one".to_owned(),
    };
    let remove = others.iter().map(|one| {
        let id = one.id();
        format!("\n  forelay component remove {id}")
    });
    Some(format!(
        "{} {}: there are other builds of it; launches without a lock take {taken}. To be left with \
         this one:{}",
        built.name,
        built.version,
        remove.collect::<String>()
    ))
}

/// What became of an image's layers.
#[derive(Default)]
struct Layers {
    all: usize,
    new: usize,
    stored_bytes: u64,
}

impl Layers {
    fn add(&mut self, published: &Published) {
        self.all += 1;
        self.new += usize::from(published.created);
        self.stored_bytes += published.progress.stored_bytes;
    }
}

impl std::fmt::Display for Layers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} layers, {} of them new: {} new in the repository",
            self.all,
            self.new,
            bytes(self.stored_bytes)
        )
    }
}

/// Publishes what was built.
async fn publish(store: &Store, built: &BuiltComponent, bar: &Bar) -> Result<Published> {
    let show = |progress: PublishProgress| {
        let total = Some(progress.total_bytes);
        bar.bytes("publishing", progress.done_bytes, total);
    };
    let BuiltComponent {
        component,
        image,
        chunks,
    } = built;
    let published = store.publish(component, image, chunks, &show).await?;
    bar.clear();
    Ok(published)
}

/// What there is to say about it.
fn told(built: &BuiltComponent, published: &Published, began: Instant) -> String {
    let component = &built.component;
    let word = if published.created {
        "published"
    } else {
        "was there already"
    };
    let mut lines = format!(
        "{} {} {word}: {} in {} chunks ({} new in the repository), {:.1} s",
        component.name,
        component.version,
        bytes(component.image.bytes),
        built.chunks.chunks.len(),
        bytes(published.progress.stored_bytes),
        began.elapsed().as_secs_f64()
    );
    for note in &component.notes {
        lines.push_str(&format!("\n  note: {note}"));
    }
    lines
}

async fn request(
    arguments: BuildArguments,
    store: &Store,
    builder: &Builder,
) -> Result<BuildRequest> {
    let root = |path| BuildSource::Directory {
        path,
        ownership: Ownership::Keep,
    };
    let source = if let Some(path) = arguments.dir {
        root(path)
    } else if let Some(path) = arguments.tar {
        BuildSource::Tar {
            path,
            ownership: Ownership::Keep,
        }
    } else if let Some(path) = arguments.deb_file {
        BuildSource::DebFile { path }
    } else if let Some(image) = arguments.oci {
        BuildSource::Image(ImageOptions {
            source: ImageSource::parse(&image)?,
            plain_http: arguments.plain_http,
            ca: arguments.ca,
        })
    } else if arguments.kernel {
        BuildSource::Kernel(KernelOptions {
            suite: arguments.suite,
            ..KernelOptions::new(&guest_init(arguments.guest)?)
        })
    } else if let Some(distribution) = arguments.base_suite {
        if distribution != "debian" {
            bail!("no base {distribution:?} can be built: `debian` can, or use --tar");
        }
        BuildSource::Base(BaseOptions {
            suite: arguments.suite,
            include: arguments.include,
            systemd: arguments.systemd,
            slim: !arguments.full,
        })
    } else if !arguments.deb.is_empty() {
        packages(
            arguments.deb,
            arguments.split,
            &arguments.on,
            store,
            builder,
        )
        .await?
    } else {
        bail!("say what to build: --deb, --deb-file, --dir, --tar, --oci, --base or --kernel");
    };
    Ok(BuildRequest {
        source,
        name: arguments.name,
        version: arguments.component_version,
        role: arguments.role,
        description: arguments.description,
        entrypoint: None,
    })
}

/// Debian packages on a base of the repository.
async fn packages(
    packages: Vec<String>,
    split: bool,
    on: &str,
    store: &Store,
    builder: &Builder,
) -> Result<BuildSource> {
    let base = find(store, on).await.with_context(|| {
        format!(
            "--deb needs the base {}: `forelay component build --base debian`",
            on
        )
    })?;
    if base.role != Role::Base {
        bail!("{} is no base: name one with --on", base.name);
    }
    if base.container.is_some() {
        bail!(
            "{} is a container image: packages are installed on a base",
            base.name
        );
    }
    let image = store.component_image(base.id()).await?;
    let reader = Reader(store.image_reader(image));
    let builder = builder.clone();
    let base = tokio::task::spawn_blocking(move || builder.base_root(&base, &reader)).await??;
    let options = PackageOptions { packages, split };
    Ok(BuildSource::Packages {
        options,
        base: Box::new(base),
    })
}

/// The guest init: as given, or beside this program.
fn guest_init(given: Option<PathBuf>) -> Result<PathBuf> {
    let beside = || {
        let program = std::env::current_exe().ok()?;
        Some(program.parent()?.join("forelay-guest")).filter(|path| path.is_file())
    };
    let path = given.or_else(beside).context(
        "where is the guest init? Give --guest FILE or set FORELAY_GUEST (`cargo xtask guest` \
         builds it and prints its path)",
    )?;
    if !path.is_file() {
        bail!(
            "the guest init {} does not exist: `cargo xtask guest` builds it",
            path.display()
        );
    }
    Ok(path)
}

/// Progress on a terminal: one bar for each phase, with rates.
pub(super) struct Bar(Mutex<(ProgressBar, &'static str)>);

impl Bar {
    pub(super) fn new() -> Self {
        let hidden = ProgressBar::hidden();
        Self(Mutex::new((hidden, "")))
    }

    fn show(&self, progress: Progress) {
        match progress {
            Progress::Started(phase) => self.phase(phase.word(), None),
            Progress::Permille {
                phase,
                permille,
                detail,
            } => {
                self.phase(phase.word(), Some(1000));
                let state = self.0.lock();
                state.0.set_position(permille.into());
                state.0.set_message(detail);
            }
            Progress::Bytes {
                phase,
                done_bytes,
                total_bytes,
            } => {
                self.bytes(BuildPhase::word(phase), done_bytes, total_bytes);
            }
        }
    }

    pub(super) fn bytes(&self, word: &'static str, done_bytes: u64, total_bytes: Option<u64>) {
        self.phase(word, total_bytes);
        let state = self.0.lock();
        if let Some(total_bytes) = total_bytes {
            state.0.set_length(total_bytes);
        }
        state.0.set_position(done_bytes);
    }

    /// Begins a phase, unless it is the one under way.
    fn phase(&self, word: &'static str, length: Option<u64>) {
        let mut state = self.0.lock();
        if state.1 == word {
            return;
        }
        state.0.finish_and_clear();
        if !std::io::stderr().is_terminal() {
            if state.1 != word {
                complain!("{word}");
            }
            state.1 = word;
            return;
        }
        let bar = length.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        let template = match length {
            Some(1000) => "{prefix:18} {bar:30} {percent}% {msg}",
            Some(_) => "{prefix:18} {bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec}",
            None => "{prefix:18} {spinner} {elapsed}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(word);
        *state = (bar, word);
    }

    pub(super) fn clear(&self) {
        self.0.lock().0.finish_and_clear();
    }
}

/// `forelay gc`. What this host's VMs have stays, also if its component was removed.
pub async fn gc(config: &Config, dry_run: bool, json: bool) -> Result<()> {
    let store = open_first_store(config).await?;
    let options = GcOptions {
        images_in_use: images_in_use(config, &store).await?,
        dry_run,
        ..GcOptions::default()
    };
    let report = store.gc(&options).await?;
    if json {
        return output::json(&report);
    }
    if dry_run {
        say!(
            "{} components use {} images in {} packs; nothing refers to {} others ({}): a run now \
             would delete {} ({}) and condemn {}, which the next run after the grace period deletes",
            report.components,
            report.live_images,
            report.live_packs,
            report.unused,
            bytes(report.unused_bytes),
            report.deleted,
            bytes(report.freed_bytes),
            report.condemned,
        );
        return Ok(());
    }
    say!(
        "{} components use {} images in {} packs; {} objects deleted ({}), {} condemned: the next \
         run after the grace period deletes them",
        report.components,
        report.live_images,
        report.live_packs,
        report.deleted,
        bytes(report.freed_bytes),
        report.condemned,
    );
    Ok(())
}

/// `forelay verify`.
pub async fn verify(config: &Config, json: bool) -> Result<()> {
    let store = open_first_store(config).await?;
    let bar = Bar::new();
    let report = store
        .verify(&|progress| bar.bytes("verifying", progress.packs, Some(progress.total_packs)))
        .await?;
    bar.clear();
    let read = report.progress;
    if json {
        output::json(&report)?;
    } else {
        say!(
            "{} components, {} packs, {} chunks, {} read",
            read.components,
            read.packs,
            read.chunks,
            bytes(read.bytes)
        );
        for finding in &report.findings {
            say!("{}: {}", finding.key, finding.problem);
        }
    }
    match report.findings.len() {
        0 => Ok(()),
        count => bail!(
            "{count} things are wrong in the repository: build or copy the components concerned \
             again"
        ),
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::Digest;
    use forelay_image::component::ImageRef;
    use forelay_image::manifest::Manifest;
    use forelay_image::solve::solve;

    use super::*;

    fn build(name: &str, version: &str, role: Role, content: &str) -> Component {
        let image = ImageRef {
            digest: Digest::of(content.as_bytes()),
            bytes: 4096,
            metadata_bytes: 4096,
            inodes: 1,
            chunk_index: Digest::of(b"index"),
        };
        let architecture = forelay_import::host_architecture();
        Component::new(name, version, role, architecture, image)
    }

    #[test]
    fn another_build_of_a_version_is_told_with_the_one_that_launches_take() {
        let kernel = |agent: &str| build("linux", "6.1", Role::Kernel, agent);
        let (one, other) = (kernel("one agent"), kernel("another agent"));
        let base = build("debian", "12", Role::Base, "base");
        let newer = build("linux", "6.2", Role::Kernel, "one agent");
        let all = [&base, &newer, &one].map(|one| Arc::new(one.clone()));
        assert_eq!(other_builds(&one, &all), None, "itself alone");
        assert_eq!(other_builds(&newer, &all), None);
        let all = [&base, &one, &other].map(|one| Arc::new(one.clone()));
        let known: Vec<Component> = all.iter().map(|one| (**one).clone()).collect();
        let manifest = Manifest::parse("name = \"x\"\nbase = \"debian\"\n").unwrap();
        let taken = solve(&manifest, &known).unwrap().kernel.id;
        for (built, there) in [(&one, &other), (&other, &one)] {
            let told = other_builds(built, &all).unwrap();
            assert!(told.starts_with("linux 6.1: "), "{told}");
            let removes = format!("forelay component remove {}", there.id());
            assert!(told.contains(&removes), "{told}");
            let is_taken = told.contains("launches without a lock take this one.");
            assert_eq!(is_taken, built.id() == taken, "{told}");
            assert_eq!(told.contains("not this one"), !is_taken, "{told}");
        }
    }
}
