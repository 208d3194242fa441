//! The API's routes: parse, call the [`Host`], answer JSON. No logic of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Extension, Json, Path, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::Deserialize;

use crate::api::{
    ApiError, AttachRequest, ForkRequest, Forked, Health, LaunchRequest, PrefetchRequest,
    SnapshotRequest, VmState, WaitingVm,
};
use crate::daemon::Host;
use crate::daemon::api::connections::LongRequests;
use crate::daemon::api::events::{self, Streams};
use crate::daemon::api::problems::ProblemKind;
use crate::daemon::api::{access, exec, metrics, pages};
use crate::daemon::error::HostError;
use crate::daemon::vm::pause;

/// How long a client waits for a VM's next state when too many wait.
const CROWDED_WAIT: Duration = Duration::from_millis(500);

type Shared = State<Arc<Host>>;

/// How long a request waits for a worker that has just started.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

/// All routes.
pub fn router(host: Arc<Host>) -> Router {
    let turns = LongRequests::default();
    let stops = from_fn_with_state(LongRequests::for_stops(), LongRequests::answer);
    let waiting = Router::new()
        .route("/v1/vms", post(launch))
        .route("/v1/vms/{name}/exec", post(exec::exec))
        .route("/v1/vms/{name}/attach", post(attach))
        .route("/v1/vms/{name}/detach", post(detach))
        .route("/v1/vms/{name}/pause", post(pause))
        .route("/v1/vms/{name}/resume", post(resume))
        .route("/v1/vms/{name}/hibernate", post(hibernate))
        .route("/v1/vms/{name}/fork", post(fork))
        .route("/v1/prefetch", post(prefetch))
        .route("/v1/snapshots", post(make_snapshot))
        .layer(from_fn_with_state(turns.clone(), LongRequests::answer))
        .route("/v1/vms/{name}", get(show))
        .route("/v1/vms/{name}", delete(stop).layer(stops))
        .route("/v1/vms/{name}/map", get(map))
        .route("/v1/snapshots", get(snapshots))
        .route("/v1/snapshots/{id}", get(snapshot).delete(remove_snapshot))
        .route("/v1/memory", get(memory))
        .route("/v1/memory/drop", post(drop_memory))
        .route("/v1/forecast", get(forecast))
        .route("/v1/history", get(history))
        .layer(Extension(turns))
        .layer(from_fn_with_state(Arc::clone(&host), settled));
    Router::new()
        .route("/v1/health", get(health))
        .route("/v1/vms", get(list))
        .route("/v1/events", get(events::stream))
        .route("/v1/events/recent", get(events::recent))
        .route("/metrics", get(metrics::scrape))
        .merge(pages::router(&host))
        .merge(waiting)
        .layer(Extension(Streams::default()))
        .fallback(unknown)
        .layer(from_fn_with_state(Arc::clone(&host), access::check))
        .with_state(host)
}

/// An error on its way to the client.
pub struct Failure(HostError);

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let (status, kind) = match &self.0 {
            HostError::NoSuchVm(_) => (StatusCode::NOT_FOUND, "no-such-vm"),
            HostError::Invalid(_) => (StatusCode::BAD_REQUEST, "invalid-request"),
            HostError::Busy(_) => (StatusCode::CONFLICT, "busy"),
            HostError::Cancelled => (StatusCode::CONFLICT, "cancelled"),
            HostError::Failed(_) => (StatusCode::INTERNAL_SERVER_ERROR, "failed"),
        };
        let said = Json(ApiError::new(self.0.to_string()));
        (status, Extension(ProblemKind(kind)), said).into_response()
    }
}

type Answer<T> = Result<Json<T>, Failure>;

async fn health(State(host): Shared) -> Json<Health> {
    let waiting = host.vms.list().into_iter().filter_map(|vm| {
        let wait = vm.waiting?;
        Some(WaitingVm { vm: vm.name, wait })
    });
    Json(Health {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        waiting: waiting.collect(),
        pid: std::process::id(),
        uptime_s: host.uptime().as_secs_f64(),
        accelerator: host.accelerator(),
        degraded: host.degraded(),
        dashboard: host.dashboard(),
    })
}

/// Has a request wait until the worker knows what there is: see [`Host::settled`].
async fn settled(State(host): Shared, request: Request, next: Next) -> Response {
    let _ = tokio::time::timeout(SETTLE_LIMIT, host.settled()).await;
    next.run(request).await
}

async fn unknown() -> Response {
    let error = "no such path in the API; `forelay --help` lists what there is";
    (StatusCode::NOT_FOUND, Json(ApiError::new(error))).into_response()
}

async fn list(State(host): Shared) -> Response {
    Json(host.vms.list()).into_response()
}

async fn launch(State(host): Shared, Json(request): Json<LaunchRequest>) -> Response {
    match host.launches.launch(request).await {
        Ok(vm) => Json(vm).into_response(),
        Err(error) => Failure(error).into_response(),
    }
}

#[derive(Debug, Deserialize)]
struct Wait {
    wait_ms: Option<u64>,
}

/// With `wait_ms`, answers when the state changes or that time is over; sooner if too many
/// wait already.
async fn show(
    State(host): Shared,
    Extension(turns): Extension<LongRequests>,
    Path(name): Path<String>,
    Query(wait): Query<Wait>,
) -> Answer<crate::api::Vm> {
    let patience = Duration::from_millis(wait.wait_ms.unwrap_or(0).min(60_000));
    let turn = turns.take();
    let patience = match turn {
        Some(_) => patience,
        None => patience.min(CROWDED_WAIT),
    };
    Ok(Json(host.vms.show(&name, patience).await?))
}

