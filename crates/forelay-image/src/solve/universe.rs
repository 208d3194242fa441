//! The available components as a problem for `resolvo`.
//!
//! A version set is an explicit set of components of one name, which makes virtual
//! provides ordinary: the alternatives of a requirement become the union of one set per
//! real name that has a component meeting it. A conflict becomes, for each real name it
//! touches, a constraint to the components of that name that it does not match. Bases
//! (and kernels) constrain each other away.
//!
//! Invariant: component numbers follow the given order (by name, newest first), and all
//! preference is "smaller number first".

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use resolvo::utils::Pool;
use resolvo::{
    Candidates, Condition, ConditionId, ConditionalRequirement, Dependencies, DependencyProvider,
    HintDependenciesAvailable, Interner, KnownDependencies, NameId, Problem as Question,
    Requirement, SolvableId, Solver, SolverCache, StringId, UnsolvableOrCancelled, VersionSetId,
    VersionSetUnionId,
};

use crate::component::{Component, NameRange, Role};
use crate::lock::Lock;
use crate::version::Range;

use super::explain;
use super::{Problem, Want, satisfies};

/// Numbers of components, all of one name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Set(BTreeSet<usize>);

impl resolvo::utils::VersionSet for Set {
    type V = usize;
}

/// The relations of one component, ranges parsed.
struct Relations {
    requires: Vec<Vec<(NameRange, Range)>>,
    conflicts: Vec<(NameRange, Range)>,
}

/// All available components and their relations.
pub(super) struct Universe<'a> {
    pub components: &'a [&'a Component],
    pub by_name: BTreeMap<&'a str, Vec<usize>>,
    relations: Vec<Relations>,
    favored: BTreeMap<&'a str, usize>,
}

