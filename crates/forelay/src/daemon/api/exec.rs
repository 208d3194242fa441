//! `exec`: a program in a guest, its streams in the client's hands.
//!
//! A request that asks for an upgrade gets the streams as they are (`exec_frames`); any
//! other gets the output as text, when the program has ended and if that is not too much.
//!
//! Invariants: nothing is held of a program's output but what the client is about to take,
//! and no more than two windows of its input; a program does not outlive the client that started
//! it, whether or not its guest answers.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest as _, Json, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use forelay_guest_protocol::messages::{ErrorKind, Exec, ExitStatus, TerminalSize};
use forelay_host::error_chain;
use forelay_vm::channel::ChannelError;
use forelay_vm::{ExecEvent, Execution, VmError, VmHandle};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::server::Failure;
use crate::api::{ExecEnd, ExecRequest, ExecResult, ExecTerminal};
use crate::daemon::Host;
use crate::daemon::error::HostError;
use crate::daemon::vm::attach::running;
use crate::exec_frames::{ExecFrame, PROTOCOL, WINDOW_BYTES};

/// How long a VM may take to go on that a daemon held which died.
const LET_GO_LIMIT: Duration = Duration::from_secs(60);

/// The request's turn among those that may take long.
type Turn = Arc<OwnedSemaphorePermit>;

/// The route's handler.
pub async fn exec(
    State(host): State<Arc<Host>>,
    Path(name): Path<String>,
    mut request: Request,
) -> Result<Response, Failure> {
    let turn = request.extensions().get::<Turn>().cloned();
    let upgrade = wants_streams(request.headers()).then(|| hyper::upgrade::on(&mut request));
    let request = match Json::<ExecRequest>::from_request(request, &()).await {
        Ok(Json(request)) => request,
        Err(refused) => return Ok(refused.into_response()),
    };
    if (request.stdin || request.terminal.is_some()) && upgrade.is_none() {
        let text = format!("standard input and terminals need an upgrade to {PROTOCOL}");
        return Err(HostError::Invalid(text).into());
    }
    let exec = program(request)?;
    let instance = host.vms.instance(&name)?;
    // A guest that is held refuses it; one that hangs is told of as it is.
    let _ = tokio::time::timeout(LET_GO_LIMIT, instance.let_go()).await;
    let handle = running(&instance)?;
    match upgrade {
        Some(upgrade) => streams(&handle, exec, upgrade, turn).await,
        None => Ok(Json(collect(&handle, exec).await?).into_response()),
    }
}

fn wants_streams(headers: &HeaderMap) -> bool {
    headers
        .get(header::UPGRADE)
        .is_some_and(|value| value == PROTOCOL)
}

fn program(request: ExecRequest) -> Result<Exec, HostError> {
    if request.command.is_empty() {
        return Err(HostError::Invalid("no command was given".to_owned()));
    }
    let limit = match request.timeout_s {
        Some(seconds) => Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|limit| limit.as_millis() > 0)
            .ok_or_else(|| HostError::Invalid(format!("{seconds} s is no time limit")))?,
        None => Duration::ZERO,
    };
    let terminal = request.terminal.as_ref();
    let kind = terminal.map(kind_of).transpose()?;
    Ok(Exec {
        argv: request.command,
        env: kind
            .map(|kind| ("TERM".to_owned(), kind))
            .into_iter()
            .collect(),
        stdin: request.stdin,
        terminal: terminal.map(|one| TerminalSize {
            rows: one.rows,
            columns: one.columns,
        }),
        timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        ..Exec::default()
    })
}

/// The `TERM` of a program's terminal.
fn kind_of(terminal: &ExecTerminal) -> Result<String, HostError> {
    let kind = &terminal.kind;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte);
    match (1..=64).contains(&kind.len()) && kind.bytes().all(plain) {
        true => Ok(kind.clone()),
        false => Err(HostError::Invalid(format!(
            "{kind:?} is no kind of terminal: set TERM"
        ))),
    }
}

/// The end of a program that cannot be started or is overdue: as shells say it.
fn end_for(error: &ChannelError) -> Option<ExecEnd> {
    let (status, text) = match error {
        ChannelError::Refused { kind, text } => match kind {
            ErrorKind::NotFound => (127, text.clone()),
            ErrorKind::NotExecutable => (126, text.clone()),
            _ => return None,
        },
        ChannelError::Overdue(_) => (ExitStatus::TimedOut.code(), error.to_string()),
        _ => return None,
    };
    let error = Some(text);
    Some(ExecEnd { status, error })
}

