//! The worker's side of the holder: mounts to serve, the pinner, canary and heartbeat.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::FdFlags;
use rustix::net::SocketType;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{HOLDER_FD, PINNER_FD};
use crate::packet::{Packet, Word};
use crate::pinner;

/// A mount that the holder holds.
#[derive(Debug)]
pub struct Domain {
    /// Trust domain.
    pub name: String,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// The session, for [`Session::Takeover`](crate::Session::Takeover).
    pub fuse: OwnedFd,
}

/// Why a worker ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// The holder is to unmount and end.
    Stop,
    /// Another worker is to take over, such as a newer one.
    Restart,
}

impl FromStr for Shutdown {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        match text {
            "stop" => Ok(Self::Stop),
            "restart" => Ok(Self::Restart),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// Why the holder did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The holder is gone or does not make sense.
    #[error("the holder cannot be reached")]
    Connection(#[from] io::Error),
    /// The holder says no.
    #[error("the holder refused: {0}")]
    Refused(String),
}

/// The connection to the holder that started this process.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    /// Held from a request to its answer.
    exchange: Mutex<()>,
}

/// The socket that `variable` names, kept from children.
fn inherited(variable: &str) -> io::Result<Option<OwnedFd>> {
    let Some(number) = std::env::var_os(variable) else {
        return Ok(None);
    };
    let number = number.to_str().and_then(|text| text.parse::<RawFd>().ok());
    let number = number
        .filter(|&fd| fd > 2)
        .ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: only looked at, and let go of before anything could close it: what has this
    // number may be somebody else's.
    let found = unsafe { BorrowedFd::borrow_raw(number) };
    // Another kind of file, or none, was not left by a holder.
    if rustix::net::sockopt::socket_type(found)? != SocketType::SEQPACKET {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    rustix::io::fcntl_setfd(found, FdFlags::CLOEXEC)?;
    // SAFETY: the parent left this socket to us and named it; each variable is read once, at
    // start, by whom it is meant for, and nothing else here opens seqpacket sockets before.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(number) }))
}

/// The pinner's own socket, when started by a holder; call it once.
pub fn pinner_socket() -> io::Result<Option<OwnedFd>> {
    inherited(PINNER_FD)
}

impl Client {
    /// The holder, if this process was started by one; call it once.
    pub fn from_env() -> Result<Option<Self>, ClientError> {
        Ok(inherited(HOLDER_FD)?.map(|socket| Self {
            socket,
            exchange: Mutex::default(),
        }))
    }

    /// The mounts it holds, by name.
    pub fn domains(&self) -> Result<Vec<Domain>, ClientError> {
        let mut domains: Vec<Domain> = Vec::new();
        loop {
            // One by one: the holder does not wait for room in the socket.
            let last = domains.last().map_or("", |domain| domain.name.as_str());
            let next = self.ask(&Packet::new(Word::After).field(last), &[])?;
            match parse_domain(next)? {
                Some(domain) => domains.push(domain),
                None => return Ok(domains),
            }
        }
    }

    /// The mount of this name, if it holds one.
    pub fn domain(&self, name: &str) -> Result<Option<Domain>, ClientError> {
        parse_domain(self.ask(&Packet::new(Word::Domain).field(name), &[])?)
    }

    /// Has it mount and hold a further domain.
    pub fn create_domain(&self, name: &str, mountpoint: &Path) -> Result<Domain, ClientError> {
        let request = Packet::new(Word::Create).field(name).path(mountpoint);
        let mut reply = self.ask(&request, &[])?;
        Ok(Domain {
            name: name.to_owned(),
            mountpoint: mountpoint.to_owned(),
            fuse: reply.take_fd().map_err(io::Error::from)?,
        })
    }

    /// A way to the pinner.
    pub fn pinner(&self) -> Result<pinner::PinnerClient, ClientError> {
        let mut reply = self.ask(&Packet::new(Word::Pinner), &[])?;
        Ok(pinner::PinnerClient::new(
            reply.take_fd().map_err(io::Error::from)?,
        ))
    }

    /// Says that this worker serves, and has it watched by a thread that does nothing: see
    /// the module's description. Without support (Linux before 6.9) only the process is. From
    /// now on the holder wants [signs of life](Client::alive).
    pub fn ready(&self) -> Result<(), ClientError> {
        let canary = match canary() {
            Ok(canary) => canary,
            Err(error) => {
                tracing::warn!(%error, "no canary thread: the process is watched");
                let pid = rustix::process::getpid();
                pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from)?
            }
        };
        self.ask(&Packet::new(Word::Ready), &[canary.as_fd()])
            .map(drop)
    }

    /// A sign of life. An error says that there is no holder any more.
    pub fn alive(&self) -> Result<(), ClientError> {
        // Not answered, so it needs no turn.
        Ok(Packet::new(Word::Alive).send(&self.socket, &[])?)
    }

    /// Waits for the holder's end for at most `limit`; true if it has ended.
    pub fn wait_for_end(&self, limit: Duration) -> bool {
        let mut end = [PollFd::new(&self.socket, PollFlags::empty())];
        let limit = Timespec::try_from(limit).ok();
        poll(&mut end, limit.as_ref()).is_ok_and(|ended| ended > 0)
    }

    /// Says what is to happen when this process ends. Does not end it.
    pub fn shutdown(&self, reason: Shutdown) -> Result<(), ClientError> {
        let reason = match reason {
            Shutdown::Stop => "stop",
            Shutdown::Restart => "restart",
        };
        self.ask(&Packet::new(Word::Shutdown).field(reason), &[])
            .map(drop)
    }

    fn ask(&self, request: &Packet, fds: &[BorrowedFd<'_>]) -> Result<Packet, ClientError> {
        let _exchange = self.exchange.lock();
        request.send(&self.socket, fds)?;
        receive(&self.socket)
    }
}

/// Rows up to the closing `ok`.
pub(super) fn receive_domains(socket: &OwnedFd) -> Result<Vec<Domain>, ClientError> {
    let mut domains = Vec::new();
    while let Some(domain) = parse_domain(receive(socket)?)? {
        domains.push(domain);
    }
    Ok(domains)
}

/// A mount; `None` if the packet says that there is none.
fn parse_domain(mut packet: Packet) -> Result<Option<Domain>, ClientError> {
    if packet.word() == Word::Ok {
        return Ok(None);
    }
    Ok(Some(Domain {
        name: packet.text(0).map_err(io::Error::from)?.to_owned(),
        mountpoint: packet.path_at(1).map_err(io::Error::from)?,
        fuse: packet.take_fd().map_err(io::Error::from)?,
    }))
}

fn receive(socket: &OwnedFd) -> Result<Packet, ClientError> {
    let packet = Packet::receive(socket)?.ok_or(io::Error::from(io::ErrorKind::UnexpectedEof))?;
    match packet.word() {
        Word::Error => {
            let text = packet.text(0).map_err(io::Error::from)?;
            Err(ClientError::Refused(text.to_owned()))
        }
        _ => Ok(packet),
    }
}

/// A descriptor of a thread that sleeps until the process dies.
fn canary() -> io::Result<OwnedFd> {
    const PIDFD_THREAD: u32 = libc::O_EXCL as u32;
    let (sender, receiver) = std::sync::mpsc::channel::<Pid>();
    std::thread::Builder::new()
        .name("canary".to_owned())
        .spawn(move || {
            // The asker may have given up; sleeping does no harm then.
            let _ = sender.send(rustix::thread::gettid());
            loop {
                std::thread::park();
            }
        })?;
    let thread = receiver.recv().map_err(io::Error::other)?;
    Ok(pidfd_open(
        thread,
        PidfdFlags::from_bits_retain(PIDFD_THREAD),
    )?)
}
