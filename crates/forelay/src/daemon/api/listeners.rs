//! Where the API is served: the socket, and loopback TCP where that is configured.
//!
//! Invariant: the API over TCP never keeps a worker from its work: what is in its way is told,
//! and tried again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::daemon::Host;
use crate::daemon::api::access::Caller;
use crate::daemon::api::connections::{ClientLimits, serve};
use crate::daemon::api::server;
use crate::daemon::api::token::TokenGate;
use crate::daemon::error::HostError;

/// Between attempts at an address that is taken.
const RETRY_EVERY: Duration = Duration::from_secs(5);

/// Serves the API for as long as this is polled; `tell` hears whether it can be over TCP.
pub async fn run(host: &Arc<Host>, socket: UnixListener, tell: impl Fn(Result<(), HostError>)) {
    let router = server::router(Arc::clone(host));
    let over_tcp = async {
        if let Some(address) = host.config.api.listen {
            serve_tcp(host, address, router.clone(), tell).await;
        }
    };
    let by_credentials = |stream: &UnixStream| {
        let credentials = stream.peer_cred().ok()?;
        Some(Caller::new(&credentials, &host.config.access))
    };
    let limits = ClientLimits::default();
    let over_socket = serve(socket, router.clone(), limits, None, by_credentials);
    tokio::join!(over_socket, over_tcp);
}

async fn serve_tcp(
    host: &Host,
    address: SocketAddr,
    router: Router,
    tell: impl Fn(Result<(), HostError>),
) {
    let (listener, gate) = loop {
        match listen(host, address).await {
            Ok(opened) => break opened,
            Err(error) => tell(Err(error)),
        }
        tokio::time::sleep(RETRY_EVERY).await;
    };
    tell(Ok(()));
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "the dashboard is served over TCP");
        host.set_dashboard(address);
    }
    let anybody = |_: &TcpStream| Some(Caller::with_token());
    serve(
        listener,
        router,
        ClientLimits::over_tcp(),
        Some(gate),
        anybody,
    )
    .await;
}

async fn listen(host: &Host, address: SocketAddr) -> Result<(TcpListener, TokenGate), HostError> {
    let path = host.config.api_token_path();
    let gate = TokenGate::open(&path, &host.config.api_read_token_path())
        .map_err(|error| HostError::Failed(format!("the token {}: {error}", path.display())))?;
    let listener = TcpListener::bind(address).await.map_err(|error| {
        HostError::Failed(format!(
            "cannot listen on {address}: {error}; give `listen` in [api] another port"
        ))
    })?;
    Ok((listener, gate))
}
