//! Layers that are components already, and need not come from their registry again.
//!
//! Owns how they are asked for. A layer is known by the name that its digest gives it; who says
//! that there is such a component is believed, as a repository is whose `nginx` is run.
//!
//! Invariant: a layer that is found says all that its archive said, wherever it is laid. One
//! that hides all others is called otherwise ([`super::layer_draft`]): its tree has no mark.

use std::fmt::Debug;

use forelay_image::Digest;
use forelay_image::component::Component;
use forelay_image::tree::Tree;

use super::called;
use crate::draft::Draft;
use crate::tar::ImageLayer;

/// Who knows layers that are components already.
pub trait KnownLayers: Debug + Send + Sync {
    /// The component of this name and version, with its files, if it can be had.
    fn find(&self, name: &str, version: &str) -> Option<(Component, Tree)>;
}

/// The component of a layer: as it is wherever it is laid, or on those that `chain` stands for.
pub(super) fn find(
    known: &dyn KnownLayers,
    diff_id: Digest,
    chain: Digest,
) -> Option<(Component, ImageLayer)> {
    let find = |on| {
        let (name, version) = called(diff_id, on);
        known.find(&name, &version)
    };
    let (component, tree) = find(None).or_else(|| find(Some(chain)))?;
    let layer = ImageLayer {
        tree,
        notes: component.notes.clone(),
        links: Vec::new(),
        bare: Vec::new(),
    };
    Some((component, layer))
}

/// What such a component is described by, beside itself.
pub(super) fn draft_of(component: Component) -> (Draft, Option<Component>) {
    let Component { name, version, .. } = &component;
    let draft = Draft::new(name, version, component.role, &component.architecture, ());
    (draft, Some(component))
}
