//! The pinner: a process that does nothing but hold memory locks on images.
//!
//! Locks belong to mappings of the process that made them. Made here, they survive the
//! daemon; and a fault while locking blocks only the pinner, never the process that has
//! to answer it. The holder starts it; daemons talk to it through [`PinnerClient`].
//!
//! One thread serves one connection; `connect` opens further ones, so that a lock which
//! waits for a fault delays no unlock. Invariant: the table says no more than what is
//! locked.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use forelay_image::extent::Extent;
use forelay_image::pages::{PageRun, PageSet};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::files::FileKey;
use crate::mapping::FileMapping;
use crate::packet::{self, Malformed, Packet, Word};

/// Extents in one packet: what fits at two 20-digit numbers each.
const EXTENTS_PER_PACKET: usize = 1000;

/// What the pinner holds of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// Trust domain of the file's mount.
    pub domain: String,
    /// The file.
    pub key: FileKey,
    /// What is locked.
    pub extents: Vec<Extent>,
}

/// Why something could not be pinned or unpinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The pinner process is gone, and its locks with it.
    #[error("the pinner is gone")]
    Gone(#[source] io::Error),
    /// The pinner could not lock all (a limit on locked memory or on mappings, mostly).
    #[error("{key}: only {pinned_bytes} bytes could be locked")]
    Lock {
        /// The file.
        key: FileKey,
        /// What was locked all the same.
        pinned_bytes: u64,
        /// Why not all.
        source: io::Error,
    },
}

#[derive(Debug)]
struct PinnedFile {
    mapping: FileMapping,
    locked: Mutex<PageSet>,
}

type Table = Mutex<BTreeMap<(String, FileKey), Arc<PinnedFile>>>;

/// Serves the connections that come over `root` until its other end is closed. The body
/// of the pinner process.
pub fn run(root: OwnedFd) -> io::Result<()> {
    let table = Arc::new(Table::default());
    serve(&root, &table)
}

fn serve(connection: &OwnedFd, table: &Arc<Table>) -> io::Result<()> {
    while let Some(mut request) = Packet::receive(connection)? {
        if request.word() == Word::Connect {
            let fd = request.take_fd()?;
            let table = Arc::clone(table);
            std::thread::Builder::new()
                .name("pinner".to_owned())
                .spawn(move || {
                    if let Err(error) = serve(&fd, &table) {
                        tracing::warn!(%error, "a connection to the pinner broke");
                    }
                })?;
            continue;
        }
        let answer = handle(connection, &mut request, table);
        let reply = match answer {
            Ok(bytes) => Packet::new(Word::Ok).field(bytes),
            Err((bytes, error)) => Packet::new(Word::Error)
                .field(bytes)
                .field(error.raw_os_error().unwrap_or(libc::EIO)),
        };
        reply.send(connection, &[])?;
    }
    Ok(())
}

/// Bytes that changed, or that many and why no more.
fn handle(
    connection: &OwnedFd,
    request: &mut Packet,
    table: &Table,
) -> Result<u64, (u64, io::Error)> {
    let early = |error: Malformed| (0, error.into());
    if request.word() == Word::Table {
        return send_table(connection, table).map_err(|error| (0, error));
    }
    let domain = request.text(0).map_err(early)?.to_owned();
    let key: FileKey = request.parse(1).map_err(early)?;
    let id = (domain, key);
    match request.word() {
        Word::Add => {
            let device_bytes = request.parse(2).map_err(early)?;
            let file = File::from(request.take_fd().map_err(early)?);
            add(&mut table.lock(), id, file, device_bytes).map_err(|error| (0, error))?;
            Ok(0)
        }
        Word::Forget => {
            table.lock().remove(&id);
            Ok(0)
        }
        word @ (Word::Pin | Word::Unpin) => {
            let file = table.lock().get(&id).cloned();
            let file = file.ok_or((0, io::ErrorKind::NotFound.into()))?;
            let extents = parse_extents(request, 2).map_err(early)?;
            file.change(&extents, word == Word::Pin)
        }
        _ => Err(early(Malformed)),
    }
}

/// Makes a file known, or replaces one of that name in a mount that is gone.
fn add(
    table: &mut BTreeMap<(String, FileKey), Arc<PinnedFile>>,
    id: (String, FileKey),
    file: File,
    device_bytes: u64,
) -> io::Result<()> {
    let inode = |file: &File| {
        use rustix::fs::{AtFlags, StatxFlags};
        // Not synced: the daemon that asks may be the one who would have to answer.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(file, c"", flags, StatxFlags::INO)?;
        io::Result::Ok((stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino))
    };
    if let Some(known) = table.get(&id)
        && inode(known.mapping.file())? == inode(&file)?
    {
        return Ok(());
    }
    let file = PinnedFile {
        mapping: FileMapping::new(file, device_bytes)?,
        locked: Mutex::default(),
    };
    table.insert(id, Arc::new(file));
    Ok(())
}

