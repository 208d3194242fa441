//! The FUSE wire format, as far as a flat read-only directory needs it.
//!
//! Source: `include/uapi/linux/fuse.h`, protocol 7.41. Parsing never panics: a request
//! too short for its opcode is `None`. All numbers are in host byte order.

/// Node id of the mount's root directory.
pub const ROOT_NODE: u64 = 1;
/// Set in `unique` of a request that is delivered again after [`notify::RESEND`].
pub const UNIQUE_RESEND: u64 = 1 << 63;
/// Protocol version spoken here.
pub const MAJOR: u32 = 7;
/// Newest minor version spoken here.
pub const MINOR: u32 = 41;
/// What the session negotiates as largest READ, in pages.
pub const MAX_PAGES: u16 = 256;
/// Requests that may be in the background at once: readahead counts as background.
pub const MAX_BACKGROUND: u16 = 4096;
/// The kernel wants reads of `/dev/fuse` to have room for a WRITE of this size.
pub const MAX_WRITE_BYTES: u32 = 4096;
/// "For ever": nothing in the mount changes behind the kernel's back.
pub const VALID_S: u64 = 1 << 32;

/// Operation codes.
#[allow(missing_docs)]
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const STATX: u32 = 52;
}

/// Codes of notifications, which a daemon writes of its own accord.
#[allow(missing_docs)]
pub mod notify {
    pub const INVAL_INODE: i32 = 2;
    pub const INVAL_ENTRY: i32 = 3;
    pub const STORE: i32 = 4;
    pub const RESEND: i32 = 7;
}

/// INIT flags that are asked for when the kernel offers them.
pub mod init_flags {
    /// Readahead may have several READs in flight.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// OPEN may answer ENOSYS: no handles, so none to lose when the daemon dies.
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    /// LOOKUP and READDIR in parallel.
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    /// `max_pages` counts.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// Cached pages go only when told.
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    /// `flags2` counts.
    pub const INIT_EXT: u64 = 1 << 30;
    /// Pending requests can be delivered again (6.9).
    pub const HAS_RESEND: u64 = 1 << 39;

    /// All of the above.
    pub const WANTED: u64 = ASYNC_READ
        | NO_OPEN_SUPPORT
        | PARALLEL_DIROPS
        | MAX_PAGES
        | EXPLICIT_INVAL_DATA
        | INIT_EXT
        | HAS_RESEND;
}

/// Cursor over a request's bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&mut self) -> Option<u32> {
        let (head, rest) = self.0.split_first_chunk::<4>()?;
        self.0 = rest;
        Some(u32::from_ne_bytes(*head))
    }

    fn u64(&mut self) -> Option<u64> {
        let (head, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_ne_bytes(*head))
    }
}

/// What every request begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// One of [`opcode`].
    pub opcode: u32,
    /// To be echoed in the reply.
    pub unique: u64,
    /// The node asked about.
    pub node: u64,
    /// Thread that asks, as the mount's pid namespace numbers it.
    pub thread: u32,
}

impl RequestHeader {
    /// Splits a request into header and body; `None` if it is cut short.
    pub fn parse(request: &[u8]) -> Option<(Self, &[u8])> {
        let body = request.get(40..)?;
        let mut fields = Fields(request);
        let len = fields.u32()?;
        if len as usize != request.len() {
            return None;
        }
        let (opcode, unique, node) = (fields.u32()?, fields.u64()?, fields.u64()?);
        let (_uid, _gid, thread) = (fields.u32()?, fields.u32()?, fields.u32()?);
        Some((
            Self {
                opcode,
                unique,
                node,
                thread,
            },
            body,
        ))
    }
}

/// Body of READ and READDIR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadIn {
    /// First byte, or directory cookie.
    pub offset: u64,
    /// Bytes wanted.
    pub len: u32,
}

impl ReadIn {
    /// `None` if cut short.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let mut fields = Fields(body);
        fields.u64()?; // handle
        Some(Self {
            offset: fields.u64()?,
            len: fields.u32()?,
        })
    }
}

/// Body of GETXATTR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetXattrIn<'a> {
    /// Room that there is for the value; 0 asks for its size.
    pub room: u32,
    /// The attribute's name.
    pub name: &'a [u8],
}

