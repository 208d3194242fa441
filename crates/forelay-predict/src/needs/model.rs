//! The online model of which components VMs have.
//!
//! Two forecasts compete, weighted by their own past log-loss: a mixture of Chow-Liu trees over
//! context and components, fitted now and then to recent launches (structure and tables),
//! and decayed counts per profile with a Dirichlet prior, which know a new component at once.
//! Evidence is the context and the components present; what is absent so far is unknown, since it
//! may yet be attached.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::data::Schema;
use super::training::{FittedNeeds, NamesInUse, NeedsTraining};
use super::tree::UNKNOWN;
use super::vocabulary::Vocabulary;
use crate::time::Timestamp;

/// What is known of a launch besides its components.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// Profile name.
    pub profile: String,
    /// Owner.
    pub owner: String,
    /// When.
    pub at: Timestamp,
    /// Memory of the VM, in MiB; its power of two is the resource class.
    pub memory_mib: u32,
}

impl Context {
    /// Three-hour part of the day.
    fn hour(&self) -> u32 {
        u32::from(self.at.hour_of_day()) / 3
    }

    fn weekend(&self) -> u32 {
        u32::from(self.at.day_of_week() >= 5)
    }

    fn class(&self) -> u32 {
        (self.memory_mib.max(1).ilog2().saturating_sub(6)).min(CLASSES as u32 - 1)
    }
}

const HOURS: usize = 8;
const CLASSES: usize = 8;
/// Answers remembered.
const MOST_RANKED: usize = 4096;
/// Variables before the components: profile, owner, hour, day type, resource class.
pub(super) const CONTEXT: usize = 5;

/// Bounds and rates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NeedsConfig {
    /// Component names modelled.
    pub max_components: usize,
    /// Profiles told apart; the least recently seen beyond it count as unknown.
    pub max_profiles: usize,
    /// Owners told apart.
    pub max_owners: usize,
    /// Recent launches kept to fit to.
    pub max_rows: usize,
    /// Launches after which one counts half.
    pub half_life_launches: f64,
    /// Launches between fits, once there are that many.
    pub fit_every: u64,
    /// Pseudo-launches of the distribution of all profiles in each profile's counts.
    pub prior_launches: f64,
}

impl Default for NeedsConfig {
    fn default() -> Self {
        Self {
            max_components: 256,
            max_profiles: 127,
            max_owners: 63,
            max_rows: 2048,
            half_life_launches: 1024.0,
            fit_every: 128,
            prior_launches: 1.0,
        }
    }
}

/// One remembered launch, or what is known of one to come.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct NeedsRow {
    profile: Option<u16>,
    owner: Option<u16>,
    hour: u32,
    weekend: u32,
    class: u32,
    components: Vec<u16>,
}

impl NeedsRow {
    /// A launch in this context, of a profile and an owner by number if they have one, with
    /// these components in any order.
    fn new(
        context: &Context,
        profile: Option<u16>,
        owner: Option<u16>,
        components: impl Iterator<Item = u16>,
    ) -> Self {
        let mut components: Vec<u16> = components.collect();
        components.sort_unstable();
        components.dedup();
        Self {
            profile,
            owner,
            hour: context.hour(),
            weekend: context.weekend(),
            class: context.class(),
            components,
        }
    }
}

/// Decayed counts of one profile, or of all.
#[derive(Clone, Debug, Default)]
struct NeedCounts {
    weight: f64,
    components: BTreeMap<u16, f64>,
}

impl NeedCounts {
    fn add(&mut self, components: &[u16], decay: f64, weight: f64) {
        self.weight = self.weight * decay + weight;
        self.components.retain(|_, n| {
            *n *= decay;
            *n > 1e-3
        });
        for component in components {
            *self.components.entry(*component).or_insert(0.0) += weight;
        }
    }
}

/// Online model of components given context.
#[derive(Clone, Debug)]
pub struct Model {
    config: NeedsConfig,
    components: Vocabulary,
    profiles: Vocabulary,
    owners: Vocabulary,
    rows: VecDeque<NeedsRow>,
    all: NeedCounts,
    by_profile: BTreeMap<u16, NeedCounts>,
    fitted: Option<FittedNeeds>,
    observed: u64,
    /// Launches observed when the last training set was taken.
    training_at: u64,
    /// Decayed log-loss of (mixture, counts), in nats.
    losses: [f64; 2],
    /// Answers of [`Self::rank`] since the last observation: forecasts ask the same every few
    /// seconds.
    ranked: RefCell<BTreeMap<NeedsRow, RankedNames>>,
}

type RankedNames = Vec<(Arc<str>, f64)>;

