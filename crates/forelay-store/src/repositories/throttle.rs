//! A repository behind a slow line: any other repository plus latency and bandwidth.
//!
//! Stands in for a remote repository on one machine. Each request first waits out the
//! latency; then its bytes pass, a slice at a time, through one line that all requests
//! share, so that concurrent transfers divide the bandwidth evenly as TCP flows do.
//!
//! Refuses to know what it carries. Invariant: over any stretch of time no more than
//! `bandwidth x (time + 5 ms)` bytes and one slice pass.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use forelay_image::Extent;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::repository::{Body, Description, Object, Put, Repository, RepositoryError, SetAside};

const SLICE_BYTES: u64 = 64 << 10;

/// Idle time that may be made up for, since timers wake late by about a millisecond.
const BURST: Duration = Duration::from_millis(5);

/// A repository with added latency and limited bandwidth.
pub struct Throttled {
    inner: Arc<dyn Repository>,
    latency: Duration,
    bandwidth_bytes_per_s: Option<u64>,
    /// When the line is free for the next slice.
    free_at: Mutex<Option<Instant>>,
}

impl Throttled {
    /// Wraps `inner`. `None` leaves the bandwidth unlimited.
    pub fn new(
        inner: Arc<dyn Repository>,
        latency: Duration,
        bandwidth_bytes_per_s: Option<u64>,
    ) -> Self {
        let bandwidth_bytes_per_s = bandwidth_bytes_per_s.map(|rate| rate.max(1));
        Self {
            inner,
            latency,
            bandwidth_bytes_per_s,
            free_at: Mutex::new(None),
        }
    }

    /// Waits as long as `bytes` take on the shared line.
    async fn carry(&self, bytes: u64) {
        let Some(rate) = self.bandwidth_bytes_per_s else {
            return;
        };
        let mut left = bytes;
        while left > 0 {
            let slice = left.min(SLICE_BYTES);
            left -= slice;
            let due = {
                let now = Instant::now();
                let mut free_at = self.free_at.lock();
                let earliest = now.checked_sub(BURST).unwrap_or(now);
                let start = free_at.map_or(now, |time| time.max(earliest));
                let due = start + Duration::from_secs_f64(slice as f64 / rate as f64);
                *free_at = Some(due);
                due
            };
            tokio::time::sleep_until(due).await;
        }
    }
}

#[async_trait]
impl Repository for Throttled {
    fn describe(&self) -> Description {
        self.inner.describe()
    }

    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        tokio::time::sleep(self.latency).await;
        let bytes = self.inner.get(key, most_bytes).await?;
        self.carry(bytes.len() as u64).await;
        Ok(bytes)
    }

    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        tokio::time::sleep(self.latency).await;
        let bytes = self.inner.get_range(key, extent).await?;
        self.carry(bytes.len() as u64).await;
        Ok(bytes)
    }

    async fn put_if_absent(&self, key: &str, body: Body) -> Result<Put, RepositoryError> {
        tokio::time::sleep(self.latency).await;
        self.carry(body.bytes()).await;
        self.inner.put_if_absent(key, body).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        tokio::time::sleep(self.latency).await;
        self.inner.list(prefix).await
    }

    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError> {
        tokio::time::sleep(self.latency).await;
        self.inner.inspect(key).await
    }

    async fn delete(&self, key: &str) -> Result<(), RepositoryError> {
        tokio::time::sleep(self.latency).await;
        self.inner.delete(key).await
    }

    fn doubt(&self, key: &str, problem: &str) {
        self.inner.doubt(key, problem);
    }

    fn set_aside(&self) -> Vec<SetAside> {
        self.inner.set_aside()
    }
}
