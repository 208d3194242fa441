//! The envelope of every binary object that the store writes.
//!
//! ```text
//! magic 8 | version u16 | reserved u16 | compatible u32 | ro_compatible u32 |
//! incompatible u32 | body bytes u64 | body | SHA-256 of all before it
//! ```
//! Integers are little-endian. Feature flags as in ext4 and composefs: an unknown
//! compatible flag is ignored, an unknown read-only-compatible one forbids writing, an
//! unknown incompatible one forbids reading.
//!
//! Refuses to know what the bodies mean. Invariant: [`unseal`] never panics, and returns
//! only bodies that arrived unchanged.

use forelay_image::Digest;

const HEADER_BYTES: usize = 32;
const DIGEST_BYTES: usize = 32;
const VERSION: u16 = 1;

/// Incompatible features that this code understands (none yet).
const KNOWN_INCOMPATIBLE: u32 = 0;

/// Why an envelope was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Fewer bytes than the header says.
    #[error("it is truncated: {found} bytes of {expected}")]
    Truncated {
        /// Bytes expected.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// Another kind of object.
    #[error(
        "it starts with {found:02x?} instead of {expected:02x?}: not the kind of object expected"
    )]
    Magic {
        /// Magic expected.
        expected: [u8; 8],
        /// Magic found.
        found: [u8; 8],
    },
    /// Written by newer code.
    #[error(
        "it uses features this version does not know (version {version}, incompatible flags {flags:#x}): update forelay"
    )]
    Incompatible {
        /// Its version.
        version: u16,
        /// Unknown incompatible flags.
        flags: u32,
    },
    /// Changed bytes.
    #[error("its checksum does not match: it is corrupted")]
    Checksum,
    /// The body contradicts itself.
    #[error("its contents are inconsistent: {0}")]
    Body(&'static str),
}

/// Puts `body` into an envelope.
pub fn seal(magic: &[u8; 8], body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_BYTES + body.len() + DIGEST_BYTES);
    out.extend_from_slice(magic);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 14]);
    out.extend_from_slice(&(body.len() as u64).to_le_bytes());
    out.extend_from_slice(body);
    let digest = Digest::of(&out);
    out.extend_from_slice(digest.as_bytes());
    out
}

/// Takes the body out of an envelope.
pub fn unseal<'a>(magic: &[u8; 8], bytes: &'a [u8]) -> Result<&'a [u8], SealError> {
    let mut header = Reader(bytes);
    let found = bytes.len() as u64;
    let truncated = |expected: u64| SealError::Truncated { expected, found };
    let short = |_| truncated((HEADER_BYTES + DIGEST_BYTES) as u64);
    let start: [u8; 8] = header.array().map_err(short)?;
    if start != *magic {
        return Err(SealError::Magic {
            expected: *magic,
            found: start,
        });
    }
    let version = header.u16().map_err(short)?;
    let _reserved = header.u16().map_err(short)?;
    let _compatible = header.u32().map_err(short)?;
    let _ro_compatible = header.u32().map_err(short)?;
    let flags = header.u32().map_err(short)? & !KNOWN_INCOMPATIBLE;
    if version != VERSION || flags != 0 {
        return Err(SealError::Incompatible { version, flags });
    }
    let body_bytes = header.u64().map_err(short)?;
    let overhead = (HEADER_BYTES + DIGEST_BYTES) as u64;
    let expected = body_bytes.saturating_add(overhead);
    if found < expected {
        return Err(truncated(expected));
    }
    if found > expected {
        return Err(SealError::Body("there are bytes after its end"));
    }
    let (sealed, digest) = bytes.split_at(bytes.len() - DIGEST_BYTES);
    if Digest::of(sealed).as_bytes() != digest {
        return Err(SealError::Checksum);
    }
    Ok(&sealed[HEADER_BYTES..])
}

/// Reads little-endian fields off the front of a slice.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn take(&mut self, bytes: usize) -> Result<&'a [u8], SealError> {
        if self.0.len() < bytes {
            return Err(SealError::Body("a field is missing"));
        }
        let (head, tail) = self.0.split_at(bytes);
        self.0 = tail;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], SealError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, SealError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, SealError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, SealError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn digest(&mut self) -> Result<Digest, SealError> {
        self.array().map(Digest::from_bytes)
    }

    /// A count of entries of `entry_bytes` each that follow; refuses counts that cannot fit.
    pub(crate) fn count(&mut self, entry_bytes: usize) -> Result<usize, SealError> {
        let count = self.u32()? as usize;
        if count > self.0.len() / entry_bytes {
            return Err(SealError::Body("it counts more entries than it holds"));
        }
        Ok(count)
    }

    pub(crate) fn finish(self) -> Result<(), SealError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(SealError::Body("its body has surplus bytes"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unchanged_envelopes_open() {
        let sealed = seal(b"FLTEST\0\0", b"body");
        assert_eq!(unseal(b"FLTEST\0\0", &sealed).unwrap(), b"body");
        assert!(matches!(
            unseal(b"FLOTHER\0", &sealed),
            Err(SealError::Magic { .. })
        ));
        for len in 0..sealed.len() {
            assert!(
                unseal(b"FLTEST\0\0", &sealed[..len]).is_err(),
                "cut to {len}"
            );
        }
        for index in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[index] ^= 0x40;
            assert!(
                unseal(b"FLTEST\0\0", &changed).is_err(),
                "bit flipped in byte {index}"
            );
        }
    }

    #[test]
    fn unknown_incompatible_flags_are_named() {
        let mut sealed = seal(b"FLTEST\0\0", b"body");
        sealed[20] = 2;
        assert_eq!(
            unseal(b"FLTEST\0\0", &sealed),
            Err(SealError::Incompatible {
                version: 1,
                flags: 2
            })
        );
    }
}