impl<'a> GetXattrIn<'a> {
    /// `None` if cut short.
    pub fn parse(body: &'a [u8]) -> Option<Self> {
        let room = Fields(body).u32()?;
        let name = name(body.get(8..)?)?;
        Some(Self { room, name })
    }
}

/// Body of INIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InitIn {
    /// Protocol major version of the kernel.
    pub major: u32,
    /// Protocol minor version of the kernel.
    pub minor: u32,
    /// Readahead the kernel would do, in bytes.
    pub max_readahead: u32,
    /// Offered [`init_flags`].
    pub flags: u64,
}

impl InitIn {
    /// `None` if cut short.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let mut fields = Fields(body);
        let (major, minor, max_readahead) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let mut flags = u64::from(fields.u32()?);
        if flags & init_flags::INIT_EXT != 0 {
            flags |= u64::from(fields.u32()?) << 32;
        }
        Some(Self {
            major,
            minor,
            max_readahead,
            flags,
        })
    }

    /// The answer: everything wanted that the kernel offers.
    pub fn answer(&self, max_readahead: u32) -> Vec<u8> {
        let flags = self.flags & init_flags::WANTED;
        let mut out = Encoder::with_capacity(64);
        out.u32(MAJOR).u32(self.minor.min(MINOR)).u32(max_readahead);
        out.u32(flags as u32);
        out.u16(MAX_BACKGROUND).u16(MAX_BACKGROUND / 4 * 3);
        out.u32(MAX_WRITE_BYTES).u32(1);
        out.u16(MAX_PAGES).u16(0).u32((flags >> 32) as u32);
        out.zeros(28);
        out.0
    }
}

/// Name in a LOOKUP's body: bytes up to the terminating zero.
pub fn name(body: &[u8]) -> Option<&[u8]> {
    let end = body.iter().position(|&byte| byte == 0)?;
    Some(&body[..end])
}

/// What the mount tells about a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Node id, also the inode number.
    pub node: u64,
    /// Size in bytes.
    pub size_bytes: u64,
    /// File type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Attributes {
    fn encode(&self, out: &mut Encoder) {
        out.u64(self.node).u64(self.size_bytes);
        out.u64(self.size_bytes.div_ceil(512));
        out.zeros(24 + 12); // times: images have none
        out.u32(self.mode).u32(1).u32(self.uid).u32(self.gid);
        out.u32(0).u32(4096).u32(0);
    }

    /// Reply to LOOKUP.
    pub fn entry_reply(&self) -> Vec<u8> {
        let mut out = Encoder::with_capacity(128);
        out.u64(self.node).u64(0).u64(VALID_S).u64(VALID_S);
        out.u32(0).u32(0);
        self.encode(&mut out);
        out.0
    }

    /// Reply to GETATTR.
    pub fn attr_reply(&self) -> Vec<u8> {
        let mut out = Encoder::with_capacity(104);
        out.u64(VALID_S).u32(0).u32(0);
        self.encode(&mut out);
        out.0
    }

    /// Reply to STATX: what GETATTR would say. Images have no birth time.
    pub fn statx_reply(&self) -> Vec<u8> {
        const BASIC_STATS: u32 = 0x7ff;
        let mut out = Encoder::with_capacity(288);
        out.u64(VALID_S).u32(0).u32(0).zeros(16);
        out.u32(BASIC_STATS).u32(4096).u64(0);
        out.u32(1).u32(self.uid).u32(self.gid);
        out.u16(self.mode as u16).u16(0);
        out.u64(self.node).u64(self.size_bytes);
        out.u64(self.size_bytes.div_ceil(512)).u64(0);
        out.zeros(4 * 16); // times
        out.zeros(4 * 4 + 14 * 8); // devices, spare
        out.0
    }
}

/// Reply to GETXATTR that asks for the value's size.
pub fn xattr_size_reply(bytes: u32) -> Vec<u8> {
    let mut out = Encoder::with_capacity(8);
    out.u32(bytes).u32(0);
    out.0
}

/// Reply to OPENDIR: no handle, nothing cached.
pub fn opendir_reply() -> [u8; 16] {
    [0; 16]
}

