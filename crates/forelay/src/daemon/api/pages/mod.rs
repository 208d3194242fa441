//! The dashboard: what the API tells, as pages for people.
//!
//! Each page has a file: it asks the services, makes words and lengths of what they say, and a
//! template of `templates/` draws them. Templates escape all text. Invariants: a page loads
//! nothing but what this daemon serves (the policy says so to the browser); lists are bounded;
//! no page waits for a repository or a guest for long.

mod expected;
mod forecast;
mod host;
mod launches;
pub mod memory;
mod pulse;
mod trail;
mod treemap;
mod vm;

use std::sync::Arc;
use std::time::Duration;

use askama::Template;
use axum::extract::{Extension, Path, State};
use axum::http::StatusCode;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};

use crate::api::Degraded;
use crate::daemon::Host;
use crate::daemon::api::server::Failure;
use crate::daemon::error::HostError;
use crate::units;

use expected::Expectations;
use pulse::{Pulse, PulseReport};
use trail::Trail;

/// Pages by their paths.
pub const PAGES: &[(&str, &str)] = &[
    ("/", "Memory"),
    ("/ui/forecast", "Forecast"),
    ("/ui/launches", "Launches"),
    ("/ui/repository", "Repository"),
    ("/ui/pressure", "Pressure"),
];

/// What a browser may load for a page: what is served here, nothing else, and no code in it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// How long a VM's page waits for its mapping table, for which a component may have to be opened.
const PATIENCE: Duration = Duration::from_secs(3);

/// Files of the pages by name: their types, and what is in them.
const FILES: &[(&str, &str, &str)] = &[
    (
        "forelay.css",
        "text/css; charset=utf-8",
        include_str!("../../../../static/forelay.css"),
    ),
    (
        "forelay.svg",
        "image/svg+xml",
        include_str!("../../../../static/forelay.svg"),
    ),
    (
        "live.js",
        "text/javascript; charset=utf-8",
        include_str!("../../../../static/live.js"),
    ),
    (
        "htmx.min.js",
        "text/javascript; charset=utf-8",
        include_str!("../../../../static/htmx.min.js"),
    ),
    (
        "chart.js",
        "text/javascript; charset=utf-8",
        include_str!("../../../../static/chart.js"),
    ),
    (
        "uplot.min.js",
        "text/javascript; charset=utf-8",
        include_str!("../../../../static/uplot.min.js"),
    ),
    (
        "uplot.css",
        "text/css; charset=utf-8",
        include_str!("../../../../static/uplot.css"),
    ),
    (
        "uplot.LICENSE",
        "text/plain; charset=utf-8",
        include_str!("../../../../static/uplot.LICENSE"),
    ),
    (
        "htmx.LICENSE",
        "text/plain; charset=utf-8",
        include_str!("../../../../static/htmx.LICENSE"),
    ),
];

/// The pages' routes. What forecasts tell and what moves is written down from now on.
pub fn router(host: &Arc<Host>) -> Router<Arc<Host>> {
    let trail = Arc::new(Trail::default());
    tokio::spawn(trail::follow(Arc::downgrade(host), Arc::downgrade(&trail)));
    let pulse = Arc::new(Pulse::default());
    tokio::spawn(pulse::follow(Arc::downgrade(host), Arc::downgrade(&pulse)));
    Router::new()
        .route("/", get(memory_page))
        .route("/ui/pulse", get(beats))
        .route("/ui/forecast", get(forecast_page))
        .route("/ui/launches", get(launches_page))
        .route("/ui/repository", get(repository_page))
        .route("/ui/pressure", get(pressure_page))
        .route("/ui/vms/{name}", get(vm_page))
        .route("/ui/static/{file}", get(file))
        .layer(Extension(trail))
        .layer(Extension(pulse))
        .layer(Extension(Arc::new(Expectations::default())))
}

/// What all pages show.
pub struct PageFrame {
    title: String,
    /// Which of the pages it is, or none of them.
    at: &'static str,
    /// The host in a few words.
    host: String,
    degraded: Vec<Degraded>,
}

