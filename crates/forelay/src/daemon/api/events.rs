//! The stream of events: `GET /v1/events`, as server-sent events.
//!
//! A client that comes back says with `Last-Event-ID` (or `after`) what it has, and hears first
//! what it missed, as far as that is kept. One that is too slow is told so, and its stream ends.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Extension, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream::{self, Stream};
use serde::Deserialize;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::api::{ApiError, HostEvent};
use crate::daemon::Host;
use crate::daemon::api::access::Caller;
use crate::daemon::api::connections::LongRequests;
use crate::daemon::events::Told;

/// How often a stream on which nothing happens says that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Turns of streams.
#[derive(Clone, Debug)]
pub struct Streams {
    over_socket: LongRequests,
    over_tcp: LongRequests,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            over_socket: LongRequests::for_streams(),
            over_tcp: LongRequests::for_streams_over_tcp(),
        }
    }
}

impl Streams {
    fn take(&self, caller: &Caller) -> Option<OwnedSemaphorePermit> {
        match caller.is_over_tcp() {
            true => self.over_tcp.take(),
            false => self.over_socket.take(),
        }
    }
}

/// From which event on.
#[derive(Debug, Default, Deserialize)]
pub struct Since {
    after: Option<u64>,
}

/// One client's stream.
struct Watch {
    missed: VecDeque<Arc<Told>>,
    receiver: Receiver<Arc<Told>>,
    over: bool,
    _turn: OwnedSemaphorePermit,
}

/// `GET /v1/events`.
pub async fn stream(
    State(host): State<Arc<Host>>,
    Extension(streams): Extension<Streams>,
    Extension(caller): Extension<Caller>,
    Query(since): Query<Since>,
    headers: HeaderMap,
) -> Response {
    let Some(turn) = streams.take(&caller) else {
        let error = "so many watch already that no more can: try again in a while";
        return (StatusCode::SERVICE_UNAVAILABLE, Json(ApiError::new(error))).into_response();
    };
    let last = headers.get("last-event-id").and_then(|id| id.to_str().ok());
    let after = last.and_then(|id| id.parse().ok()).or(since.after);
    let (missed, receiver) = host.events().watch(after);
    let watch = Watch {
        missed: missed.into(),
        receiver,
        over: false,
        _turn: turn,
    };
    Sse::new(watch.into_stream())
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}

/// `GET /v1/events/recent`.
pub async fn recent(State(host): State<Arc<Host>>) -> Json<Vec<HostEvent>> {
    let recent = host.events().recent();
    Json(recent.iter().map(|told| told.event.clone()).collect())
}

impl Watch {
    fn into_stream(self) -> impl Stream<Item = Result<Event, Infallible>> {
        stream::unfold(self, async |mut watch| {
            let event = watch.next().await?;
            Some((Ok(event), watch))
        })
    }

    async fn next(&mut self) -> Option<Event> {
        if self.over {
            return None;
        }
        let told = match self.missed.pop_front() {
            Some(told) => Ok(told),
            None => self.receiver.recv().await,
        };
        match told {
            Ok(told) => Some(event(&told)),
            Err(RecvError::Lagged(lost)) => {
                self.over = true;
                let words = format!("{lost} events were lost: this client reads too slowly");
                Some(Event::default().event("dropped").data(words))
            }
            Err(RecvError::Closed) => None,
        }
    }
}

fn event(told: &Told) -> Event {
    Event::default()
        .id(told.event.id.to_string())
        .event(told.event.kind.name())
        .data(&told.json)
}
