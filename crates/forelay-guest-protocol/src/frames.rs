//! Bytes of programs' standard streams on the guest channel, beside its lines of JSON.
//!
//! A frame is a line as well, so that both sides find the next message after anything that
//! was cut: a byte that says which stream, then the program's id (8 bytes, little-endian) and
//! the bytes, stuffed (COBS) so that no newline is among them. A frame without bytes is the
//! end of standard input; output has none.
//!
//! Flow control is by credit: the sender of a stream starts with [`WINDOW_BYTES`] and sends no
//! more than it was given. So each side holds at most a window for each stream, whatever the
//! other does; who sends more has broken the protocol.

/// Bytes of a stream that may be under way or waiting at the receiver.
pub const WINDOW_BYTES: u32 = 256 << 10;
/// Most bytes of a stream in a frame: with what goes around them, one write to the port.
pub const MAX_DATA_BYTES: usize = 31 << 10;

const NEWLINE: u8 = b'\n';
const ID_BYTES: usize = size_of::<u64>();

/// A standard stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard input, to the guest.
    Stdin,
    /// Standard output, from the guest.
    Stdout,
    /// Standard error, from the guest.
    Stderr,
}

/// Some bytes of a stream of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Which stream.
    pub stream: Stream,
    /// The id of the request that started the program.
    pub id: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Stream {
    /// First byte of its frames; no JSON starts like that.
    const fn mark(self) -> u8 {
        match self {
            Self::Stdin => b'<',
            Self::Stdout => b'1',
            Self::Stderr => b'2',
        }
    }
}

/// A frame as a line, newline included. `bytes` are at most [`MAX_DATA_BYTES`].
pub fn encode(stream: Stream, id: u64, bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(ID_BYTES + bytes.len());
    plain.extend_from_slice(&id.to_le_bytes());
    plain.extend_from_slice(bytes);
    let mut line = vec![0; 1 + cobs::max_encoding_length(plain.len()) + 1];
    line[0] = stream.mark();
    let end = 1 + cobs::encode_with_sentinel(&plain, &mut line[1..], NEWLINE);
    line[end] = NEWLINE;
    line.truncate(end + 1);
    line
}

/// Reads a line without its newline; `None` if it is no frame.
pub fn decode(line: &[u8]) -> Option<Frame> {
    let (mark, stuffed) = line.split_first()?;
    let streams = [Stream::Stdin, Stream::Stdout, Stream::Stderr];
    let stream = streams.into_iter().find(|stream| stream.mark() == *mark)?;
    let plain = cobs::decode_vec_with_sentinel(stuffed, NEWLINE).ok()?;
    let (id, bytes) = plain.split_first_chunk::<ID_BYTES>()?;
    (bytes.len() <= MAX_DATA_BYTES).then(|| Frame {
        stream,
        id: u64::from_le_bytes(*id),
        bytes: bytes.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::messages::{GuestMessage, GuestRequest};
    use proptest::prelude::*;

    #[test]
    fn a_full_frame_is_one_write_to_the_port() {
        for filler in [0, b'\n', 7] {
            let line = encode(Stream::Stdout, u64::MAX, &vec![filler; MAX_DATA_BYTES]);
            assert!(line.len() <= 32 << 10, "{}", line.len());
        }
        let long = encode(Stream::Stdout, 1, &vec![7; MAX_DATA_BYTES + 1]);
        assert_eq!(decode(&long[..long.len() - 1]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn any_bytes_come_back_from_one_line(
            id in any::<u64>(),
            bytes in proptest::collection::vec(
                prop_oneof![Just(b'\n'), Just(0), any::<u8>()], 0..700),
        ) {
            for stream in [Stream::Stdin, Stream::Stdout, Stream::Stderr] {
                let line = encode(stream, id, &bytes);
                let newlines = line.iter().filter(|&&byte| byte == b'\n').count();
                prop_assert_eq!((newlines, line.last()), (1, Some(&b'\n')));
                let frame = Frame { stream, id, bytes: bytes.clone() };
                prop_assert_eq!(decode(&line[..line.len() - 1]), Some(frame));
                prop_assert!(serde_json::from_slice::<GuestMessage>(&line).is_err());
                prop_assert!(serde_json::from_slice::<GuestRequest>(&line).is_err());
            }
        }

        #[test]
        fn any_line_is_a_frame_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            for mark in [b'<', b'1', b'2', b'{'] {
                let line: Vec<u8> = std::iter::once(mark).chain(bytes.clone()).collect();
                if let Some(frame) = decode(&line) {
                    prop_assert!(frame.bytes.len() <= bytes.len());
                }
            }
        }
    }
}