impl PinnedFile {
    fn change(&self, extents: &[Extent], lock: bool) -> Result<u64, (u64, io::Error)> {
        let mut changed_bytes = 0;
        for extent in extents {
            let run = PageRun::covering(*extent);
            if lock {
                // Not under the table's lock: this may wait for a fault.
                self.mapping
                    .lock(*extent)
                    .map_err(|error| (changed_bytes, error))?;
                changed_bytes += self.locked.lock().insert(run).bytes();
            } else {
                let removed_bytes = self.locked.lock().remove(run).bytes();
                self.mapping
                    .unlock(*extent)
                    .map_err(|error| (changed_bytes, error))?;
                changed_bytes += removed_bytes;
            }
        }
        Ok(changed_bytes)
    }
}

fn send_table(connection: &OwnedFd, table: &Table) -> io::Result<u64> {
    let rows: Vec<_> = table
        .lock()
        .iter()
        .map(|((domain, key), file)| {
            let extents: Vec<Extent> = file.locked.lock().extents().collect();
            (domain.clone(), *key, extents)
        })
        .collect();
    for (domain, key, extents) in rows {
        // A file without locks has a row, too: the pinner holds its mapping.
        for piece in pieces(&extents) {
            let row = Packet::new(Word::Row).field(&domain).field(key.hex());
            with_extents(row, piece).send(connection, &[])?;
        }
    }
    Ok(0)
}

fn pieces(extents: &[Extent]) -> Vec<&[Extent]> {
    if extents.is_empty() {
        return vec![extents];
    }
    extents.chunks(EXTENTS_PER_PACKET).collect()
}

fn with_extents(packet: Packet, extents: &[Extent]) -> Packet {
    extents.iter().fold(packet, |packet, extent| {
        packet.field(extent.offset).field(extent.len)
    })
}

fn parse_extents(packet: &Packet, first: usize) -> Result<Vec<Extent>, Malformed> {
    (first..packet.len())
        .step_by(2)
        .map(|at| Ok(Extent::new(packet.parse(at)?, packet.parse(at + 1)?)))
        .collect()
}

/// A daemon's way to the pinner.
#[derive(Debug)]
pub struct PinnerClient {
    root: Mutex<OwnedFd>,
    idle: Mutex<Vec<OwnedFd>>,
}

impl PinnerClient {
    /// Talks over a socket whose other end [`run`] serves.
    pub fn new(root: OwnedFd) -> Self {
        Self {
            root: Mutex::new(root),
            idle: Mutex::default(),
        }
    }

    /// A way to no pinner: every request fails until [`PinnerClient::renew`].
    pub fn unconnected() -> io::Result<Self> {
        let (ours, _) = packet::pair()?;
        Ok(Self::new(ours))
    }

    /// Talks to `other`'s pinner from now on: this one's is gone, and its locks with it.
    pub fn renew(&self, other: Self) {
        *self.root.lock() = other.root.into_inner();
        self.idle.lock().clear();
    }