async fn stop(State(host): Shared, Path(name): Path<String>) -> Answer<crate::api::Vm> {
    let hibernates = host.vms.instance(&name)?.state() == VmState::Hibernated;
    let stopped = host.vms.stop(&name).await?;
    if hibernates {
        host.snapshots.remove_unused().await;
    }
    Ok(Json(stopped))
}

async fn attach(
    State(host): Shared,
    Path(name): Path<String>,
    Json(request): Json<AttachRequest>,
) -> Answer<crate::api::Vm> {
    let instance = host.vms.instance(&name)?;
    // A client that goes away must not leave it half done.
    let attached = tokio::spawn(async move {
        let _turn = instance.device_turn().await;
        let attached = host.attachments.attach(&instance, &request.component);
        attached.await
    });
    Ok(Json(attached.await.map_err(HostError::failed)??))
}

async fn detach(
    State(host): Shared,
    Path(name): Path<String>,
    Json(request): Json<AttachRequest>,
) -> Answer<crate::api::Vm> {
    let instance = host.vms.instance(&name)?;
    let detached = tokio::spawn(async move {
        let _turn = instance.device_turn().await;
        let detached = host.attachments.detach(&instance, &request.component);
        detached.await
    });
    Ok(Json(detached.await.map_err(HostError::failed)??))
}

async fn pause(State(host): Shared, Path(name): Path<String>) -> Answer<crate::api::Vm> {
    let instance = host.vms.instance(&name)?;
    // A client that goes away must not leave it half done.
    let pausing = tokio::spawn(async move { pause::pause(&instance).await });
    Ok(Json(pausing.await.map_err(HostError::failed)??))
}

async fn resume(State(host): Shared, Path(name): Path<String>) -> Answer<crate::api::Vm> {
    let instance = host.vms.instance(&name)?;
    let resuming = tokio::spawn(async move {
        match instance.state() {
            VmState::Hibernated => host.launches.wake(&instance).await,
            _ => pause::unpause(&instance).await,
        }
    });
    Ok(Json(resuming.await.map_err(HostError::failed)??))
}

async fn hibernate(State(host): Shared, Path(name): Path<String>) -> Answer<crate::api::Vm> {
    let instance = host.vms.instance(&name)?;
    let saving = tokio::spawn(async move {
        let saved = host.launches.hibernate(&instance).await;
        // Also of what was saved in vain, and of what it was saved as before.
        host.snapshots.remove_unused().await;
        saved
    });
    Ok(Json(saving.await.map_err(HostError::failed)??))
}

async fn fork(
    State(host): Shared,
    Path(name): Path<String>,
    Json(request): Json<ForkRequest>,
) -> Answer<Forked> {
    let source = host.vms.instance(&name)?;
    let forking = tokio::spawn(async move {
        let forked = host.launches.fork(&source, request).await;
        if forked.is_err() {
            host.snapshots.remove_unused().await;
        }
        forked
    });
    Ok(Json(forking.await.map_err(HostError::failed)??))
}

async fn map(State(host): Shared, Path(name): Path<String>) -> Answer<crate::api::VmMap> {
    Ok(Json(host.maps.map(&*host.vms.instance(&name)?).await?))
}

async fn memory(State(host): Shared) -> Answer<crate::api::MemoryReport> {
    Ok(Json(host.accounts.report().await?))
}

async fn drop_memory(State(host): Shared) -> Answer<crate::api::MemoryReport> {
    host.maps.drop_memory().await?;
    Ok(Json(host.accounts.report().await?))
}

async fn prefetch(
    State(host): Shared,
    Json(request): Json<PrefetchRequest>,
) -> Answer<crate::api::Prefetched> {
    let started = Instant::now();
    let launch = host.launches.prefetch_only(request).await?;
    let took_s = started.elapsed().as_secs_f64();
    Ok(Json(host.maps.prefetched(&launch, took_s)))
}

async fn make_snapshot(
    State(host): Shared,
    Json(request): Json<SnapshotRequest>,
) -> Answer<crate::api::Snapshot> {
    let launches = Arc::clone(&host.launches);
    // A client that goes away must not leave it half done.
    let making = tokio::spawn(async move { launches.make_snapshot(request).await });
    let made = making.await.map_err(HostError::failed)??;
    Ok(Json(host.snapshots.show(&made).await?))
}

async fn snapshots(State(host): Shared) -> Response {
    Json(host.snapshots.list().await).into_response()
}

async fn snapshot(State(host): Shared, Path(id): Path<String>) -> Answer<crate::api::Snapshot> {
    let (_, kept) = host.snapshots.named(&id).await?;
    Ok(Json(host.snapshots.show(&kept).await?))
}

async fn remove_snapshot(
    State(host): Shared,
    Path(id): Path<String>,
) -> Answer<crate::api::Snapshot> {
    let removing = tokio::spawn(async move {
        let (shelf, kept) = host.snapshots.named(&id).await?;
        let shown = host.snapshots.show(&kept).await?;
        host.snapshots.remove(&shelf, &kept).await.map(|()| shown)
    });
    Ok(Json(removing.await.map_err(HostError::failed)??))
}

#[derive(Debug, Deserialize)]
struct OfProfile {
    profile: Option<String>,
}

async fn forecast(
    State(host): Shared,
    Query(query): Query<OfProfile>,
) -> Answer<Vec<crate::api::ForecastEntry>> {
    Ok(Json(host.forecasts.report(query.profile.as_deref()).await?))
}

async fn history(
    State(host): Shared,
    Query(query): Query<OfProfile>,
) -> Answer<Vec<crate::api::HistoryEntry>> {
    Ok(Json(
        host.forecasts
            .learner
            .entries(query.profile.as_deref())
            .await?,
    ))
}
