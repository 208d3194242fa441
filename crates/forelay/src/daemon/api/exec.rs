//! `exec`: a program in a guest, its streams in the client's hands.
//!
//! A request that asks for an upgrade gets the streams as they are (`exec_frames`); any
//! other gets the output as text, when the program has ended and if that is not too much.
//!
//! Invariants: nothing is held of a program's output but what the client is about to take;
//! a program does not outlive the client that started it.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{FromRequest as _, Json, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use forelay_guest_protocol::messages::{ErrorKind, Exec};
use forelay_host::error_chain;
use forelay_vm::channel::ChannelError;
use forelay_vm::{ExecEvent, Execution, VmError, VmHandle};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;

use super::server::Failure;
use crate::api::{ExecEnd, ExecRequest, ExecResult};
use crate::daemon::Host;
use crate::daemon::error::HostError;
use crate::daemon::vm::attach::running;
use crate::exec_frames::{ExecFrame, PROTOCOL};

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
    if request.stdin && upgrade.is_none() {
        let text = format!("standard input needs an upgrade to {PROTOCOL}");
        return Err(HostError::Invalid(text).into());
    }
    let exec = program(request)?;
    let handle = running(&*host.vms.instance(&name)?)?;
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
    Ok(Exec {
        argv: request.command,
        stdin: request.stdin,
        timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        ..Exec::default()
    })
}

/// How a program ends that cannot be started: as shells say it.
fn not_started(error: &VmError) -> Option<ExecEnd> {
    let VmError::Channel { source, .. } = error else {
        return None;
    };
    let ChannelError::Refused { kind, text } = source else {
        return None;
    };
    let status = match kind {
        ErrorKind::NotFound => 127,
        ErrorKind::NotExecutable => 126,
        _ => return None,
    };
    let error = Some(text.clone());
    Some(ExecEnd { status, error })
}

async fn collect(handle: &VmHandle, exec: Exec) -> Result<ExecResult, HostError> {
    let done = match handle.collect(exec).await {
        Ok(done) => done,
        Err(error) => {
            let end = not_started(&error).ok_or_else(|| HostError::failed(&error))?;
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
        Err(error) => Err(not_started(&error).ok_or_else(|| HostError::failed(&error))?),
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
    let (mut from_client, mut to_client) = tokio::io::split(connection);
    let output = async {
        loop {
            let frame = match execution.next().await {
                Ok(ExecEvent::Stdout(bytes)) => ExecFrame::Stdout(bytes),
                Ok(ExecEvent::Stderr(bytes)) => ExecFrame::Stderr(bytes),
                Ok(ExecEvent::StdinCredit(bytes)) => ExecFrame::StdinCredit(bytes),
                Ok(ExecEvent::Ended(status)) => ExecFrame::End(ExecEnd {
                    status: status.code(),
                    error: None,
                }),
                Err(error) => ExecFrame::End(ExecEnd {
                    status: 1,
                    error: Some(error_chain(&error)),
                }),
            };
            let last = matches!(frame, ExecFrame::End(_));
            if frame.write(&mut to_client).await.is_err() || last {
                return;
            }
        }
    };
    // Whatever else a client sends, or nothing more: it is not there any more.
    let input = async {
        while let Ok(Some(ExecFrame::Stdin(bytes))) = ExecFrame::read(&mut from_client).await {
            if execution.stdin(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = output => {}
        () = input => {}
    }
}