impl<'a> Universe<'a> {
    pub fn new(components: &'a [&'a Component], previous: Option<&Lock>) -> Result<Self, Problem> {
        let mut by_name: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        let mut favored = BTreeMap::new();
        let mut relations = Vec::with_capacity(components.len());
        for (number, component) in components.iter().enumerate() {
            by_name.entry(&component.name).or_default().push(number);
            let id = component.id();
            if previous.is_some_and(|lock| lock.all().any(|locked| locked.id == id)) {
                favored.insert(component.name.as_str(), number);
            }
            let parse = |wanted: &NameRange| match wanted.range.parse() {
                Ok(range) => Ok((wanted.clone(), range)),
                Err(error) => Err(Problem::Malformed {
                    component: explain::title(component),
                    relation: format!("{} ({})", wanted.name, wanted.range),
                    problem: format!("{error}"),
                }),
            };
            let requires = component
                .requires
                .iter()
                .map(|any| any.iter().map(parse).collect());
            relations.push(Relations {
                requires: requires.collect::<Result<_, _>>()?,
                conflicts: component
                    .conflicts
                    .iter()
                    .map(parse)
                    .collect::<Result<_, _>>()?,
            });
        }
        Ok(Self {
            components,
            by_name,
            relations,
            favored,
        })
    }

    /// Requirements of a component.
    pub fn requires(&self, number: usize) -> impl Iterator<Item = &[(NameRange, Range)]> {
        self.relations[number].requires.iter().map(Vec::as_slice)
    }

    /// Components that meet `wanted`, the real name first, then by name; newest first.
    pub fn matching(&self, wanted: &NameRange, range: &Range) -> Vec<usize> {
        let meets = |number: &usize| satisfies(self.components[*number], wanted, range);
        let mut found: Vec<usize> = (0..self.components.len()).filter(meets).collect();
        found.sort_by_key(|number| (self.components[*number].name != wanted.name, *number));
        found
    }

    /// Components that must not stand beside `number`.
    pub fn excluded_by(&self, number: usize) -> BTreeSet<usize> {
        let this = self.components[number];
        let mut excluded = BTreeSet::new();
        for (wanted, range) in &self.relations[number].conflicts {
            excluded.extend(self.matching(wanted, range));
        }
        if matches!(this.role, Role::Base | Role::Kernel) {
            let unfit = |other: &usize| {
                let other = self.components[*other];
                let with_base = this.role == Role::Base || other.role == Role::Base;
                other.role == this.role || with_base && !other.runs_beside(this)
            };
            excluded.extend((0..self.components.len()).filter(unfit));
        }
        // Versions of one name exclude each other anyway.
        excluded.retain(|other| self.components[*other].name != this.name);
        excluded
    }

    /// Components that meet a want of the manifest.
    pub fn wanted(&self, want: &Want) -> Vec<usize> {
        let range = want.what.range.parse().unwrap_or_default();
        let mut found = self.matching(&want.what, &range);
        found.retain(|number| match want.role {
            Some(role) => self.components[*number].role == role,
            // Extra bases and kernels are not asked for by mistake.
            None => self.components[*number].role != Role::Kernel,
        });
        // A base provides the names of all its packages: who names one wants the component.
        let named = |number: &usize| self.components[*number].name == want.what.name;
        if want.role.is_none() && found.iter().any(named) {
            found.retain(named);
        }
        found
    }

    /// All kernels, the one that is preferred first.
    pub fn kernels(&self) -> Vec<usize> {
        let is_kernel = |number: &usize| self.components[*number].role == Role::Kernel;
        let mut kernels: Vec<usize> = (0..self.components.len()).filter(is_kernel).collect();
        kernels.sort_by(|a, b| {
            let (a, b) = (self.components[*a], self.components[*b]);
            crate::version::compare(&b.version, &a.version).then_with(|| a.name.cmp(&b.name))
        });
        let favored = |number: &usize| !self.favored.values().any(|favored| favored == number);
        kernels.sort_by_key(favored);
        kernels
    }

    /// The components of the best solution, in order of their numbers.
    pub fn solve(&self, wants: &[Want]) -> Result<Vec<&'a Component>, Vec<Problem>> {
        self.search(wants)
            .ok_or_else(|| explain::conflict(self, wants))
    }

    /// True if the wants have a solution.
    pub fn is_solvable(&self, wants: &[Want]) -> bool {
        self.search(wants).is_some()
    }

    fn search(&self, wants: &[Want]) -> Option<Vec<&'a Component>> {
        let provider = Provider::new(self);
        let mut requirements: Vec<ConditionalRequirement> = wants
            .iter()
            .map(|want| provider.any_of(&self.wanted(want)))
            .collect();
        if !wants.iter().any(|want| want.role == Some(Role::Kernel)) {
            requirements.push(provider.any_of(&self.kernels()));
        }
        let mut solver = Solver::new(provider);
        match solver.solve(Question::new().requirements(requirements)) {
            Ok(solvables) => {
                let pool = &solver.provider().pool;
                let mut numbers: Vec<usize> = solvables
                    .iter()
                    .map(|id| pool.resolve_solvable(*id).record)
                    .collect();
                numbers.sort_unstable();
                Some(
                    numbers
                        .into_iter()
                        .map(|number| self.components[number])
                        .collect(),
                )
            }
            Err(UnsolvableOrCancelled::Unsolvable(_) | UnsolvableOrCancelled::Cancelled(_)) => None,
        }
    }
}

/// Answers `resolvo`'s questions from a universe.
struct Provider<'u, 'a> {
    universe: &'u Universe<'a>,
    pool: Pool<Set>,
    solvables: Vec<SolvableId>,
}

impl<'u, 'a> Provider<'u, 'a> {
    fn new(universe: &'u Universe<'a>) -> Self {
        let pool = Pool::new();
        let intern = |(number, component): (usize, &&Component)| {
            let name = pool.intern_package_name(component.name.as_str());
            pool.intern_solvable(name, number)
        };
        let solvables = universe.components.iter().enumerate().map(intern).collect();
        Self {
            universe,
            pool,
            solvables,
        }
    }

    /// Version sets of `numbers`, one per name, in the order in which names appear.
    fn sets(&self, numbers: &[usize]) -> Vec<VersionSetId> {
        let mut names: Vec<&str> = Vec::new();
        let mut sets: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
        for number in numbers {
            let name = self.universe.components[*number].name.as_str();
            if !sets.contains_key(name) {
                names.push(name);
            }
            sets.entry(name).or_default().insert(*number);
        }
        let intern = |name: &str| {
            let id = self.pool.intern_package_name(name);
            self.pool.intern_version_set(id, Set(sets[name].clone()))
        };
        names.into_iter().map(intern).collect()
    }

