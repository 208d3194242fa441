//! Client of the daemon's API over its Unix socket.
//!
//! One connection per request; no retries: a request either has an answer or an error
//! that names the socket and what to do.

use std::path::PathBuf;

use bytes::Bytes;
use forelay_image::{NameError, NameOf};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::http::request::Builder;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::api::ApiError;

/// A daemon's API.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// Why a request had no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No daemon answers.
    #[error("no daemon answers on {socket}: start one with `forelay daemon`")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the connection to the daemon on {socket} broke: {message}")]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// How.
        message: String,
    },
    /// The daemon refused.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The daemon's words.
        message: String,
    },
}

/// What the daemon tells for as long as it lives: server-sent events.
pub struct EventStream {
    client: Client,
    body: Incoming,
    /// What came and was not told yet.
    read: Vec<u8>,
}

impl EventStream {
    /// The next thing told, by its kind; `None` once the daemon has ended the stream.
    pub async fn next(&mut self) -> Result<Option<(String, String)>, ClientError> {
        loop {
            if let Some(end) = self.read.windows(2).position(|two| two == b"\n\n") {
                let told: Vec<u8> = self.read.drain(..end + 2).collect();
                if let Some(event) = event(&String::from_utf8_lossy(&told)) {
                    return Ok(Some(event));
                }
                continue;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self
                    .read
                    .extend_from_slice(frame.data_ref().map_or(&[][..], |data| data)),
                Some(Err(error)) => return Err(self.client.broken(error)),
                None => return Ok(None),
            }
        }
    }
}

/// Kind and data of an event; what only says that the stream lives is none.
fn event(told: &str) -> Option<(String, String)> {
    let field = |name: &str| {
        let mut lines = told.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    };
    let text = |name: &str| field(name).map(|value| value.trim_start().to_owned());
    Some((text("event")?, text("data")?))
}

/// The API's path of a VM, with `rest` behind it.
pub fn vm_path(name: &str, rest: &str) -> Result<String, NameError> {
    NameOf::Vm.check(name)?;
    Ok(format!("/v1/vms/{name}{rest}"))
}

impl Client {
    /// A client of the daemon on `socket`.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// `GET path`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::GET, path, Bytes::new()).await
    }

    /// `DELETE path`.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.request(Method::DELETE, path, Bytes::new()).await
    }

    /// `POST path` with a JSON body.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(error))?;
        self.request(Method::POST, path, body.into()).await
    }

    /// `POST path` with a JSON body, to have the connection speak `protocol` from then on.
    pub async fn upgrade(
        &self,
        path: &str,
        protocol: &str,
        body: &impl Serialize,
    ) -> Result<TokioIo<Upgraded>, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| self.broken(error))?;
        let request = request(Method::POST, path)
            .header("connection", "upgrade")
            .header("upgrade", protocol);
        let response = self.send(request, body.into()).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.refusal(response).await);
        }
        let upgraded = hyper::upgrade::on(response).await;
        Ok(TokioIo::new(upgraded.map_err(|error| self.broken(error))?))
    }

    /// `GET path`, whose answer goes on for as long as the daemon has something to say.
    pub async fn stream(&self, path: &str) -> Result<EventStream, ClientError> {
        let request = request(Method::GET, path).header("accept", "text/event-stream");
        let response = self.send(request, Bytes::new()).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response).await);
        }
        Ok(EventStream {
            client: self.clone(),
            body: response.into_body(),
            read: Vec::new(),
        })
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<T, ClientError> {
        let response = self.send(request(method, path), body).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response).await);
        }
        let body = response.into_body().collect().await;
        let body = body.map_err(|error| self.broken(error))?.to_bytes();
        serde_json::from_slice(&body).map_err(|error| self.broken(error))
    }

    /// Sends a request on a connection of its own.
    async fn send(&self, request: Builder, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let stream =
            UnixStream::connect(&self.socket)
                .await
                .map_err(|source| ClientError::Connect {
                    socket: self.socket.clone(),
                    source,
                })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(error))?;
        // Ends when the response was read, or what it became.
        tokio::spawn(connection.with_upgrades());
        let request = request.body(Full::new(body));
        let request = request.map_err(|error| self.broken(error))?;
        let response = sender.send_request(request).await;
        response.map_err(|error| self.broken(error))
    }

    /// The error that a response tells.
    async fn refusal(&self, response: Response<Incoming>) -> ClientError {
        let status = response.status().as_u16();
        let body = match response.into_body().collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => return self.broken(error),
        };
        let message = serde_json::from_slice::<ApiError>(&body).map_or_else(
            |_| String::from_utf8_lossy(&body).into_owned(),
            |error| error.error,
        );
        ClientError::Refused { status, message }
    }

    fn broken(&self, error: impl std::fmt::Display) -> ClientError {
        ClientError::Broken {
            socket: self.socket.clone(),
            message: error.to_string(),
        }
    }
}

fn request(method: Method, path: &str) -> Builder {
    Request::builder()
        .method(method)
        .uri(path)
        .header("host", "forelay")
        .header("content-type", "application/json")
}
