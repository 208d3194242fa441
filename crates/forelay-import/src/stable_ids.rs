//! Stable ids for the users and groups that packages make.
//!
//! A package's script takes the next free id, which depends on what was installed
//! before; two components built apart would give two users the same id. So every id that
//! was allocated dynamically (100 to 999, as adduser does) is replaced, in the account
//! files, in the ownership of files and in access control lists, by one that depends on
//! the name alone: for names in [`WELL_KNOWN`] a fixed id in Debian's own system range,
//! for all others an id in a large range that systemd's registry of ids leaves unused
//! (0x7000_0000 to 0x77ff_ffff), from the name's SHA-256. With 27 bits, twenty such users
//! in one VM clash with a probability of about one in a million; a clash is reported at
//! launch by [`forelay_guest_protocol::accounts`], never ignored.
//!
//! Refuses to touch ids below 100 (Debian assigns them for good) and from 1000 up
//! (people's accounts).

use std::collections::BTreeMap;

use forelay_image::Digest;
use forelay_image::tree::{NodeId, Tree};

/// Users and groups of widespread packages, with ids in Debian's system range.
/// Never change a line: images depend on it. New names get new ids.
const WELL_KNOWN: &[(&str, u32)] = &[
    ("messagebus", 200),
    ("systemd-network", 201),
    ("systemd-resolve", 202),
    ("systemd-timesync", 203),
    ("systemd-journal", 204),
    ("systemd-coredump", 205),
    ("input", 206),
    ("sgx", 207),
    ("kvm", 208),
    ("render", 209),
    ("crontab", 210),
    ("netdev", 211),
    ("ssl-cert", 212),
    ("sshd", 213),
    ("_ssh", 214),
    ("postgres", 215),
    ("redis", 216),
    ("mysql", 217),
    ("nginx", 218),
    ("memcache", 219),
    ("rabbitmq", 220),
    ("mongodb", 221),
    ("polkitd", 222),
    ("tcpdump", 223),
    ("uuidd", 224),
    ("syslog", 225),
    ("_chrony", 226),
    ("rdma", 227),
    ("docker", 228),
    ("avahi", 229),
    ("dnsmasq", 230),
    ("haproxy", 231),
];

const HASHED_START: u32 = 0x7000_0000;
const HASHED_MASK: u32 = 0x07ff_ffff;

/// Ids that scripts allocate.
const DYNAMIC: std::ops::RangeInclusive<u32> = 100..=999;

/// The id of the user or group `name`, the same in every component.
pub fn stable_id(name: &str) -> u32 {
    if let Some((_, id)) = WELL_KNOWN.iter().find(|(known, _)| *known == name) {
        return *id;
    }
    let digest = Digest::of(format!("forelay account {name}").as_bytes());
    let [a, b, c, d, ..] = *digest.as_bytes();
    HASHED_START | (u32::from_be_bytes([a, b, c, d]) & HASHED_MASK)
}

/// Which ids become which.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    users: BTreeMap<u32, u32>,
    groups: BTreeMap<u32, u32>,
}

impl IdMap {
    /// Maps the dynamic ids of entries in `passwd` and `group` whose names are not in
    /// `base_passwd` and `base_group`.
    pub fn new(base_passwd: &str, passwd: &str, base_group: &str, group: &str) -> Self {
        Self {
            users: new_ids(base_passwd, passwd),
            groups: new_ids(base_group, group),
        }
    }

    /// True if no id changes.
    pub fn is_empty(&self) -> bool {
        self.users.is_empty() && self.groups.is_empty()
    }

    fn user(&self, id: u32) -> u32 {
        self.users.get(&id).copied().unwrap_or(id)
    }

    fn group(&self, id: u32) -> u32 {
        self.groups.get(&id).copied().unwrap_or(id)
    }

    /// Rewrites the text of `/etc/passwd`.
    pub fn passwd(&self, text: &str) -> String {
        rewrite(text, |columns| {
            map_column(columns, 2, |id| self.user(id));
            map_column(columns, 3, |id| self.group(id));
        })
    }

    /// Rewrites the text of `/etc/group`.
    pub fn group_file(&self, text: &str) -> String {
        rewrite(text, |columns| {
            map_column(columns, 2, |id| self.group(id));
        })
    }

    /// Rewrites owners and access control lists of every node of `tree`.
    pub fn apply(&self, tree: &mut Tree) {
        if self.is_empty() {
            return;
        }
        for index in 0..tree.len() {
            let attributes = &mut tree.node_mut(NodeId(index as u32)).attributes;
            attributes.uid = self.user(attributes.uid);
            attributes.gid = self.group(attributes.gid);
            for name in ["system.posix_acl_access", "system.posix_acl_default"] {
                if let Some(acl) = attributes.xattrs.get_mut(name.as_bytes()) {
                    self.apply_to_acl(acl);
                }
            }
        }
    }