    /// The requirement that one of `numbers` (not empty) is chosen.
    fn any_of(&self, numbers: &[usize]) -> ConditionalRequirement {
        let mut sets = self.sets(numbers).into_iter();
        let Some(first) = sets.next() else {
            // Nothing meets it: a set of a name that no component has.
            let nothing = self.pool.intern_package_name("");
            return Requirement::Single(
                self.pool.intern_version_set(nothing, Set(BTreeSet::new())),
            )
            .into();
        };
        let rest: Vec<VersionSetId> = sets.collect();
        if rest.is_empty() {
            return Requirement::Single(first).into();
        }
        Requirement::Union(self.pool.intern_version_set_union(first, rest.into_iter())).into()
    }

    fn number(&self, solvable: SolvableId) -> usize {
        self.pool.resolve_solvable(solvable).record
    }
}

impl Interner for Provider<'_, '_> {
    type NameId = NameId;
    type SolvableId = SolvableId;

    fn display_solvable(&self, solvable: SolvableId) -> impl Display + '_ {
        explain::title(self.universe.components[self.number(solvable)])
    }

    fn display_name(&self, name: NameId) -> impl Display + '_ {
        self.pool.resolve_package_name(name).as_str()
    }

    fn display_version_set(&self, version_set: VersionSetId) -> impl Display + '_ {
        format!("{:?}", self.pool.resolve_version_set(version_set).0)
    }

    fn display_string(&self, string_id: StringId) -> impl Display + '_ {
        self.pool.resolve_string(string_id).to_owned()
    }

    fn version_set_name(&self, version_set: VersionSetId) -> NameId {
        self.pool.resolve_version_set_package_name(version_set)
    }

    fn solvable_name(&self, solvable: SolvableId) -> NameId {
        self.pool.resolve_solvable(solvable).name
    }

    fn version_sets_in_union(
        &self,
        union: VersionSetUnionId,
    ) -> impl Iterator<Item = VersionSetId> {
        self.pool.resolve_version_set_union(union)
    }

    fn resolve_condition(&self, condition: ConditionId) -> Condition {
        self.pool.resolve_condition(condition).clone()
    }
}

impl DependencyProvider for Provider<'_, '_> {
    async fn filter_candidates(
        &self,
        candidates: &[SolvableId],
        version_set: VersionSetId,
        inverse: bool,
    ) -> Vec<SolvableId> {
        let set = &self.pool.resolve_version_set(version_set).0;
        let wanted = |id: &SolvableId| set.contains(&self.number(*id)) != inverse;
        candidates.iter().copied().filter(wanted).collect()
    }

    async fn get_candidates(&self, name: NameId) -> Option<Candidates> {
        let name = self.pool.resolve_package_name(name).as_str();
        let numbers = self.universe.by_name.get(name)?;
        let candidates = numbers
            .iter()
            .map(|number| self.solvables[*number])
            .collect();
        let favored = self
            .universe
            .favored
            .get(name)
            .map(|number| self.solvables[*number]);
        let hint_dependencies_available = HintDependenciesAvailable::All;
        Some(Candidates {
            candidates,
            favored,
            hint_dependencies_available,
            ..Candidates::default()
        })
    }

    async fn sort_candidates(&self, _solver: &SolverCache<Self>, solvables: &mut [SolvableId]) {
        solvables.sort_by_key(|id| self.number(*id));
    }

    async fn get_dependencies(&self, solvable: SolvableId) -> Dependencies {
        let number = self.number(solvable);
        let mut known = KnownDependencies::default();
        for any in self.universe.requires(number) {
            let mut meeting: Vec<usize> = Vec::new();
            for (wanted, range) in any {
                let found = self.universe.matching(wanted, range);
                meeting.extend(
                    found
                        .into_iter()
                        .filter(|number| !meeting.contains(number))
                        .collect::<Vec<_>>(),
                );
            }
            // A component that provides what it requires needs nobody else.
            if !meeting.contains(&number) {
                known.requirements.push(self.any_of(&meeting));
            }
        }
        let excluded = self.universe.excluded_by(number);
        let names: BTreeSet<&str> = excluded
            .iter()
            .map(|other| self.universe.components[*other].name.as_str())
            .collect();
        for name in names {
            let rest = self.universe.by_name[name]
                .iter()
                .filter(|other| !excluded.contains(other));
            let id = self.pool.intern_package_name(name);
            known.constrains.push(
                self.pool
                    .intern_version_set(id, Set(rest.copied().collect())),
            );
        }
        Dependencies::Known(known)
    }
}
