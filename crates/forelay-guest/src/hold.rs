//! A boot that is held for a snapshot, and goes on when the host says so.
//!
//! PID 1 holds it before the agent runs at tier `kernel`, and for an init of the image; the
//! agent does so itself where it stays. A held guest answers that it is held and refuses the rest. What
//! is saved here is restored any number of times: nothing that must differ between clones
//! may be made before a hold.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::time::Duration;

use forelay_guest_protocol::frames;
use forelay_guest_protocol::messages::{
    ErrorKind, GuestCommand, GuestMessage, GuestRequest, Line, LineBuffer, MAX_REQUEST_BYTES,
    PROTOCOL_VERSION, Reply, Status, encode_line,
};
use forelay_guest_protocol::snapshot::{HOLD_WORD, Resume, Resumed, Tier};

use crate::boot::{Parameters, console, context};
use crate::{devices, pmem_state, sys};

/// How long the kernel may take to tell the host what is free: it waits for two seconds
/// after memory was freed, and does it in the background.
const REPORT: Duration = Duration::from_secs(3);

/// Where the kernel's command line wants the boot to be held.
pub fn tier(parameters: &Parameters) -> Option<Tier> {
    Tier::named(parameters.get(HOLD_WORD)?)
}

/// Gives memory back that a clone would carry for nothing: what is cached can be read again,
/// and what is free is told to the host. Notes what the VMM does not save.
pub fn prepare() {
    note_devices();
    sys::sync();
    give_back();
}

/// Notes what the VMM does not save.
pub fn note_devices() {
    if let Err(error) = pmem_state::note() {
        console(&format!("state of pmem devices: {error}"));
    }
}

/// Gives memory back; returns when the host has heard of it.
pub fn give_back() {
    for (file, value) in [("drop_caches", "3"), ("compact_memory", "1")] {
        if let Err(error) = fs::write(format!("/proc/sys/vm/{file}"), value) {
            console(&format!("{file}: {error}"));
        }
    }
    std::thread::sleep(REPORT);
}

/// The guest channel of a boot that is held before there is an agent.
pub struct HeldBoot {
    port: File,
    /// The request by which it was resumed.
    id: u64,
    /// What the clone is.
    pub resume: Resume,
}

impl HeldBoot {
    /// Holds the boot at `tier`; returns in a clone.
    pub fn until_resumed(tier: Tier) -> io::Result<Self> {
        let path = devices::wait_for(Duration::from_secs(20), devices::channel_port)
            .ok_or_else(|| io::Error::other("no guest channel: nobody could resume this VM"))?;
        let opened = File::options().read(true).write(true).open(&path);
        let mut port = opened.map_err(context(path.display()))?;
        prepare();
        port.write_all(&encode_line(&GuestMessage::Held { tier }))?;
        let mut lines = LineBuffer::new(MAX_REQUEST_BYTES);
        let mut buffer = vec![0; 8 << 10];
        loop {
            let count = port.read(&mut buffer)?;
            if count == 0 {
                // The host is not connected.
                std::thread::sleep(devices::POLL);
            }
            for line in lines.push(&buffer[..count]) {
                let Some(request) = request(line) else {
                    continue;
                };
                match answer(tier, request.command) {
                    HeldAnswer::Resume(resume) => {
                        sys::count_uptime_from_now();
                        let id = request.id;
                        return Ok(Self { port, id, resume });
                    }
                    HeldAnswer::Reply(result) => {
                        let id = request.id;
                        port.write_all(&encode_line(&GuestMessage::Reply { id, result }))?;
                    }
                    HeldAnswer::None => {}
                }
            }
        }
    }

    /// Tells the host that the clone is a machine of its own.
    pub fn resumed(&mut self, failures: Vec<String>) -> io::Result<()> {
        let result = Reply::Resumed(Resumed {
            failures,
            unix_time_us: sys::clock_us(),
        });
        let reply = GuestMessage::Reply {
            id: self.id,
            result,
        };
        self.port.write_all(&encode_line(&reply))
    }

    /// Gives the channel to the agent.
    pub fn into_port(self) -> File {
        self.port
    }
}

fn request(line: Line) -> Option<GuestRequest> {
    let Line::Complete(line) = line else {
        return None;
    };
    if line.is_empty() || frames::decode(&line).is_some() {
        return None;
    }
    serde_json::from_slice(&line).ok()
}

enum HeldAnswer {
    Resume(Resume),
    Reply(Reply),
    None,
}

fn answer(tier: Tier, command: GuestCommand) -> HeldAnswer {
    let refuse = |kind, text: String| HeldAnswer::Reply(Reply::Error { kind, text });
    match command {
        GuestCommand::Resume(resume) => match resume.validate() {
            Ok(()) => HeldAnswer::Resume(resume),
            Err(text) => refuse(ErrorKind::BadRequest, text),
        },
        GuestCommand::Status => HeldAnswer::Reply(Reply::Status(Status {
            protocol: PROTOCOL_VERSION,
            held: Some(tier),
            ..Status::default()
        })),
        GuestCommand::Credit { .. }
        | GuestCommand::End
        | GuestCommand::EndAll
        | GuestCommand::Clock { .. } => HeldAnswer::None,
        _ => refuse(ErrorKind::Busy, HELD.to_owned()),
    }
}

/// Why a held guest refuses a request.
pub const HELD: &str = "this VM is held for a snapshot";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_boot_says_so_and_takes_only_a_resume_that_makes_sense() {
        let HeldAnswer::Reply(Reply::Status(status)) = answer(Tier::Kernel, GuestCommand::Status)
        else {
            panic!("no status");
        };
        assert_eq!(status.held, Some(Tier::Kernel));
        let nonsense = GuestCommand::Resume(Resume::default());
        for command in [nonsense, GuestCommand::Traffic] {
            let answer = answer(Tier::Composed, command);
            assert!(matches!(answer, HeldAnswer::Reply(Reply::Error { .. })));
        }
        assert!(matches!(
            answer(Tier::Composed, GuestCommand::EndAll),
            HeldAnswer::None
        ));
        for garbage in [&b""[..], b"{", b"<x", b"null"] {
            assert!(request(Line::Complete(garbage.to_vec())).is_none());
        }
    }
}
