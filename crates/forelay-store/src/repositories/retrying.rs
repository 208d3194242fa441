//! A repository whose operations are tried again when what failed may pass: any other
//! repository, and patience.
//!
//! Refuses to know what failed: the inner repository says whether it may pass, and itself
//! waits as long as its server asked for. Invariant: what will not pass is tried once.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use forelay_image::Extent;
use forelay_remote::Patience;

use crate::repository::{Body, Description, Object, Put, Repository, RepositoryError};

/// Waits before the second, third... attempt. Who needs more patience has it above: a VM's
/// demand is tried for as long as it takes.
const WAITS: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(600),
    Duration::from_millis(1500),
];

type Open = Box<dyn Fn() -> Result<Arc<dyn Repository>, RepositoryError> + Send + Sync>;

/// A repository with patience.
pub struct Retrying {
    description: Description,
    open: Open,
    opened: OnceLock<Arc<dyn Repository>>,
}

impl Retrying {
    /// A repository that `open` opens when it is first asked: what opening needs (a file of
    /// credentials) may not be there yet.
    pub fn new(
        description: Description,
        open: impl Fn() -> Result<Arc<dyn Repository>, RepositoryError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            description,
            open: Box::new(open),
            opened: OnceLock::new(),
        }
    }

    fn inner(&self) -> Result<&dyn Repository, RepositoryError> {
        if let Some(inner) = self.opened.get() {
            return Ok(&**inner);
        }
        let inner = (self.open)()?;
        Ok(&**self.opened.get_or_init(|| inner))
    }

    async fn tried<'a, T, F>(
        &'a self,
        ask: impl Fn(&'a dyn Repository) -> F,
    ) -> Result<T, RepositoryError>
    where
        F: Future<Output = Result<T, RepositoryError>> + Send + 'a,
    {
        let inner = self.inner()?;
        let mut patience = Patience::new(&WAITS);
        loop {
            match ask(inner).await {
                Err(error) if error.is_transient() && patience.wait().await => {}
                other => return other,
            }
        }
    }
}

#[async_trait]
impl Repository for Retrying {
    fn describe(&self) -> Description {
        self.description.clone()
    }

    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        self.tried(|one| one.get(key, most_bytes)).await
    }

    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        self.tried(|one| one.get_range(key, extent)).await
    }

    async fn put_if_absent(&self, key: &str, body: Body) -> Result<Put, RepositoryError> {
        self.tried(|one| one.put_if_absent(key, body.clone())).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        self.tried(|one| one.list(prefix)).await
    }

    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError> {
        self.tried(|one| one.inspect(key)).await
    }

    async fn delete(&self, key: &str) -> Result<(), RepositoryError> {
        self.tried(|one| one.delete(key)).await
    }
}
