//! Removing from a tree what differs from build to build, or must not be shared.
//!
//! Owns the lists of caches, logs, locks, backups, host traces and secrets, and the
//! clamping of times. Invariant: two builds of the same package set clean to the same
//! tree, up to what maintainer scripts themselves draw at random outside these lists.

use forelay_image::tree::{FileData, Kind, NodeId, Tree};

/// Directories whose content goes.
const EMPTIED: &[&str] = &[
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "var/tmp",
    "var/cache/ldconfig",
    "var/cache/man",
    "var/cache/fontconfig",
    "var/lib/apt/mirrors",
    "var/lib/apt/periodic",
    "var/lib/dpkg/updates",
    "var/lib/dpkg/parts",
    "var/lib/systemd/coredump",
    "var/log/apt",
    "var/log/journal",
];

/// Directories that lose their files and keep their directories, which apt insists on.
const EMPTIED_OF_FILES: &[&str] = &["var/cache/apt", "var/lib/apt/lists"];

/// Files that go: backups, locks, caches, traces of the building host.
const REMOVED: &[&str] = &[
    "etc/.pwd.lock",
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
    "etc/subuid-",
    "etc/subgid-",
    "etc/hostname",
    "etc/resolv.conf",
    "usr/sbin/policy-rc.d",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/lib/apt/extended_states",
    "var/lib/dbus/machine-id",
    "var/lib/dpkg/available",
    "var/lib/dpkg/available-old",
    "var/lib/dpkg/diversions-old",
    "var/lib/dpkg/lock",
    "var/lib/dpkg/lock-frontend",
    "var/lib/dpkg/statoverride-old",
    "var/lib/dpkg/status-old",
    "var/lib/dpkg/triggers/Lock",
    "var/lib/systemd/credential.secret",
    "var/lib/systemd/random-seed",
    "var/log/alternatives.log",
    "var/log/bootstrap.log",
    "var/log/dpkg.log",
    "var/log/fontconfig.log",
];

/// The key pair that ssl-cert makes, in words.
pub(crate) const SNAKEOIL_LEFT_OUT: &str = "the self-signed certificate of ssl-cert";

/// Removes caches, logs, locks, backups and traces of the host from `tree`.
pub fn remove_noise(tree: &mut Tree) {
    for path in EMPTIED {
        if let Some(id) = tree.lookup(path.as_bytes()) {
            clear(tree, id);
        }
    }
    for path in EMPTIED_OF_FILES {
        if let Some(id) = tree.lookup(path.as_bytes()) {
            clear_files(tree, id);
        }
    }
    for path in REMOVED {
        tree.remove_path(path.as_bytes());
    }
    if let Some(id) = tree.lookup(b"var/log") {
        truncate_files(tree, id);
    }
    // Empty means: make one at the first boot.
    if let Some(id) = tree.lookup(b"etc/machine-id") {
        truncate_files(tree, id);
    }
}

/// Removes keys that a maintainer script made: one key in every VM is no secret. Returns
/// what was removed, in words.
pub fn remove_secrets(tree: &mut Tree) -> Vec<String> {
    let mut removed = Vec::new();
    let host_keys = names_in(tree, b"etc/ssh", |name| {
        name.starts_with(b"ssh_host_") && name.windows(4).any(|part| part == b"_key")
    });
    for name in &host_keys {
        tree.remove_path(&[b"etc/ssh/", &name[..]].concat());
    }
    if !host_keys.is_empty() {
        removed.push("SSH host keys (make them with ssh-keygen -A in the VM)".to_owned());
    }
    let key = tree.remove_path(b"etc/ssl/private/ssl-cert-snakeoil.key");
    let certificate = tree.remove_path(b"etc/ssl/certs/ssl-cert-snakeoil.pem");
    if key.is_some() || certificate.is_some() {
        let dangling = names_in(tree, b"etc/ssl/certs", |_| true);
        for name in dangling {
            let path = [b"etc/ssl/certs/", &name[..]].concat();
            let kind = tree.lookup(&path).map(|id| &tree.node(id).kind);
            let dangles = matches!(kind, Some(Kind::Symlink(to)) if to == b"ssl-cert-snakeoil.pem");
            if dangles {
                tree.remove_path(&path);
            }
        }
        removed.push(format!(
            "{SNAKEOIL_LEFT_OUT} (make-ssl-cert generate-default-snakeoil)"
        ));
    }
    removed
}

