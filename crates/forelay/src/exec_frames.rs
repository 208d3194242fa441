//! The frames of a program's streams between daemon and client, on a connection that was an
//! HTTP request before (`Upgrade: forelay-exec/1`).
//!
//! ```text
//! POST /v1/vms/NAME/exec, Connection: upgrade, body ExecRequest
//!                 <- 101 Switching Protocols; from then on frames:
//! stdin ->        kind 0: bytes; none are the end of standard input
//! size ->         kind 5: lines and columns of the terminal (2 bytes each)
//!                 <- kind 1, 2: bytes of standard output, standard error
//!                 <- kind 3: the end, JSON of ExecEnd; nothing follows
//!                 <- kind 4: further bytes of standard input that may be sent (4 bytes)
//! ```
//! A frame is its kind (1 byte), 3 bytes 0, its length (4 bytes) and so many bytes, numbers
//! big-endian: the format of Docker's attach. The client starts with a credit of
//! [`WINDOW_BYTES`] of standard input and sends no more than it was given; output is held
//! back by the connection itself. A client that closes the connection ends the program.

use std::io;

pub use forelay_guest_protocol::frames::WINDOW_BYTES;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::api::ExecEnd;

/// Name in the `Upgrade` header.
pub const PROTOCOL: &str = "forelay-exec/1";

const HEADER_BYTES: usize = 8;

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecFrame {
    /// To the program; no bytes are the end.
    Stdin(Vec<u8>),
    /// From the program.
    Stdout(Vec<u8>),
    /// From the program.
    Stderr(Vec<u8>),
    /// The program's end, or why it did not start.
    End(ExecEnd),
    /// Further bytes that the program takes.
    StdinCredit(u32),
    /// To the program: its terminal has so many lines and columns.
    Resize(u16, u16),
}

impl ExecFrame {
    fn kind_and_payload(self) -> io::Result<(u8, Vec<u8>)> {
        Ok(match self {
            Self::Stdin(bytes) => (0, bytes),
            Self::Stdout(bytes) => (1, bytes),
            Self::Stderr(bytes) => (2, bytes),
            Self::End(end) => (3, serde_json::to_vec(&end)?),
            Self::StdinCredit(bytes) => (4, bytes.to_be_bytes().into()),
            Self::Resize(rows, columns) => {
                let size = [rows.to_be_bytes(), columns.to_be_bytes()];
                (5, size.concat())
            }
        })
    }

    fn parse(kind: u8, payload: Vec<u8>) -> io::Result<Self> {
        Ok(match kind {
            0 => Self::Stdin(payload),
            1 => Self::Stdout(payload),
            2 => Self::Stderr(payload),
            3 => Self::End(serde_json::from_slice(&payload)?),
            4 => match <[u8; 4]>::try_from(payload) {
                Ok(bytes) => Self::StdinCredit(u32::from_be_bytes(bytes)),
                Err(_) => return Err(broken("a credit that is no number")),
            },
            5 => match <[u8; 4]>::try_from(payload) {
                Ok([a, b, c, d]) => {
                    Self::Resize(u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
                }
                Err(_) => return Err(broken("a size that is none")),
            },
            _ => return Err(broken("a frame of an unknown kind")),
        })
    }

    /// Sends it.
    pub async fn write(self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let (kind, payload) = self.kind_and_payload()?;
        let len = u32::try_from(payload.len()).map_err(io::Error::other)?;
        let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
        frame.extend([kind, 0, 0, 0]);
        frame.extend(len.to_be_bytes());
        frame.extend(payload);
        to.write_all(&frame).await?;
        to.flush().await
    }

    /// Reads the next one; `None` at the end of the connection. May not be dropped while it
    /// waits.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER_BYTES];
        match from.read_exact(&mut header).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        let [kind, zero @ .., a, b, c, d] = header;
        let len = u32::from_be_bytes([a, b, c, d]);
        if zero != [0; 3] || len > WINDOW_BYTES {
            return Err(broken("a frame that is none"));
        }
        let mut payload = vec![0; len as usize];
        from.read_exact(&mut payload).await?;
        Self::parse(kind, payload).map(Some)
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    async fn read_all(bytes: &[u8]) -> io::Result<Vec<ExecFrame>> {
        let (mut from, mut frames) = (bytes, Vec::new());
        while let Some(frame) = ExecFrame::read(&mut from).await? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[tokio::test]
    async fn frames_are_those_of_dockers_attach() {
        let end = ExecEnd {
            status: 3,
            error: None,
        };
        let frames = [
            ExecFrame::Stdin(Vec::new()),
            ExecFrame::Stdout(b"out\0\n".into()),
            ExecFrame::Stderr(vec![0xff]),
            ExecFrame::StdinCredit(u32::MAX),
            ExecFrame::Resize(24, 300),
            ExecFrame::End(end),
        ];
        let mut bytes = Vec::new();
        for frame in frames.clone() {
            frame.write(&mut bytes).await.unwrap();
        }
        assert_eq!(&bytes[8..21], b"\x01\0\0\0\0\0\0\x05out\0\n");
        assert_eq!(read_all(&bytes).await.unwrap(), frames);
        assert!(read_all(&bytes[..20]).await.is_err(), "cut within a frame");
        let mut long = vec![1, 0, 0, 0];
        long.extend((WINDOW_BYTES + 1).to_be_bytes());
        let refused = read_all(&long).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn any_bytes_are_frames_or_refused(
            kind in 0u8..7, len in 0u8..40,
            bytes in proptest::collection::vec(any::<u8>(), 0..60),
        ) {
            let mut all = vec![kind, 0, 0, 0, 0, 0, 0, len];
            all.extend(&bytes);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let read = runtime.block_on(read_all(&all));
            prop_assert!(read.is_err() || read.unwrap().len() <= 1 + bytes.len() / HEADER_BYTES);
        }
    }
}