    /// A version, then entries of tag (u16), permissions (u16) and id (u32), little-endian.
    fn apply_to_acl(&self, acl: &mut [u8]) {
        const USER: u16 = 0x02;
        const GROUP: u16 = 0x08;
        for entry in acl.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
            let tag = u16::from_le_bytes([entry[0], entry[1]]);
            let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            let id = match tag {
                USER => self.user(id),
                GROUP => self.group(id),
                _ => id,
            };
            entry[4..].copy_from_slice(&id.to_le_bytes());
        }
    }
}

/// Blanks the day of the last password change, which is the day of the build.
pub fn without_change_days(shadow: &str) -> String {
    rewrite(shadow, |columns| {
        if let Some(day) = columns.get_mut(2) {
            day.clear();
        }
    })
}

fn new_ids(base: &str, text: &str) -> BTreeMap<u32, u32> {
    let name = |line: &str| line.split(':').next().unwrap_or_default().to_owned();
    let known: Vec<String> = base.lines().map(name).collect();
    let mut map = BTreeMap::new();
    for line in text.lines() {
        let name = name(line);
        let id = line.split(':').nth(2).and_then(|id| id.parse::<u32>().ok());
        // `users` has id 100 by Debian's policy.
        if let Some(id) = id
            && DYNAMIC.contains(&id)
            && (name.as_str(), id) != ("users", 100)
            && !known.contains(&name)
        {
            map.insert(id, stable_id(&name));
        }
    }
    map
}

fn rewrite(text: &str, change: impl Fn(&mut Vec<String>)) -> String {
    let lines = text.lines().filter(|line| !line.is_empty());
    lines.fold(String::new(), |out, line| {
        let mut columns: Vec<String> = line.split(':').map(str::to_owned).collect();
        change(&mut columns);
        out + &columns.join(":") + "\n"
    })
}

fn map_column(columns: &mut [String], column: usize, map: impl Fn(u32) -> u32) {
    if let Some(text) = columns.get_mut(column)
        && let Ok(id) = text.parse()
    {
        *text = map(id).to_string();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use forelay_image::tree::{Attributes, FileData, Kind, Node};

    use super::*;

    #[test]
    fn well_known_names_and_ids_are_unique() {
        let names: BTreeSet<_> = WELL_KNOWN.iter().map(|(name, _)| name).collect();
        let ids: BTreeSet<_> = WELL_KNOWN.iter().map(|(_, id)| id).collect();
        assert_eq!(names.len(), WELL_KNOWN.len());
        assert_eq!(ids.len(), WELL_KNOWN.len());
        assert!(ids.iter().all(|id| DYNAMIC.contains(id)));
    }

    #[test]
    fn ids_depend_on_the_name_alone() {
        assert_eq!(stable_id("redis"), 216);
        let hashed = stable_id("some-daemon");
        assert!((HASHED_START..=HASHED_START | HASHED_MASK).contains(&hashed));
        assert_eq!(hashed, stable_id("some-daemon"));
        assert_ne!(hashed, stable_id("other-daemon"));
    }

    #[test]
    fn only_new_dynamic_accounts_get_new_ids() {
        let base = "root:x:0:0::/:/bin/sh\nolder:x:100:101::/:/bin/sh\n";
        let passwd = format!("{base}redis:x:101:102::/:/x\nme:x:1000:1000::/:/x\n");
        let group = "users:x:100:\nolder:x:101:\nredis:x:102:\n";
        let map = IdMap::new(base, &passwd, "users:x:100:\nolder:x:101:\n", group);
        let expected = format!("{base}redis:x:216:216::/:/x\nme:x:1000:1000::/:/x\n");
        assert_eq!(map.passwd(&passwd), expected);
        assert_eq!(
            map.group_file(group),
            "users:x:100:\nolder:x:101:\nredis:x:216:\n"
        );

        let mut tree = Tree::new();
        let mut attributes = Attributes::with_mode(0o640);
        (attributes.uid, attributes.gid) = (101, 101);
        let acl = [2u32.to_le_bytes(), [2, 0, 7, 0], 101u32.to_le_bytes()].concat();
        attributes
            .xattrs
            .insert(b"system.posix_acl_access".to_vec(), acl);
        let kind = Kind::File(FileData::Bytes(Vec::new().into()));
        let id = tree.insert_path(b"f", Node { attributes, kind }).unwrap();
        map.apply(&mut tree);
        let attributes = &tree.node(id).attributes;
        assert_eq!((attributes.uid, attributes.gid), (216, 101));
        assert_eq!(attributes.xattrs[&b"system.posix_acl_access"[..]][8], 216);
    }

    #[test]
    fn the_day_of_the_build_leaves_no_trace_in_shadow() {
        assert_eq!(
            without_change_days("redis:!:20780::::::\n"),
            "redis:!:::::::\n"
        );
    }
}
