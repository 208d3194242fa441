//! What this daemon does without at the moment, and since when.
//!
//! Serving VMs needs the sessions and the disk cache; all else may be missing for a while:
//! the daemon then serves what it can, says so here, and goes on trying.

use std::collections::BTreeMap;

use parking_lot::Mutex;

use crate::api::{Degraded, EventKind};
use crate::daemon::events::{Events, Happening};
use crate::daemon::memory::planner::now_ms;

/// What may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dependency {
    /// The configuration file is not valid; the last good one is in use.
    Configuration,
    /// The history is not open: nothing is forecast from the past.
    History,
    /// The holder has ended: the mounts end with this process.
    Holder,
    /// The mapping table has no journal.
    Journal,
    /// A directory of the daemon's own cannot be made.
    Directory,
    /// The disk cache is not where it was configured.
    DiskCache,
    /// The repository is not there or does not answer.
    Repository,
    /// The repository, or one of its mirrors, failed and is asked after the others for a while.
    Mirror,
    /// Components of running VMs cannot be opened.
    Components,
    /// A mount is not served.
    Mounts,
    /// VMMs are confined, but not in all that control groups could do.
    ControlGroups,
    /// The API is not served over TCP.
    Dashboard,
}

impl Dependency {
    const fn name(self) -> &'static str {
        match self {
            Self::Configuration => "configuration",
            Self::History => "history",
            Self::Holder => "holder",
            Self::Journal => "journal",
            Self::Directory => "directory",
            Self::DiskCache => "disk cache",
            Self::Repository => "repository",
            Self::Mirror => "mirror",
            Self::Components => "components",
            Self::Mounts => "mounts",
            Self::ControlGroups => "control groups",
            Self::Dashboard => "dashboard over TCP",
        }
    }
}

/// The parts that are missing now.
#[derive(Debug, Default)]
pub struct Health {
    missing: Mutex<BTreeMap<Dependency, Degraded>>,
    events: Events,
}

impl Health {
    /// Where it is told what is missing.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Notes that a part is missing, or the like of it has changed.
    pub fn lack(&self, dependency: Dependency, problem: impl Into<String>) {
        let problem = problem.into();
        let mut missing = self.missing.lock();
        if let Some(known) = missing.get_mut(&dependency) {
            if known.problem != problem {
                tracing::warn!(part = dependency.name(), problem, "degraded");
                known.problem = problem;
            }
            return;
        }
        tracing::error!(
            part = dependency.name(),
            problem,
            "degraded: serving without it"
        );
        let message = format!("{}: {problem}", dependency.name());
        self.events
            .tell(Happening::new(EventKind::Degraded, message));
        let what = dependency.name().to_owned();
        let since_ms = now_ms();
        missing.insert(
            dependency,
            Degraded {
                what,
                problem,
                since_ms,
            },
        );
    }

    /// Notes that a part is there.
    pub fn has(&self, dependency: Dependency) {
        if self.missing.lock().remove(&dependency).is_some() {
            tracing::info!(part = dependency.name(), "there again");
            let message = format!("{} is there again", dependency.name());
            self.events
                .tell(Happening::new(EventKind::Restored, message));
        }
    }

    /// Notes what became of an attempt at a part.
    pub fn note<T, E: std::error::Error>(
        &self,
        dependency: Dependency,
        attempt: Result<T, E>,
    ) -> Option<T> {
        match attempt {
            Ok(value) => {
                self.has(dependency);
                Some(value)
            }
            Err(error) => {
                self.lack(dependency, forelay_host::error_chain(&error));
                None
            }
        }
    }

    /// What is missing, for clients.
    pub fn missing(&self) -> Vec<Degraded> {
        self.missing.lock().values().cloned().collect()
    }

    /// True if this part is missing.
    pub fn lacks(&self, dependency: Dependency) -> bool {
        self.missing.lock().contains_key(&dependency)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_missing_since_it_was_first_noted_until_it_is_there() {
        let health = Health::default();
        health.lack(Dependency::History, "damaged");
        let first = health.missing();
        health.lack(Dependency::History, "full");
        let now = health.missing();
        assert_eq!((now.len(), now[0].problem.as_str()), (1, "full"));
        assert_eq!(now[0].since_ms, first[0].since_ms);
        let there: Result<u8, std::io::Error> = Ok(7);
        assert_eq!(health.note(Dependency::History, there), Some(7));
        assert!(health.missing().is_empty() && !health.lacks(Dependency::History));
    }
}
