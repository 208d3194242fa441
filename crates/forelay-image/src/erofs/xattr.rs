//! Extended attributes stored behind an inode.
//!
//! Owns the encoding: a 12-byte header, then entries with a prefix index, the rest of
//! the name and the value. Shared attributes are not written and not read.

use std::collections::BTreeMap;

use super::layout::{LayoutError, u16_at};

const HEADER_BYTES: usize = 12;
/// Largest attribute area that the inode's 16-bit count can describe, in bytes.
const AREA_BYTES_MAX: usize = HEADER_BYTES + 4 * (u16::MAX as usize - 1);

/// Name prefixes with an index; the longer ones stand first.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"security.", 6),
    (b"trusted.", 4),
    (b"user.", 1),
];

/// Name of the attribute that makes a directory opaque for overlayfs.
pub const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// Name of the attribute of an entry that is what it is, whatever lower layers have in its
/// place: composing then does as overlayfs does, not as dpkg.
pub const REPLACES: &[u8] = b"trusted.forelay.replaces";

/// Why attributes cannot be stored.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum XattrError {
    /// The name has no prefix that EROFS knows, or it is too long.
    #[error(
        "extended attribute {0:?} cannot be stored: names start with user., trusted., security. \
         or are POSIX ACLs, and have at most 255 bytes"
    )]
    Name(String),
    /// A value or all of them are too long.
    #[error("extended attribute {name:?}: {bytes} bytes are too many")]
    Size {
        /// The attribute's name.
        name: String,
        /// Bytes of the value or of all attributes.
        bytes: usize,
    },
}

fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|&(prefix, index)| {
        let rest = name.strip_prefix(prefix)?;
        let is_acl = index == 2 || index == 3;
        (is_acl == rest.is_empty()).then_some((index, rest))
    })
}

/// The attribute area for `xattrs`; empty if there are none.
pub fn encode(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<Vec<u8>, XattrError> {
    if xattrs.is_empty() {
        return Ok(Vec::new());
    }
    let mut out = vec![0; HEADER_BYTES];
    for (name, value) in xattrs {
        let lossy = || String::from_utf8_lossy(name).into_owned();
        let (index, rest) = split_name(name).ok_or_else(|| XattrError::Name(lossy()))?;
        let name_len = u8::try_from(rest.len()).map_err(|_| XattrError::Name(lossy()))?;
        let size_error = |bytes| XattrError::Size {
            name: lossy(),
            bytes,
        };
        let value_len = u16::try_from(value.len()).map_err(|_| size_error(value.len()))?;
        out.extend([name_len, index]);
        out.extend(value_len.to_le_bytes());
        out.extend(rest);
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
        if out.len() > AREA_BYTES_MAX {
            return Err(size_error(out.len()));
        }
    }
    Ok(out)
}

/// One attribute as stored: prefix, rest of the name, value.
pub type RawXattr<'a> = (&'static [u8], &'a [u8], &'a [u8]);

/// Calls `visit` for each attribute of an area.
pub fn visit<'a>(area: &'a [u8], mut visit: impl FnMut(RawXattr<'a>)) -> Result<(), LayoutError> {
    if area.is_empty() {
        return Ok(());
    }
    const CUT: LayoutError = LayoutError::Truncated("extended attributes");
    let header = area.get(..HEADER_BYTES).ok_or(CUT)?;
    if header[4] != 0 {
        let value = header[4].into();
        let what = "shared extended attributes";
        return Err(LayoutError::Unsupported { what, value });
    }
    let mut rest = &area[HEADER_BYTES..];
    while !rest.is_empty() {
        let head = rest.get(..4).ok_or(CUT)?;
        let name_end = 4 + usize::from(head[0]);
        let end = name_end + usize::from(u16_at(head, 2));
        let prefix = PREFIXES
            .iter()
            .find(|(_, index)| *index == head[1])
            .ok_or(LayoutError::corrupt("attribute prefix", head[1].into()))?;
        let name = rest.get(4..name_end).ok_or(CUT)?;
        let value = rest.get(name_end..end).ok_or(CUT)?;
        visit((prefix.0, name, value));
        rest = rest.get(end.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(())
}

/// The attributes of an area by full name.
pub fn decode(area: &[u8]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, LayoutError> {
    let mut out = BTreeMap::new();
    visit(area, |(prefix, name, value)| {
        out.insert([prefix, name].concat(), value.to_vec());
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_round_trip() {
        let xattrs: BTreeMap<Vec<u8>, Vec<u8>> = [
            (&b"user.a"[..], &b"1"[..]),
            (b"security.capability", &[1, 0, 0, 2]),
            (b"trusted.overlay.opaque", b"y"),
            (b"system.posix_acl_access", b"acl"),
            (b"user.empty", b""),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_vec(), value.to_vec()))
        .collect();
        let area = encode(&xattrs).unwrap();
        assert_eq!(area.len() % 4, 0);
        assert_eq!(decode(&area), Ok(xattrs));
        assert!(decode(&area[..area.len() - 4]).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let one = |name: &[u8], bytes| BTreeMap::from([(name.to_vec(), vec![0; bytes])]);
        assert!(matches!(
            encode(&one(b"other.x", 1)),
            Err(XattrError::Name(_))
        ));
        let acl = b"system.posix_acl_accessx";
        assert!(matches!(encode(&one(acl, 1)), Err(XattrError::Name(_))));
        assert!(matches!(
            encode(&one(b"user.x", 70_000)),
            Err(XattrError::Size { .. })
        ));
    }
}
