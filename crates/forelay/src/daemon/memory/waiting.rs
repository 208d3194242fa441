//! VMs that wait for bytes: since when, for what, and whose fault it is.
//!
//! A fault that cannot be answered stays pending for as long as it takes, and its vCPU with
//! it. What is pending is read from the mounts themselves, so that a wait is seen whatever
//! holds it up, also if the fault handler never returned.
//!
//! Invariant: a wait is logged once when it has lasted, and once when it is over.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use forelay_image::{Digest, Extent};
use forelay_memory::WaitingRead;
use forelay_store::FetchError;

use crate::api::{EventKind, PendingFault, WaitCulprit};
use crate::daemon::events::{Events, Happening};
use crate::daemon::memory::domains::Domains;

/// A fault that is younger is an ordinary demand fetch.
const ORDINARY_FETCH: Duration = Duration::from_millis(500);

/// The fault that a VM has been waiting for the longest.
#[derive(Clone, Debug)]
pub struct PendingWait {
    /// Name of the VM.
    pub vm: String,
    since: Instant,
    image: Digest,
    extent: Extent,
    culprit: WaitCulprit,
    error: Option<String>,
}

impl PendingWait {
    fn new(vm: String, read: WaitingRead, domains: &Domains) -> Self {
        let (culprit, error) = culprit(&read);
        // The repository is tried on without a report each time; its last failure is known.
        let last_failure = || match culprit {
            WaitCulprit::Repository => domains.last_repository_failure(),
            _ => None,
        };
        Self {
            vm,
            since: read.since,
            image: read.file,
            extent: read.extent,
            culprit,
            error: error.or_else(last_failure),
        }
    }

    /// The image that the bytes are of.
    pub const fn image(&self) -> Digest {
        self.image
    }

    /// The wait as clients see it; the image is that of `component`.
    pub fn view(&self, component: Option<String>) -> PendingFault {
        let waited = self.since.elapsed();
        let since = SystemTime::now() - waited;
        let since_ms = since.duration_since(SystemTime::UNIX_EPOCH);
        PendingFault {
            since_ms: since_ms.map_or(0, |time| time.as_millis() as i64),
            waited_s: waited.as_secs_f64(),
            component,
            image: self.image,
            offset: self.extent.offset,
            len: self.extent.len,
            culprit: self.culprit,
            error: self.error.clone(),
        }
    }
}

/// Whose fault it is that a READ is not answered, and what the last attempt said.
fn culprit(read: &WaitingRead) -> (WaitCulprit, Option<String>) {
    let Some(failure) = &read.failure else {
        // The handler looks into the disk cache before it hands a fault on to the repository.
        return match read.handed_on {
            true => (WaitCulprit::Repository, None),
            false => (WaitCulprit::DiskCache, None),
        };
    };
    let culprit = match failure.downcast_ref::<FetchError>() {
        Some(FetchError::Corrupted { .. }) => WaitCulprit::Content,
        Some(FetchError::NoSuchChunk { .. } | FetchError::Cancelled) | None => WaitCulprit::Other,
        // A pack that is gone and a repository that is gone look alike.
        Some(_) => WaitCulprit::Repository,
    };
    (culprit, Some(forelay_host::error_chain(failure.as_ref())))
}

/// The longest wait of each VM, by the VMM's process id; ordinary demand fetches are none.
pub fn longest_waits(domains: &Domains) -> BTreeMap<u32, PendingWait> {
    let mut waits: BTreeMap<u32, PendingWait> = BTreeMap::new();
    for memory in domains.all() {
        let long = memory.shared.waiting_reads().into_iter();
        for read in long.take_while(|read| read.since.elapsed() >= ORDINARY_FETCH) {
            let Some(vm) = domains.attribution().vm_of(read.thread) else {
                continue;
            };
            let is_longer = |known: &PendingWait| read.since < known.since;
            if waits.get(&vm.pid).is_none_or(is_longer) {
                waits.insert(vm.pid, PendingWait::new(vm.vm.clone(), read, domains));
            }
        }
    }
    waits
}

/// Logs waits once each. See the module's header.
#[derive(Debug, Default)]
pub struct WaitLog {
    /// VMs that wait, and since when.
    logged: BTreeMap<u32, PendingWait>,
}

impl WaitLog {
    /// Notes who waits now.
    pub fn note(&mut self, waits: BTreeMap<u32, PendingWait>, events: &Events) {
        for (pid, wait) in &waits {
            if !self.logged.contains_key(pid) {
                tracing::error!(
                    vm = wait.vm,
                    image = %wait.image,
                    offset = wait.extent.offset,
                    culprit = ?wait.culprit,
                    error = wait.error.as_deref().unwrap_or("no answer yet"),
                    "a VM waits for bytes; they are tried for until they are there"
                );
                let why = wait.error.as_deref().unwrap_or("no answer yet");
                let message = format!("waits for bytes; {}: {why}", wait.culprit);
                let waiting = Happening::new(EventKind::Waiting, message).of_vm(&wait.vm);
                events.tell(waiting.bytes(wait.extent.len));
            }
        }
        for (pid, wait) in std::mem::take(&mut self.logged) {
            if !waits.contains_key(&pid) {
                let waited_s = wait.since.elapsed().as_secs_f64();
                tracing::info!(vm = wait.vm, waited_s, "a VM waits no longer");
                let message = format!("waits no longer, after {waited_s:.1} s");
                let over = Happening::new(EventKind::WaitOver, message).of_vm(&wait.vm);
                events.tell(over.seconds(waited_s));
            }
        }
        self.logged = waits;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use forelay_memory::AnswerFailure;

    use super::*;

    #[test]
    fn who_holds_bytes_up_is_told_by_how_far_they_came() {
        let image = Digest::of(b"image");
        let read = |handed_on, failure: Option<FetchError>| WaitingRead {
            file: image,
            extent: Extent::new(0, 4096),
            thread: 1,
            since: Instant::now(),
            handed_on,
            failure: failure.map(|error| Arc::new(error) as AnswerFailure),
        };
        let pack = Digest::of(b"pack");
        let chunk_no = 3;
        let gone = FetchError::Vanished {
            image,
            chunk_no,
            pack,
        };
        let corrupted = FetchError::Corrupted {
            image,
            chunk_no,
            pack,
            problem: "flipped".to_owned(),
        };
        let of = |handed_on, failure| culprit(&read(handed_on, failure)).0;
        assert_eq!(of(false, None), WaitCulprit::DiskCache);
        assert_eq!(of(true, None), WaitCulprit::Repository);
        assert_eq!(of(true, Some(gone)), WaitCulprit::Repository);
        assert_eq!(of(true, Some(corrupted)), WaitCulprit::Content);
        let (other, said) = culprit(&read(true, Some(FetchError::Cancelled)));
        assert_eq!(other, WaitCulprit::Other);
        assert_eq!(said.as_deref(), Some("the fetch was cancelled"));
    }
}
