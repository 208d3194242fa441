//! What a VM needs: components given its context and the components it already has.
//!
//! Owns fitting of discrete distributions (Chow-Liu trees, mixtures of them), exact inference, and
//! the online models built on both. Refuses to know what a component contains and where it is.
//!
//! ```text
//! observe(context, components) -> recent launches --fit--> mixture of Chow-Liu trees --+
//!                             \-> decayed counts per profile --------------------------+-> rank
//! ```
//!
//! Invariants: names, rows and trees are bounded whatever is observed; no observation has
//! probability zero; the same observations give the same model.

mod attachments;
pub mod counts;
pub mod data;
pub mod fit;
pub mod mixture;
mod model;
mod training;
pub mod tree;
mod vocabulary;

pub use attachments::{AttachOutlook, Attachments};
pub use model::{Context, Model, NeedsConfig};
pub use training::{FittedNeeds, NeedsTraining};

#[cfg(test)]
mod tests;
