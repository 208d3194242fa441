//! The API's connections: how many there may be, and how long a client may take.
//!
//! Refuses to know the routes. Invariants: a client that sends nothing, or too slowly, holds
//! a connection no longer than the limits say; more than so many wait until one is free;
//! requests that may take long ([`LongRequests`]) never hold all of them.

use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::serve::Listener;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::api::ApiError;
use crate::daemon::api::access::Caller;
use crate::daemon::api::problems;
use crate::daemon::api::token::TokenGate;

/// Who may use the API: root and root's group.
const SOCKET_MODE: u32 = 0o660;
/// Largest body of a request: manifests with the files in them.
const MAX_BODY_BYTES: usize = 8 << 20;
/// Connections at a time, those of event streams aside.
const MAX_CONVERSING: usize = 256;
/// Of them, those whose requests may take long.
const MAX_LONG: usize = MAX_CONVERSING * 3 / 4;
/// And those that stop a VM: they are not refused while others take long.
const MAX_STOPS: usize = MAX_CONVERSING / 8;
/// Event streams at a time; one that idles costs a connection and next to nothing else.
const MAX_STREAMS: usize = 1_200;
/// Connections at a time.
const MAX_CONNECTIONS: usize = MAX_CONVERSING + MAX_STREAMS;
/// Connections over TCP at a time: anything on this host may open some.
const MAX_OVER_TCP: usize = 128;
/// Of them, event streams: the others are left for what is answered at once.
const MAX_STREAMS_OVER_TCP: usize = MAX_OVER_TCP * 3 / 4;

/// What a client may take.
#[derive(Clone, Copy, Debug)]
pub struct ClientLimits {
    /// Connections at a time.
    pub connections: usize,
    /// For a request's header, from the connection or the answer before; so also the time
    /// that a connection may idle.
    pub header: Duration,
    /// For a request's body.
    pub body: Duration,
}

impl ClientLimits {
    /// Those over TCP.
    pub fn over_tcp() -> Self {
        Self {
            connections: MAX_OVER_TCP,
            ..Self::default()
        }
    }
}

impl Default for ClientLimits {
    fn default() -> Self {
        Self {
            connections: MAX_CONNECTIONS,
            header: Duration::from_secs(15),
            body: Duration::from_secs(15),
        }
    }
}

/// Turns for requests that may take as long as a guest's command or a launch, so that some
/// connections are left for those that are answered at once.
#[derive(Clone, Debug)]
pub struct LongRequests(Arc<Semaphore>);

impl Default for LongRequests {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_LONG)))
    }
}

impl LongRequests {
    /// Turns for event streams alone.
    pub fn for_streams() -> Self {
        Self(Arc::new(Semaphore::new(MAX_STREAMS)))
    }

    /// Turns for event streams over TCP alone.
    pub fn for_streams_over_tcp() -> Self {
        Self(Arc::new(Semaphore::new(MAX_STREAMS_OVER_TCP)))
    }

    /// Turns for stops alone.
    pub fn for_stops() -> Self {
        Self(Arc::new(Semaphore::new(MAX_STOPS)))
    }

    /// A turn, held until it is dropped; none if all are taken.
    pub fn take(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0).try_acquire_owned().ok()
    }

    /// Answers a request of a route whose requests may take long, or refuses it. The turn is held
    /// until the answer, and by what goes on after it: it is among the request's extensions.
    pub async fn answer(State(turns): State<Self>, mut request: Request, next: Next) -> Response {
        match turns.take() {
            Some(turn) => {
                let turn = Arc::new(turn);
                request.extensions_mut().insert(Arc::clone(&turn));
                let answer = next.run(request).await;
                drop(turn);
                answer
            }
            None => {
                let error = "so many commands, launches, stops and the like are under way that \
                             no more are begun: try again in a while";
                (StatusCode::SERVICE_UNAVAILABLE, Json(ApiError::new(error))).into_response()
            }
        }
    }
}

/// Listens on `socket`; a socket that is there belongs to a predecessor that has ended.
pub fn listen(socket: &Path) -> std::io::Result<UnixListener> {
    let is_socket = |path: &Path| {
        std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket())
    };
    if is_socket(socket) {
        std::fs::remove_file(socket)?;
    }
    // The process's umask leaves it to root alone; from there it is only widened.
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    Ok(listener)
}