/// Reply to STATFS.
pub fn statfs_reply(files: u64) -> Vec<u8> {
    let mut out = Encoder::with_capacity(80);
    out.u64(0).u64(0).u64(0).u64(files).u64(0);
    out.u32(4096).u32(255).u32(4096).u32(0);
    out.zeros(24);
    out.0
}

/// Appends a directory entry unless it would exceed `limit` bytes; says whether it fit.
pub fn push_dirent(out: &mut Vec<u8>, limit: usize, entry: (u64, u64, u32, &[u8])) -> bool {
    let (node, cookie, kind, name) = entry;
    let entry_bytes = (24 + name.len()).next_multiple_of(8);
    if out.len() + entry_bytes > limit {
        return false;
    }
    let mut encoder = Encoder::with_capacity(entry_bytes);
    encoder
        .u64(node)
        .u64(cookie)
        .u32(name.len() as u32)
        .u32(kind);
    encoder.0.extend_from_slice(name);
    encoder.0.resize(entry_bytes, 0);
    out.extend_from_slice(&encoder.0);
    true
}

/// Header of a reply or notification whose body is `body_bytes` long.
pub fn out_header(body_bytes: usize, error_or_code: i32, unique: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&(16 + body_bytes as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error_or_code.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// Body of STORE, before the data.
pub fn store_body(node: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut out = Encoder::with_capacity(24);
    out.u64(node).u64(offset).u32(len).u32(0);
    out.0
}

/// Body of INVAL_INODE; `len` 0 means to the end.
pub fn inval_inode_body(node: u64, offset: u64, len: u64) -> Vec<u8> {
    let mut out = Encoder::with_capacity(24);
    out.u64(node).u64(offset).u64(len);
    out.0
}

/// Body of INVAL_ENTRY for `name` in the root directory.
pub fn inval_entry_body(name: &[u8]) -> Vec<u8> {
    let mut out = Encoder::with_capacity(17 + name.len());
    out.u64(ROOT_NODE).u32(name.len() as u32).u32(0);
    out.0.extend_from_slice(name);
    out.0.push(0);
    out.0
}

struct Encoder(Vec<u8>);

impl Encoder {
    fn with_capacity(bytes: usize) -> Self {
        Self(Vec::with_capacity(bytes))
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn zeros(&mut self, bytes: usize) -> &mut Self {
        self.0.resize(self.0.len() + bytes, 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn replies_have_the_sizes_of_the_kernel_structs() {
        let attributes = Attributes {
            node: 7,
            size_bytes: 4096,
            mode: 0o100440,
            uid: 0,
            gid: 0,
        };
        assert_eq!(attributes.entry_reply().len(), 128);
        assert_eq!(attributes.attr_reply().len(), 104);
        assert_eq!(attributes.statx_reply().len(), 288);
        assert_eq!(statfs_reply(3).len(), 80);
        let init = InitIn {
            major: 7,
            minor: 45,
            max_readahead: 131_072,
            flags: u64::MAX,
        };
        let answer = init.answer(1 << 20);
        assert_eq!(answer.len(), 64);
        assert_eq!(answer[4..8], MINOR.to_ne_bytes());
    }

    #[test]
    fn dirents_are_padded_and_stop_at_the_limit() {
        let mut out = Vec::new();
        assert!(push_dirent(&mut out, 64, (1, 1, 4, b".")));
        assert_eq!(out.len(), 32);
        assert!(push_dirent(&mut out, 64, (1, 2, 4, b"..")));
        assert!(!push_dirent(&mut out, 64, (9, 3, 8, b"x")));
        assert_eq!(out.len(), 64);
    }

    proptest! {
        #[test]
        fn no_bytes_make_parsing_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some((_, body)) = RequestHeader::parse(&bytes) {
                prop_assert_eq!(body.len(), bytes.len() - 40);
            }
            if let Some(read) = ReadIn::parse(&bytes) {
                prop_assert_eq!(&read.offset.to_ne_bytes()[..], &bytes[8..16]);
            }
            let _ = InitIn::parse(&bytes);
            let _ = GetXattrIn::parse(&bytes);
            if let Some(found) = name(&bytes) {
                prop_assert!(!found.contains(&0));
            }
        }
    }
}
