//! Users of trust domains: the VMMs of each run as one that nobody else is.
//!
//! A user is a number of a range that the configuration reserves; no name is needed for it.
//! Invariant: no two domains have the same one. A domain keeps its user across restarts: the
//! first try is made from its name, and who came second to the same number is written down.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use forelay_cache::Domain;
use forelay_host::atomic_write;
use forelay_image::Digest;
use parking_lot::Mutex;

use crate::daemon::error::HostError;

/// Which user each domain has.
const FILE: &str = "domain-users.json";

/// See the module's header.
pub struct DomainUsers {
    path: PathBuf,
    range: Range<u32>,
    table: Mutex<BTreeMap<String, u32>>,
}

impl DomainUsers {
    /// Those that are written down in `state_dir`, and more of `range`.
    pub fn open(state_dir: &Path, range: Range<u32>) -> Self {
        let path = state_dir.join(FILE);
        let read = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            read => read.and_then(|text| Ok(serde_json::from_slice(&text)?)),
        };
        let mut table: BTreeMap<String, u32> = read.unwrap_or_else(|error| {
            tracing::error!(%error, path = %path.display(), "users of trust domains are assigned anew");
            BTreeMap::new()
        });
        table.retain(|_, user| range.contains(user));
        let table = Mutex::new(table);
        Self { path, range, table }
    }

    /// The user of a domain.
    pub fn of(&self, domain: &Domain) -> Result<u32, HostError> {
        let mut table = self.table.lock();
        if let Some(user) = table.get(domain.as_str()) {
            return Ok(*user);
        }
        let count = self.range.len() as u64;
        let start = Digest::of(domain.as_str().as_bytes()).uuid();
        let start = start.iter().fold(0, |sum: u64, byte| {
            (sum << 8 | u64::from(*byte)) % count.max(1)
        });
        let candidates = (0..count).map(|step| self.range.start + ((start + step) % count) as u32);
        let taken = |user: &u32| table.values().any(|other| other == user);
        let user = candidates.into_iter().find(|user| !taken(user)).ok_or_else(|| {
            HostError::Failed(format!(
                "all {count} users of trust domains are taken: raise vmm.users in the configuration"
            ))
        })?;
        table.insert(domain.as_str().to_owned(), user);
        let text = serde_json::to_vec_pretty(&*table).map_err(HostError::failed)?;
        if let Err(error) = atomic_write(&self.path, &text) {
            // The next daemon most likely finds the same by the name.
            tracing::warn!(%error, %domain, user, "the user of a trust domain is not written down");
        }
        Ok(user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domains_keep_users_of_their_own_until_there_are_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let range = 3_000..3_003;
        let domain = |name: &str| Domain::from(name);
        let users = DomainUsers::open(dir.path(), range.clone());
        let names = ["a", "b", "c"];
        let first = names.map(|name| users.of(&domain(name)).unwrap());
        let mut sorted = first;
        sorted.sort_unstable();
        assert_eq!(sorted, [3_000, 3_001, 3_002]);
        let full = users.of(&domain("d")).unwrap_err().to_string();
        assert!(full.contains("vmm.users"), "{full}");
        // Another daemon, which is asked in another order.
        let users = DomainUsers::open(dir.path(), range.clone());
        let mut again = ["c", "b", "a"].map(|name| users.of(&domain(name)).unwrap());
        again.reverse();
        assert_eq!(again, first);
        // A user outside of the range, or a file that is damaged, is not used.
        let users = DomainUsers::open(dir.path(), 5_000..5_002);
        assert!((5_000..5_002).contains(&users.of(&domain("a")).unwrap()));
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        let users = DomainUsers::open(dir.path(), range.clone());
        assert!(range.contains(&users.of(&domain("a")).unwrap()));
    }
}
