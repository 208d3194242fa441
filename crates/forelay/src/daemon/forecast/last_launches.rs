//! The last manifest and lock of each profile, kept on disk: what its next launch will ask for.
//!
//! Invariant: what cannot be read any more is skipped, never an error.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forelay_cache::plan::PastLaunch;
use forelay_image::Digest;
use forelay_image::component::Component;
use forelay_image::solve::solve;
use forelay_predict::time::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::daemon::forecast::clock::ForecastClock;
use crate::daemon::forecast::models::model_key;
use crate::daemon::order::Order;
use crate::history::ProfileRef;
use crate::recipe::for_this_host;

/// The last launch of a profile, as kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct LastLaunch {
    of: ProfileRef,
    manifest: String,
    lock: String,
    /// Whether the launch came with a lock: the next one will too.
    #[serde(default)]
    pinned: bool,
}

/// What a profile's next launch will ask for.
struct Expected {
    order: Arc<Order>,
    pinned: bool,
}

/// The last launches of all profiles.
pub struct LastLaunches {
    dir: PathBuf,
    pmem_slots: usize,
    orders: Mutex<BTreeMap<String, Expected>>,
    /// The components that orders were last resolved with.
    resolved_with: Mutex<Option<Digest>>,
}

impl LastLaunches {
    /// Reads what earlier daemons kept in `state_dir`. What cannot be read is skipped.
    pub fn open(state_dir: &Path, pmem_slots: usize) -> Self {
        let dir = state_dir.join("profiles");
        let entries = std::fs::create_dir_all(&dir).and_then(|()| std::fs::read_dir(&dir));
        let entries = entries.inspect_err(|error| {
            tracing::error!(%error, path = %dir.display(), "earlier launches are not known");
        });
        let mut orders = BTreeMap::new();
        for entry in entries.into_iter().flatten().flatten() {
            let read = std::fs::read(entry.path()).ok();
            let last: Option<LastLaunch> = read.and_then(|text| serde_json::from_slice(&text).ok());
            let Some(last) = last else { continue };
            if let Some(order) = Order::remembered(&last.manifest, &last.lock, pmem_slots) {
                let (key, order, pinned) = (model_key(&order.of), Arc::new(order), last.pinned);
                orders.insert(key, Expected { order, pinned });
            }
        }
        Self {
            dir,
            pmem_slots,
            orders: Mutex::new(orders),
            resolved_with: Mutex::default(),
        }
    }

    /// Remembers a launch; `pinned` if it came with its lock.
    pub fn remember(&self, order: &Order, pinned: bool) {
        let key = model_key(&order.of);
        let last = LastLaunch {
            of: order.of.clone(),
            manifest: order.manifest.to_toml(),
            lock: order.lock.to_toml(),
            pinned,
        };
        let name = forelay_image::Digest::of(key.as_bytes()).hex();
        let path = self.dir.join(format!("{name}.json"));
        let write = || -> std::io::Result<()> {
            forelay_host::atomic_write(&path, &serde_json::to_vec(&last)?).map(drop)
        };
        if let Err(error) = write() {
            tracing::warn!(%error, path = %path.display(), "a launch was not remembered");
        }
        let order = Arc::new(order.clone());
        let expected = Expected { order, pinned };
        self.orders.lock().insert(key, expected);
    }

    /// Resolves again what next launches will ask for, where a component has another version since
    /// the last one. Takes milliseconds for each such profile: not on async threads.
    pub fn resolve_again(&self, components: &[Arc<Component>]) {
        let ids: Vec<u8> = components
            .iter()
            .flat_map(|one| *one.id().as_bytes())
            .collect();
        let listed = Some(Digest::of(&ids));
        if std::mem::replace(&mut *self.resolved_with.lock(), listed) == listed {
            return;
        }
        let components = for_this_host(components);
        // Sorted by name and version: the newest stays.
        let newest: BTreeMap<&str, Digest> = components
            .iter()
            .map(|one| (one.name.as_str(), one.image.digest))
            .collect();
        let outdated = |order: &Order| {
            let locked = order.lock.components.iter();
            locked
                .clone()
                .any(|one| newest.get(one.name.as_str()) != Some(&one.image))
        };
        let stale: Vec<Arc<Order>> = {
            let orders = self.orders.lock();
            let free = orders.values().filter(|one| !one.pinned);
            free.map(|one| &one.order)
                .filter(|order| outdated(order))
                .cloned()
                .collect()
        };
        for old in stale {
            let Ok(lock) = solve(&old.manifest, &components) else {
                continue;
            };
            let renewed = Order::new(old.manifest.clone(), lock, 0.0, self.pmem_slots);
            let Ok(renewed) = renewed else { continue };
            // A launch meanwhile knows better.
            if let Some(known) = self.orders.lock().get_mut(&model_key(&old.of))
                && Arc::ptr_eq(&known.order, &old)
            {
                known.order = Arc::new(renewed);
            }
        }
    }

