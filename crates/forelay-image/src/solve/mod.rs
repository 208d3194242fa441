//! From a manifest to a lock: which versions of which components, in which order.
//!
//! Owns the rules: one version of a name; exactly one base and one kernel; a requirement
//! is met by any of its alternatives, by real name or by what a component provides (a
//! range then needs a versioned provide); a conflict excludes whatever its name and range
//! match, except the component that states it; a base excludes what is for other machines. What the manifest names is taken by its real name if there is such a component,
//! even if others provide the name. The newest versions are preferred, when re-locking those
//! of the previous lock; of several providers the one with the real name, then by name. The
//! layers of a container image are those that it names by id, in its order, and no others.
//!
//! The search itself is `resolvo`'s (see [`universe`]); failures are put into words in
//! [`explain`]. Refuses to know repositories: it is given all available components.
//!
//! Invariant: the same manifest and components (in any order) give the same lock.

mod explain;
mod order;
mod universe;

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::component::{Component, ComponentId, NameRange, Role};
use crate::lock::{LOCK_FORMAT, Lock, LockedComponent};
use crate::manifest::Manifest;
use crate::version::{self, Range};

use universe::Universe;

/// Why no lock exists, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the manifest cannot be resolved:\n{}", problems.iter().map(|problem| format!("  - {problem}")).collect::<Vec<_>>().join("\n"))]
pub struct SolveError {
    /// What stands in the way, each with what to do about it.
    pub problems: Vec<Problem>,
}

/// One thing that stands in the way of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Nothing has the name.
    Missing {
        /// Who wants it: the chain from the manifest.
        wanted_by: String,
        /// The name.
        name: String,
        /// The nearest name that exists.
        nearest: Option<String>,
    },
    /// The name exists, but in no version that is wanted.
    Version {
        /// Who wants it.
        wanted_by: String,
        /// What is wanted.
        wanted: String,
        /// Versions that exist.
        available: Vec<String>,
    },
    /// The name exists, but with another role.
    Role {
        /// What is wanted.
        wanted: String,
        /// The role it should have.
        role: Role,
        /// Components with that role.
        available: Vec<String>,
    },
    /// A layer of a container image is not there.
    Layer {
        /// The image.
        image: String,
        /// The layer's id.
        id: String,
    },
    /// Each part exists, but not together.
    Conflict {
        /// The chain of requirements and conflicts, in sentences.
        chain: String,
    },
    /// A component of the repository has a range that cannot be read.
    Malformed {
        /// The component.
        component: String,
        /// The relation.
        relation: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        explain::write_problem(self, f)
    }
}

/// Resolves a manifest against the available components.
pub fn solve(manifest: &Manifest, available: &[Component]) -> Result<Lock, SolveError> {
    resolve(manifest, available, None)
}

/// Resolves a manifest, keeping what the previous lock has where that is possible.
pub fn relock(
    manifest: &Manifest,
    available: &[Component],
    previous: &Lock,
) -> Result<Lock, SolveError> {
    resolve(manifest, available, Some(previous))
}

/// What the manifest asks for, with the role that it must have.
struct Want {
    what: NameRange,
    role: Option<Role>,
    /// `the manifest's base`, ...
    place: &'static str,
}

fn wants(manifest: &Manifest) -> Vec<Want> {
    let want = |what: &NameRange, role, place| Want {
        what: what.clone(),
        role,
        place,
    };
    let mut wants = vec![want(
        &manifest.base,
        Some(Role::Base),
        "the manifest's base",
    )];
    wants.extend(
        manifest
            .kernel
            .iter()
            .map(|kernel| want(kernel, Some(Role::Kernel), "the manifest's kernel")),
    );
    wants.extend(
        manifest
            .components
            .iter()
            .map(|wanted| want(wanted, None, "the manifest")),
    );
    wants
}

/// How components are preferred, those of one name from the newest on; of two builds of one version
/// it is their ids that decide, as nothing says which is the newer.
pub fn preference(a: &Component, b: &Component) -> Ordering {
    let by_name = a.name.cmp(&b.name);
    by_name
        .then_with(|| version::compare(&b.version, &a.version))
        .then_with(|| a.id().cmp(&b.id()))
}

fn resolve(
    manifest: &Manifest,
    available: &[Component],
    previous: Option<&Lock>,
) -> Result<Lock, SolveError> {
    let wants = wants(manifest);
    let mut sorted: Vec<&Component> = available.iter().collect();
    sorted.sort_by(|a, b| preference(a, b));
    sorted.dedup_by_key(|component| component.id());
    let universe = Universe::new(&sorted, previous).map_err(|problem| SolveError {
        problems: vec![problem],
    })?;
    let problems = explain::obvious(&universe, &wants);
    if !problems.is_empty() {
        return Err(SolveError { problems });
    }
    let chosen = universe
        .solve(&wants)
        .map_err(|problems| SolveError { problems })?;
    let kernel = chosen
        .iter()
        .find(|component| component.role == Role::Kernel);
    let Some(kernel) = kernel else {
        let problem = Problem::Role {
            wanted: "a kernel".into(),
            role: Role::Kernel,
            available: Vec::new(),
        };
        return Err(SolveError {
            problems: vec![problem],
        });
    };
    let mut components = order::compose_order(&chosen);
    let layers = components.first().map(|base| layers_of(base, &sorted));
    let layers = layers.transpose().map_err(|problem| SolveError {
        problems: vec![problem],
    })?;
    components.splice(1..1, layers.unwrap_or_default());
    Ok(Lock {
        format: LOCK_FORMAT,
        manifest_digest: manifest.digest(),
        kernel: LockedComponent::from(*kernel),
        components: components.into_iter().map(LockedComponent::from).collect(),
    })
}

/// The layers of a base that is a container image, the lowest first.
fn layers_of<'a>(
    base: &Component,
    available: &[&'a Component],
) -> Result<Vec<&'a Component>, Problem> {
    let Some(image) = &base.container else {
        return Ok(Vec::new());
    };
    let all = available.iter().filter(|one| one.role == Role::Layer);
    let all: HashMap<ComponentId, &Component> = all.map(|one| (one.id(), *one)).collect();
    let found = image.layers.iter().map(|id| {
        all.get(id).copied().ok_or_else(|| Problem::Layer {
            image: explain::title(base),
            id: id.to_string(),
        })
    });
    found.collect()
}

/// True if the component is, by real name or provide, what `wanted` names. `range` is
/// that of `wanted`, parsed.
fn satisfies(component: &Component, wanted: &NameRange, range: &Range) -> bool {
    if component.name == wanted.name && range.admits(&component.version) {
        return true;
    }
    component
        .provides
        .iter()
        .filter(|offered| offered.name == wanted.name)
        .any(|offered| {
            range.is_any()
                || offered
                    .version
                    .as_ref()
                    .is_some_and(|version| range.admits(version))
        })
}

#[cfg(test)]
#[path = "solve_tests.rs"]
mod tests;
