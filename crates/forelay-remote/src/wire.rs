//! An HTTP client for one server: who is spoken to and how, how long it may be silent, how
//! much it may say, and when it wants to be asked again.
//!
//! Proxies are those of the environment (`HTTPS_PROXY`, `HTTP_PROXY`, `NO_PROXY`). Invariant:
//! a certificate that does not check out ends the request; there is no way to go on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Certificate, Client, Request, Response, StatusCode};
use tokio::time::Instant;

use crate::RemoteError;

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A server that wants to be left alone for longer is asked again after this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 5;
/// Of what a server says of a failure so much is read, and shown.
const MAX_SAID_BYTES: u64 = 16 << 10;
const MAX_SHOWN_CHARS: usize = 200;

/// How a server is spoken to.
#[derive(Clone, Debug)]
pub struct WireOptions {
    /// Without TLS.
    pub plain_http: bool,
    /// Certificates (PEM) of authorities that are trusted besides the host's.
    pub ca: Option<PathBuf>,
    /// Longest time without a byte.
    pub silence: Duration,
    /// What a user is told when the server refuses.
    pub hint: &'static str,
}

/// A client of one server.
#[derive(Debug)]
pub struct Wire {
    client: Client,
    host: String,
    hint: &'static str,
    /// The server asked not to be asked before this.
    pause_until: Mutex<Option<Instant>>,
}

impl Wire {
    /// Connects to nobody yet. `host` is for messages.
    pub fn new(host: &str, options: &WireOptions) -> Result<Self, RemoteError> {
        // Another part of the process may have chosen already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = Client::builder()
            .user_agent(concat!("forelay/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_LIMIT)
            .read_timeout(options.silence)
            .redirect(reqwest::redirect::Policy::limited(MAX_REDIRECTS))
            .https_only(!options.plain_http);
        if let Some(path) = &options.ca {
            builder = builder.tls_certs_merge(certificates(path)?);
        }
        let client = builder
            .build()
            .map_err(|error| RemoteError::Local(format!("no HTTP client: {}", chain(&error))))?;
        Ok(Self {
            client,
            host: host.to_owned(),
            hint: options.hint,
            pause_until: Mutex::default(),
        })
    }

    /// The client that requests are built with.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The server's name, for messages.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Sends a request and takes whatever status comes back.
    pub async fn send(&self, request: Request) -> Result<Response, RemoteError> {
        self.keep_pause().await;
        let answer = self.client.execute(request).await;
        let answer = answer.map_err(|error| self.broken(&error))?;
        self.note_pause(answer.status(), answer.headers());
        Ok(answer)
    }

    /// Waits as long as the server asked to be left alone.
    pub async fn keep_pause(&self) {
        let pause = *self.pause_until.lock();
        if let Some(until) = pause {
            tokio::time::sleep_until(until).await;
        }
    }

    /// Notes whether an answer asks for a pause.
    pub fn note_pause(&self, status: StatusCode, headers: &HeaderMap) {
        if let Some(pause) = asked_to_wait(status, headers) {
            *self.pause_until.lock() = Some(Instant::now() + pause);
        }
    }

    /// The answer, if it is a success; else what it says, as an error.
    pub async fn succeeded(&self, answer: Response, what: &str) -> Result<Response, RemoteError> {
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let said = self.body(answer, MAX_SAID_BYTES).await.unwrap_or_default();
        Err(self.refusal(status, what, &said))
    }

    /// A status that is no success, as an error.
    pub fn refusal(&self, status: StatusCode, what: &str, said: &[u8]) -> RemoteError {
        let host = self.host.clone();
        let said = shown(said);
        let status = status.as_u16();
        match status {
            404 => RemoteError::Missing {
                host,
                what: what.to_owned(),
            },
            401 | 403 => RemoteError::Refused {
                host,
                status,
                hint: self.hint,
                said,
            },
            _ => RemoteError::Answer { host, status, said },
        }
    }

    /// The whole body, which may have up to `limit` bytes.
    pub async fn body(&self, answer: Response, limit: u64) -> Result<Bytes, RemoteError> {
        let too_long = || RemoteError::TooLong {
            host: self.host.clone(),
            limit,
        };
        let announced = answer.content_length();
        if announced.is_some_and(|bytes| bytes > limit) {
            return Err(too_long());
        }
        let mut all = BytesMut::new();
        let mut stream = answer.bytes_stream();
        while let Some(part) = stream.next().await {
            let part = part.map_err(|error| self.broken(&error))?;
            if (all.len() + part.len()) as u64 > limit {
                return Err(too_long());
            }
            all.extend_from_slice(&part);
        }
        Ok(all.freeze())
    }

    /// What broke a connection.
    pub fn broken(&self, error: &reqwest::Error) -> RemoteError {
        let host = self.host.clone();
        if let Some(problem) = certificate_problem(error) {
            return RemoteError::Certificate { host, problem };
        }
        if error.is_redirect() || error.is_builder() {
            let problem = chain(error);
            return RemoteError::Protocol { host, problem };
        }
        let problem = match error.is_timeout() {
            true => "no byte came in time".to_owned(),
            false => chain(error),
        };
        RemoteError::Connection { host, problem }
    }
}

/// How long a server wants to be left alone.
fn asked_to_wait(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    if status != StatusCode::TOO_MANY_REQUESTS && status != StatusCode::SERVICE_UNAVAILABLE {
        return None;
    }
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_PAUSE))
}

