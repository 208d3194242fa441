//! Names of policies, as on the command line.
//!
//! Owns the grammar: `none`, `fixed:MINUTES`, `hybrid`, `hybrid+mean`, `clairvoyant`,
//! `forelay[:PRICE[,PRICE...]]`, and `NAME:SLOTS` with the name of an eviction policy. Invariant: `name` parses back to
//! the same policy.

use crate::eviction::EvictionKind;
use crate::windows::WindowPolicy;
use std::fmt;
use std::str::FromStr;

/// A policy to simulate.
#[derive(Debug, Clone, PartialEq)]
pub enum Policy {
    /// Never stay loaded.
    None,
    /// Stay loaded so many minutes after a launch.
    Fixed(f64),
    /// Histogram of gaps.
    Hybrid,
    /// Histogram of gaps, mean gap beyond it.
    HybridMean,
    /// Knows the future.
    Clairvoyant,
    /// Forelay's forecasts, at these prices of memory (launches per minute from which holding
    /// pays); empty for the whole curve.
    Forelay(Vec<f64>),
    /// A cache of so many profiles.
    Bounded(EvictionKind, u64),
}

/// Why a policy's name is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown policy {0:?}: expected none, fixed:MINUTES, hybrid, hybrid+mean, clairvoyant, \
     forelay[:PRICE,...], or one of least-used, lru, lfu, gdsf, s3-fifo, forecast, \
     forecast+prefetch, min with :SLOTS"
)]
pub struct PolicyError(String);

impl Policy {
    /// The usual set.
    #[must_use]
    pub fn usual() -> Vec<Self> {
        vec![
            Self::None,
            Self::Fixed(10.0),
            Self::Fixed(60.0),
            Self::Fixed(240.0),
            Self::Hybrid,
            Self::HybridMean,
            Self::Clairvoyant,
            Self::Forelay(Vec::new()),
        ]
    }

    /// Prices of the whole curve.
    #[must_use]
    pub fn curve() -> Vec<f64> {
        (0..92).map(|step| 1.5 * 0.9f64.powi(step)).collect()
    }

    pub(crate) fn window(&self) -> Option<WindowPolicy> {
        match self {
            Self::None => Some(WindowPolicy::None),
            Self::Fixed(minutes) => Some(WindowPolicy::Fixed(*minutes)),
            Self::Hybrid => Some(WindowPolicy::Hybrid),
            Self::HybridMean => Some(WindowPolicy::HybridMean),
            Self::Clairvoyant => Some(WindowPolicy::Clairvoyant),
            Self::Forelay(_) | Self::Bounded(..) => None,
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forelay(prices) if prices.is_empty() => write!(f, "forelay"),
            Self::Forelay(prices) => {
                let list: Vec<String> = prices.iter().map(f64::to_string).collect();
                write!(f, "forelay:{}", list.join(","))
            }
            Self::Bounded(kind, slots) => write!(f, "{kind}:{slots}"),
            other => match other.window() {
                Some(window) => write!(f, "{}", window.name()),
                None => Ok(()),
            },
        }
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || PolicyError(text.to_owned());
        let (name, argument) = match text.split_once(':') {
            Some((name, argument)) => (name, Some(argument)),
            None => (text, None),
        };
        let positive = |text: &str| {
            text.parse::<f64>()
                .ok()
                .filter(|value| value.is_finite() && *value >= 0.0)
        };
        match (name, argument) {
            ("none", None) => Ok(Self::None),
            ("hybrid", None) => Ok(Self::Hybrid),
            ("hybrid+mean", None) => Ok(Self::HybridMean),
            ("clairvoyant", None) => Ok(Self::Clairvoyant),
            ("fixed", Some(minutes)) => positive(minutes).map(Self::Fixed).ok_or_else(error),
            ("forelay", None) => Ok(Self::Forelay(Vec::new())),
            ("forelay", Some(list)) => list
                .split(',')
                .map(|price| positive(price).ok_or_else(error))
                .collect::<Result<_, _>>()
                .map(Self::Forelay),
            (name, Some(slots)) => {
                let kind = EvictionKind::from_name(name).ok_or_else(error)?;
                let slots = slots
                    .parse()
                    .ok()
                    .filter(|&slots: &u64| slots > 0)
                    .ok_or_else(error)?;
                Ok(Self::Bounded(kind, slots))
            }
            _ => Err(error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for name in [
            "none",
            "fixed:10",
            "hybrid",
            "hybrid+mean",
            "clairvoyant",
            "forelay",
            "forelay:0.01,0.2",
            "lru:500",
            "s3-fifo:1000",
            "forecast:500",
            "forecast+prefetch:500",
        ] {
            let policy: Policy = name.parse().unwrap();
            assert_eq!(policy.to_string(), name);
        }
        for name in [
            "",
            "fixed",
            "fixed:-1",
            "fixed:x",
            "lru",
            "lru:0",
            "best:3",
            "forelay:,",
        ] {
            assert!(name.parse::<Policy>().is_err(), "{name}");
        }
    }
}
