//! POSIX access control lists: from the text in which archives have them (`SCHILY.acl.access`,
//! as star and GNU tar write it) to the attribute that Linux keeps.
//!
//! ```text
//! user::rw-,user:33:r--,group::r--,mask::r--,other::---
//! user::rw-,user:www-data:r--:33,...      star adds the number
//! ```
//! Names without a number are looked up in the archive's own account files, then among the
//! accounts that every Debian system has by the same number. The host's accounts do not
//! count: the same archive gives the same image anywhere. Nor does the order of its entries:
//! lists stay texts until the whole tree is there.
//!
//! With a list, the group's permission bits are its mask. Invariant: where a list is left
//! out, nobody gets rights that the list did not give.

use std::collections::{BTreeMap, BTreeSet};

use forelay_image::tree::{NodeId, Tree};

/// What archives and Linux call the lists of a file and of what is made in a directory.
const LISTS: [(&[u8], &[u8]); 2] = [
    (b"SCHILY.acl.access", b"system.posix_acl_access"),
    (b"SCHILY.acl.default", b"system.posix_acl_default"),
];
/// Longest account file that is read.
const MAX_ACCOUNTS_BYTES: u64 = 16 << 20;

const VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// Debian's fixed users and groups that have the same number (base-passwd).
const FIXED: &[(&str, u32)] = &[
    ("root", 0),
    ("daemon", 1),
    ("bin", 2),
    ("sys", 3),
    ("games", 60),
    ("man", 12),
    ("lp", 7),
    ("mail", 8),
    ("news", 9),
    ("uucp", 10),
    ("proxy", 13),
    ("www-data", 33),
    ("backup", 34),
    ("list", 38),
    ("irc", 39),
    ("nobody", 65_534),
];

/// Debian's fixed groups without a user of their number.
const FIXED_GROUPS: &[(&str, u32)] = &[
    ("adm", 4),
    ("tty", 5),
    ("disk", 6),
    ("kmem", 15),
    ("dialout", 20),
    ("sudo", 27),
    ("audio", 29),
    ("operator", 37),
    ("src", 40),
    ("shadow", 42),
    ("utmp", 43),
    ("video", 44),
    ("plugdev", 46),
    ("staff", 50),
    ("users", 100),
    ("nogroup", 65_534),
];

/// Why a list cannot be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Unkept {
    Malformed,
    /// Nobody knows the number of this user or group.
    Account(String),
}

/// True for the PAX record of a list, which [`encode_all`] takes among the attributes.
pub(super) fn is_list(key: &[u8]) -> bool {
    LISTS.iter().any(|(text, _)| *text == key)
}

/// Puts Linux's attributes in the place of the texts in `tree`; says in `left_out` what it
/// cannot keep.
pub(super) fn encode_all(tree: &mut Tree, left_out: &mut BTreeSet<String>) {
    let mut accounts = None;
    for index in 0..tree.len() {
        let id = NodeId(index as u32);
        for (number, (text, name)) in LISTS.into_iter().enumerate() {
            let Some(text) = tree.node_mut(id).attributes.xattrs.remove(text) else {
                continue;
            };
            let accounts = accounts.get_or_insert_with(|| Accounts::of(tree));
            let encoded = encode(&text, number == 1, accounts);
            let attributes = &mut tree.node_mut(id).attributes;
            match encoded {
                Ok(Some(value)) => {
                    attributes.xattrs.entry(name.to_vec()).or_insert(value);
                    continue;
                }
                Ok(None) => continue,
                Err(Unkept::Malformed) => {
                    left_out.insert("a malformed access control list".to_owned());
                }
                Err(Unkept::Account(name)) => {
                    left_out.insert(format!(
                        "an access control list for {name:?}, whose id is not known"
                    ));
                }
            }
            if number == 0 && !attributes.xattrs.contains_key(name) {
                attributes.mode = attributes.mode & !0o070 | group_bits(&text) << 3;
            }
        }
    }
}

/// What a list that is not kept gives the owning group: its entry, within the mask.
fn group_bits(text: &[u8]) -> u16 {
    let text = String::from_utf8_lossy(text);
    let nobody = Accounts::default();
    let (mut group, mut mask) = (0, 7);
    for (tag, _, bits) in lines(&text).filter_map(|line| entry(line, &nobody).ok()) {
        match tag {
            GROUP_OBJ => group = bits,
            MASK => mask = bits,
            _ => {}
        }
    }
    group & mask
}

/// Users and groups by name, of the archive and of every Debian system.
#[derive(Default)]
struct Accounts([BTreeMap<String, u32>; 2]);

impl Accounts {
    fn of(tree: &Tree) -> Self {
        let read = |path: &str, fixed: &[&[(&str, u32)]]| {
            let file = tree.file(path.as_bytes());
            let small = file.is_some_and(|file| file.len() <= MAX_ACCOUNTS_BYTES);
            let text = if small { tree.text_of(path) } else { Ok(None) };
            let text = text.ok().flatten().unwrap_or_default();
            let own = text.lines().rev().filter_map(|line| {
                let mut columns = line.split(':');
                Some((columns.next()?, columns.nth(1)?.parse().ok()?))
            });
            let fixed = fixed.iter().copied().flatten().copied();
            let all = fixed.chain(own.collect::<Vec<_>>());
            all.map(|(name, id)| (name.to_owned(), id)).collect()
        };
        let users = read("etc/passwd", &[FIXED]);
        Self([users, read("etc/group", &[FIXED, FIXED_GROUPS])])
    }

