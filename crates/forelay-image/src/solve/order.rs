//! The compose order of a set of components.
//!
//! The base comes first; a component comes after those that it requires, so that it wins
//! where they have the same file; apart from that by role (libraries and runtimes before
//! packages, configuration last) and name. Cycles of requirements are broken where that
//! order would break them.

use crate::component::{Component, Role};
use crate::version::Range;

use super::satisfies;

fn rank(role: Role) -> u8 {
    match role {
        Role::Base => 0,
        Role::Layer => 1,
        Role::Library => 2,
        Role::Runtime => 3,
        Role::Package => 4,
        Role::Config => 5,
        // Neither is composed.
        Role::Kernel | Role::Snapshot => 6,
    }
}

/// All but the kernel, in compose order.
pub(super) fn compose_order<'a>(chosen: &[&'a Component]) -> Vec<&'a Component> {
    let mut pending: Vec<&Component> = chosen
        .iter()
        .copied()
        .filter(|component| component.role != Role::Kernel)
        .collect();
    pending.sort_by(|a, b| {
        rank(a.role)
            .cmp(&rank(b.role))
            .then_with(|| a.name.cmp(&b.name))
    });
    let mut ordered: Vec<&Component> = Vec::with_capacity(pending.len());
    while !pending.is_empty() {
        let ready = pending.iter().position(|component| {
            component.role == Role::Base
                || !pending
                    .iter()
                    .any(|other| !std::ptr::eq(*other, *component) && needs(component, other))
        });
        ordered.push(pending.remove(ready.unwrap_or(0)));
    }
    ordered
}

fn needs(component: &Component, other: &Component) -> bool {
    component.requires.iter().flatten().any(|wanted| {
        let range: Result<Range, _> = wanted.range.parse();
        range.is_ok_and(|range| satisfies(other, wanted, &range))
    })
}
