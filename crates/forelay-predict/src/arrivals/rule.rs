//! The rule of the simulator: a profile stays loaded while its hazard exceeds the price of memory.
//!
//! Owns that rule and the account of whether forecasting pays against the simple rule
//! (a fixed keep-alive). Invariant: both rules are charged for the same stretches and launches, so
//! regret compares like with like even while a profile has fallen back.

use super::config::ArrivalsConfig;
use super::walk::Segment;

/// The rule at one price, as the simulator applies it to a stretch of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// Launches per minute from which holding pays.
    pub price_per_min: f64,
    /// The simple rule's keep-alive at this price.
    pub keep_alive_min: f64,
}

impl Rule {
    /// Whether so many launches per minute are worth the memory. What costs nothing is held.
    #[must_use]
    pub fn pays(&self, worth_per_min: f64) -> bool {
        worth_per_min >= self.price_per_min
    }

    /// Whether forecasting holds the profile over this stretch.
    #[must_use]
    pub fn forecast_holds(&self, segment: &Segment) -> bool {
        self.pays(segment.worth_per_min())
    }

    /// Whether the simple rule does.
    #[must_use]
    pub fn simple_holds(&self, segment: &Segment) -> bool {
        segment.start_min < self.keep_alive_min
    }

    /// Whether the rule in force for this profile does.
    #[must_use]
    pub fn holds(&self, segment: &Segment) -> bool {
        if segment.fallen_back {
            self.simple_holds(segment)
        } else {
            self.forecast_holds(segment)
        }
    }
}

/// Running cost of forecasting and of the simple rule, in cold starts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Regret {
    forecast_cost: f32,
    simple_cost: f32,
    launches: u16,
}

impl Regret {
    const DECAY: f32 = 0.98;
    const PATIENCE: u16 = 8;
    const MARGIN: f32 = 3.0;

    /// Charges both rules for a stretch.
    pub fn note(&mut self, segment: &Segment, rule: &Rule) {
        let memory = (segment.length_min * rule.price_per_min) as f32;
        let charge = |cost: &mut f32, held: bool| {
            if held {
                *cost += memory;
            } else if segment.launched {
                *cost += 1.0;
            }
        };
        charge(&mut self.forecast_cost, rule.forecast_holds(segment));
        charge(&mut self.simple_cost, rule.simple_holds(segment));
        if segment.launched {
            self.launches = self.launches.saturating_add(1);
            self.forecast_cost *= Self::DECAY;
            self.simple_cost *= Self::DECAY;
        }
    }

    /// Cold starts that forecasting cost more than the simple rule; negative if it saves.
    #[must_use]
    pub fn excess(&self) -> f64 {
        f64::from(self.forecast_cost - self.simple_cost)
    }

    /// True if forecasting has done harm for long enough to be set aside.
    #[must_use]
    pub fn harmful(&self) -> bool {
        self.launches >= Self::PATIENCE
            && self.forecast_cost > 1.1 * self.simple_cost + Self::MARGIN
    }
}

impl ArrivalsConfig {
    /// The rule at a price. The simple rule's keep-alive is as many minutes as configured at the
    /// reference price, and falls as memory gets dearer: for ever where memory costs nothing,
    /// never where nothing is worth it.
    #[must_use]
    pub fn rule(&self, price_per_min: f64) -> Rule {
        let share = self.reference_price_per_min / price_per_min;
        Rule {
            price_per_min,
            keep_alive_min: self.keep_alive_min * share,
        }
    }

    /// The rule by which regret is kept inside the forecaster.
    #[must_use]
    pub fn reference_rule(&self) -> Rule {
        self.rule(self.reference_price_per_min)
    }
}
