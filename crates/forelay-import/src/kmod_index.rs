//! The index files in which modprobe looks modules up (`modules.dep.bin` and the like): a
//! trie of names with values.
//!
//! ```text
//! file   magic, version, place of the root
//! node   [prefix NUL] [first, last, place of each child from first to last] [count, values]
//! value  priority, text NUL
//! ```
//! Numbers are big endian. A place is a byte offset whose highest bits tell which of the
//! three parts its node has. The format is kmod's (`libkmod/libkmod-index.c`).

use std::collections::BTreeMap;

const MAGIC: u32 = 0xB007_F457;
const VERSION: u32 = 0x0002_0001;
const HAS_PREFIX: u32 = 0x8000_0000;
const HAS_VALUES: u32 = 0x4000_0000;
const HAS_CHILDREN: u32 = 0x2000_0000;

/// The index of these values by name. Names that are not ASCII have no place in one.
pub fn kmod_index(entries: &BTreeMap<String, Vec<String>>) -> Vec<u8> {
    let entries = entries.iter().filter(|(name, _)| name.is_ascii());
    let entries: Vec<_> = entries
        .map(|(name, values)| (name.as_bytes(), &values[..]))
        .collect();
    let mut out = Vec::new();
    for number in [MAGIC, VERSION, 0] {
        put(&mut out, number);
    }
    let root = node(&mut out, &entries, 0);
    out[8..12].copy_from_slice(&root.to_be_bytes());
    out
}

fn put(out: &mut Vec<u8>, number: u32) {
    out.extend_from_slice(&number.to_be_bytes());
}

/// Writes the node of `entries`, sorted names that are equal in their first `depth` bytes, and
/// what lies below it; returns its place.
fn node(out: &mut Vec<u8>, entries: &[(&[u8], &[String])], depth: usize) -> u32 {
    let (Some((first, _)), Some((last, _))) = (entries.first(), entries.last()) else {
        return out.len() as u32;
    };
    let pairs = first[depth..].iter().zip(&last[depth..]);
    let end = depth + pairs.take_while(|(one, other)| one == other).count();
    let own = usize::from(first.len() == end);
    let (own, longer) = entries.split_at(own);
    let groups = longer.chunk_by(|(one, _), (other, _)| one[end] == other[end]);
    let children: BTreeMap<u8, u32> = groups
        .map(|group| (group[0].0[end], node(out, group, end + 1)))
        .collect();
    let mut place = out.len() as u32;
    if end > depth {
        place |= HAS_PREFIX;
        out.extend_from_slice(&first[depth..end]);
        out.push(0);
    }
    if let (Some((&low, _)), Some((&high, _))) =
        (children.first_key_value(), children.last_key_value())
    {
        place |= HAS_CHILDREN;
        out.extend([low, high]);
        for byte in low..=high {
            put(out, children.get(&byte).copied().unwrap_or(0));
        }
    }
    if let Some((_, values)) = own.first() {
        place |= HAS_VALUES;
        put(out, values.len() as u32);
        for (priority, value) in values.iter().enumerate() {
            put(out, priority as u32);
            out.extend_from_slice(value.as_bytes());
            out.push(0);
        }
    }
    place
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an index has at a name.
    fn values(index: &[u8], name: &str) -> Option<Vec<String>> {
        let number = |at: usize| u32::from_be_bytes(index[at..at + 4].try_into().unwrap());
        let text = |at: usize| index[at..].split(|&byte| byte == 0).next().unwrap();
        let (mut place, mut name) = (number(8), name.as_bytes());
        loop {
            let mut at = (place & 0x0fff_ffff) as usize;
            if place & HAS_PREFIX != 0 {
                let prefix = text(at);
                name = name.strip_prefix(prefix)?;
                at += prefix.len() + 1;
            }
            if place & HAS_CHILDREN != 0 {
                let (low, high) = (index[at], index[at + 1]);
                if let Some((&byte, rest)) = name.split_first() {
                    let child = (low..=high).position(|one| one == byte)?;
                    (place, name) = (number(at + 2 + 4 * child), rest);
                    if place == 0 {
                        return None;
                    }
                    continue;
                }
                at += 2 + 4 * (usize::from(high - low) + 1);
            }
            if place & HAS_VALUES == 0 || !name.is_empty() {
                return None;
            }
            let mut found = Vec::new();
            at += 4;
            for _ in 0..number(at - 4) {
                let value = text(at + 4);
                found.push(String::from_utf8(value.to_vec()).unwrap());
                at += 4 + value.len() + 1;
            }
            return Some(found);
        }
    }

    #[test]
    fn every_name_is_found_and_no_other() {
        let names = [
            "nf_nat",
            "nf",
            "nf_tables",
            "nft_chain_1",
            "nft_chain_12",
            "x",
            "pci:v*d[1-3]*",
        ];
        let entries =
            names.map(|name| (name.to_owned(), vec![format!("{name}.ko:"), "b".to_owned()]));
        let index = kmod_index(&BTreeMap::from(entries));
        assert_eq!(&index[..8], b"\xB0\x07\xF4\x57\0\x02\0\x01");
        for name in names {
            assert_eq!(
                values(&index, name).unwrap(),
                [format!("{name}.ko:"), "b".to_owned()]
            );
        }
        for name in ["", "n", "nf_", "nf_natx", "nft_chain_", "y"] {
            assert_eq!(values(&index, name), None, "{name}");
        }
        assert_eq!(values(&kmod_index(&BTreeMap::new()), "x"), None);
    }
}
