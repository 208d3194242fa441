//! Failures of the solver in sentences that a person can act on.
//!
//! First what is plainly wrong: names nobody has, versions that do not exist, wherever
//! every path leads to them ([`obvious`]). What remains are combinations: [`conflict`]
//! removes wants from the manifest one by one until what is left can no longer be
//! solved *because of* each of them, then tells how those wants collide: what each leads to
//! that another excludes, and nothing else.
//!
//! Refuses to search: it asks the solver. Invariant: every explanation names at least
//! one want of the manifest.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::component::{Component, NameRange, Role};
use crate::manifest::nearest;
use crate::version::{Range, display_wanted};

use super::universe::Universe;
use super::{Problem, Want};

/// `nginx 1.22.1-9`.
pub(super) fn title(component: &Component) -> String {
    format!("{} {}", component.name, component.version)
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Base => "base",
        Role::Kernel => "kernel",
        Role::Runtime => "runtime",
        Role::Package => "package",
        Role::Library => "library",
        Role::Config => "config",
        Role::Snapshot => "snapshot",
        Role::Layer => "layer",
    }
}

/// The command that makes a component with the given role and name.
fn build_command(role: Option<Role>, name: &str) -> String {
    match role {
        Some(Role::Base) => "forelay component build --base".to_owned(),
        Some(Role::Kernel) => "forelay component build --kernel".to_owned(),
        _ => format!("forelay component build --deb {name}"),
    }
}

pub(super) fn write_problem(problem: &Problem, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match problem {
        Problem::Missing {
            wanted_by,
            name,
            nearest,
        } => {
            write!(
                f,
                "{wanted_by} wants {name}, but no component has or provides that name"
            )?;
            if let Some(nearest) = nearest {
                write!(f, "; did you mean {nearest}?")?;
            }
            write!(f, " To make it: `{}`", build_command(None, name))
        }
        Problem::Version {
            wanted_by,
            wanted,
            available,
        } => {
            let name = wanted.split('@').next().unwrap_or(wanted);
            write!(
                f,
                "{wanted_by} wants {wanted}, but the repository has only {}; \
                 change the range or build that version: `{}`",
                available.join(", "),
                build_command(None, name)
            )
        }
        Problem::Role {
            wanted,
            role,
            available,
        } => {
            let role_name = role_name(*role);
            write!(f, "the manifest wants {wanted} as its {role_name}, ")?;
            if available.is_empty() {
                write!(
                    f,
                    "but the repository has no {role_name} at all. To make one: `{}`",
                    build_command(Some(*role), "")
                )
            } else {
                write!(
                    f,
                    "but the repository's {role_name} components are: {}",
                    available.join(", ")
                )
            }
        }
        Problem::Layer { image, id } => write!(
            f,
            "the container image {image} has the layer {id}, which is not in the repository; \
             build the image again"
        ),
        Problem::Conflict { chain } => write!(f, "{chain}"),
        Problem::Malformed {
            component,
            relation,
            problem,
        } => {
            write!(
                f,
                "component {component} has a relation that cannot be read, {relation}: {problem}; build it again"
            )
        }
    }
}

/// Problems that need no search: wants that nothing meets, and wants all of whose
/// candidates need something that nothing meets.
pub(super) fn obvious(universe: &Universe<'_>, wants: &[Want]) -> Vec<Problem> {
    let mut problems = Vec::new();
    for want in wants {
        let candidates = universe.wanted(want);
        if candidates.is_empty() {
            problems.push(unmet(universe, want));
        } else if let Some(problem) = hopeless(universe, want, &candidates) {
            problems.push(problem);
        }
    }
    let has_kernel = universe
        .components
        .iter()
        .any(|component| component.role == Role::Kernel);
    if !has_kernel && !wants.iter().any(|want| want.role == Some(Role::Kernel)) {
        let wanted = "any component".to_owned();
        problems.push(Problem::Role {
            wanted,
            role: Role::Kernel,
            available: Vec::new(),
        });
    }
    problems.dedup();
    problems
}

/// Why nothing meets a want of the manifest.
fn unmet(universe: &Universe<'_>, want: &Want) -> Problem {
    let wanted = display_wanted(&want.what);
    if let Some(role) = want.role {
        let range = want.what.range.parse().unwrap_or_default();
        let other_role = !universe.matching(&want.what, &range).is_empty();
        let of_role = universe
            .components
            .iter()
            .filter(|component| component.role == role);
        let available: Vec<String> = of_role.map(|component| title(component)).collect();
        let known = universe
            .components
            .iter()
            .any(|component| component.role == role && component.name == want.what.name);
        if other_role || !known {
            return Problem::Role {
                wanted,
                role,
                available,
            };
        }
    }
    unmet_relation(universe, want.place.to_owned(), &want.what)
}