    /// The last order of a profile, by its model key.
    pub fn get(&self, key: &str) -> Option<Arc<Order>> {
        let orders = self.orders.lock();
        orders.get(key).map(|one| Arc::clone(&one.order))
    }

    /// The last orders of all profiles, by model key.
    pub fn all(&self) -> Vec<Arc<Order>> {
        let orders = self.orders.lock();
        let all = orders.values();
        all.map(|one| Arc::clone(&one.order)).collect()
    }

    /// Past launches as the planner knows them: each with the devices of its profile's last.
    pub fn past(
        &self,
        recent: &VecDeque<(ProfileRef, Timestamp)>,
        clock: &ForecastClock,
    ) -> Vec<PastLaunch> {
        let orders = self.orders.lock();
        let past = |(of, at): &(ProfileRef, Timestamp)| {
            let order = &orders.get(&model_key(of))?.order;
            Some(PastLaunch {
                at_ms: clock.wall_ms(*at),
                domain: order.domain.clone(),
                profile: of.profile.as_str().into(),
                devices: order.device_images(),
            })
        };
        recent.iter().filter_map(past).collect()
    }

    /// Memory that each profile's manifest asks for, in MiB.
    pub fn memory_mib(&self) -> HashMap<String, u32> {
        let orders = self.orders.lock();
        let memory = orders.iter();
        memory
            .map(|(key, one)| (key.clone(), one.order.memory_mib()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::component::{ImageRef, Role};
    use forelay_image::manifest::Manifest;

    use super::*;

    fn component(name: &str, version: &str, role: Role) -> Arc<Component> {
        let image = ImageRef {
            digest: Digest::of(format!("{name} {version}").as_bytes()),
            bytes: 4096,
            metadata_bytes: 4096,
            inodes: 1,
            chunk_index: Digest::of(b"index"),
        };
        let here = forelay_import::host_architecture();
        Arc::new(Component::new(name, version, role, here, image))
    }

    #[test]
    fn what_has_a_newer_version_is_resolved_again_unless_its_lock_was_given() {
        let kernel = component("linux-cloud", "1", Role::Kernel);
        let [old, new] = ["1", "2"].map(|version| component("debian", version, Role::Base));
        let dir = tempfile::tempdir().unwrap();
        let last = LastLaunches::open(dir.path(), 8);
        let of = |profile: &str| ProfileRef::new(profile, "me");
        for (profile, pinned) in [("free", false), ("pinned", true)] {
            let text = format!("base = \"debian\"\nprofile = \"{profile}\"\nowner = \"me\"\n");
            let manifest = Manifest::parse(&text).unwrap();
            let here = for_this_host(&[Arc::clone(&kernel), Arc::clone(&old)]);
            let lock = solve(&manifest, &here).unwrap();
            last.remember(&Order::new(manifest, lock, 0.0, 8).unwrap(), pinned);
        }
        let versions = |last: &LastLaunches| {
            ["free", "pinned"].map(|profile| {
                let order = last.get(&model_key(&of(profile))).unwrap();
                order.lock.components[0].version.clone()
            })
        };
        let resolve = |last: &LastLaunches, listed: &[&Arc<Component>]| {
            let listed: Vec<_> = listed.iter().map(|one| Arc::clone(one)).collect();
            last.resolve_again(&listed);
            versions(last)
        };
        assert_eq!(resolve(&last, &[&kernel, &old]), ["1", "1"]);
        assert_eq!(resolve(&last, &[&kernel, &old, &new]), ["2", "1"]);
        assert_eq!(
            resolve(&last, &[&kernel]),
            ["2", "1"],
            "nothing to launch it with"
        );
        // The next daemon begins with what was launched.
        let next = LastLaunches::open(dir.path(), 8);
        assert_eq!(versions(&next), ["1", "1"]);
        assert_eq!(resolve(&next, &[&kernel, &old, &new]), ["2", "1"]);
    }
}
