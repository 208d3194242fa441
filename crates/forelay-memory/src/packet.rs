//! Packets between worker, holder and pinner: a word, fields and descriptors over a Unix
//! seqpacket socket.
//!
//! ```text
//! version 0 word 0 field 0 field ...      at most MAX_BYTES, with at most MAX_FDS descriptors
//! ```
//! The two ends may be of different executables: a worker that was started after an upgrade
//! talks to the holder and the pinner of before. So each packet names the version of its
//! [`Word`]s, another version is refused, and whatever arrives is parsed without panics.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// Version of the words and their fields. Another one whenever any of them changes meaning.
pub(crate) const VERSION: u32 = 1;
/// Largest packet.
pub(crate) const MAX_BYTES: usize = 64 << 10;
const MAX_FDS: usize = 4;

macro_rules! words {
    ($($(#[$doc:meta])* $word:ident = $text:literal,)*) => {
        /// What a packet says.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Word { $($(#[$doc])* $word,)* }

        impl Word {
            const fn text(self) -> &'static str {
                match self { $(Self::$word => $text,)* }
            }

            fn parse(text: &[u8]) -> Option<Self> {
                $(if text == $text.as_bytes() { return Some(Self::$word); })*
                None
            }
        }
    };
}

words! {
    /// Asks the holder for the first of its mounts after a name.
    After = "after",
    /// Asks the holder for a further mount: name, mountpoint.
    Create = "create",
    /// Asks the holder for a connection to the pinner.
    Pinner = "pinner",
    /// The worker serves its mounts; with the canary's descriptor.
    Ready = "ready",
    /// The worker is alive. Not answered.
    Alive = "alive",
    /// What is to happen when the worker ends: `stop` or `restart`.
    Shutdown = "shutdown",
    /// Asks a worker without a holder for its mounts; it then ends.
    HandOver = "hand-over",
    /// One mount: name, mountpoint, with its descriptor. As a request to the holder: the one
    /// of that name.
    Domain = "domain",
    /// Opens a further connection to the pinner; with its descriptor.
    Connect = "connect",
    /// Asks the pinner what it holds.
    Table = "table",
    /// One file of the pinner's table: domain, key, extents.
    Row = "row",
    /// Makes a file known to the pinner: domain, key, bytes, with its descriptor.
    Add = "add",
    /// Lets go of a file and its locks: domain, key.
    Forget = "forget",
    /// Locks: domain, key, extents.
    Pin = "pin",
    /// Unlocks: domain, key, extents.
    Unpin = "unpin",
    /// Done.
    Ok = "ok",
    /// Not done: why.
    Error = "error",
}

/// A packet received or to be sent.
#[derive(Debug)]
pub(crate) struct Packet {
    word: Word,
    fields: Vec<Vec<u8>>,
    fds: Vec<OwnedFd>,
}

/// Two connected sockets.
pub(crate) fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

impl Packet {
    /// A packet without fields.
    pub fn new(word: Word) -> Self {
        Self {
            word,
            fields: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// Appends a field. A zero in it, which would end it, becomes a space.
    pub fn field(mut self, field: impl ToString) -> Self {
        let field = field.to_string().replace('\0', " ");
        self.fields.push(field.into_bytes());
        self
    }

    /// Appends a path.
    pub fn path(mut self, path: &Path) -> Self {
        self.fields.push(path.as_os_str().as_bytes().to_vec());
        self
    }

    /// What it says.
    pub fn word(&self) -> Word {
        self.word
    }

    /// The field at `index`, parsed.
    pub fn parse<T: FromStr>(&self, index: usize) -> Result<T, Malformed> {
        self.text(index)?.parse().map_err(|_| Malformed)
    }

    /// The field at `index` as text.
    pub fn text(&self, index: usize) -> Result<&str, Malformed> {
        let field = self.fields.get(index).ok_or(Malformed)?;
        std::str::from_utf8(field).map_err(|_| Malformed)
    }

    /// The field at `index` as a path.
    pub fn path_at(&self, index: usize) -> Result<PathBuf, Malformed> {
        let field = self.fields.get(index).ok_or(Malformed)?;
        Ok(PathBuf::from(std::ffi::OsStr::from_bytes(field)))
    }

    /// Fields in it.
    pub fn len(&self) -> usize {
        self.fields.len()
    }

    /// Takes the first descriptor.
    pub fn take_fd(&mut self) -> Result<OwnedFd, Malformed> {
        if self.fds.is_empty() {
            return Err(Malformed);
        }
        Ok(self.fds.remove(0))
    }

    /// Sends it, with copies of `fds`.
    pub fn send(&self, socket: impl AsFd, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut bytes = format!("{VERSION}\0{}", self.word.text()).into_bytes();
        for field in &self.fields {
            bytes.push(0);
            bytes.extend_from_slice(field);
        }
        if bytes.len() > MAX_BYTES || fds.len() > MAX_FDS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let slices = [IoSlice::new(&bytes)];
        loop {
            match rustix::net::sendmsg(&socket, &slices, &mut control, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => return other.map(drop).map_err(Into::into),
            }
        }
    }

    /// Waits for a packet; `None` if the other end is gone.
    pub fn receive(socket: impl AsFd) -> io::Result<Option<Self>> {
        let mut bytes = vec![0; MAX_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut slices = [IoSliceMut::new(&mut bytes)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match rustix::net::recvmsg(&socket, &mut slices, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                other => break other?,
            }
        };
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(io::ErrorKind::InvalidData.into());
        }
        decode(&bytes[..received.bytes], fds).map(Some)
    }
}

fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> io::Result<Packet> {
    let mut fields = bytes.split(|&byte| byte == 0);
    let version = fields.next().unwrap_or_default();
    if version != VERSION.to_string().as_bytes() {
        let version = String::from_utf8_lossy(version);
        let problem = format!(
            "the other end speaks version {version:?}, this program version {VERSION}: stop the \
             daemon and start it again"
        );
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    let word = fields.next().and_then(Word::parse).ok_or(Malformed)?;
    Ok(Packet {
        word,
        fields: fields.map(<[u8]>::to_vec).collect(),
        fds,
    })
}

/// A packet that makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("a malformed packet")]
pub(crate) struct Malformed;

impl From<Malformed> for io::Error {
    fn from(error: Malformed) -> Self {
        Self::new(io::ErrorKind::InvalidData, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn words_fields_and_descriptors_arrive() {
        let (ours, theirs) = pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"hello").unwrap();
        io::Seek::rewind(&mut file).unwrap();
        Packet::new(Word::Add)
            .field(42u64)
            .path(Path::new("/a b"))
            .field("one\0two")
            .send(&ours, &[file.as_fd()])
            .unwrap();
        let mut packet = Packet::receive(&theirs).unwrap().unwrap();
        assert_eq!(packet.word(), Word::Add);
        assert_eq!(packet.parse::<u64>(0).unwrap(), 42);
        assert_eq!(packet.path_at(1).unwrap(), Path::new("/a b"));
        assert_eq!((packet.text(2).unwrap(), packet.len()), ("one two", 3));
        assert!(packet.parse::<u64>(1).is_err() && packet.text(3).is_err());
        let mut text = String::new();
        let mut received = std::fs::File::from(packet.take_fd().unwrap());
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert!(packet.take_fd().is_err());
        drop(ours);
        assert!(Packet::receive(&theirs).unwrap().is_none());
    }

    #[test]
    fn other_versions_and_unknown_words_are_refused_in_words() {
        let said = |bytes: &[u8]| decode(bytes, Vec::new()).unwrap_err().to_string();
        assert!(said(b"2\0alive").contains("version \"2\""));
        // As packets were before they had a version.
        assert!(said(b"domains").contains("version \"domains\""));
        assert!(said(b"1\0dance").contains("malformed"));
        assert!(said(b"1").contains("malformed"));
        assert_eq!(decode(b"1\0alive", Vec::new()).unwrap().word(), Word::Alive);
    }
}
