//! What a collection of garbage must leave: the images of this host's VMs, whatever was removed
//! from the repository since they were launched.
//!
//! Read from the records on disk, so that no daemon need run; a VM's is there before its VMM is.
//! Refuses to know other hosts: their VMs have the grace period. Invariant: while it is not known
//! what a VM uses, nothing is collected.

use forelay_image::component::ImageRef;
use forelay_image::lock::Lock;
use forelay_store::Store;

use crate::config::Config;
use crate::daemon::error::HostError;
use crate::daemon::order::label;
use crate::daemon::vm::registry::load_records;

/// The images of the components of this host's VMs.
pub async fn images_in_use(config: &Config, store: &Store) -> Result<Vec<ImageRef>, HostError> {
    let (records, unusable) = load_records(&config.vms_dir());
    if let Some(one) = unusable.first() {
        return Err(unknown(one.name(), &one.problem()));
    }
    let mut images = Vec::new();
    for record in &records {
        let name = &record.vm.name;
        let lock = Lock::parse(&record.lock).map_err(|error| unknown(name, &error))?;
        for component in lock.all() {
            let found = store.pinned_component(component.id).await;
            let found = found.map_err(|error| {
                let why = forelay_host::error_chain(&error);
                unknown(name, &format!("{}: {why}", label(component)))
            })?;
            images.push(found.image);
        }
    }
    Ok(images)
}

fn unknown(vm: impl std::fmt::Display, why: &dyn std::fmt::Display) -> HostError {
    HostError::Failed(format!(
        "what VM {vm} uses is not known, so nothing is collected: {why}; stop it first"
    ))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use forelay_image::Extent;
    use forelay_image::component::Role;
    use forelay_image::lock::LockedComponent;
    use forelay_image::manifest::Manifest;
    use forelay_store::gc::GcOptions;
    use forelay_store::{DirectoryRepository, FetchConfig, Priority, StoreConfig};

    use super::*;
    use crate::daemon::spine_tests::build_directory;
    use crate::daemon::vm::instance::{Instance, VmData, tests::data};

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_vm_has_outlives_its_removal_and_two_collections() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state_dir: dir.path().join("state"),
            runtime_dir: dir.path().join("run"),
            ..Config::default()
        };
        let store = async |cache: &str| {
            let repository = DirectoryRepository::create(config.repository_path()).unwrap();
            let opening = Store::open(StoreConfig {
                repository: std::sync::Arc::new(repository),
                cache_dir: dir.path().join(cache),
                cache_cap_bytes: 1 << 30,
                fetch: FetchConfig::default(),
            });
            let store = opening.await.unwrap();
            store.initialise().await.unwrap();
            store
        };
        let publisher = store("publisher").await;
        let files = dir.path().join("files");
        std::fs::create_dir(&files).unwrap();
        let mut locked = Vec::new();
        for (name, role) in [("base", Role::Base), ("kernel", Role::Kernel)] {
            std::fs::write(files.join("data"), name.repeat(9000)).unwrap();
            let mut built = build_directory(&files);
            (built.component.name, built.component.role) = (name.to_owned(), role);
            let published =
                publisher.publish(&built.component, &built.image, &built.chunks, &|_| {});
            published.await.unwrap();
            locked.push(built.component);
        }
        let manifest = Manifest::parse("base = \"base\"\n").unwrap();
        let lock = Lock {
            format: 1,
            manifest_digest: manifest.digest(),
            kernel: LockedComponent::from(&locked[1]),
            components: vec![LockedComponent::from(&locked[0])],
        };
        std::fs::create_dir_all(config.vms_dir()).unwrap();
        let vm = Instance::launching(
            "web",
            VmData {
                lock: lock.to_toml(),
                ..data("web", &config.vms_dir())
            },
        );
        vm.save().unwrap();

        // The VM's host has read what the VM was launched with, and not its data.
        let host = store("host").await;
        for component in lock.all() {
            host.hold_locked(component).await.unwrap();
            host.remove_component(component.id).await.unwrap();
        }
        let collect = async |images_in_use| {
            let grace = Duration::ZERO;
            let options = GcOptions {
                images_in_use,
                grace,
                dry_run: false,
            };
            host.gc(&options).await.unwrap()
        };
        for _ in 0..4 {
            let in_use = images_in_use(&config, &host).await;
            let report = collect(in_use.unwrap()).await;
            assert_eq!((report.condemned, report.deleted), (0, 0));
        }
        let image = locked[0].image;
        let whole = Extent::new(0, image.bytes);
        let read = host.read_image(image.digest, whole, Priority::Demand);
        read.await.unwrap();
        // What cannot be known is not nothing.
        let other = images_in_use(&config, &store("another").await).await;
        let error = other.unwrap_err().to_string();
        assert!(error.contains("what VM web uses is not known"), "{error}");
        std::fs::write(config.vms_dir().join("web/instance.json"), "{").unwrap();
        assert!(images_in_use(&config, &host).await.is_err());
        std::fs::remove_dir_all(config.vms_dir()).unwrap();
        let nobodys = images_in_use(&config, &host).await.unwrap();
        assert!(nobodys.is_empty());
        assert_eq!(collect(nobodys).await.condemned, 2);
    }
}