impl PageFrame {
    fn new(host: &Host, at: &'static str) -> Self {
        Self::titled(host, at, at.to_owned())
    }

    /// Of no host.
    #[cfg(test)]
    pub fn of_test() -> Self {
        Self {
            title: String::new(),
            at: "",
            host: String::new(),
            degraded: Vec::new(),
        }
    }

    fn titled(host: &Host, at: &'static str, title: String) -> Self {
        let live = host.instances.live().len();
        let vms = if live == 1 { "VM" } else { "VMs" };
        Self {
            title,
            at,
            host: format!(
                "{live} {vms}, up {}",
                units::seconds(host.uptime().as_secs_f64())
            ),
            degraded: host.degraded(),
        }
    }
}

/// A page, with what the browser must know of it.
fn shown(page: &impl Template) -> Result<Response, Failure> {
    let text = page.render().map_err(HostError::failed)?;
    Ok((headers("text/html; charset=utf-8", "no-store"), text).into_response())
}

fn headers(media: &'static str, cache: &'static str) -> [(HeaderName, &'static str); 5] {
    [
        (CONTENT_TYPE, media),
        (CACHE_CONTROL, cache),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
    ]
}

/// Makes a page off the async threads.
async fn made<P: Template + Send + 'static>(
    make: impl FnOnce() -> P + Send + 'static,
) -> Result<Response, Failure> {
    let page = tokio::task::spawn_blocking(make).await;
    shown(&page.map_err(HostError::failed)?)
}

async fn memory_page(
    State(host): State<Arc<Host>>,
    Extension(expectations): Extension<Arc<Expectations>>,
    Extension(pulse): Extension<Arc<Pulse>>,
) -> Result<Response, Failure> {
    let expected = expectations.recent(&host).await;
    made(move || {
        let frame = PageFrame::new(&host, "Memory");
        memory::page(frame, &host.accounts, &expected, pulse.words())
    })
    .await
}

async fn beats(Extension(pulse): Extension<Arc<Pulse>>) -> Json<PulseReport> {
    Json(pulse.report())
}

async fn forecast_page(
    State(host): State<Arc<Host>>,
    Extension(trail): Extension<Arc<Trail>>,
) -> Result<Response, Failure> {
    made(move || forecast::page(&host, &trail)).await
}

async fn launches_page(State(host): State<Arc<Host>>) -> Result<Response, Failure> {
    made(move || launches::page(&host)).await
}

async fn repository_page(State(host): State<Arc<Host>>) -> Result<Response, Failure> {
    made(move || host::repository(&host)).await
}

async fn pressure_page(State(host): State<Arc<Host>>) -> Result<Response, Failure> {
    made(move || host::pressure(&host)).await
}

async fn vm_page(
    State(host): State<Arc<Host>>,
    Path(name): Path<String>,
) -> Result<Response, Failure> {
    let vm = host.vms.show(&name, Duration::ZERO).await?;
    let instance = host.vms.instance(&name)?;
    let map = tokio::time::timeout(PATIENCE, host.maps.map(&instance));
    let map = map.await.ok().and_then(Result::ok);
    let console = instance.handle();
    made(move || {
        let console = console.map(|handle| handle.console_tail());
        vm::page(&host, &vm, map, console.unwrap_or_default())
    })
    .await
}

async fn file(Path(name): Path<String>) -> Response {
    match FILES.iter().find(|(known, ..)| *known == name) {
        Some((_, media, text)) => (headers(media, "no-cache"), *text).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// A number as SVG takes it: no more digits than show.
fn px(value: f64) -> f64 {
    if value.is_finite() {
        (value * 10.0).round() / 10.0
    } else {
        0.0
    }
}

/// `part` of `whole` in percent.
fn percent(part: u64, whole: u64) -> f64 {
    px(100.0 * part as f64 / whole.max(1) as f64).min(100.0)
}

/// A text that is not longer than `most` characters.
fn cut(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}
