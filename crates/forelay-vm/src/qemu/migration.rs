//! The state of a QEMU's devices, out of one and into another: a migration to nowhere and one
//! from a file, over a socket in the runtime directory.
//!
//! `x-ignore-shared` leaves out all memory that is a shared file: the guest's in a maker,
//! and the components' in both. It must be set on both sides. A QEMU that is given a
//! state it cannot use ends by itself.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use super::{LOG_FILE, Qmp, QmpError};
use crate::confined::Incoming;
use crate::handle::file_tail;
use crate::snapshot::{MAX_STATE_BYTES, SnapshotError};

/// Socket over which a state goes, in the runtime directory.
pub const STATE_SOCKET: &str = "state.sock";
/// How long a state may take, in either direction.
const MIGRATION: Duration = Duration::from_secs(60);
/// What a QEMU says last that cannot use a state.
const REFUSAL: &str = "load of migration failed";
/// Interval of questions whether it is done.
const POLL: Duration = Duration::from_millis(1);

/// The socket's path; the file goes with it.
struct Socket(PathBuf);

impl Socket {
    fn new(runtime_dir: &Path) -> Self {
        let socket = Self(runtime_dir.join(STATE_SOCKET));
        // One that a predecessor left would be in the way.
        let _ = std::fs::remove_file(&socket.0);
        socket
    }

    fn uri(&self) -> Result<Value, SnapshotError> {
        let path = self.0.to_str();
        let path = path.ok_or_else(|| SnapshotError::State(io::ErrorKind::InvalidInput.into()))?;
        Ok(json!({ "uri": format!("unix:{path}") }))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Stops the guest and returns the state of its devices. `user` is the VMM's, if it has one of
/// its own.
pub async fn save(
    qmp: &Qmp,
    runtime_dir: &Path,
    user: Option<u32>,
) -> Result<Vec<u8>, SnapshotError> {
    let saving = async {
        qmp.command("stop", Value::Null).await?;
        leave_out_shared_memory(qmp).await?;
        let socket = Socket::new(runtime_dir);
        let listener = UnixListener::bind(&socket.0).map_err(SnapshotError::State)?;
        if user.is_some() {
            std::os::unix::fs::lchown(&socket.0, user, user).map_err(SnapshotError::State)?;
        }
        qmp.command("migrate", socket.uri()?).await?;
        let (stream, _) = listener.accept().await.map_err(SnapshotError::State)?;
        let mut state = Vec::new();
        let mut stream = stream.take(MAX_STATE_BYTES as u64 + 1);
        let read = stream.read_to_end(&mut state).await;
        if read.map_err(SnapshotError::State)? > MAX_STATE_BYTES {
            return Err(SnapshotError::TooLong);
        }
        done(qmp, "save its state").await?;
        Ok(state)
    };
    let saved = tokio::time::timeout(MIGRATION, saving).await;
    saved.unwrap_or(Err(SnapshotError::TimedOut(MIGRATION)))
}

/// Gives a QEMU that waits for it a state: one of [`save`], or one `of_running`.
pub async fn load(
    qmp: &Qmp,
    runtime_dir: &Path,
    incoming: Option<Incoming>,
    state: &[u8],
    of_running: bool,
) -> Result<(), SnapshotError> {
    let restoring = async {
        if !of_running {
            leave_out_shared_memory(qmp).await?;
        }
        let stream = match incoming {
            Some(incoming) => inherited(qmp, incoming).await?,
            None => {
                let socket = Socket::new(runtime_dir);
                qmp.command("migrate-incoming", socket.uri()?).await?;
                UnixStream::connect(&socket.0).await
            }
        };
        let mut stream = stream.map_err(SnapshotError::State)?;
        stream
            .write_all(state)
            .await
            .map_err(SnapshotError::State)?;
        stream.shutdown().await.map_err(SnapshotError::State)?;
        done(qmp, "restore a state").await
    };
    match tokio::time::timeout(MIGRATION, restoring).await {
        Ok(Err(SnapshotError::Failed(why))) => Err(SnapshotError::Refused(why)),
        Ok(Err(SnapshotError::Monitor(_) | SnapshotError::State(_))) => {
            let words = file_tail(&runtime_dir.join(LOG_FILE));
            // Else it may have ended for any reason, such as want of memory.
            if words.contains(REFUSAL) {
                return Err(SnapshotError::Refused(words));
            }
            let text = format!("restore a state; its last words: {words}");
            Err(SnapshotError::Failed(text))
        }
        Ok(restored) => restored,
        Err(_) => Err(SnapshotError::TimedOut(MIGRATION)),
    }
}

/// Has a QEMU take its state from a socket that it inherited.
async fn inherited(qmp: &Qmp, incoming: Incoming) -> Result<io::Result<UnixStream>, QmpError> {
    let uri = json!({ "uri": format!("fd:{}", incoming.theirs) });
    qmp.command("migrate-incoming", uri).await?;
    let ours = std::os::unix::net::UnixStream::from(incoming.ours);
    Ok(ours
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(ours)))
}

async fn leave_out_shared_memory(qmp: &Qmp) -> Result<(), SnapshotError> {
    let capability = json!({ "capability": "x-ignore-shared", "state": true });
    let arguments = json!({ "capabilities": [capability] });
    qmp.command("migrate-set-capabilities", arguments).await?;
    Ok(())
}

/// Waits until a migration has come to its end, well or not.
async fn done(qmp: &Qmp, what: &str) -> Result<(), SnapshotError> {
    loop {
        let found = qmp.command("query-migrate", Value::Null).await?;
        match found["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => {
                let why = found["error-desc"]
                    .as_str()
                    .unwrap_or("it does not say why");
                return Err(SnapshotError::Failed(format!("{what}: {why}")));
            }
            _ => tokio::time::sleep(POLL).await,
        }
    }
}