    fn id(&self, name: &str, number: Option<&str>, group: bool) -> Result<u32, Unkept> {
        let known = || self.0[usize::from(group)].get(name).copied();
        let id = number.unwrap_or(name).parse().ok().or_else(known);
        id.ok_or_else(|| Unkept::Account(name.to_owned()))
    }
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.split([',', '\n']);
    let lines = lines.map(|line| line.split('#').next().unwrap_or_default().trim());
    lines.filter(|line| !line.is_empty())
}

/// The attribute's value for a list in words; nothing for an empty one. A list of what
/// permission bits say (owner, group, others) is kept as Linux would: only as a default.
fn encode(text: &[u8], is_default: bool, accounts: &Accounts) -> Result<Option<Vec<u8>>, Unkept> {
    let text = std::str::from_utf8(text).map_err(|_| Unkept::Malformed)?;
    let entries = lines(text).map(|line| entry(line, accounts));
    let mut entries: Vec<(u16, u32, u16)> = entries.collect::<Result<_, _>>()?;
    entries.sort_unstable();
    let is_bit = |tag: u16| matches!(tag, USER_OBJ | GROUP_OBJ | OTHER);
    if entries.is_empty() || !is_default && entries.iter().all(|(tag, ..)| is_bit(*tag)) {
        return Ok(None);
    }
    let mut value = VERSION.to_le_bytes().to_vec();
    for (tag, id, permissions) in entries {
        value.extend(tag.to_le_bytes());
        value.extend(permissions.to_le_bytes());
        value.extend(id.to_le_bytes());
    }
    Ok(Some(value))
}

/// Tag, number and permissions of one entry. Their order is that in which Linux wants them.
fn entry(line: &str, accounts: &Accounts) -> Result<(u16, u32, u16), Unkept> {
    let mut parts = line.split(':').map(str::trim);
    let (Some(kind), Some(name)) = (parts.next(), parts.next()) else {
        return Err(Unkept::Malformed);
    };
    let rest = parts.next();
    // `mask:r--` and `other:r--` may leave the name out.
    let (name, permissions) = match rest {
        Some(permissions) => (name, permissions),
        None if matches!(kind, "mask" | "m" | "other" | "o") => ("", name),
        None => return Err(Unkept::Malformed),
    };
    let number = parts.next().filter(|number| !number.is_empty());
    let id = |group: bool| accounts.id(name, number, group);
    let (tag, id) = match (kind, name) {
        ("user" | "u", "") => (USER_OBJ, NO_ID),
        ("user" | "u", _) => (USER, id(false)?),
        ("group" | "g", "") => (GROUP_OBJ, NO_ID),
        ("group" | "g", _) => (GROUP, id(true)?),
        ("mask" | "m", "") => (MASK, NO_ID),
        ("other" | "o", "") => (OTHER, NO_ID),
        _ => return Err(Unkept::Malformed),
    };
    let mut bits = 0;
    for letter in permissions.chars() {
        bits |= match letter {
            'r' => 4,
            'w' => 2,
            'x' => 1,
            '-' => 0,
            _ => return Err(Unkept::Malformed),
        };
    }
    Ok((tag, id, bits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use forelay_image::tree::Attributes;

    #[test]
    fn lists_of_tar_and_of_star_give_what_linux_keeps() {
        let mut tree = Tree::new();
        let passwd = "me:x:1234:1234::/:/bin/sh\n";
        tree.put_file(
            "etc/passwd",
            passwd.as_bytes(),
            Attributes::with_mode(0o644),
        )
        .unwrap();
        let accounts = Accounts::of(&tree);
        let encoded = |text: &str| encode(text.as_bytes(), false, &accounts);
        let expected =
            encoded("user::rw-\nuser:33:r--\nuser:1234:--x\ngroup::r--\nmask::r-x\nother::---\n");
        let bytes = expected.clone().unwrap().unwrap();
        assert_eq!(bytes.len(), 4 + 6 * 8);
        assert_eq!(bytes[4 + 8..4 + 16], [2, 0, 4, 0, 33, 0, 0, 0]);
        assert_eq!(bytes[4 + 5 * 8..], [0x20, 0, 0, 0, 255, 255, 255, 255]);
        for same in [
            "user::rw-,user:www-data:r--,user:me:--x,group::r--,mask::r-x,other::---",
            "u::rw,u:nobody-knows:r:33,u:1234:x,g::r,m:rx,o:-",
            "other::---,mask::r-x,group::r--,user:me:--x,user:33:r--,user::rw- # owner",
        ] {
            assert_eq!(encoded(same), expected, "{same}");
        }
        let bits = "user::rw-,group::r--,other::r--";
        assert_eq!(encoded(bits), Ok(None));
        let default = encode(bits.as_bytes(), true, &accounts).unwrap().unwrap();
        assert_eq!(default.len(), 4 + 3 * 8);
        let stranger = encoded("user::rw-,user:stranger:r--,group::r--,mask::r--,other::---");
        assert_eq!(stranger, Err(Unkept::Account("stranger".into())));
        for bad in ["user", "user::rwz", "owner::rwx", "user:1", "mask:x:rwx"] {
            assert_eq!(encoded(bad), Err(Unkept::Malformed), "{bad}");
        }
    }
}