fn certificates(path: &Path) -> Result<Vec<Certificate>, RemoteError> {
    let local = |problem: String| RemoteError::Local(format!("{}: {problem}", path.display()));
    let pem = std::fs::read(path).map_err(|error| local(error.to_string()))?;
    let all = Certificate::from_pem_bundle(&pem).map_err(|error| local(chain(&error)))?;
    match all.is_empty() {
        true => Err(local("has no certificate (PEM)".to_owned())),
        false => Ok(all),
    }
}

/// What a server said, on one line and without what terminals obey.
fn shown(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    words.join(" ").chars().take(MAX_SHOWN_CHARS).collect()
}

/// What TLS has against a server's certificate, if that is why it failed.
fn certificate_problem(error: &reqwest::Error) -> Option<String> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        // An I/O error hides what it wraps from `source`.
        let inner = error.downcast_ref::<std::io::Error>();
        let inner = inner.and_then(std::io::Error::get_ref);
        let tls = match inner {
            Some(inner) => inner.downcast_ref::<rustls::Error>(),
            None => error.downcast_ref::<rustls::Error>(),
        };
        match tls {
            Some(rustls::Error::InvalidCertificate(problem)) => return Some(problem.to_string()),
            Some(error @ rustls::Error::NoCertificatesPresented) => return Some(error.to_string()),
            _ => {}
        }
        cause = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// An error with its causes in one line, without the address, which may hold secrets.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error.source();
    let mut text = match cause {
        Some(_) => String::new(),
        None => error.to_string(),
    };
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            let between = if text.is_empty() { "" } else { ": " };
            text = format!("{text}{between}{said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_left_alone_as_long_as_it_asks_but_not_for_ever() {
        let mut headers = HeaderMap::new();
        let of = |headers: &HeaderMap, status| asked_to_wait(status, headers);
        assert_eq!(of(&headers, StatusCode::TOO_MANY_REQUESTS), None);
        headers.insert(RETRY_AFTER, "3".parse().unwrap());
        let three = Some(Duration::from_secs(3));
        assert_eq!(of(&headers, StatusCode::TOO_MANY_REQUESTS), three);
        assert_eq!(of(&headers, StatusCode::SERVICE_UNAVAILABLE), three);
        assert_eq!(of(&headers, StatusCode::OK), None);
        headers.insert(RETRY_AFTER, "99999999".parse().unwrap());
        assert_eq!(
            of(&headers, StatusCode::TOO_MANY_REQUESTS),
            Some(LONGEST_PAUSE)
        );
        headers.insert(RETRY_AFTER, "-1".parse().unwrap());
        assert_eq!(of(&headers, StatusCode::TOO_MANY_REQUESTS), None);
    }

    #[test]
    fn what_a_server_says_stays_on_one_line() {
        assert_eq!(shown(b"a\n\x1b[31mred\r\n b"), "a [31mred b");
        assert_eq!(shown(&[b'x'; 5000]).len(), MAX_SHOWN_CHARS);
    }
}
