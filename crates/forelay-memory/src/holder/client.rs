//! The daemon's side of the holder: mounts to serve, the pinner, the canary.

use std::io;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use parking_lot::Mutex;
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::{HOLDER_FD, PINNER_FD};
use crate::packet::Packet;
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

/// How a daemon wants to be followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// The holder is to unmount and end.
    Stop,
    /// Another daemon is to take over, such as a newer one.
    Restart,
}

impl FromStr for Farewell {
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
pub struct Client(Mutex<OwnedFd>);

/// The descriptor that `variable` names, kept from children.
fn inherited(variable: &str) -> io::Result<Option<OwnedFd>> {
    let Some(number) = std::env::var_os(variable) else {
        return Ok(None);
    };
    let number = number.to_str().and_then(|text| text.parse::<RawFd>().ok());
    let number = number
        .filter(|&fd| fd > 2)
        .ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: the parent left this descriptor to us and named it; each variable is read
    // once, at start, by whom it is meant for. A wrong number fails in the next call.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    if let Err(error) = rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC) {
        // Not open: there is nothing to close either.
        std::mem::forget(fd);
        return Err(error.into());
    }
    Ok(Some(fd))
}

/// The pinner's own socket, when started by a holder; call it once.
pub fn pinner_socket() -> io::Result<Option<OwnedFd>> {
    inherited(PINNER_FD)
}

impl Client {
    /// The holder, if this process was started by one; call it once.
    pub fn from_env() -> Result<Option<Self>, ClientError> {
        Ok(inherited(HOLDER_FD)?.map(|fd| Self(Mutex::new(fd))))
    }

    /// The mounts it holds, by name.
    pub fn domains(&self) -> Result<Vec<Domain>, ClientError> {
        let socket = self.0.lock();
        Packet::new("domains").send(&*socket, &[])?;
        let mut domains = Vec::new();
        loop {
            let mut packet = receive(&socket)?;
            if packet.text(0).map_err(io::Error::from)? == "ok" {
                return Ok(domains);
            }
            domains.push(Domain {
                name: packet.text(1).map_err(io::Error::from)?.to_owned(),
                mountpoint: packet.path_at(2).map_err(io::Error::from)?,
                fuse: packet.take_fd().map_err(io::Error::from)?,
            });
        }
    }

    /// Has it mount and hold a further domain.
    pub fn create_domain(&self, name: &str, mountpoint: &Path) -> Result<Domain, ClientError> {
        let request = Packet::new("create").word(name).path(mountpoint);
        let mut reply = self.ask(&request)?;
        Ok(Domain {
            name: name.to_owned(),
            mountpoint: mountpoint.to_owned(),
            fuse: reply.take_fd().map_err(io::Error::from)?,
        })
    }

    /// Has it unmount a domain. What still maps its files faults no more.
    pub fn remove_domain(&self, name: &str) -> Result<(), ClientError> {
        self.ask(&Packet::new("remove").word(name)).map(drop)
    }

    /// A way to the pinner.
    pub fn pinner(&self) -> Result<pinner::Client, ClientError> {
        let mut reply = self.ask(&Packet::new("pinner"))?;
        Ok(pinner::Client::new(
            reply.take_fd().map_err(io::Error::from)?,
        ))
    }

    /// Says that this daemon is up, and has it watched by a thread that does nothing: see
    /// the module's description. Without support (Linux before 6.9) only the process is.
    pub fn ready(&self) -> Result<(), ClientError> {
        let canary = match canary() {
            Ok(canary) => canary,
            Err(error) => {
                tracing::warn!(%error, "no canary thread: the process is watched");
                let pid = rustix::process::getpid();
                pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from)?
            }
        };
        let socket = self.0.lock();
        Packet::new("canary").send(&*socket, &[canary.as_fd()])?;
        receive(&socket).map(drop)
    }

    /// Says what is to happen when this process ends. Does not end it.
    pub fn farewell(&self, farewell: Farewell) -> Result<(), ClientError> {
        let word = match farewell {
            Farewell::Stop => "stop",
            Farewell::Restart => "restart",
        };
        self.ask(&Packet::new("farewell").word(word)).map(drop)
    }

    fn ask(&self, request: &Packet) -> Result<Packet, ClientError> {
        let socket = self.0.lock();
        request.send(&*socket, &[])?;
        receive(&socket)
    }
}

fn receive(socket: &OwnedFd) -> Result<Packet, ClientError> {
    let packet = Packet::receive(socket)?.ok_or(io::Error::from(io::ErrorKind::UnexpectedEof))?;
    match packet.text(0).map_err(io::Error::from)? {
        "error" => {
            let text = packet.text(1).map_err(io::Error::from)?;
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
