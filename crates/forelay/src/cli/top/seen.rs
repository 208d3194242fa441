//! What `forelay top` knows of the host: the daemon's last answers.
//!
//! Invariant: an answer that does not come leaves what was known before, and is told.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use crate::api::{ComponentMemory, ForecastEntry, Health, HostEvent, MemoryReport, Vm};
use crate::client::{Client, ClientError};

/// See the module's header.
#[derive(Clone, Debug, Default)]
pub struct SeenHost {
    pub health: Option<Health>,
    /// Those that live, then those that ended, each newest first.
    pub vms: Vec<Vm>,
    pub memory: Option<MemoryReport>,
    /// Newest first.
    pub events: Vec<HostEvent>,
    pub expected: Vec<Expected>,
    /// Some of it is for those who may act for all owners.
    pub withheld: bool,
    /// Why the daemon did not answer.
    pub problem: Option<String>,
}

/// What a profile, or a running VM, is expected to need.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    pub profile: String,
    /// The running VM that may be given it; none for a launch.
    pub vm: Option<String>,
    pub probability: f64,
    pub in_s: Option<f64>,
    pub bytes: u64,
    pub resident_bytes: u64,
    pub why: String,
}

impl SeenHost {
    /// What there is now; an error if nobody answers.
    pub async fn now(client: &Client) -> Result<Self, ClientError> {
        let mut seen = Self {
            health: Some(client.get("/v1/health").await?),
            ..Self::default()
        };
        seen.look(client, true).await;
        Ok(seen)
    }

    /// Looks again.
    pub async fn look(&mut self, client: &Client, forecast: bool) {
        self.withheld = false;
        self.problem = None;
        if let Some(health) = self.ask(client, "/v1/health").await {
            self.health = Some(health);
        }
        if let Some(vms) = self.ask(client, "/v1/vms").await {
            self.vms = in_order(vms);
        }
        if let Some(memory) = self.ask(client, "/v1/memory").await {
            self.memory = Some(memory);
        }
        if let Some(mut events) = self
            .ask::<Vec<HostEvent>>(client, "/v1/events/recent")
            .await
        {
            events.reverse();
            self.events = events;
        }
        if forecast && let Some(entries) = self.ask(client, "/v1/forecast").await {
            self.expected = expected(entries);
        }
    }

    async fn ask<T: DeserializeOwned>(&mut self, client: &Client, path: &str) -> Option<T> {
        // Who does not answer once is not asked more.
        if self.problem.is_some() {
            return None;
        }
        match client.get(path).await {
            Ok(answer) => Some(answer),
            Err(ClientError::Refused { status: 403, .. }) => {
                self.withheld = true;
                None
            }
            // Without a repository nothing is forecast; `degraded` tells.
            Err(ClientError::Refused { .. }) => None,
            Err(error) => {
                self.problem = Some(error.to_string());
                None
            }
        }
    }

    /// All components in memory, largest first.
    pub fn components(&self) -> Vec<&ComponentMemory> {
        let domains = self.memory.iter().flat_map(|memory| &memory.domains);
        let mut all: Vec<_> = domains.flat_map(|domain| &domain.components).collect();
        all.sort_by_key(|one| std::cmp::Reverse((one.resident_bytes, one.image_bytes)));
        all
    }
}

/// VMs that live before those that ended, newest first.
fn in_order(mut vms: Vec<Vm>) -> Vec<Vm> {
    vms.sort_by_key(|vm| (!vm.state.is_live(), std::cmp::Reverse(vm.launched_ms)));
    vms
}

/// Forecasts of components, put together for each launch or VM; likeliest first.
fn expected(entries: Vec<ForecastEntry>) -> Vec<Expected> {
    let mut all: BTreeMap<_, Expected> = BTreeMap::new();
    for entry in entries {
        let key = (entry.owner, entry.profile.clone(), entry.vm.clone());
        let known = all.entry(key).or_insert(Expected {
            profile: entry.profile,
            vm: entry.vm,
            probability: 0.0,
            in_s: None,
            bytes: 0,
            resident_bytes: 0,
            why: entry.reasons.join("; "),
        });
        known.probability = known.probability.max(entry.probability);
        known.in_s = match (known.in_s, entry.expected_in_s) {
            (Some(known_s), Some(s)) => Some(known_s.min(s)),
            (known_s, s) => known_s.or(s),
        };
        known.bytes += entry.bytes;
        known.resident_bytes += entry.resident_bytes;
    }
    let mut all: Vec<_> = all.into_values().collect();
    all.retain(|one| one.probability >= 0.01);
    all.sort_by(|a, b| b.probability.total_cmp(&a.probability));
    all
}