    /// True if the pinner has ended.
    pub fn is_gone(&self) -> bool {
        let root = self.root.lock();
        let mut fds = [PollFd::new(&*root, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// A pinner on a thread of this process, for tests and tools that need no survival.
    pub fn in_process() -> io::Result<Self> {
        let (ours, theirs) = packet::pair()?;
        std::thread::Builder::new()
            .name("pinner".to_owned())
            .spawn(move || {
                if let Err(error) = run(theirs) {
                    tracing::warn!(%error, "the pinner's connection broke");
                }
            })?;
        Ok(Self::new(ours))
    }

    /// Makes `file` known; adding it again changes nothing.
    pub fn add(
        &self,
        domain: &str,
        key: FileKey,
        file: &File,
        device_bytes: u64,
    ) -> Result<(), PinError> {
        let request = Packet::new(Word::Add)
            .field(domain)
            .field(key.hex())
            .field(device_bytes);
        self.exchange(key, &request, Some(file)).map(drop)
    }

    /// Lets go of a file and all its locks.
    pub fn forget(&self, domain: &str, key: FileKey) -> Result<(), PinError> {
        let request = Packet::new(Word::Forget).field(domain).field(key.hex());
        self.exchange(key, &request, None).map(drop)
    }

    /// Locks extents; returns bytes newly locked.
    pub fn pin(&self, domain: &str, key: FileKey, extents: &[Extent]) -> Result<u64, PinError> {
        self.change(Word::Pin, domain, key, extents)
    }

    /// Unlocks extents; returns bytes that were locked.
    pub fn unpin(&self, domain: &str, key: FileKey, extents: &[Extent]) -> Result<u64, PinError> {
        self.change(Word::Unpin, domain, key, extents)
    }

    /// What is locked now.
    pub fn table(&self) -> Result<Vec<Pinned>, PinError> {
        let connection = self.connection().map_err(PinError::Gone)?;
        let rows = receive_table(&connection).map_err(PinError::Gone)?;
        self.idle.lock().push(connection);
        Ok(rows)
    }

    fn change(
        &self,
        word: Word,
        domain: &str,
        key: FileKey,
        extents: &[Extent],
    ) -> Result<u64, PinError> {
        let mut changed_bytes = 0;
        for piece in extents.chunks(EXTENTS_PER_PACKET) {
            let request = Packet::new(word).field(domain).field(key.hex());
            match self.exchange(key, &with_extents(request, piece), None) {
                Ok(bytes) => changed_bytes += bytes,
                Err(PinError::Lock {
                    pinned_bytes,
                    source,
                    ..
                }) => {
                    return Err(PinError::Lock {
                        key,
                        pinned_bytes: changed_bytes + pinned_bytes,
                        source,
                    });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(changed_bytes)
    }

    /// A connection that nobody uses: an idle one or a new one.
    fn connection(&self) -> io::Result<OwnedFd> {
        if let Some(idle) = self.idle.lock().pop() {
            return Ok(idle);
        }
        let (ours, theirs) = packet::pair()?;
        Packet::new(Word::Connect).send(&*self.root.lock(), &[theirs.as_fd()])?;
        Ok(ours)
    }

    fn exchange(
        &self,
        key: FileKey,
        request: &Packet,
        file: Option<&File>,
    ) -> Result<u64, PinError> {
        let exchange = || {
            let connection = self.connection()?;
            let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
            request.send(&connection, &fds)?;
            let reply = Packet::receive(&connection)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            self.idle.lock().push(connection);
            let errno = match reply.word() {
                Word::Ok => None,
                _ => Some(reply.parse::<i32>(1)?),
            };
            Ok((reply.parse::<u64>(0)?, errno))
        };
        match exchange().map_err(PinError::Gone)? {
            (bytes, None) => Ok(bytes),
            (pinned_bytes, Some(errno)) => Err(PinError::Lock {
                key,
                pinned_bytes,
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }
}

fn receive_table(connection: &OwnedFd) -> io::Result<Vec<Pinned>> {
    Packet::new(Word::Table).send(connection, &[])?;
    let mut rows: Vec<Pinned> = Vec::new();
    loop {
        let packet = Packet::receive(connection)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        if packet.word() != Word::Row {
            return Ok(rows);
        }
        let (domain, key) = (packet.text(0)?.to_owned(), packet.parse(1)?);
        let extents = parse_extents(&packet, 2)?;
        match rows.last_mut() {
            Some(last) if last.domain == domain && last.key == key => last.extents.extend(extents),
            _ => rows.push(Pinned {
                domain,
                key,
                extents,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forelay_image::digest::Digest;

    #[test]
    fn locks_are_held_told_and_let_go() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 12).unwrap();
        let key = Digest::of(b"x");
        let client = PinnerClient::in_process().unwrap();
        let page = |n: u64, pages: u64| Extent::new(n << 12, pages << 12);
        assert!(client.pin("d", key, &[page(0, 1)]).is_err(), "unknown file");
        client.add("d", key, file.as_file(), 64 << 12).unwrap();
        assert_eq!(
            client.pin("d", key, &[page(0, 4), page(8, 4)]).unwrap(),
            8 << 12
        );
        assert_eq!(client.pin("d", key, &[page(2, 4)]).unwrap(), 2 << 12);
        assert_eq!(client.unpin("d", key, &[page(1, 1)]).unwrap(), 1 << 12);
        let rows = client.table().unwrap();
        assert_eq!(rows[0].extents, [page(0, 1), page(2, 4), page(8, 4)]);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(status.contains("VmLck:\t      36 kB"), "{status}");
        assert!(matches!(
            client.pin("d", key, &[page(64, 1)]),
            Err(PinError::Lock {
                pinned_bytes: 0,
                ..
            })
        ));
        client.forget("d", key).unwrap();
        assert_eq!(client.table().unwrap(), []);
    }
}
