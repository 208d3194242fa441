//! The audit log: who asked to change what, and whether it was done.
//!
//! One JSON object a line in the state directory, root's alone. Two files at most, each of
//! bounded size; what is older is dropped. A line that cannot be written is told in the daemon's
//! log instead: nobody is refused for want of disk.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use serde::Serialize;

use crate::daemon::memory::planner::now_ms;

/// The log in the state directory, and the one before it.
const FILE: &str = "audit.log";
const EARLIER: &str = "audit.log.1";
/// Largest size of either.
const MOST_BYTES: u64 = 8 << 20;
/// Longest path of a request that is written down.
const PATH_BYTES: usize = 300;

/// A request that changes something.
#[derive(Clone, Debug, Serialize)]
pub struct Deed {
    /// The user who asked; none if somebody did over TCP, with the token.
    pub user: Option<u32>,
    /// Its process, when it connected.
    pub process: Option<i32>,
    /// HTTP method.
    pub method: String,
    /// What it is about.
    pub path: String,
    /// HTTP status of the answer.
    pub status: u16,
}

#[derive(Serialize)]
struct AuditLine<'a> {
    at_ms: i64,
    #[serde(flatten)]
    deed: &'a Deed,
}

/// See the module's header.
#[derive(Debug)]
pub struct Audit {
    dir: PathBuf,
    most_bytes: u64,
    open: Mutex<Option<(File, u64)>>,
}

impl Audit {
    /// The log in this directory.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            dir: state_dir.to_owned(),
            most_bytes: MOST_BYTES,
            open: Mutex::default(),
        }
    }

    /// Writes a deed down.
    pub fn note(&self, mut deed: Deed) {
        deed.path
            .truncate(deed.path.floor_char_boundary(PATH_BYTES));
        if let Err(error) = self.write(&deed) {
            tracing::error!(%error, ?deed, "not in the audit log");
        }
    }

    fn write(&self, deed: &Deed) -> io::Result<()> {
        let entry = AuditLine {
            at_ms: now_ms(),
            deed,
        };
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        let mut open = self.open.lock();
        let (mut file, bytes) = match open.take() {
            Some((file, bytes)) if bytes < self.most_bytes => (file, bytes),
            Some(_) => {
                std::fs::rename(self.dir.join(FILE), self.dir.join(EARLIER))?;
                self.begin()?
            }
            None => self.begin()?,
        };
        // In one write: a line is whole or, on a full disk, cut.
        file.write_all(&line)?;
        *open = Some((file, bytes + line.len() as u64));
        Ok(())
    }

    fn begin(&self) -> io::Result<(File, u64)> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut options = File::options();
        let options = options.append(true).create(true).mode(0o600);
        let file = options.open(self.dir.join(FILE))?;
        let bytes = file.metadata()?.len();
        Ok((file, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deeds_are_kept_in_order_for_root_alone_and_within_bounds() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let audit = |most_bytes| Audit {
            most_bytes,
            ..Audit::new(dir.path())
        };
        let deed = |status| Deed {
            user: Some(1000),
            process: Some(7),
            method: "POST".to_owned(),
            path: format!("/v1/vms/{}", "ä".repeat(400)),
            status,
        };
        audit(1 << 20).note(deed(200));
        // Another daemon goes on with the file.
        let log = audit(1_000);
        for status in 201..210 {
            log.note(deed(status));
        }
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let both = read(EARLIER) + &read(FILE);
        let statuses: Vec<u64> = both
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .map(|line| line["status"].as_u64().unwrap())
            .collect();
        assert!(
            statuses.is_sorted() && statuses.last() == Some(&209),
            "{statuses:?}"
        );
        assert!(both.len() < 4 * 1_000, "{}", both.len());
        let mode = std::fs::metadata(dir.path().join(FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
