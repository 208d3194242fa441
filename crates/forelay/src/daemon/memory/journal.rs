//! The mapping table's journal on disk: rows that a successor finds when this daemon died.
//!
//! Owns the file and when it is rewritten; what its records mean is
//! [`forelay_cache::mapping_table::journal`]'s. It lies in the runtime directory: rows do
//! not outlive the host's VMs. Nothing is synced, since only a crash of the host could
//! lose what was written, and that ends the VMs too.
//!
//! Invariants: the file is replaced whole or appended to, never changed in place; what a
//! predecessor that still hangs in its death writes goes to a file that has no name any
//! more.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use forelay_cache::mapping_table::journal::{append, replay};
use forelay_cache::mapping_table::{MappingTable, Phase, SharedTable};
use forelay_host::atomic_write;

/// The journal is rewritten when it has grown to this many bytes beyond twice its start.
const SLACK_BYTES: u64 = 1 << 20;

/// How soon a write that failed is tried again.
const RETRY_EVERY: Duration = Duration::from_secs(1);

/// What a journal of an earlier daemon said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// VMs that ran.
    pub vms: usize,
    /// Launches that were prepared or under way; their rows are dropped.
    pub unstarted: usize,
    /// Records that contradicted those before them.
    pub refused_records: usize,
    /// Bytes behind the last intact record.
    pub dropped_bytes: u64,
}

/// A journal that is written.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    bytes: u64,
    start_bytes: u64,
    /// A write failed: what is there may be torn, and records are lost.
    behind: bool,
}

impl Journal {
    /// Rebuilds the table that `path` tells of (an empty one if there is no file), and
    /// starts a journal of it there. The table's residency is for the kernel to say.
    pub fn open(path: PathBuf) -> io::Result<(Self, MappingTable, Replayed)> {
        let found = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            found => found?,
        };
        let old = replay(&found);
        for (record, error) in &old.refused {
            tracing::warn!(record, %error, "the mapping table's journal contradicts itself");
        }
        let mut table = old.table;
        let unstarted: Vec<_> = table
            .known_vms()
            .filter(|(_, phase)| *phase == Phase::Premapped)
            .map(|(vm, _)| vm.clone())
            .collect();
        for vm in &unstarted {
            // The name was read from the table just now.
            let _ = table.unmap(vm);
        }
        let replayed = Replayed {
            vms: table.known_vms().count(),
            unstarted: unstarted.len(),
            refused_records: old.refused.len(),
            dropped_bytes: old.dropped_bytes as u64,
        };
        let (file, bytes) = start_file(&path, &snapshot(&table))?;
        table.start_journal();
        let journal = Self {
            path,
            file,
            bytes,
            start_bytes: bytes,
            behind: false,
        };
        Ok((journal, table, replayed))
    }

    /// Writes what has changed since the last call; all of the table if a call before failed.
    pub fn write(&mut self, table: &SharedTable) -> io::Result<()> {
        let records = table.write(MappingTable::drain_records);
        if records.is_empty() && !self.behind {
            return Ok(());
        }
        if !self.behind {
            let mut frames = Vec::new();
            append(&mut frames, &records);
            self.behind = true;
            self.file.write_all(&frames)?;
            self.behind = false;
            self.bytes += frames.len() as u64;
        }
        if self.behind || self.bytes > 2 * self.start_bytes + SLACK_BYTES {
            let whole = table.write(|table| {
                // What has changed since is in the snapshot; told again it would contradict it.
                drop(table.drain_records());
                snapshot(table)
            });
            self.behind = true;
            let (file, bytes) = start_file(&self.path, &whole)?;
            (self.file, self.bytes, self.start_bytes) = (file, bytes, bytes);
            self.behind = false;
        }
        Ok(())
    }
}

/// Writes a journal in order, on a thread of its own, which ends with this.
#[derive(Debug)]
pub struct JournalWriter(SyncSender<()>);

