//! Runs requests: one ranged GET, then every wanted chunk in it is decompressed,
//! verified, handed out and put into the disk cache.
//!
//! A transient failure is repeated with growing waits: a prefetch a few times, a demand
//! for as long as it takes. A chunk whose bytes are wrong is fetched once more by itself;
//! a pack that is gone makes the image's locations be read again, once. After that the
//! failure is final and names image, chunk and pack.
//!
//! Invariant: every request that starts gives its slot back.

use std::sync::Arc;

use bytes::Bytes;
use forelay_host::error_chain;
use forelay_image::Digest;
use tokio::time::Instant;

use super::queue::{ChunkSource, RangeRequest};
use super::{FetchError, Scheduler, source};
use crate::layout;
use crate::pack::open_frame;
use crate::repository::RepositoryError;

/// Tries that a chunk gets whose bytes are wrong or whose pack is gone.
const SECOND_LOOKS: u32 = 1;

impl Scheduler {
    /// Starts all requests that may start.
    pub(super) fn pump(&self) {
        loop {
            let mut state = self.0.state.lock();
            let Some(request) = state.queue.next_request() else {
                return;
            };
            if state.busy_since.is_none() {
                state.busy_since = Some(Instant::now());
                state.busy_bytes = 0;
            }
            drop(state);
            let this = self.clone();
            self.0
                .handle
                .spawn(async move { this.run(request, SECOND_LOOKS).await });
        }
    }

    async fn run(&self, request: RangeRequest, second_looks: u32) {
        let outcome = self.get(&request).await;
        {
            let mut state = self.0.state.lock();
            state.queue.request_ended(&request);
            if state.queue.active() == (0, 0) {
                state.busy_since = None;
            }
        }
        // The slot is free: let others start while this one's bytes are unpacked.
        self.pump();
        match outcome {
            Ok(bytes) => {
                let bad = self.unpack(&request, bytes).await;
                if let Some((source, problem)) = bad.first() {
                    let repository = self.0.images.repository_of(source.image.digest);
                    repository.doubt(&layout::pack(request.pack), problem);
                }
                for (source, problem) in bad {
                    self.look_again(source, Failure::Bytes(problem), second_looks)
                        .await;
                }
            }
            Err((RepositoryError::NotFound { .. }, _)) => {
                for source in &request.parts {
                    self.look_again(*source, Failure::Gone, second_looks).await;
                }
            }
            Err((error @ RepositoryError::Truncated { .. }, _)) => {
                for source in &request.parts {
                    let problem = Failure::Bytes(error.to_string());
                    self.look_again(*source, problem, second_looks).await;
                }
            }
            Err((error, attempts)) => {
                let cause = Arc::new(error);
                for part in &request.parts {
                    let (image, chunk_no, source) =
                        (part.image.digest, part.chunk_no, cause.clone());
                    self.fail(
                        part.chunk,
                        FetchError::Repository {
                            image,
                            chunk_no,
                            attempts,
                            source,
                        },
                    );
                }
            }
        }
    }

    /// The request's bytes, with retries.
    async fn get(&self, request: &RangeRequest) -> Result<Bytes, (RepositoryError, u32)> {
        let key = layout::pack(request.pack);
        let config = &self.0.config;
        // Parts of one request are in one pack, and so in one repository.
        let repository = match request.parts.first() {
            Some(part) => self.0.images.repository_of(part.image.digest),
            None => Arc::clone(&self.0.repository),
        };
        let mut attempts = 0;
        let mut in_trouble = false;
        let outcome = loop {
            let started = Instant::now();
            let result = repository.get_range(&key, request.extent).await;
            attempts += 1;
            let error = match result {
                Ok(bytes) => {
                    if !is_elsewhere(self, request) {
                        self.observe(request, started);
                    }
                    break Ok(bytes);
                }
                Err(error) => error,
            };
            let demanded = {
                let state = self.0.state.lock();
                request
                    .parts
                    .iter()
                    .any(|part| state.queue.is_demanded(part.chunk))
            };
            if !error.is_transient() || (!demanded && attempts >= config.prefetch_attempts) {
                break Err((error, attempts));
            }
            in_trouble |= self.note_retry(request, &error, attempts, demanded && !in_trouble);
            let doublings = (attempts - 1).min(16);
            let wait = config.first_backoff.saturating_mul(1 << doublings);
            tokio::time::sleep(wait.min(config.longest_backoff)).await;
        };
        if in_trouble {
            self.0.state.lock().counters.demands_in_trouble -= 1;
        }
        outcome
    }

