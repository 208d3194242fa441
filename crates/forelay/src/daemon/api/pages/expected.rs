//! What is expected next, as pages show it: the last forecast, made again when somebody looks and
//! it is old.
//!
//! A forecast asks the repository for its list, and the models for each VM. Invariant: no page
//! waits for one but the first, and that not for long; one is made at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::api::ForecastEntry;
use crate::daemon::Host;

/// A forecast younger than this is shown as it is.
const FRESH: Duration = Duration::from_secs(10);
/// How long the first page waits for one.
const PATIENCE: Duration = Duration::from_millis(300);

type Entries = Arc<Vec<ForecastEntry>>;

/// See the module's header.
#[derive(Debug, Default)]
pub struct Expectations {
    told: watch::Sender<Option<Entries>>,
    /// When the last one was begun, and whether it is being made.
    last: Mutex<(Option<Instant>, bool)>,
}

impl Expectations {
    /// The last forecast; nothing if there is none yet.
    pub async fn recent(self: &Arc<Self>, host: &Arc<Host>) -> Entries {
        if self.begin() {
            let (this, host) = (Arc::clone(self), Arc::clone(host));
            tokio::spawn(async move { this.make(&host).await });
        }
        let mut told = self.told.subscribe();
        let first = tokio::time::timeout(PATIENCE, told.wait_for(Option::is_some));
        let known = match first.await {
            Ok(Ok(told)) => told.clone(),
            _ => None,
        };
        known.unwrap_or_default()
    }

    /// Whether another is to be made now.
    fn begin(&self) -> bool {
        let mut last = self.last.lock();
        let (at, under_way) = *last;
        let due = !under_way && at.is_none_or(|at| at.elapsed() >= FRESH);
        if due {
            *last = (Some(Instant::now()), true);
        }
        due
    }

    async fn make(&self, host: &Host) {
        // Without the repository's list nothing is known to be expected.
        let made = host.forecasts.report(None).await.unwrap_or_default();
        self.told.send_replace(Some(Arc::new(made)));
        self.last.lock().1 = false;
    }
}