fn end_or_failure(error: &VmError) -> Result<ExecEnd, HostError> {
    let end = match error {
        VmError::Channel { source, .. } => end_for(source),
        _ => None,
    };
    end.ok_or_else(|| HostError::failed(error))
}

async fn collect(handle: &VmHandle, exec: Exec) -> Result<ExecResult, HostError> {
    let done = match handle.collect(exec).await {
        Ok(done) => done,
        Err(error) => {
            let end = end_or_failure(&error)?;
            return Ok(ExecResult {
                status: end.status,
                stdout: String::new(),
                stderr: end.error.unwrap_or_default(),
            });
        }
    };
    let text = |bytes: Vec<u8>, which: &str| {
        String::from_utf8(bytes).map_err(|_| {
            HostError::Failed(format!(
                "the program's standard {which} is no text (UTF-8): stream it"
            ))
        })
    };
    Ok(ExecResult {
        status: done.status.code(),
        stdout: text(done.stdout, "output")?,
        stderr: text(done.stderr, "error")?,
    })
}

async fn streams(
    handle: &VmHandle,
    exec: Exec,
    upgrade: OnUpgrade,
    turn: Option<Turn>,
) -> Result<Response, Failure> {
    let started = match handle.start_program(exec).await {
        Ok(execution) => Ok(execution),
        Err(error) => Err(end_or_failure(&error)?),
    };
    tokio::spawn(async move {
        let _turn = turn;
        // A client that went away before it read the answer has ended the program, too.
        let Ok(upgraded) = upgrade.await else { return };
        let mut connection = TokioIo::new(upgraded);
        match started {
            Ok(execution) => relay(&execution, connection).await,
            Err(end) => drop(ExecFrame::End(end).write(&mut connection).await),
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Until the program has ended or its client is gone.
async fn relay(execution: &Execution, connection: impl AsyncRead + AsyncWrite) {
    let (from_client, to_client) = tokio::io::split(connection);
    let input = watch::Sender::new(Input::default());
    tokio::select! {
        () = tell(execution, to_client) => {}
        () = listen(from_client, &input) => {}
        () = feed(execution, &input) => {}
    }
}

/// What a client has sent and the program has not been sent yet.
#[derive(Default)]
struct Input {
    bytes: Vec<u8>,
    is_ended: bool,
    /// The terminal's new size.
    size: Option<TerminalSize>,
}

/// Tells the client what the program does, until it has ended or nobody listens.
async fn tell(execution: &Execution, mut to: impl AsyncWrite + Unpin) {
    loop {
        let frame = match execution.next().await {
            Ok(ExecEvent::Stdout(bytes)) => ExecFrame::Stdout(bytes),
            Ok(ExecEvent::Stderr(bytes)) => ExecFrame::Stderr(bytes),
            Ok(ExecEvent::StdinCredit(bytes)) => ExecFrame::StdinCredit(bytes),
            Ok(ExecEvent::Ended(status)) => ExecFrame::End(ExecEnd {
                status: status.code(),
                error: None,
            }),
            Err(error) => ExecFrame::End(end_for(&error).unwrap_or_else(|| ExecEnd {
                status: 1,
                error: Some(error_chain(&error)),
            })),
        };
        let is_last = matches!(frame, ExecFrame::End(_));
        if frame.write(&mut to).await.is_err() || is_last {
            return;
        }
    }
}

/// Takes what the client sends until it is gone, or sends more than it may or anything else.
/// Waits for no guest: else it would not be noticed that the client is gone.
async fn listen(mut from: impl AsyncRead + Unpin, input: &watch::Sender<Input>) {
    loop {
        let mut fits = true;
        match ExecFrame::read(&mut from).await {
            Ok(Some(ExecFrame::Stdin(bytes))) => input.send_modify(|input| {
                fits = input.bytes.len() + bytes.len() <= WINDOW_BYTES as usize;
                input.is_ended |= bytes.is_empty();
                input.bytes.extend(bytes);
            }),
            Ok(Some(ExecFrame::Resize(rows, columns))) => input.send_modify(|input| {
                input.size = Some(TerminalSize { rows, columns });
            }),
            _ => return,
        }
        if !fits {
            return;
        }
    }
}

/// Sends the program its input; what comes after that is its output's to tell.
async fn feed(execution: &Execution, input: &watch::Sender<Input>) {
    let mut news = input.subscribe();
    let is_due = |input: &Input| input.is_ended || !input.bytes.is_empty() || input.size.is_some();
    while news.wait_for(is_due).await.is_ok() {
        let mut taken = Input::default();
        input.send_if_modified(|input| {
            taken = std::mem::take(input);
            false
        });
        if let Some(size) = taken.size
            && execution.resize(size).await.is_err()
        {
            break;
        }
        let has_bytes = !taken.bytes.is_empty();
        if has_bytes && execution.stdin(&taken.bytes).await.is_err() {
            break;
        }
        if taken.is_ended {
            let _ = execution.stdin(&[]).await;
            break;
        }
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use forelay_guest_protocol::messages::{
        GuestCommand, GuestMessage, GuestRequest, PROTOCOL_VERSION, Reply, Status, encode_line,
    };
    use forelay_vm::Progress;
    use forelay_vm::channel::Channel;
    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::UnixStream;

    use super::*;

    /// A program in a guest that starts it and says nothing more of itself.
    async fn started() -> (Channel, Execution, BufReader<UnixStream>) {
        let (host, guest) = UnixStream::pair().unwrap();
        let connection = forelay_vm::lines::over(host, 1 << 16);
        let progress = watch::Sender::new(Progress::default());
        let channel = Channel::start("web", connection, false, Instant::now(), progress);
        let mut guest = BufReader::new(guest);
        let agent = async {
            let mut line = String::new();
            loop {
                line.clear();
                guest.read_line(&mut line).await.unwrap();
                let Ok(GuestRequest { id, command }) = serde_json::from_str(&line) else {
                    continue;
                };
                let protocol = PROTOCOL_VERSION;
                let (result, is_last) = match command {
                    GuestCommand::Status => {
                        let status = Status {
                            protocol,
                            ..Status::default()
                        };
                        (Reply::Status(status), false)
                    }
                    GuestCommand::Start(_) => (Reply::Started, true),
                    _ => continue,
                };
                let reply = encode_line(&GuestMessage::Reply { id, result });
                guest.write_all(&reply).await.unwrap();
                if is_last {
                    return;
                }
            }
        };
        let start = channel.start_program(Exec::default(), Duration::from_secs(60));
        let (execution, ()) = tokio::join!(start, agent);
        (channel, execution.unwrap(), guest)
    }

    async fn send_input(client: &mut UnixStream, len: usize) {
        for part in vec![1; len].chunks(1 << 15) {
            let frame = ExecFrame::Stdin(part.to_vec());
            frame.write(client).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_client_that_goes_is_noticed_though_the_guest_takes_nothing() {
        let (channel, execution, guest) = started().await;
        // Fills the queue and the socket to the guest.
        while tokio::time::timeout(Duration::from_millis(50), execution.stdin(&[1; 1 << 15]))
            .await
            .is_ok()
        {}
        let (mut client, daemon) = UnixStream::pair().unwrap();
        let leave = async {
            send_input(&mut client, WINDOW_BYTES as usize).await;
            drop(client);
        };
        tokio::join!(relay(&execution, daemon), leave);
        // So is one that sends more than it may.
        let (mut client, daemon) = UnixStream::pair().unwrap();
        let flood = async {
            let frame = ExecFrame::Stdin(vec![1; 1 << 15]);
            while frame.clone().write(&mut client).await.is_ok() {}
        };
        tokio::join!(relay(&execution, daemon), flood);
        drop((channel, guest));
    }

    #[tokio::test]
    async fn a_client_is_told_why_a_program_was_lost_whatever_it_sends() {
        for _ in 0..32 {
            let (_channel, execution, guest) = started().await;
            let (mut client, daemon) = UnixStream::pair().unwrap();
            send_input(&mut client, 1 << 15).await;
            drop(guest);
            let mut said = Vec::new();
            relay(&execution, daemon).await;
            // What it has sent and nobody read resets the connection, after what was said.
            let _ = client.read_to_end(&mut said).await;
            let Ok(Some(ExecFrame::End(end))) = ExecFrame::read(&mut &*said).await else {
                panic!("no end: {said:?}");
            };
            assert!(end.error.unwrap().contains("closed"), "{}", end.status);
        }
    }
}