impl Model {
    /// Knows nothing yet.
    pub fn new(config: NeedsConfig) -> Self {
        // Values of a variable are kept in a byte.
        let config = NeedsConfig {
            max_profiles: config.max_profiles.min(254),
            max_owners: config.max_owners.min(254),
            ..config
        };
        Self {
            components: Vocabulary::new(config.max_components),
            profiles: Vocabulary::new(config.max_profiles),
            owners: Vocabulary::new(config.max_owners),
            rows: VecDeque::new(),
            all: NeedCounts::default(),
            by_profile: BTreeMap::new(),
            fitted: None,
            observed: 0,
            training_at: 0,
            losses: [0.0; 2],
            ranked: RefCell::default(),
            config,
        }
    }

    /// Learns that a VM had `components` in the end. Names beyond the bounds are left out until a
    /// fitted model frees room.
    pub fn observe<'a>(
        &mut self,
        context: &Context,
        components: impl IntoIterator<Item = &'a str>,
    ) {
        let profile = self.profiles.add(&context.profile);
        let owner = self.owners.add(&context.owner);
        let components = components.into_iter();
        let ids = components.filter_map(|name| self.components.add(name));
        let row = NeedsRow::new(context, profile, owner, ids);
        self.judge(&row);
        let decay = 0.5_f64.powf(1.0 / self.config.half_life_launches.max(1.0));
        self.all.add(&row.components, decay, 1.0);
        if let Some(profile) = row.profile {
            // A profile's own counts fade per launch of it, and sixteen times faster.
            let tally = self.by_profile.entry(profile).or_default();
            tally.add(&row.components, decay.powi(16), 1.0);
        }
        if self.rows.len() >= self.config.max_rows.max(1) {
            self.rows.pop_front();
        }
        self.rows.push_back(row);
        self.observed += 1;
        self.ranked.get_mut().clear();
    }

    /// Whether enough was observed since the last training set for another.
    pub fn fit_due(&self) -> bool {
        let since = self.observed - self.training_at;
        since >= 8 && (since >= self.config.fit_every || since >= self.training_at)
    }

    /// Counts a training set as taken that nobody fits, because a later one will be.
    pub fn skip_fit(&mut self) {
        self.training_at = self.observed;
    }

    /// What structure and tables are to be fitted to: a copy, so that whoever shares this model
    /// need not wait for [`NeedsTraining::fit`].
    pub fn training_set(&mut self) -> NeedsTraining {
        self.training_at = self.observed;
        let used = self.used();
        let components: Vec<u16> = (0..self.components.len() as u16)
            .filter(|id| self.components.name(*id).is_some() && used.has_component(*id))
            .collect();
        let schema = self.schema(components.len());
        let at: BTreeMap<u16, usize> = components
            .iter()
            .enumerate()
            .map(|(i, id)| (*id, CONTEXT + i))
            .collect();
        let newest = self.rows.len() as f64;
        let rows = self
            .rows
            .iter()
            .enumerate()
            .map(|(age, row)| {
                let half_lives = (newest - age as f64) / self.config.half_life_launches.max(1.0);
                (
                    indicators(&schema, row, &at),
                    0.5_f64.powf(half_lives) as f32,
                )
            })
            .collect();
        NeedsTraining {
            taken_at: self.observed,
            schema,
            rows,
            components,
            used,
        }
    }

    /// Forecasts by a fitted model from now on, unless a later training set was taken meanwhile.
    /// What was observed since then stays.
    pub fn install(&mut self, fitted: FittedNeeds) {
        if fitted.taken_at == self.training_at {
            self.forget_unused(&fitted.used);
            self.fitted = Some(fitted);
            self.ranked.get_mut().clear();
        }
    }

    /// Components that a VM in this context will have or get, besides those present, likeliest
    /// first; those under one in a thousand are left out.
    pub fn rank(&self, context: &Context, present: &[&str]) -> RankedNames {
        let profile = self.profiles.get(&context.profile);
        let owner = self.owners.get(&context.owner);
        let ids = present.iter().filter_map(|name| self.components.get(name));
        let row = NeedsRow::new(context, profile, owner, ids);
        if let Some(known) = self.ranked.borrow().get(&row) {
            return known.clone();
        }
        let ranked = self.rank_row(&row);
        let mut known = self.ranked.borrow_mut();
        if known.len() >= MOST_RANKED {
            known.clear();
        }
        known.insert(row, ranked.clone());
        ranked
    }

    fn rank_row(&self, row: &NeedsRow) -> RankedNames {
        let by_tree = self.by_mixture(row);
        let by_count = self.by_counts(row);
        let share = self.mixture_share();
        let mut ranked: RankedNames = (0..self.components.len() as u16)
            .filter(|id| row.components.binary_search(id).is_err())
            .filter_map(|id| {
                let name = self.components.name(id)?;
                let counted = by_count[usize::from(id)];
                let p = match by_tree.get(&id) {
                    Some(p) => share * p + (1.0 - share) * counted,
                    None => counted,
                };
                (p >= 1e-3).then(|| (name.clone(), p))
            })
            .collect();
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        ranked
    }

    /// Launches observed.
    pub fn observed(&self) -> u64 {
        self.observed
    }

    /// Share of the mixture of trees in the forecast, the rest being counts.
    pub fn mixture_share(&self) -> f64 {
        if self.fitted.is_none() {
            return 0.0;
        }
        1.0 / (1.0 + (self.losses[0] - self.losses[1]).clamp(-30.0, 30.0).exp())
    }

    fn schema(&self, components: usize) -> Schema {
        let context = [
            self.profiles.len() + 1,
            self.owners.len() + 1,
            HOURS,
            2,
            CLASSES,
        ];
        Schema::new(
            context
                .into_iter()
                .chain(std::iter::repeat_n(2, components)),
        )
    }

    /// Names that remembered launches use.
    fn used(&self) -> NamesInUse {
        let mut used = NamesInUse::default();
        for row in &self.rows {
            used.components.extend(&row.components);
            used.profiles.extend(row.profile);
            used.owners.extend(row.owner);
        }
        used
    }

    /// Frees names that neither remembered launches use nor the fitted model.
    fn forget_unused(&mut self, fitted: &NamesInUse) {
        let mut used = self.used();
        used.components.extend(&fitted.components);
        used.profiles.extend(&fitted.profiles);
        used.owners.extend(&fitted.owners);
        self.components.keep(|id| used.has_component(id));
        self.profiles.keep(|id| used.profiles.contains(&id));
        self.owners.keep(|id| used.owners.contains(&id));
        self.by_profile.retain(|id, _| used.profiles.contains(id));
        for tally in self.by_profile.values_mut().chain([&mut self.all]) {
            tally.components.retain(|id, _| used.has_component(*id));
        }
    }

    /// Lets both forecasts predict a launch from its context, and remembers how well they did.
    fn judge(&mut self, row: &NeedsRow) {
        if self.fitted.is_none() {
            return;
        }
        let context_only = NeedsRow {
            components: Vec::new(),
            ..row.clone()
        };
        let by_tree = self.by_mixture(&context_only);
        let by_count = self.by_counts(&context_only);
        let loss = |p: f64, present: bool| {
            let p = p.clamp(1e-3, 1.0 - 1e-3);
            -if present { p } else { 1.0 - p }.ln()
        };
        let mut sums = [0.0; 2];
        for (id, p) in &by_tree {
            let present = row.components.binary_search(id).is_ok();
            sums[0] += loss(*p, present);
            sums[1] += loss(by_count[usize::from(*id)], present);
        }
        for (total, sum) in self.losses.iter_mut().zip(sums) {
            *total = *total * 0.98 + sum;
        }
    }

    /// Decayed counts: the profile's own, shrunk towards everyone's.
    fn by_counts(&self, row: &NeedsRow) -> Vec<f64> {
        let own = row.profile.and_then(|id| self.by_profile.get(&id));
        let prior = self.config.prior_launches;
        (0..self.components.len() as u16)
            .map(|id| {
                let count = |tally: &NeedCounts| tally.components.get(&id).copied().unwrap_or(0.0);
                let base = (count(&self.all) + 0.1) / (self.all.weight + 1.0);
                own.map_or(base, |own| {
                    (count(own) + prior * base) / (own.weight + prior)
                })
            })
            .collect()
    }

    /// Exact posterior of the mixture, by component.
    fn by_mixture(&self, row: &NeedsRow) -> BTreeMap<u16, f64> {
        let Some(fitted) = &self.fitted else {
            return BTreeMap::new();
        };
        let schema = fitted.mixture.schema();
        let mut evidence = vec![UNKNOWN; schema.variables()];
        let mut know = |variable: usize, value: u32| {
            if (value as usize) < schema.card(variable) {
                evidence[variable] = value;
            }
        };
        if let Some(profile) = row.profile {
            know(0, u32::from(profile) + 1);
        }
        if let Some(owner) = row.owner {
            know(1, u32::from(owner) + 1);
        }
        know(2, row.hour);
        know(3, row.weekend);
        know(4, row.class);
        for (i, id) in fitted.components.iter().enumerate() {
            if row.components.binary_search(id).is_ok() {
                know(CONTEXT + i, 1);
            }
        }
        let posterior = fitted.mixture.posterior(&evidence);
        fitted
            .components
            .iter()
            .enumerate()
            .map(|(i, id)| (*id, posterior[fitted.mixture.slot(CONTEXT + i) + 1]))
            .collect()
    }
}

/// A remembered launch as indicators of the schema.
fn indicators(schema: &Schema, row: &NeedsRow, at: &BTreeMap<u16, usize>) -> Vec<u32> {
    let context = [
        (0, row.profile.map_or(0, |id| usize::from(id) + 1)),
        (1, row.owner.map_or(0, |id| usize::from(id) + 1)),
        (2, row.hour as usize),
        (3, row.weekend as usize),
        (4, row.class as usize),
    ];
    let components = row.components.iter().filter_map(|id| at.get(id));
    context
        .into_iter()
        .chain(components.map(|v| (*v, 1)))
        .filter_map(|(variable, value)| schema.indicator(variable, value))
        .collect()
}
