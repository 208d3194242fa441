//! Newline-separated JSON over a Unix socket, with bounds on both directions.
//!
//! Owns the socket's two tasks. A peer that floods is slowed (bounded queue), a line that is
//! too long is dropped, and a peer that does not read makes senders wait, not memory grow.

use std::io;
use std::path::Path;

use forelay_guest_protocol::messages::{Line, LineBuffer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// Lines that may wait in each direction.
const QUEUE_LINES: usize = 64;

/// Both ends of a connection as queues; an ended `incoming` means the peer is gone.
pub struct LineConnection {
    /// Lines from the peer.
    pub incoming: mpsc::Receiver<Line>,
    /// Lines to the peer, newline included.
    pub outgoing: mpsc::Sender<Vec<u8>>,
}

/// Connects to a socket.
pub async fn connect(path: &Path, max_line_bytes: usize) -> io::Result<LineConnection> {
    Ok(over(UnixStream::connect(path).await?, max_line_bytes))
}

/// Serves an open socket.
pub fn over(stream: UnixStream, max_line_bytes: usize) -> LineConnection {
    let (mut reader, mut writer) = stream.into_split();
    let (line_sender, incoming) = mpsc::channel(QUEUE_LINES);
    let (outgoing, mut queue) = mpsc::channel::<Vec<u8>>(QUEUE_LINES);
    tokio::spawn(async move {
        let mut lines = LineBuffer::new(max_line_bytes);
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = reader.read(&mut buffer).await {
            for line in lines.push(&buffer[..count]) {
                if line_sender.send(line).await.is_err() {
                    return;
                }
            }
        }
    });
    tokio::spawn(async move {
        while let Some(line) = queue.recv().await {
            if writer.write_all(&line).await.is_err() {
                return;
            }
        }
    });
    LineConnection { incoming, outgoing }
}
