//! A repository whose every operation has a time limit: any other repository, and a clock.
//!
//! A repository that hangs (a dead NFS server, a lost connection) fails for now instead,
//! so that whoever waits can be told, try again or give up.
//!
//! Refuses to know what it carries and why it takes long. Invariant: no operation takes
//! longer than the limit and what its bytes take at [`SLOWEST_BYTES_PER_S`].

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use forelay_image::Extent;

use crate::repository::{Body, Description, Object, Put, Repository, RepositoryError, SetAside};

/// Bytes that are known to be on their way may come as slowly as this.
const SLOWEST_BYTES_PER_S: u64 = 1 << 20;

/// A repository with a time limit.
pub struct Limited {
    inner: Arc<dyn Repository>,
    limit: Duration,
}

/// The limit was reached.
#[derive(Debug, thiserror::Error)]
#[error(
    "the repository at {location} did not answer within {} s: see whether it can be reached \
     (the limit is `repository.timeout_s`)", limit.as_secs_f64()
)]
struct TimedOut {
    location: String,
    limit: Duration,
}

impl Limited {
    /// Wraps `inner`.
    pub fn new(inner: Arc<dyn Repository>, limit: Duration) -> Self {
        Self { inner, limit }
    }

    async fn within<T>(
        &self,
        operation: &'static str,
        key: &str,
        bytes: u64,
        work: impl Future<Output = Result<T, RepositoryError>> + Send,
    ) -> Result<T, RepositoryError> {
        let limit = self.limit + Duration::from_secs(bytes / SLOWEST_BYTES_PER_S);
        let Ok(result) = tokio::time::timeout(limit, work).await else {
            let location = self.inner.describe().location;
            return Err(RepositoryError::Transient {
                operation,
                key: key.to_owned(),
                source: Box::new(TimedOut { location, limit }),
            });
        };
        result
    }
}

#[async_trait]
impl Repository for Limited {
    fn describe(&self) -> Description {
        self.inner.describe()
    }

    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        let reading = self.inner.get(key, most_bytes);
        self.within("reading", key, 0, reading).await
    }

    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        let reading = self.inner.get_range(key, extent);
        self.within("reading", key, extent.len, reading).await
    }

    async fn put_if_absent(&self, key: &str, body: Body) -> Result<Put, RepositoryError> {
        let bytes = body.bytes();
        let writing = self.inner.put_if_absent(key, body);
        self.within("writing", key, bytes, writing).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        let listing = self.inner.list(prefix);
        self.within("listing", prefix, 0, listing).await
    }

    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError> {
        let inspecting = self.inner.inspect(key);
        self.within("reading", key, 0, inspecting).await
    }

    async fn delete(&self, key: &str) -> Result<(), RepositoryError> {
        let deleting = self.inner.delete(key);
        self.within("deletion", key, 0, deleting).await
    }

    fn doubt(&self, key: &str, problem: &str) {
        self.inner.doubt(key, problem);
    }

    fn set_aside(&self) -> Vec<SetAside> {
        self.inner.set_aside()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repositories::directory::DirectoryRepository;
    use crate::repositories::throttle::Throttled;

    #[tokio::test]
    async fn a_repository_that_hangs_fails_for_now() {
        let dir = tempfile::tempdir().unwrap();
        let directory = DirectoryRepository::create(dir.path()).unwrap();
        let for_ever = Duration::from_secs(24 * 3600);
        let hanging = Throttled::new(Arc::new(directory), for_ever, None);
        let limited = Limited::new(Arc::new(hanging), Duration::from_millis(50));
        let hung = limited.get("stuck", 100).await.unwrap_err();
        assert!(hung.is_transient(), "{hung}");
        let text = std::error::Error::source(&hung).unwrap().to_string();
        assert!(text.contains("did not answer within 0.05 s"), "{text}");
        let part = limited.get_range("stuck", Extent::new(0, 4096)).await;
        assert!(part.unwrap_err().is_transient());
    }
}
