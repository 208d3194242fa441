//! Mounts whose holder has ended, from the worker that still serves them to the next holder.
//!
//! ```text
//! worker, its holder gone          next holder
//!        listen  <- hand over ---  connect
//!        domain, descriptor ---->  (one for each mount)
//!        ok                 ---->
//!        ends                      holds the mounts, starts a worker of its own
//! ```
//! Until somebody comes the worker serves on: ending would end the VMs. Invariant: the
//! mounts are held by one of the two at any time.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::client::{ClientError, Domain, receive_domains};
use crate::packet::{Packet, Word};

/// How long a worker that handed its mounts over may take to end.
const END_LIMIT: Duration = Duration::from_secs(15);

/// Where a worker without a holder waits for the next one.
#[derive(Debug)]
pub struct Handover {
    listener: OwnedFd,
    path: PathBuf,
}

impl Handover {
    /// Waits at `path`, which only this user may reach.
    pub fn listen(path: &Path) -> io::Result<Self> {
        match rustix::fs::unlink(path) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        let listener = socket()?;
        rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?;
        rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
        rustix::net::listen(&listener, 1)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Waits for a holder and hands it the mounts that there are then. When this returns, the
    /// worker is to end.
    pub fn hand_over(self, domains: &dyn Fn() -> io::Result<Vec<Domain>>) -> io::Result<()> {
        loop {
            let holder = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC)?;
            match Self::give(&holder, domains) {
                Ok(true) => {
                    // The path is the next worker's to use.
                    let _ = rustix::fs::unlink(&self.path);
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "a holder came and did not take the mounts"),
            }
        }
    }

    fn give(holder: &OwnedFd, domains: &dyn Fn() -> io::Result<Vec<Domain>>) -> io::Result<bool> {
        let Some(request) = Packet::receive(holder)? else {
            return Ok(false);
        };
        if request.word() != Word::HandOver {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for domain in domains()? {
            let row = Packet::new(Word::Domain).field(domain.name);
            let row = row.path(&domain.mountpoint);
            row.send(holder, &[domain.fuse.as_fd()])?;
        }
        Packet::new(Word::Ok).send(holder, &[])?;
        Ok(true)
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// Takes the mounts of a worker that waits at `path` for a holder, and waits for its end.
/// `None` if none waits there.
pub fn take_mounts(path: &Path) -> Result<Option<Vec<Domain>>, ClientError> {
    let worker = socket().map_err(io::Error::from)?;
    let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
    match rustix::net::connect(&worker, &address) {
        Ok(()) => {}
        Err(Errno::NOENT | Errno::CONNREFUSED) => return Ok(None),
        Err(error) => return Err(io::Error::from(error).into()),
    }
    let credentials = rustix::net::sockopt::socket_peercred(&worker).map_err(io::Error::from)?;
    let process = pidfd_open(credentials.pid, PidfdFlags::empty()).map_err(io::Error::from)?;
    Packet::new(Word::HandOver).send(&worker, &[])?;
    let domains = receive_domains(&worker)?;
    let mut end = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    let limit = Timespec::try_from(END_LIMIT).ok();
    if !poll(&mut end, limit.as_ref()).is_ok_and(|ended| ended > 0) {
        tracing::warn!(pid = %credentials.pid.as_raw_nonzero(), "the worker before does not end: killing it");
        // It may have ended just now.
        let _ = pidfd_send_signal(&process, Signal::KILL);
    }
    Ok(Some(domains))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_where_nothing_is_or_a_socket_was_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover");
        assert!(take_mounts(&path).unwrap().is_none());
        drop(Handover::listen(&path).unwrap());
        assert!(take_mounts(&path).unwrap().is_none());
        assert!(Handover::listen(&path).is_ok(), "what is left is replaced");
    }
}
