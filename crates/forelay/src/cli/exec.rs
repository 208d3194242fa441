//! `forelay exec`: a command in a VM, between its streams and this process's, or its terminal and
//! the one that this runs in.
//!
//! Invariant: a terminal that was made raw is given back as it was, however the command ends.

use std::io::{IsTerminal as _, Write as _};

use anyhow::{Context as _, Result, bail};
use ratatui::crossterm::terminal;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Mutex, Semaphore};

use super::output;
use crate::api::{ExecRequest, ExecResult, ExecTerminal};
use crate::client::{Client, vm_path};
use crate::exec_frames::{ExecFrame, PROTOCOL, WINDOW_BYTES};

/// Standard input of a command is read in parts of this size.
const INPUT_PART_BYTES: usize = 32 << 10;

/// Arguments of `forelay exec`.
#[derive(Debug, clap::Args)]
pub struct ExecArguments {
    /// The VM.
    pub name: String,
    /// Program and arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
    /// Pass standard input on.
    #[arg(long, short)]
    pub interactive: bool,
    /// Give the command a terminal, this one: its size and signals, and with -i its keys.
    #[arg(long, short, conflicts_with = "json")]
    pub tty: bool,
    /// End the command after this many seconds, with exit code 124.
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    /// Print status and output as JSON when it has ended.
    #[arg(long, conflicts_with = "interactive")]
    pub json: bool,
}

/// `forelay exec`: returns the command's exit status.
pub async fn run(client: &Client, arguments: ExecArguments) -> Result<i32> {
    let path = vm_path(&arguments.name, "/exec")?;
    let request = ExecRequest {
        command: arguments.command,
        timeout_s: arguments.timeout,
        stdin: arguments.interactive,
        terminal: arguments.tty.then(this_terminal).transpose()?,
    };
    if arguments.json {
        let result: ExecResult = client.post(&path, &request).await?;
        output::json(&result)?;
        return Ok(0);
    }
    let connection = client.upgrade(&path, PROTOCOL, &request).await?;
    let stdin = request.stdin.then(tokio::io::stdin);
    let mut ends = EndingSignals::watched()?;
    // Keys that are nobody else's go on being signals here.
    let is_typed = request.stdin && request.terminal.is_some();
    let raw = is_typed.then(RawTerminal::take);
    let _raw = raw.transpose()?;
    tokio::select! {
        ended = pass_streams(connection, stdin, request.terminal.is_some()) => ended,
        status = ends.arrived() => Ok(status),
    }
}

/// The terminal that this process has.
fn this_terminal() -> Result<ExecTerminal> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        bail!("this is no terminal: leave -t out");
    }
    let (columns, rows) = terminal::size().context("the terminal's size")?;
    let kind = std::env::var("TERM").ok().filter(|kind| !kind.is_empty());
    Ok(ExecTerminal {
        rows,
        columns,
        kind: kind.unwrap_or_else(|| "linux".to_owned()),
    })
}

/// This terminal while its keys are the command's.
struct RawTerminal;

impl RawTerminal {
    fn take() -> Result<Self> {
        terminal::enable_raw_mode().context("cannot take the terminal")?;
        Ok(Self)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = terminal::disable_raw_mode();
    }
}

/// Signals that end this process, and the command with it; its terminal is given back before.
struct EndingSignals([(i32, Signal); 4]);

impl EndingSignals {
    fn watched() -> Result<Self> {
        let watch = |kind: SignalKind| anyhow::Ok((kind.as_raw_value(), signal(kind)?));
        Ok(Self([
            watch(SignalKind::terminate())?,
            watch(SignalKind::hangup())?,
            watch(SignalKind::interrupt())?,
            watch(SignalKind::quit())?,
        ]))
    }

    /// Waits for one; the exit status that shells have for it.
    async fn arrived(&mut self) -> i32 {
        let [a, b, c, d] = &mut self.0;
        let number = tokio::select! {
            _ = a.1.recv() => a.0,
            _ = b.1.recv() => b.0,
            _ = c.1.recv() => c.0,
            _ = d.1.recv() => d.0,
        };
        128 + number
    }
}

/// Between a command and this process; returns the command's exit status.
async fn pass_streams(
    connection: impl AsyncRead + AsyncWrite,
    stdin: Option<impl AsyncRead + Unpin>,
    in_terminal: bool,
) -> Result<i32> {
    let (from_daemon, to_daemon) = tokio::io::split(connection);
    let to_daemon = Mutex::new(to_daemon);
    let credit = Semaphore::new(WINDOW_BYTES as usize);
    let sizes = async {
        match in_terminal {
            true => follow_terminal(&to_daemon).await,
            false => std::future::pending().await,
        }
    };
    let input = async {
        if let Some(stdin) = stdin {
            send_input(stdin, &to_daemon, &credit).await?;
        }
        // The program ends it, not its input.
        std::future::pending().await
    };
    tokio::select! {
        status = show_output(from_daemon, &credit, in_terminal) => status,
        sent = input => sent,
        ended = sizes => ended,
    }
}

