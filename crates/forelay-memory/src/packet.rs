//! Packets between daemon, holder and pinner: words and descriptors over a Unix seqpacket
//! socket.
//!
//! A packet is a list of words (bytes without zero, joined by zeros) and at most
//! [`MAX_FDS`] descriptors. Both ends are started from one executable, so there is no
//! version in it; still, whatever arrives is parsed without panics.

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

/// Largest packet.
pub(crate) const MAX_BYTES: usize = 64 << 10;
const MAX_FDS: usize = 4;

/// A packet received or to be sent.
#[derive(Debug, Default)]
pub(crate) struct Packet {
    words: Vec<Vec<u8>>,
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
    /// A packet that begins with `word`.
    pub fn new(word: &str) -> Self {
        Self::default().word(word)
    }

    /// Appends a word.
    pub fn word(mut self, word: impl ToString) -> Self {
        self.words.push(word.to_string().into_bytes());
        self
    }

    /// Appends a path.
    pub fn path(mut self, path: &Path) -> Self {
        self.words.push(path.as_os_str().as_bytes().to_vec());
        self
    }

    /// The word at `index`, parsed.
    pub fn parse<T: FromStr>(&self, index: usize) -> Result<T, Malformed> {
        self.text(index)?.parse().map_err(|_| Malformed)
    }

    /// The word at `index` as text.
    pub fn text(&self, index: usize) -> Result<&str, Malformed> {
        let word = self.words.get(index).ok_or(Malformed)?;
        std::str::from_utf8(word).map_err(|_| Malformed)
    }

    /// The word at `index` as a path.
    pub fn path_at(&self, index: usize) -> Result<PathBuf, Malformed> {
        let word = self.words.get(index).ok_or(Malformed)?;
        Ok(PathBuf::from(std::ffi::OsStr::from_bytes(word)))
    }

    /// Words in it.
    pub fn len(&self) -> usize {
        self.words.len()
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
        let bytes = self.words.join(&0);
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
        bytes.truncate(received.bytes);
        let words = bytes.split(|&byte| byte == 0).map(<[u8]>::to_vec);
        Ok(Some(Self {
            words: words.collect(),
            fds,
        }))
    }
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
    fn words_and_descriptors_arrive() {
        let (ours, theirs) = pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"hello").unwrap();
        io::Seek::rewind(&mut file).unwrap();
        Packet::new("add")
            .word(42u64)
            .path(Path::new("/a b"))
            .send(&ours, &[file.as_fd()])
            .unwrap();
        let mut packet = Packet::receive(&theirs).unwrap().unwrap();
        assert_eq!(packet.text(0).unwrap(), "add");
        assert_eq!(packet.parse::<u64>(1).unwrap(), 42);
        assert_eq!(packet.path_at(2).unwrap(), Path::new("/a b"));
        assert!(packet.parse::<u64>(2).is_err() && packet.text(3).is_err());
        let mut text = String::new();
        let mut received = std::fs::File::from(packet.take_fd().unwrap());
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        assert!(packet.take_fd().is_err());
        drop(ours);
        assert!(Packet::receive(&theirs).unwrap().is_none());
    }
}
