//! Images in registries: documents and layers over HTTP.
//!
//! The protocol and the credentials are `forelay-remote`'s. Owns what is tried again, and how
//! a blob that was cut short goes on where it ended. Blocking, with a runtime of its own.
//!
//! Invariants: nothing longer than its descriptor says is written, no manifest longer than one
//! may be is held; a registry that drips has an end.

use std::fs::File;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forelay_image::Digest;
use forelay_image::tree::FileData;
use forelay_remote::wire::WireOptions;
use forelay_remote::{Patience, RemoteError, registry};
use oci_spec::distribution::Reference;

use super::document::MAX_DOCUMENT_BYTES;
use super::source::ImageTitle;
use super::{Blob, Blobs, ImageOptions, Root};
use crate::error::{ImportError, archive_error, io_error};
use crate::progress::{BuildPhase, Progress, Reporter};
use crate::spool::{DEFAULT_LIMIT_BYTES, Spool};

/// Longest time without a byte.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Longest time for a manifest, however it drips.
const DOCUMENT_LIMIT: Duration = Duration::from_secs(300);
/// One try for a blob may take as long as its bytes do at this speed, and a minute.
const SLOWEST_BYTES_PER_S: u64 = 16 << 10;
/// Waits before what failed for the moment is tried again; a registry that asks for more time
/// is given it.
const WAITS: [Duration; 4] = [
    Duration::from_millis(300),
    Duration::from_secs(1),
    Duration::from_secs(3),
    Duration::from_secs(8),
];
/// A try that brought so much was worth it: as many are made again.
const WORTH_BYTES: u64 = 4 << 20;
const HINT: &str = "check the name; `docker login` keeps credentials in ~/.docker/config.json, \
                    which are used";
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
                        application/vnd.oci.image.manifest.v1+json, \
                        application/vnd.docker.distribution.manifest.list.v2+json, \
                        application/vnd.docker.distribution.manifest.v2+json";

/// An image in a registry.
pub(super) struct Registry {
    reference: Reference,
    shown: PathBuf,
    remote: registry::Registry,
    runtime: tokio::runtime::Runtime,
}

/// Why something did not come.
enum PullError {
    Remote(RemoteError),
    /// It came, and there is no place for it.
    Here(ImportError),
}

impl From<RemoteError> for PullError {
    fn from(error: RemoteError) -> Self {
        Self::Remote(error)
    }
}

/// A blob that is expected.
struct ExpectedBlob {
    digest: Digest,
    bytes: u64,
}

impl Registry {
    /// Connects to nobody yet.
    pub fn new(reference: &Reference, options: &ImageOptions) -> Result<Self, ImportError> {
        let shown = PathBuf::from(reference.whole());
        let host = reference.resolve_registry();
        let wire = WireOptions {
            plain_http: options.plain_http || is_local(host) && options.ca.is_none(),
            ca: options.ca.clone(),
            silence: SILENCE_LIMIT,
            hint: HINT,
        };
        let remote = registry::Registry::new(host, reference.repository(), &wire);
        let remote = remote.map_err(|error| archive_error(&shown, error.to_string()))?;
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build();
        Ok(Self {
            reference: reference.clone(),
            remote,
            runtime: runtime.map_err(io_error("starting a runtime for", &shown))?,
            shown,
        })
    }

    fn refused(&self, problem: impl Into<String>) -> ImportError {
        archive_error(&self.shown, problem)
    }

    /// Tries until it works, fails for good or was tried often enough.
    fn patiently<T>(
        &self,
        mut attempt: impl AsyncFnMut(&mut Patience) -> Result<T, PullError>,
    ) -> Result<T, ImportError> {
        let trying = async {
            let mut patience = Patience::new(&WAITS);
            loop {
                match attempt(&mut patience).await {
                    Ok(done) => return Ok(done),
                    Err(PullError::Here(error)) => return Err(error),
                    Err(PullError::Remote(error)) => {
                        if !(error.is_transient() && patience.wait().await) {
                            return Err(self.refused(error.to_string()));
                        }
                    }
                }
            }
        };
        self.runtime.block_on(trying)
    }

    /// That a try took too long.
    fn late(&self, limit: Duration) -> RemoteError {
        RemoteError::Connection {
            host: self.reference.registry().to_owned(),
            problem: format!("it took more than {} s", limit.as_secs()),
        }
    }