    /// Counts a failed attempt; true if a demand now counts as in trouble.
    fn note_retry(
        &self,
        request: &RangeRequest,
        error: &RepositoryError,
        attempts: u32,
        demanded: bool,
    ) -> bool {
        let trouble = demanded && attempts >= self.0.config.demand_trouble_attempts;
        let mut state = self.0.state.lock();
        state.counters.retries += 1;
        state.counters.last_failure = Some(error_chain(error));
        state.counters.demands_in_trouble += u64::from(trouble);
        drop(state);
        if trouble {
            let (pack, error) = (request.pack, error_chain(error));
            tracing::warn!(%pack, attempts, error, "a VM waits for a chunk that cannot be fetched; trying on");
        }
        trouble
    }

    fn observe(&self, request: &RangeRequest, started: Instant) {
        let mut state = self.0.state.lock();
        let now = Instant::now();
        let bytes = request.extent.len;
        state.busy_bytes += bytes;
        state
            .counters
            .request(request.priority, bytes, request.parts.len() as u64);
        let busy = state
            .busy_since
            .map(|since| (state.busy_bytes, now - since));
        let busy = busy.filter(|(bytes, _)| *bytes >= 4 << 20);
        if busy.is_some() {
            state.busy_since = Some(now);
            state.busy_bytes = 0;
        }
        state.counters.observe(bytes, now - started, busy);
    }

    /// Unpacks what arrived; returns the chunks whose bytes are wrong.
    async fn unpack(&self, request: &RangeRequest, bytes: Bytes) -> Vec<(ChunkSource, String)> {
        let this = self.clone();
        let parts = request.parts.clone();
        let start = request.extent.offset;
        let keep = !is_elsewhere(self, request);
        let work = move || {
            let mut bad = Vec::new();
            for source in parts {
                let from = (u64::from(source.offset) - start) as usize;
                let frame = bytes
                    .get(from..from + source.stored_bytes as usize)
                    .unwrap_or_default();
                match open_frame(frame, source.chunk_bytes, source.chunk) {
                    Ok(chunk) => this.deliver(source.chunk, chunk.into(), keep),
                    Err(error) => bad.push((source, error_chain(&error))),
                }
            }
            bad
        };
        // It fails only when the runtime shuts down: nobody waits any more.
        tokio::task::spawn_blocking(work).await.unwrap_or_default()
    }

    /// Hands a chunk out, then keeps it on disk if it is to be kept.
    fn deliver(&self, chunk: Digest, bytes: Bytes, keep: bool) {
        let waiters = self.0.state.lock().queue.delivered(chunk, bytes.clone());
        for waiter in waiters {
            waiter(Ok(bytes.clone()));
        }
        if keep && let Err(error) = self.0.cache.insert(chunk, &bytes) {
            tracing::warn!(%chunk, %error, "cannot keep a chunk in the disk cache");
        }
        self.0.state.lock().queue.finished(chunk);
    }

    /// Tries a chunk once more with what the repository says now, or gives up.
    async fn look_again(&self, part: ChunkSource, failure: Failure, second_looks: u32) {
        let ChunkSource {
            chunk_no,
            chunk,
            pack,
            ..
        } = part;
        let image = part.image.digest;
        if second_looks > 0 {
            let again = match &failure {
                Failure::Bytes(_) => Some(part),
                Failure::Gone => match self.0.images.reload(part.image).await {
                    Ok(map) => source(&map, chunk_no).ok().filter(|new| new.chunk == chunk),
                    Err(_) => None,
                },
            };
            if let Some(part) = again {
                self.0.state.lock().counters.retries += 1;
                // Not through the queue: this chunk alone, whatever the slots say.
                return Box::pin(self.run_alone(part, second_looks - 1)).await;
            }
        }
        let error = match failure {
            Failure::Gone => FetchError::Vanished {
                image,
                chunk_no,
                pack,
            },
            Failure::Bytes(problem) => FetchError::Corrupted {
                image,
                chunk_no,
                pack,
                problem,
            },
        };
        self.fail(chunk, error);
    }

    async fn run_alone(&self, part: ChunkSource, second_looks: u32) {
        let request = self.0.state.lock().queue.alone(part);
        self.run(request, second_looks).await;
    }

    fn fail(&self, chunk: Digest, error: FetchError) {
        let waiters = {
            let mut state = self.0.state.lock();
            state.counters.failures += 1;
            state.counters.last_failure = Some(error_chain(&error));
            state.queue.failed(chunk)
        };
        for waiter in waiters {
            waiter(Err(error.clone()));
        }
    }
}

/// Whether a request's parts, all in one repository, are in another than the host's.
fn is_elsewhere(scheduler: &Scheduler, request: &RangeRequest) -> bool {
    let first = request.parts.first();
    first.is_some_and(|part| scheduler.0.images.is_elsewhere(part.image.digest))
}

enum Failure {
    Gone,
    Bytes(String),
}
