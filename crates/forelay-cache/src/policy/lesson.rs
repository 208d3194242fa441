//! Fitting of the forecast policy's model, apart from the policy that it is for.
//!
//! Refuses to know objects: a lesson holds features and how long was waited. Takes tenths of a
//! second, needs nothing but itself and may run on any thread.

use std::fmt;

use super::trees::{FitSettings, Samples, Trees};

/// What there is to learn from, as [`super::forecast::Forecast::lesson`] gives it.
#[derive(Clone, PartialEq)]
pub struct Lesson {
    pub(super) samples: Samples,
    pub(super) half_life_ms: f64,
    pub(super) fit: FitSettings,
}

/// What a lesson taught.
#[derive(Clone, Debug, PartialEq)]
pub struct Learned {
    pub(super) model: Option<Trees>,
    pub(super) half_life_ms: f64,
}

impl Lesson {
    /// Fits a model.
    pub fn study(&self) -> Learned {
        study(&self.samples, self.half_life_ms, &self.fit)
    }
}

impl fmt::Debug for Lesson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lesson of {} samples", self.samples.len())
    }
}

/// Fits a model to outcomes discounted with this half-life.
pub(super) fn study(samples: &Samples, half_life_ms: f64, fit: &FitSettings) -> Learned {
    let half_life = half_life_ms as f32;
    let discounted = |wait_ms: f32| (-wait_ms / half_life).exp2();
    Learned {
        model: Trees::fit(samples, discounted, fit),
        half_life_ms,
    }
}