/// Replaces every time from `started_s` on (made by the build itself) by the latest time
/// before it, which comes from a package archive. Without such a time, `fallback_s`.
pub fn clamp_times(tree: &mut Tree, started_s: i64, fallback_s: i64) {
    let reachable = tree.reachable();
    let times = reachable.iter().map(|&id| tree.node(id).attributes.mtime_s);
    let latest = times.filter(|&time| time < started_s).max();
    let latest = latest.unwrap_or(fallback_s);
    for id in reachable {
        let attributes = &mut tree.node_mut(id).attributes;
        if attributes.mtime_s >= started_s {
            attributes.mtime_s = latest;
            attributes.mtime_ns = 0;
        }
    }
}

fn names_in(tree: &Tree, directory: &[u8], matches: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
    let id = tree.lookup(directory);
    let entries = id.and_then(|id| tree.entries(id));
    let names = entries.into_iter().flat_map(|entries| entries.keys());
    names.filter(|name| matches(name)).cloned().collect()
}

fn clear(tree: &mut Tree, id: NodeId) {
    let names: Vec<Vec<u8>> = tree
        .entries(id)
        .map(|entries| entries.keys().cloned().collect())
        .unwrap_or_default();
    for name in names {
        tree.remove(id, &name);
    }
}

fn clear_files(tree: &mut Tree, id: NodeId) {
    let mut pending = vec![id];
    while let Some(id) = pending.pop() {
        let entries = tree.entries(id).cloned().unwrap_or_default();
        for (name, child) in entries {
            if tree.entries(child).is_some() {
                pending.push(child);
            } else {
                tree.remove(id, &name);
            }
        }
    }
}

fn truncate_files(tree: &mut Tree, id: NodeId) {
    let mut pending = vec![id];
    while let Some(id) = pending.pop() {
        match &mut tree.node_mut(id).kind {
            Kind::File(data) => *data = FileData::Bytes(Vec::new().into()),
            Kind::Directory(entries) => pending.extend(entries.values().copied()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use forelay_image::tree::{Attributes, Node, ROOT};

    use super::*;

    fn tree(files: &[(&str, i64)]) -> Tree {
        let mut tree = Tree::new();
        for (path, time) in files {
            let mut attributes = Attributes::with_mode(0o644);
            attributes.mtime_s = *time;
            let kind = Kind::File(FileData::Bytes(b"content".as_slice().into()));
            tree.insert_path(path.as_bytes(), Node { attributes, kind })
                .unwrap();
        }
        tree
    }

    #[test]
    fn noise_goes_and_logs_are_emptied() {
        let mut tree = tree(&[
            ("var/lib/apt/lists/x", 0),
            ("etc/passwd-", 0),
            ("etc/passwd", 0),
            ("var/log/nginx/error.log", 0),
            ("etc/machine-id", 0),
        ]);
        remove_noise(&mut tree);
        assert!(tree.lookup(b"var/lib/apt/lists/x").is_none());
        assert!(tree.lookup(b"var/lib/apt/lists").is_some());
        assert!(tree.lookup(b"etc/passwd-").is_none());
        assert!(tree.lookup(b"etc/passwd").is_some());
        for path in [&b"var/log/nginx/error.log"[..], b"etc/machine-id"] {
            let id = tree.lookup(path).unwrap();
            assert!(matches!(&tree.node(id).kind, Kind::File(data) if data.is_empty()));
        }
    }

    #[test]
    fn generated_keys_go_and_are_named() {
        let mut tree = tree(&[
            ("etc/ssh/ssh_host_rsa_key", 0),
            ("etc/ssh/ssh_host_rsa_key.pub", 0),
            ("etc/ssh/sshd_config", 0),
            ("etc/ssl/private/ssl-cert-snakeoil.key", 0),
        ]);
        let notes = remove_secrets(&mut tree);
        assert_eq!(notes.len(), 2);
        assert!(tree.lookup(b"etc/ssh/ssh_host_rsa_key").is_none());
        assert!(tree.lookup(b"etc/ssh/ssh_host_rsa_key.pub").is_none());
        assert!(tree.lookup(b"etc/ssh/sshd_config").is_some());
        assert_eq!(remove_secrets(&mut tree), Vec::<String>::new());
    }

    #[test]
    fn times_of_the_build_become_the_latest_time_of_the_packages() {
        let mut clamped = tree(&[("a", 50), ("b", 100), ("c", 70)]);
        clamp_times(&mut clamped, 100, 7);
        let time = |tree: &Tree, path: &[u8]| {
            let id = tree.lookup(path).unwrap();
            tree.node(id).attributes.mtime_s
        };
        assert_eq!(time(&clamped, b"a"), 50);
        assert_eq!(time(&clamped, b"b"), 70);
        let root_is_older = clamped.node(ROOT).attributes.mtime_s;
        assert_eq!(root_is_older, 0);
    }
}
