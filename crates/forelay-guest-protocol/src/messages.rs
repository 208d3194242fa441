//! Messages of the guest channel: one JSON object a line, on the virtio-serial port
//! [`PORT_NAME`].
//!
//! ```text
//! host                                guest
//!   | -- GuestRequest{id, command} -------->  |
//!   | <------- Reply{id, result} ------  |   in any order, one for each request
//!   | <------- Mounted, Ready, ... ----  |   events, each at most once a boot
//!
//!   | -- GuestRequest{id, Start} ------>  |
//!   | <------- Reply{id, Started} -----  |
//!   | -- frames of stdin, Credit ----->  |   see `frames`
//!   | <- frames of output, StdinCredit-  |
//!   | <------- Ended{id, status} ------  |   after all output
//! ```
//! A new daemon that connects to a running VM may have missed events and finds half a line
//! in the pipe: it sends an empty line, then [`GuestCommand::EndAll`] for its predecessor's
//! programs and [`GuestCommand::Status`], and skips what does not parse until the reply comes. Neither side trusts the other: lines are bounded by
//! [`MAX_REQUEST_BYTES`] and [`MAX_MESSAGE_BYTES`], unknown fields are ignored, unknown
//! messages are errors.

use serde::{Deserialize, Serialize};

use crate::snapshot::{Freeze, Frozen, Release, Resume, Resumed, Tier};

/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "org.forelay.channel";
/// Version of these messages; reported in [`Status`]. Programs are run by 2 and later,
/// 3 can be held for a snapshot, 4 can be frozen while they run, and 5 gives programs terminals.
pub const PROTOCOL_VERSION: u32 = 5;
/// Longest line that a guest accepts, newline included: more than arguments and environment
/// of a program can be.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;
/// Longest line that a host accepts, newline included.
pub const MAX_MESSAGE_BYTES: usize = 128 << 10;

/// Host to guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestRequest {
    /// Chosen by the host, repeated in the reply.
    pub id: u64,
    /// What to do.
    pub command: GuestCommand,
}

/// What the host can ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestCommand {
    /// Where the boot is; also proves that the agent answers.
    Status,
    /// Starts a program, which the request's id names from then on. Its output may come to
    /// [`WINDOW_BYTES`](crate::frames::WINDOW_BYTES) a stream without further credit.
    Start(Exec),
    /// More output of a program may come; has no reply.
    Credit {
        /// Further bytes of its standard output.
        stdout: u32,
        /// Further bytes of its standard error.
        stderr: u32,
    },
    /// The terminal of a program has another size; has no reply.
    Resize(TerminalSize),
    /// Ends a program whose output nobody wants any more; has no reply.
    End,
    /// Ends all programs that were started for an earlier host; has no reply.
    EndAll,
    /// Makes the files of a hot-plugged component visible in the running root.
    Attach(Attach),
    /// Takes them away again; refused while in use.
    Detach {
        /// UUID of the component image, 32 hex digits.
        uuid: String,
    },
    /// What its network interfaces have carried.
    Traffic,
    /// Makes a held guest a machine of its own and lets it go on.
    Resume(Resume),
    /// Sets the wall clock; has no reply.
    Clock {
        /// What it shows, in microseconds since the epoch.
        unix_time_us: u64,
    },
    /// Stops what the image runs, so that the host can save the VM; it is held from then on.
    Freeze(Freeze),
    /// Lets a held guest go on as the machine that it was; one that is not held is told the
    /// time alone.
    Release(Release),
    /// Flushes and powers off.
    Poweroff,
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Exec {
    /// Program (looked up in `PATH`) and arguments.
    pub argv: Vec<String>,
    /// Environment on top of the VM's.
    pub env: std::collections::BTreeMap<String, String>,
    /// Working directory; empty is `/`.
    pub cwd: String,
    /// `user[:group]` by name or number; empty is root.
    pub user: String,
    /// Standard input comes in frames; else it is `/dev/null`.
    pub stdin: bool,
    /// Its standard streams are a terminal of this size; what it writes is standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
    /// End after this long; 0 is never.
    pub timeout_ms: u64,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
}

/// A component to attach.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attach {
    /// UUID of the component image, 32 hex digits.
    pub uuid: String,
    /// Name for messages.
    pub name: String,
    /// Also bring in the component's files under /etc.
    pub etc: bool,
    /// How long to wait for the device; 0 is the guest's default.
    pub timeout_ms: u64,
}

/// Guest to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestMessage {
    /// The root is mounted and the agent runs.
    Mounted(Mounted),
    /// The ready probe succeeded.
    Ready {
        /// Milliseconds since the guest's kernel started.
        uptime_ms: u64,
        /// When the steps before were done.
        #[serde(default)]
        steps: BootSteps,
    },
    /// Held for a snapshot, until [`GuestCommand::Resume`].
    Held {
        /// How far it has come.
        tier: Tier,
    },
    /// The entrypoint ended.
    Exited(ExitStatus),
    /// Something a person should know.
    Log {
        /// The text.
        text: String,
    },
    /// The boot failed, or the entrypoint before the VM was ready; the VM powers off.
    Failed {
        /// Why.
        text: String,
    },
    /// A program has ended, and all its output was sent.
    Ended {
        /// The program.
        id: u64,
        /// How it ended.
        status: ExitStatus,
    },
    /// A program took bytes of its standard input: as many more may come.
    StdinCredit {
        /// The program.
        id: u64,
        /// How many.
        bytes: u32,
    },
    /// Answer to a [`GuestRequest`].
    Reply {
        /// The request's id; 0 if the request could not be read.
        id: u64,
        /// Its outcome.
        result: Reply,
    },
}