/// Why nothing meets one alternative.
fn unmet_relation(universe: &Universe<'_>, wanted_by: String, wanted: &NameRange) -> Problem {
    let mut available: Vec<String> = Vec::new();
    for component in universe.components {
        if component.name == wanted.name {
            available.push(title(component));
        }
        for offered in component
            .provides
            .iter()
            .filter(|offered| offered.name == wanted.name)
        {
            let version = offered.version.as_deref().unwrap_or("without a version");
            available.push(format!(
                "{} {version} (provided by {})",
                offered.name,
                title(component)
            ));
        }
    }
    if !available.is_empty() {
        return Problem::Version {
            wanted_by,
            wanted: display_wanted(wanted),
            available,
        };
    }
    let provided = universe
        .components
        .iter()
        .flat_map(|component| &component.provides);
    let names: BTreeSet<&str> = universe
        .by_name
        .keys()
        .copied()
        .chain(provided.map(|offered| offered.name.as_str()))
        .collect();
    let nearest = nearest(&wanted.name, names).map(str::to_owned);
    Problem::Missing {
        wanted_by,
        name: wanted.name.clone(),
        nearest,
    }
}

/// If every candidate of a want leads, by requirements alone, to something that nothing
/// meets: that problem, for the candidate that would be preferred.
fn hopeless(universe: &Universe<'_>, want: &Want, candidates: &[usize]) -> Option<Problem> {
    let dead = dead_ends(universe);
    if candidates.iter().any(|number| !dead.contains(number)) {
        return None;
    }
    let mut number = *candidates.first()?;
    let mut chain = format!(
        "{} wants {}",
        want.place,
        title(universe.components[number])
    );
    let mut seen = BTreeSet::new();
    while seen.insert(number) {
        let unmet = universe.requires(number).find_map(|any| {
            let meeting = meeting(universe, any);
            (!meeting.contains(&number) && meeting.iter().all(|other| dead.contains(other)))
                .then_some((any, meeting))
        });
        let (any, meeting) = unmet?;
        match meeting.first() {
            Some(next) => {
                number = *next;
                chain.push_str(&format!(
                    ", which needs {}",
                    title(universe.components[number])
                ));
            }
            None => {
                let (wanted, _) = any.first()?;
                return Some(unmet_relation(universe, format!("{chain}, which"), wanted));
            }
        }
    }
    None
}

fn meeting(universe: &Universe<'_>, any: &[(NameRange, Range)]) -> Vec<usize> {
    any.iter()
        .flat_map(|(wanted, range)| universe.matching(wanted, range))
        .collect()
}

/// Components that can never be chosen, since what they require, directly or not, is not
/// there. The complement of the largest set in which every requirement is met.
fn dead_ends(universe: &Universe<'_>) -> BTreeSet<usize> {
    let mut dead = BTreeSet::new();
    loop {
        let before = dead.len();
        for number in 0..universe.components.len() {
            let stuck = universe.requires(number).any(|any| {
                let meeting = meeting(universe, any);
                !meeting.contains(&number) && meeting.iter().all(|other| dead.contains(other))
            });
            if stuck {
                dead.insert(number);
            }
        }
        if dead.len() == before {
            return dead;
        }
    }
}

/// Explains a manifest that has no solution although each want has candidates: finds a
/// smallest set of wants that collide and tells how.
pub(super) fn conflict(universe: &Universe<'_>, wants: &[Want]) -> Vec<Problem> {
    let mut core: Vec<usize> = (0..wants.len()).collect();
    let solvable = |numbers: &[usize]| {
        let subset: Vec<Want> = numbers
            .iter()
            .map(|number| Want {
                what: wants[*number].what.clone(),
                ..wants[*number]
            })
            .collect();
        universe.is_solvable(&subset)
    };
    let mut index = 0;
    while index < core.len() {
        let mut smaller = core.clone();
        smaller.remove(index);
        if solvable(&smaller) {
            index += 1;
        } else {
            core = smaller;
        }
    }
    let names: Vec<String> = core
        .iter()
        .map(|number| display_wanted(&wants[*number].what))
        .collect();
    let mut candidates: Vec<Vec<usize>> = core
        .iter()
        .map(|number| {
            let mut candidates = universe.wanted(&wants[*number]);
            // Other bases that go by the name, or other kernels, would have fared no better.
            candidates.truncate(wants[*number].role.map_or(usize::MAX, |_| 1));
            candidates
        })
        .collect();
    if !wants.iter().any(|want| want.role == Some(Role::Kernel)) {
        candidates.push(universe.kernels().into_iter().take(1).collect());
    }
    let sentences = Story::new(universe, &candidates).sentences();
    let lead = match names.as_slice() {
        [] => "no kernel of the repository goes with it".to_owned(),
        [one] => format!("{one} cannot be had"),
        many => format!("{} cannot be had together", many.join(" and ")),
    };
    let chain = if sentences.is_empty() {
        format!("{lead}: they need different versions of one component")
    } else {
        format!("{lead}: {}", sentences.join("; "))
    };
    let advice = "drop one of them, widen its range, or build a version that goes with the others";
    vec![Problem::Conflict {
        chain: format!("{chain}. To go on, {advice}"),
    }]
}

