//! The `/dev/fuse` descriptor: requests in, replies and notifications out.
//!
//! One shared, non-blocking file description serves all threads and, after a takeover,
//! all daemons: cloned descriptors would abort their requests when closed. Knows the
//! framing, not the meaning of requests.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::io::Errno;

use super::abi;

/// Room for any request that the kernel may send to a read-only mount.
pub const REQUEST_BYTES: usize = 64 << 10;

/// An open FUSE session.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
}

/// What a reader got.
#[derive(Debug)]
pub enum Received {
    /// A request of that many bytes.
    Request(usize),
    /// Nothing there right now.
    Empty,
    /// The mount is gone.
    Unmounted,
}

impl Connection {
    /// Wraps the descriptor of a mounted session.
    pub fn new(fd: OwnedFd) -> rustix::io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { fd })
    }

    /// The descriptor, for waiting.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Takes the next request, if there is one.
    pub fn receive(&self, buffer: &mut [u8]) -> rustix::io::Result<Received> {
        loop {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(len) => return Ok(Received::Request(len)),
                Err(Errno::AGAIN) => return Ok(Received::Empty),
                Err(Errno::NODEV) => return Ok(Received::Unmounted),
                // Interrupted, or the request was withdrawn before it could be copied.
                Err(Errno::INTR | Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Answers request `unique`. That the asker has given up meanwhile is no error.
    pub fn reply(&self, unique: u64, parts: &[&[u8]]) -> rustix::io::Result<()> {
        ignore_gone(self.write(0, unique, parts))
    }

    /// Answers request `unique` with an error.
    pub fn reply_error(&self, unique: u64, error: Errno) -> rustix::io::Result<()> {
        ignore_gone(self.write(-error.raw_os_error(), unique, &[]))
    }

    /// Tells the kernel something of our own accord. May wait for pages that unanswered
    /// READs hold locked: never call it from a thread that others wait on for answers.
    pub fn notify(&self, code: i32, parts: &[&[u8]]) -> rustix::io::Result<()> {
        self.write(code, 0, parts)
    }

    fn write(&self, code: i32, unique: u64, parts: &[&[u8]]) -> rustix::io::Result<()> {
        let body_bytes = parts.iter().map(|part| part.len()).sum();
        let header = abi::out_header(body_bytes, code, unique);
        let mut slices = Vec::with_capacity(1 + parts.len());
        slices.push(IoSlice::new(&header));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        loop {
            match rustix::io::writev(&self.fd, &slices) {
                Err(Errno::INTR) => {}
                other => return other.map(drop),
            }
        }
    }
}

fn ignore_gone(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

/// Waits of one reader thread for requests or for the order to stop. Wake-ups are
/// exclusive: one request wakes one reader.
#[derive(Debug)]
pub struct Waiter {
    epoll: OwnedFd,
}

impl Waiter {
    /// A waiter on `connection` that also wakes when `stop` becomes readable.
    pub fn new(connection: &Connection, stop: &OwnedFd) -> rustix::io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            connection.fd(),
            epoll::EventData::new_u64(0),
            epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE,
        )?;
        epoll::add(
            &epoll,
            stop,
            epoll::EventData::new_u64(1),
            epoll::EventFlags::IN,
        )?;
        Ok(Self { epoll })
    }

    /// Blocks; `false` means stop.
    pub fn wait(&self) -> rustix::io::Result<bool> {
        let mut events = Vec::with_capacity(2);
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            None,
        ) {
            Ok(_) => Ok(events.iter().all(|event| event.data.u64() != 1)),
            Err(Errno::INTR) => Ok(true),
            Err(error) => Err(error),
        }
    }
}