    /// An index or a manifest by tag or digest.
    fn document(&self, reference: &str) -> Result<Vec<u8>, ImportError> {
        let registry = self.reference.registry();
        self.patiently(async |_| {
            let asked = self
                .remote
                .manifest(reference, ACCEPTED, MAX_DOCUMENT_BYTES);
            let came = tokio::time::timeout(DOCUMENT_LIMIT, asked).await;
            let refused = |problem: String| PullError::Here(self.refused(problem));
            match came.unwrap_or_else(|_| Err(self.late(DOCUMENT_LIMIT))) {
                Ok(bytes) => Ok(bytes.to_vec()),
                Err(RemoteError::Missing { .. }) => {
                    Err(refused(format!("{registry} has no such image or tag")))
                }
                Err(RemoteError::TooLong { .. }) => {
                    Err(refused("its manifest is too large to be read".to_owned()))
                }
                Err(error) => Err(error.into()),
            }
        })
    }

    fn expected(&self, blob: &Blob) -> Result<ExpectedBlob, ImportError> {
        let (Some(digest), Some(bytes)) = (blob.digest, blob.bytes) else {
            return Err(self.refused("a blob without digest"));
        };
        if bytes > DEFAULT_LIMIT_BYTES {
            let problem =
                format!("a blob of {bytes} bytes; at most {DEFAULT_LIMIT_BYTES} are taken");
            return Err(self.refused(problem));
        }
        Ok(ExpectedBlob { digest, bytes })
    }

    /// Appends to `file`, which has `have` bytes of a blob, what is missing.
    async fn append(
        &self,
        blob: &ExpectedBlob,
        (file, path): (&File, &Path),
        have: u64,
        report: Reporter<'_>,
    ) -> Result<(), PullError> {
        let mut file = file;
        let mut done_bytes = have;
        let mut parts = self.remote.blob_from(blob.digest, have, blob.bytes).await?;
        while let Some(part) = parts.next().await? {
            let written = file.write_all(&part).map_err(io_error("writing", path));
            written.map_err(PullError::Here)?;
            done_bytes += part.len() as u64;
            report(Progress::Bytes {
                phase: BuildPhase::Download,
                done_bytes,
                total_bytes: Some(blob.bytes),
            });
        }
        Ok(())
    }
}

impl Blobs for Registry {
    fn root(&mut self) -> Result<Root, ImportError> {
        let digest = self.reference.digest();
        let name = digest.or(self.reference.tag()).unwrap_or("latest");
        let bytes = self.document(name)?;
        // Of a tag nobody knows what it should be.
        let pinned = digest.and_then(|digest| digest.parse().ok());
        if pinned.is_some_and(|pinned| Digest::of(&bytes) != pinned) {
            return Err(self.refused(format!("its manifest is not of digest {name}")));
        }
        Ok(Root::Document {
            title: ImageTitle::of(&self.reference),
            bytes,
            name: None,
        })
    }

    fn manifest(&mut self, blob: &Blob) -> Result<Vec<u8>, ImportError> {
        let expected = self.expected(blob)?;
        if expected.bytes > MAX_DOCUMENT_BYTES {
            return Err(self.refused("its manifest is too large to be read"));
        }
        self.document(&expected.digest.to_string())
    }

    fn blob(
        &mut self,
        blob: &Blob,
        spool: &mut Spool,
        report: Reporter<'_>,
    ) -> Result<FileData, ImportError> {
        let expected = self.expected(blob)?;
        let path = spool.sparse_file(0, &self.shown)?;
        let file = File::options().append(true).open(&path);
        let file = file.map_err(io_error("opening", &path))?;
        let bytes = || file.metadata().map_or(0, |metadata| metadata.len());
        self.patiently(async |patience| {
            let have = bytes();
            if have == expected.bytes {
                return Ok(());
            }
            let left_s = (expected.bytes - have) / SLOWEST_BYTES_PER_S;
            let limit = SILENCE_LIMIT + Duration::from_secs(left_s);
            let append = self.append(&expected, (&file, &path), have, report);
            let done = tokio::time::timeout(limit, append).await;
            if bytes().saturating_sub(have) >= WORTH_BYTES {
                patience.renew();
            }
            done.unwrap_or_else(|_| Err(self.late(limit).into()))
        })?;
        Ok(FileData::HostFile {
            path,
            offset: 0,
            len: expected.bytes,
        })
    }
}

/// True for a registry on this host, which speaks plain HTTP as a rule.
fn is_local(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    let address = host.parse::<Ipv4Addr>();
    host == "localhost" || host == "[::1]" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_hosts_registries_speak_plain_http() {
        for local in [
            "localhost:5000",
            "127.0.0.1:5000",
            "127.0.0.1",
            "[::1]:5000",
        ] {
            assert!(is_local(local), "{local}");
        }
        for other in [
            "127.evil.io",
            "127.0.0.1.evil.io:80",
            "a.io",
            "localhost.io",
        ] {
            assert!(!is_local(other), "{other}");
        }
    }
}
