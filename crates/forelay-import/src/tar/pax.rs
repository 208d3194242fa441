//! Extension headers: what GNU and PAX headers say about the entry that follows them.

use std::collections::BTreeMap;

/// What extension headers said about the entry that follows them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Extensions {
    /// Name, from a GNU header.
    pub name: Option<Vec<u8>>,
    /// Link target, from a GNU header.
    pub link: Option<Vec<u8>>,
    /// PAX records by key; of several with one key the last counts.
    pub pax: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Values of `GNU.sparse.offset` and `GNU.sparse.numbytes`, the keys that come again
    /// for each piece of a sparse file, in their order.
    pub pieces: Vec<u64>,
}

impl Extensions {
    pub fn number(&self, key: &[u8]) -> Option<u64> {
        let text = std::str::from_utf8(self.pax.get(key)?).ok()?;
        text.parse().ok()
    }

    /// Adds PAX records: `<length> <key>=<value>\n`, the length counting the whole record.
    /// `None` if they are malformed.
    pub fn add_pax(&mut self, mut records: &[u8]) -> Option<()> {
        while !records.is_empty() && records[0] != 0 {
            let space = records.iter().position(|&byte| byte == b' ')?;
            let length: usize = std::str::from_utf8(&records[..space]).ok()?.parse().ok()?;
            let record = records.get(space + 1..length)?;
            let record = record.strip_suffix(b"\n")?;
            let equals = record.iter().position(|&byte| byte == b'=')?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                let number = std::str::from_utf8(value).ok()?.parse().ok()?;
                self.pieces.push(number);
            } else {
                self.pax.insert(key.to_vec(), value.to_vec());
            }
            records = &records[length..];
        }
        Some(())
    }
}

/// `-12.5` as whole seconds (rounded down) and nanoseconds.
pub(super) fn parse_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}