/// How the root came up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mounted {
    /// Milliseconds since the guest's kernel started.
    pub uptime_ms: u64,
    /// File content is mapped from the devices, not copied into guest memory.
    pub dax: bool,
    /// What was mounted: `pmem`, `flat` or `disk`.
    pub source: String,
    /// Component devices of the map image.
    pub devices: u16,
    /// When the steps so far were done.
    pub steps: BootSteps,
    /// In a clone that had no image when it was resumed: what of its own identity it could not
    /// be given since, hooks that failed among it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<String>,
}

/// When the steps of a boot were done, in the order in which they are taken: microseconds
/// since the guest's kernel started, 0 for one that was not taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BootSteps {
    /// The kernel had started the guest's init.
    pub kernel_us: u64,
    /// Modules were loaded and all devices of the root found.
    pub devices_us: u64,
    /// The image was mounted.
    pub mount_us: u64,
    /// The writable overlay was the root, with all that is mounted in it.
    pub overlay_us: u64,
    /// The network was configured.
    pub network_us: u64,
    /// The agent ran.
    pub agent_us: u64,
    /// The entrypoint was started.
    pub entrypoint_us: u64,
}

impl BootSteps {
    /// The same with no step before the one that it follows and none after `end_us`: a guest
    /// can say anything.
    pub fn in_order(self, end_us: u64) -> Self {
        let mut last_us = 0;
        let mut next = |us: u64| {
            last_us = us.clamp(last_us, end_us.max(last_us));
            last_us
        };
        Self {
            kernel_us: next(self.kernel_us),
            devices_us: next(self.devices_us),
            mount_us: next(self.mount_us),
            overlay_us: next(self.overlay_us),
            network_us: next(self.network_us),
            agent_us: next(self.agent_us),
            entrypoint_us: next(self.entrypoint_us),
        }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// Exit code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
    /// Killed since its time was up.
    TimedOut,
}

impl ExitStatus {
    /// What a shell would call it: 128 and the signal's number, 124 for a time that was up.
    pub fn code(&self) -> i32 {
        match *self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128_i32.saturating_add(signal),
            Self::TimedOut => 124,
        }
    }

    /// True for exit code 0.
    pub fn success(&self) -> bool {
        *self == Self::Code(0)
    }
}

/// Outcome of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`GuestCommand::Status`].
    Status(Status),
    /// To [`GuestCommand::Start`]: the program runs.
    Started,
    /// To [`GuestCommand::Attach`].
    Attached(Attached),
    /// To [`GuestCommand::Detach`]; the device is no longer used.
    Detached,
    /// To [`GuestCommand::Traffic`].
    Traffic(Traffic),
    /// To [`GuestCommand::Resume`].
    Resumed(Resumed),
    /// To [`GuestCommand::Freeze`].
    Frozen(Frozen),
    /// To [`GuestCommand::Release`].
    Released,
    /// To [`GuestCommand::Poweroff`].
    PoweringOff,
    /// The request failed.
    Error {
        /// What kind of failure.
        kind: ErrorKind,
        /// What and why, for a person.
        text: String,
    },
}

/// Kinds of failure the host treats differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The request makes no sense.
    BadRequest,
    /// A file or device does not exist.
    NotFound,
    /// A program is there and cannot be executed.
    NotExecutable,
    /// The component is in use.
    Busy,
    /// The component has files that differ from files in the VM.
    Conflict,
    /// Anything else.
    Failed,
}

/// Where the boot is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// [`PROTOCOL_VERSION`] of the guest.
    pub protocol: u32,
    /// Held for a snapshot at this tier; what else is said here is its maker's then.
    pub held: Option<Tier>,
    /// How the root came up.
    pub mounted: Mounted,
    /// When the ready probe succeeded.
    pub ready_uptime_ms: Option<u64>,
    /// How the entrypoint ended.
    pub exited: Option<ExitStatus>,
    /// UUIDs of attached components, in order.
    pub attached: Vec<String>,
}

/// What an attach did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attached {
    /// The component's files are mapped from the device.
    pub dax: bool,
    /// Directories and files mounted into the root.
    pub mounts: u32,
    /// Symbolic links made and files copied into the root.
    pub copies: u32,
    /// Milliseconds from the request to the device being there.
    pub device_wait_ms: u64,
    /// Milliseconds from the device being there to the files being visible.
    pub graft_ms: u64,
    /// Of those, milliseconds in the agent's own code instead of the guest's kernel.
    #[serde(default)]
    pub agent_ms: u64,
    /// Files of the component that the VM does not have now, and why; the last may say how
    /// many more.
    #[serde(default)]
    pub left_out: Vec<String>,
}