/// Who takes part in a conflict: what wants lead to, and what excludes what among it.
struct Story<'u, 'a> {
    universe: &'u Universe<'a>,
    /// In the order in which they are come to.
    reached: Vec<usize>,
    /// Those of them that each excludes.
    excluded: BTreeMap<usize, Vec<usize>>,
}

impl<'u, 'a> Story<'u, 'a> {
    fn new(universe: &'u Universe<'a>, candidates: &[Vec<usize>]) -> Self {
        let mut reached: Vec<usize> = Vec::new();
        let mut pending: Vec<usize> = candidates.iter().flatten().copied().collect();
        pending.reverse();
        while let Some(number) = pending.pop() {
            if reached.contains(&number) {
                continue;
            }
            reached.push(number);
            let needs = universe.requires(number).map(|any| meeting(universe, any));
            let needs = needs.filter(|meeting| !meeting.contains(&number)).flatten();
            pending.extend(needs.collect::<Vec<_>>().into_iter().rev());
        }
        // Candidates for one want exclude each other as a matter of course.
        let rivals = |one: usize, other: usize| {
            let both = |set: &Vec<usize>| set.contains(&one) && set.contains(&other);
            candidates.iter().any(both)
        };
        let mut excluded = BTreeMap::new();
        for &number in &reached {
            let others = universe.excluded_by(number).into_iter();
            let others = others.filter(|other| reached.contains(other) && !rivals(number, *other));
            let others: Vec<usize> = others.collect();
            if !others.is_empty() {
                excluded.insert(number, others);
            }
        }
        Self {
            universe,
            reached,
            excluded,
        }
    }

    /// True if `number` excludes, is excluded, has no way to be had, or needs such a one.
    fn takes_part(&self) -> BTreeSet<usize> {
        let mut part: BTreeSet<usize> = self.excluded.keys().copied().collect();
        part.extend(self.excluded.values().flatten());
        part.extend(
            dead_ends(self.universe)
                .iter()
                .filter(|number| self.reached.contains(number)),
        );
        loop {
            let before = part.len();
            for &number in &self.reached {
                let mut needs = self.needs(number);
                if needs.any(|(_, meeting)| meeting.iter().any(|one| part.contains(one))) {
                    part.insert(number);
                }
            }
            if part.len() == before {
                return part;
            }
        }
    }

    /// What `number` needs of others: the words, and who meets them.
    fn needs(&self, number: usize) -> impl Iterator<Item = (String, Vec<usize>)> {
        let universe = self.universe;
        universe.requires(number).filter_map(move |any| {
            let meeting = meeting(universe, any);
            let words: Vec<String> = any
                .iter()
                .map(|(wanted, _)| display_wanted(wanted))
                .collect();
            (!meeting.contains(&number)).then(|| (words.join(" or "), meeting))
        })
    }

    fn sentences(&self) -> Vec<String> {
        let part = self.takes_part();
        let mut sentences = Vec::new();
        let mut foreign = BTreeSet::new();
        for &number in self.reached.iter().filter(|number| part.contains(number)) {
            let this = self.universe.components[number];
            let mut excluded = Vec::new();
            for &other in self.excluded.get(&number).into_iter().flatten() {
                let beside = self.universe.components[other];
                if beside.runs_beside(this) {
                    excluded.push(title(beside));
                } else if foreign.insert((number.min(other), number.max(other))) {
                    let (of_this, of_other) = (&this.architecture, &beside.architecture);
                    let (this, other) = (title(this), title(beside));
                    sentences.push(format!("{this} is for {of_this}, {other} for {of_other}"));
                }
            }
            if !excluded.is_empty() {
                sentences.push(format!("{} excludes {}", title(this), excluded.join(", ")));
            }
            for (words, meeting) in self.needs(number) {
                if meeting.is_empty() || meeting.iter().any(|one| part.contains(one)) {
                    sentences.push(format!("{} needs {words}", title(this)));
                }
            }
        }
        sentences
    }
}