impl JournalWriter {
    /// Starts the thread.
    pub fn start(mut journal: Journal, table: Arc<SharedTable>) -> io::Result<Self> {
        // One waiting wake is enough: a write takes all that has changed until then.
        let (wake, woken) = sync_channel(1);
        let write = move || {
            let mut fails = false;
            loop {
                let woken = woken.recv_timeout(RETRY_EVERY);
                if woken.is_ok() || fails {
                    let written = journal.write(&table);
                    match (&written, fails) {
                        (Err(error), false) => {
                            tracing::error!(%error, "the mapping table's journal is behind");
                        }
                        (Ok(()), true) => tracing::info!("the mapping table's journal is whole"),
                        _ => {}
                    }
                    fails = written.is_err();
                }
                if woken == Err(RecvTimeoutError::Disconnected) {
                    // What has changed since the last wake.
                    let _ = journal.write(&table);
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("forelay-journal".to_owned());
        thread.spawn(write)?;
        Ok(Self(wake))
    }

    /// The table may have changed. Never blocks.
    pub fn wake(&self) {
        let _ = self.0.try_send(());
    }
}

/// All of the table as frames.
fn snapshot(table: &MappingTable) -> Vec<u8> {
    let mut frames = Vec::new();
    append(&mut frames, &table.snapshot());
    frames
}

/// Puts a journal that begins with `frames` in the place of the one at `path`.
fn start_file(path: &std::path::Path, frames: &[u8]) -> io::Result<(File, u64)> {
    Ok((atomic_write(path, frames)?, frames.len() as u64))
}

#[cfg(test)]
mod tests {
    use forelay_cache::DeviceImage;
    use forelay_image::Digest;

    use super::*;

    fn device() -> DeviceImage {
        DeviceImage {
            image: Digest::of(b"image"),
            image_bytes: 1 << 20,
        }
    }

    #[test]
    fn running_vms_are_found_again_and_what_had_not_started_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.journal");
        let (mut journal, table, replayed) = Journal::open(path.clone()).unwrap();
        assert_eq!(replayed, Replayed::default());
        let table = SharedTable::new(table);
        let map = |vm: &str, phase| {
            let devices = [device()];
            table.write(|table| table.map(&vm.into(), &"d".into(), &"p".into(), &devices, phase))
        };
        map("runs", Phase::Running).unwrap();
        map("~d/p", Phase::Premapped).unwrap();
        journal.write(&table).unwrap();
        map("torn", Phase::Running).unwrap();
        journal.write(&table).unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();

        let (_, found, replayed) = Journal::open(path.clone()).unwrap();
        let vms: Vec<_> = found.known_vms().map(|(vm, _)| vm.clone()).collect();
        assert_eq!(vms, ["runs".into()]);
        assert_eq!((replayed.vms, replayed.unstarted), (1, 1));
        assert!(replayed.dropped_bytes > 0 && replayed.refused_records == 0);
        let (_, _, again) = Journal::open(path).unwrap();
        assert_eq!((again.vms, again.dropped_bytes), (1, 0), "rewritten whole");
    }

    #[test]
    fn after_a_failed_write_the_whole_table_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.journal");
        let (mut journal, table, _) = Journal::open(path.clone()).unwrap();
        let table = SharedTable::new(table);
        let map = |vm: &str| {
            let (vm, devices) = (vm.into(), [device()]);
            table
                .write(|table| table.map(&vm, &"d".into(), &"p".into(), &devices, Phase::Running))
                .unwrap();
        };
        map("before");
        journal.file = File::open("/dev/full").unwrap();
        assert!(journal.write(&table).is_err());
        map("after");
        journal.write(&table).unwrap();
        let (_, found, replayed) = Journal::open(path).unwrap();
        assert_eq!(
            (found.known_vms().count(), replayed.refused_records),
            (2, 0)
        );
    }

    #[test]
    fn a_long_journal_is_rewritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("table.journal");
        let (mut journal, table, _) = Journal::open(path.clone()).unwrap();
        let table = SharedTable::new(table);
        for _ in 0..8000 {
            table.write(|table| {
                let (vm, devices) = ("vm".into(), [device()]);
                table
                    .map(&vm, &"d".into(), &"p".into(), &devices, Phase::Running)
                    .unwrap();
                table.unmap(&vm).unwrap();
            });
            journal.write(&table).unwrap();
        }
        assert!(std::fs::metadata(path).unwrap().len() < SLACK_BYTES + 4096);
    }
}