/// Bytes that network interfaces have carried since they exist, the loopback left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
}

impl Traffic {
    /// Reads the format of `/proc/net/dev` (proc(5)); what does not parse counts nothing.
    pub fn parse(dev: &str) -> Self {
        let interfaces = dev.lines().skip(2).filter_map(|line| line.split_once(':'));
        let interfaces = interfaces.filter(|(name, _)| name.trim() != "lo");
        interfaces.fold(Self::default(), |sum, (_, counters)| {
            let counter = |at: usize| {
                let value = counters.split_whitespace().nth(at);
                value
                    .and_then(|value| value.parse::<u64>().ok())
                    .unwrap_or(0)
            };
            Self {
                received_bytes: sum.received_bytes.saturating_add(counter(0)),
                sent_bytes: sum.sent_bytes.saturating_add(counter(8)),
            }
        })
    }
}

/// Encodes a message as one line with its newline.
pub fn encode_line<T: Serialize>(message: &T) -> Vec<u8> {
    // Only maps with non-string keys can fail, and these types have none.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Splits a byte stream into lines, dropping lines longer than a limit.
#[derive(Debug)]
pub struct LineBuffer {
    pending: Vec<u8>,
    limit: usize,
    skipping: bool,
}

/// A line from a [`LineBuffer`].
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// A complete line without its newline.
    Complete(Vec<u8>),
    /// A line was longer than the limit and is gone.
    TooLong,
}

impl LineBuffer {
    /// A buffer that holds at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            pending: Vec::new(),
            limit,
            skipping: false,
        }
    }

    /// Adds bytes; returns the lines they completed. Empty lines are dropped.
    pub fn push(&mut self, mut bytes: &[u8]) -> Vec<Line> {
        let mut lines = Vec::new();
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            self.take(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let line = std::mem::take(&mut self.pending);
            if std::mem::take(&mut self.skipping) {
                lines.push(Line::TooLong);
            } else if !line.is_empty() {
                lines.push(Line::Complete(line));
            }
        }
        self.take(bytes);
        lines
    }

    fn take(&mut self, bytes: &[u8]) {
        if self.skipping || self.pending.len() + bytes.len() >= self.limit {
            self.skipping = self.skipping || !bytes.is_empty();
            self.pending = Vec::new();
        } else {
            self.pending.extend_from_slice(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_round_trip_on_one_line() {
        let message = GuestMessage::Reply {
            id: 3,
            result: Reply::Error {
                kind: ErrorKind::NotFound,
                text: "a\nb".into(),
            },
        };
        let line = encode_line(&message);
        assert_eq!(line.iter().filter(|&&byte| byte == b'\n').count(), 1);
        assert_eq!(
            serde_json::from_slice::<GuestMessage>(&line).unwrap(),
            message
        );
    }

    #[test]
    fn traffic_is_the_sum_of_all_interfaces_but_the_loopback() {
        let dev = "Inter-| Receive\n face |bytes\n    lo: 7 0 0 0 0 0 0 0 7 0\n  \
                   eth0: 1000 1 0 0 0 0 0 0 2000 2\n  eth1:5 0 0 0 0 0 0 0 6 0\n bad: x\n";
        let expected = Traffic {
            received_bytes: 1005,
            sent_bytes: 2006,
        };
        assert_eq!(Traffic::parse(dev), expected);
        assert_eq!(Traffic::parse("nonsense"), Traffic::default());
    }

    #[test]
    fn long_lines_are_dropped_and_the_next_one_is_read() {
        let mut buffer = LineBuffer::new(8);
        assert_eq!(buffer.push(b"0123456789"), vec![]);
        assert_eq!(buffer.push(b"more"), vec![]);
        assert_eq!(
            buffer.push(b"\nok\n\nrest"),
            vec![Line::TooLong, Line::Complete(b"ok".to_vec())]
        );
        assert_eq!(buffer.push(b"\n"), vec![Line::Complete(b"rest".to_vec())]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn splitting_does_not_depend_on_reads(
            bytes in proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..300),
            cuts in proptest::collection::vec(1usize..20, 1..40),
        ) {
            let whole = LineBuffer::new(16).push(&bytes);
            let (mut buffer, mut lines, mut at) = (LineBuffer::new(16), Vec::new(), 0);
            for cut in cuts.iter().cycle() {
                if at >= bytes.len() { break; }
                let end = (at + cut).min(bytes.len());
                lines.extend(buffer.push(&bytes[at..end]));
                at = end;
                prop_assert!(buffer.pending.len() < 16);
            }
            prop_assert_eq!(lines, whole);
        }

        #[test]
        fn hostile_lines_are_refused_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            text in "[\\[\\]{}\":,a-z0-9_]{0,120}",
        ) {
            let _ = serde_json::from_slice::<GuestMessage>(&bytes);
            let _ = serde_json::from_slice::<GuestRequest>(&bytes);
            let _ = serde_json::from_str::<GuestMessage>(&text);
            let _ = serde_json::from_str::<GuestRequest>(&text);
        }
    }
}
