//! What launches touch of component images: seen of one, expected of the next.
//!
//! Owns the two records that prediction, planning and history hand to each other. Refuses
//! to know how touches are seen and how they are predicted.

use serde::{Deserialize, Serialize};

use crate::{Digest, Extent};

/// One touched extent of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touch {
    /// Image the extent belongs to.
    pub image: Digest,
    /// Bytes touched; widened to pages.
    pub extent: Extent,
    /// When they were first seen touched, in milliseconds after the launch. A periodic scan gives
    /// the scan's time, the READ log the exact one.
    pub first_touch_ms: u32,
}

/// One extent that a launch is expected to touch, and when.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlannedExtent {
    /// Image the extent belongs to.
    pub image: Digest,
    /// The bytes.
    pub extent: Extent,
    /// Probability that the launch touches it.
    pub probability: f64,
    /// Expected first touch, in milliseconds after the launch.
    pub first_touch_ms: u32,
}