/// Tells the command of each new size of this terminal.
async fn follow_terminal(to: &Mutex<impl AsyncWrite + Unpin>) -> Result<i32> {
    let mut resized = signal(SignalKind::window_change())?;
    // Once unasked: it may have changed since the request was made, when nobody watched.
    loop {
        if let Ok((columns, rows)) = terminal::size() {
            // A daemon that takes no more has said, or will say, how the command ended.
            let frame = ExecFrame::Resize(rows, columns);
            let _ = frame.write(&mut *to.lock().await).await;
        }
        if resized.recv().await.is_none() {
            std::future::pending().await
        }
    }
}

/// Prints a command's output until it ends.
async fn show_output(
    mut from: impl AsyncRead + Unpin,
    credit: &Semaphore,
    in_terminal: bool,
) -> Result<i32> {
    // Only who asked for a terminal has this one do what a guest says.
    let tame = |shown: bool| (shown && !in_terminal).then(Tamed::default);
    let mut stdout = tame(std::io::stdout().is_terminal());
    let mut stderr = tame(std::io::stderr().is_terminal());
    loop {
        match ExecFrame::read(&mut from).await? {
            Some(ExecFrame::Stdout(mut bytes)) => {
                stdout.iter_mut().for_each(|one| one.tame(&mut bytes));
                output::raw(&bytes);
            }
            Some(ExecFrame::Stderr(mut bytes)) => {
                stderr.iter_mut().for_each(|one| one.tame(&mut bytes));
                let _ = std::io::stderr().write_all(&bytes);
            }
            Some(ExecFrame::StdinCredit(bytes)) => credit.add_permits(bytes as usize),
            Some(ExecFrame::End(end)) => {
                if let Some(error) = end.error {
                    complain!("error: {error}");
                }
                return Ok(end.status);
            }
            Some(ExecFrame::Stdin(_) | ExecFrame::Resize(..)) | None => {
                bail!("the daemon ended the connection before the command ended")
            }
        }
    }
}

/// A stream without what terminals take for commands.
#[derive(Default)]
struct Tamed {
    last: u8,
}

impl Tamed {
    /// Puts a question mark for each control character but line ends and tabs: those of ASCII, and
    /// those behind them in Unicode (U+0080 to U+009F).
    fn tame(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            let given = *byte;
            let control = given.is_ascii_control() && !b"\n\r\t".contains(&given);
            if control || (self.last == 0xc2 && (0x80..0xa0).contains(&given)) {
                *byte = b'?';
            }
            self.last = given;
        }
    }
}

/// Sends standard input, as far as there is credit for it, and its end. Only what cannot be
/// read is an error: a daemon that takes no more has said, or will say, how the command ended.
async fn send_input(
    mut stdin: impl AsyncRead + Unpin,
    to: &Mutex<impl AsyncWrite + Unpin>,
    credit: &Semaphore,
) -> Result<()> {
    let mut buffer = vec![0; INPUT_PART_BYTES];
    loop {
        let free = credit.available_permits().clamp(1, buffer.len());
        let permits = credit.acquire_many(u32::try_from(free)?).await?;
        let read = stdin.read(&mut buffer[..free]).await;
        let len = read.context("cannot read standard input")?;
        permits.forget();
        credit.add_permits(free - len);
        let frame = ExecFrame::Stdin(buffer[..len].to_vec());
        let sent = frame.write(&mut *to.lock().await).await;
        if sent.is_err() || len == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ExecEnd;

    #[test]
    fn what_a_guest_says_is_no_command_for_this_terminal() {
        let mut tamed = Tamed::default();
        let mut shown = Vec::new();
        // Parts may end anywhere.
        for part in [
            "a\x1b[2J\tb\r\n".as_bytes(),
            b"\xc2",
            b"\x9bJ",
            "\u{e4}\u{20ac}\x07".as_bytes(),
        ] {
            let mut part = part.to_vec();
            tamed.tame(&mut part);
            shown.extend(part);
        }
        assert_eq!(shown, b"a?[2J\tb\r\n\xc2?J\xc3\xa4\xe2\x82\xac?");
    }

    #[tokio::test]
    async fn a_command_that_ends_before_its_input_has_its_status() {
        // Whichever of both is looked at first.
        for _ in 0..32 {
            let (mut daemon, client) = tokio::net::UnixStream::pair().unwrap();
            let end = ExecEnd {
                status: 3,
                error: None,
            };
            ExecFrame::End(end).write(&mut daemon).await.unwrap();
            drop(daemon);
            let endless = Some(tokio::io::repeat(b'y'));
            assert_eq!(pass_streams(client, endless, false).await.unwrap(), 3);
        }
    }
}