/// Serves the API for as long as this is polled, to those whom the gate lets in, if there is
/// one; `caller` says who is at the other end of a connection.
pub async fn serve<L: Listener>(
    mut listener: L,
    router: Router,
    limits: ClientLimits,
    gate: Option<TokenGate>,
    caller: impl Fn(&L::Io) -> Option<Caller>,
) {
    let mut router = router.layer(from_fn(move |request, next| {
        read_body(limits.body, request, next)
    }));
    if let Some(gate) = gate {
        // Before anything is read of a request's body.
        router = router.layer(from_fn_with_state(gate, TokenGate::guard));
    }
    let router = router.layer(from_fn(problems::answer));
    let turns = Arc::new(Semaphore::new(limits.connections));
    loop {
        let Ok(turn) = Arc::clone(&turns).acquire_owned().await else {
            return;
        };
        // What the system refuses, for example for want of descriptors, is tried again.
        let (stream, _) = listener.accept().await;
        let Some(caller) = caller(&stream) else {
            continue;
        };
        let router = router.clone().layer(Extension(caller));
        tokio::spawn(async move {
            converse(stream, router, limits.header).await;
            drop(turn);
        });
    }
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    router: Router,
    header: Duration,
) {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(header);
    let service = TowerToHyperService::new(router);
    // A client that goes away or is too slow is no concern of anybody else's.
    if let Err(error) = builder
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await
    {
        tracing::debug!(%error, "a connection to the API ended");
    }
}

/// Reads a request's body before anything is done about it.
async fn read_body(limit: Duration, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let reading = axum::body::to_bytes(body, MAX_BODY_BYTES);
    match tokio::time::timeout(limit, reading).await {
        Ok(Ok(bytes)) => {
            next.run(Request::from_parts(parts, Body::from(bytes)))
                .await
        }
        Ok(Err(_)) => StatusCode::PAYLOAD_TOO_LARGE.into_response(),
        Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::{get, post};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixStream;

    use super::*;

    const LIMITS: ClientLimits = ClientLimits {
        connections: 2,
        header: Duration::from_millis(200),
        body: Duration::from_millis(200),
    };

    fn anybody(_: &UnixStream) -> Option<Caller> {
        Some(Caller::with_token())
    }

    fn started(dir: &Path) -> std::path::PathBuf {
        let socket = dir.join("api.sock");
        let listener = listen(&socket).unwrap();
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, SOCKET_MODE);
        let router = Router::new()
            .route("/", get(async || "fine"))
            .route("/echo", post(async |body: String| body));
        tokio::spawn(serve(listener, router, LIMITS, None, anybody));
        socket
    }

    /// Sends `text` and reads until the daemon closes the connection.
    async fn exchange(socket: &Path, text: &str) -> String {
        let mut stream = UnixStream::connect(socket).await.unwrap();
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    // Time passes when nobody has anything to do, and not while they do it.
    #[tokio::test(start_paused = true)]
    async fn clients_that_say_nothing_are_shown_out_and_others_served() {
        let dir = tempfile::tempdir().unwrap();
        let socket = started(dir.path());
        // As many as there may be, silent or half-spoken.
        let (silent, half) = tokio::join!(
            exchange(&socket, ""),
            exchange(&socket, "GET / HTTP/1.1\r\nhost: x"),
        );
        assert_eq!(silent, "");
        assert!(!half.contains("200"), "{half}");
        // One that was answered and then idles, and one that never sends what it promised.
        let idle = exchange(&socket, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(idle.ends_with("fine"), "{idle}");
        let promised = "POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf";
        let cut = exchange(&socket, promised).await;
        assert!(cut.starts_with("HTTP/1.1 408"), "{cut}");
        let whole = promised.replace("half", "the whole");
        let echoed = exchange(&socket, &whole).await;
        assert!(echoed.ends_with("the whole"), "{echoed}");
    }
    #[tokio::test(start_paused = true)]
    async fn requests_that_take_long_leave_connections_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api.sock");
        let turns = LongRequests(Arc::new(Semaphore::new(LIMITS.connections - 1)));
        let router = Router::new()
            .route("/long", post(std::future::pending::<()>))
            .layer(from_fn_with_state(turns.clone(), LongRequests::answer))
            .route("/", get(async || "fine"));
        tokio::spawn(serve(
            listen(&socket).unwrap(),
            router,
            LIMITS,
            None,
            anybody,
        ));
        let request = |words: &str| {
            format!("{words} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        };
        let mut long = Vec::new();
        for _ in 0..LIMITS.connections - 1 {
            let mut stream = UnixStream::connect(&socket).await.unwrap();
            stream
                .write_all(request("POST /long").as_bytes())
                .await
                .unwrap();
            long.push(stream);
        }
        while turns.0.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refused = exchange(&socket, &request("POST /long")).await;
        assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
        assert!(refused.contains("try again"), "{refused}");
        let fine = exchange(&socket, &request("GET /")).await;
        assert!(fine.ends_with("fine"), "{fine}");
        // A client that goes away gives its turn back.
        drop(long);
        while turns.0.available_permits() == 0 {
            tokio::task::yield_now().await;
        }
        let turns = [LongRequests::default(), LongRequests::for_stops()];
        let most: usize = turns.iter().map(|turns| turns.0.available_permits()).sum();
        assert!(most + MAX_STREAMS + 32 <= ClientLimits::default().connections);
    }
}
