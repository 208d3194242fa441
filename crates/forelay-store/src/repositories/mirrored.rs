//! A repository and its mirrors, as one.
//!
//! Reads go through the list in its order; one that fails, or whose bytes turn out to be
//! wrong, goes to its end for a while and is named. What one lacks may be on the next: mirrors
//! may lag, so the list of what there is, too, is the first one's as long as it answers.
//!
//! Refuses to know what the objects contain, and to write: what a publication or a collection
//! builds on must be the word of the repository that it changes, so both open that one alone.
//! Invariant: setting one aside changes the order in which they are asked, never whether they are.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use forelay_host::error_chain;
use forelay_image::Extent;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::repository::{Body, Description, Object, Put, Repository, RepositoryError, SetAside};

/// How long one that failed is asked after the others.
const SET_ASIDE: Duration = Duration::from_secs(60);

struct MirrorSource {
    repository: Arc<dyn Repository>,
    aside: Mutex<Option<(Instant, SetAside)>>,
}

impl MirrorSource {
    fn is_aside(&self) -> bool {
        let aside = self.aside.lock();
        aside
            .as_ref()
            .is_some_and(|(until, _)| Instant::now() < *until)
    }

    fn set_aside(&self, problem: String) {
        let location = self.repository.describe().location;
        let mut aside = self.aside.lock();
        let until = Instant::now() + SET_ASIDE;
        // Since when it has been failing, not when it did so last.
        let since = match &*aside {
            Some((was_until, was)) if *was_until + SET_ASIDE > Instant::now() => was.since,
            _ => {
                tracing::warn!(location, problem, "a repository is set aside for a while");
                SystemTime::now()
            }
        };
        let now = SetAside {
            location,
            problem,
            since,
        };
        *aside = Some((until, now));
    }
}

/// A repository and its mirrors.
pub struct Mirrored {
    sources: Vec<MirrorSource>,
}

impl Mirrored {
    /// `first` is what others mirror; `mirrors` are asked after it, in their order.
    pub fn new(first: Arc<dyn Repository>, mirrors: Vec<Arc<dyn Repository>>) -> Self {
        let all = std::iter::once(first).chain(mirrors);
        let sources = all.map(|repository| MirrorSource {
            repository,
            aside: Mutex::default(),
        });
        Self {
            sources: sources.collect(),
        }
    }

    fn first(&self) -> &dyn Repository {
        &*self.sources[0].repository
    }

    /// In the order in which they are asked now.
    fn in_order(&self) -> Vec<&MirrorSource> {
        let mut order: Vec<&MirrorSource> = self.sources.iter().collect();
        order.sort_by_key(|source| source.is_aside());
        order
    }

    /// The first answer that there is, or the failure of the first in the list: it is the one
    /// that knows what there is.
    async fn read<'a, T, F>(
        &'a self,
        ask: impl Fn(&'a dyn Repository) -> F,
    ) -> Result<T, RepositoryError>
    where
        F: Future<Output = Result<T, RepositoryError>> + Send + 'a,
    {
        let mut failure = None;
        for source in self.in_order() {
            let error = match ask(&*source.repository).await {
                Ok(answer) => {
                    *source.aside.lock() = None;
                    return Ok(answer);
                }
                Err(error) => error,
            };
            let is_asked_in_vain = matches!(
                error,
                RepositoryError::NotFound { .. }
                    | RepositoryError::Truncated { .. }
                    | RepositoryError::Key(_)
            );
            if !is_asked_in_vain {
                source.set_aside(error_chain(&error));
            }
            if failure.is_none() || std::ptr::eq(source, &self.sources[0]) {
                failure = Some(error);
            }
        }
        Err(failure.unwrap_or_else(|| read_only("mirrors")))
    }
}

fn read_only(key: &str) -> RepositoryError {
    RepositoryError::Permanent {
        operation: "writing",
        key: key.to_owned(),
        source: "a repository with its mirrors is only read".into(),
    }
}

#[async_trait]
impl Repository for Mirrored {
    fn describe(&self) -> Description {
        self.first().describe()
    }

    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        self.read(|one| one.get(key, most_bytes)).await
    }

    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        self.read(|one| one.get_range(key, extent)).await
    }

    async fn put_if_absent(&self, key: &str, _: Body) -> Result<Put, RepositoryError> {
        Err(read_only(key))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        // A mirror lists what the first had when it was last copied.
        self.read(|one| one.list(prefix)).await
    }

    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError> {
        self.read(|one| one.inspect(key)).await
    }

    async fn delete(&self, key: &str) -> Result<(), RepositoryError> {
        Err(read_only(key))
    }

    fn doubt(&self, key: &str, problem: &str) {
        if let Some(source) = self.in_order().first() {
            source.set_aside(format!("{key}: {problem}"));
        }
    }

    fn set_aside(&self) -> Vec<SetAside> {
        let aside = self.sources.iter().filter(|source| source.is_aside());
        let aside = aside.filter_map(|source| source.aside.lock().clone());
        aside.map(|(_, one)| one).collect()
    }
}
