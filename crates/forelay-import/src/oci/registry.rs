//! Images in registries: documents and layers over HTTP, with the credentials that Docker
//! keeps.
//!
//! The protocol is oci-client's. Owns what a user is told when it fails, and what is tried
//! again: connections that break and servers that are busy, not refusals.
//!
//! Manifests are fetched here, since oci-client takes what comes of them. Blocking, with a
//! runtime of its own.
//!
//! Invariants: nothing longer than its descriptor says is written, no manifest longer than one
//! may be is held; a registry whose words oci-client panics at is told as one that makes no
//! sense. (What oci-client itself collects in memory, tokens and the words of a refusal, it does
//! not bound: a hostile registry can exhaust the importing command, not the daemon.)

use std::cell::Cell;
use std::fs::File;
use std::future::Future;
use std::io::{BufReader, ErrorKind, Write as _};
use std::net::Ipv4Addr;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential};
use forelay_image::tree::FileData;
use futures_util::StreamExt as _;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use reqwest::header::ACCEPT;

use super::document::MAX_DOCUMENT_BYTES;
use super::source::ImageTitle;
use super::{Blob, Blobs, Root};
use crate::error::{ImportError, archive_error, io_error};
use crate::progress::{BuildPhase, Progress, Reporter};
use crate::spool::{DEFAULT_LIMIT_BYTES, Spool};

const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// Longest time without a byte.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Longest time for a manifest, however it drips.
const DOCUMENT_LIMIT: Duration = Duration::from_secs(300);
/// Waits before what failed for the moment is tried again.
const RETRY_AFTER: [Duration; 3] = [
    Duration::from_millis(300),
    Duration::from_secs(2),
    Duration::from_secs(6),
];
/// As much is told of what a server says that is no registry's answer.
const SAID_BYTES: usize = 200;
/// Where Docker keeps the credentials of its own registry.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// An image in a registry.
pub(super) struct Registry {
    reference: Reference,
    shown: PathBuf,
    auth: RegistryAuth,
    client: Client,
    /// For manifests.
    http: reqwest::Client,
    /// `http` or `https`.
    scheme: &'static str,
    runtime: tokio::runtime::Runtime,
}

impl Registry {
    /// Connects to nobody yet.
    pub fn new(reference: &Reference, plain_http: bool) -> Result<Self, ImportError> {
        let shown = PathBuf::from(reference.whole());
        // Another part of the process may have chosen already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (protocol, scheme) = match plain_http || is_local(reference.resolve_registry()) {
            true => (ClientProtocol::Http, "http"),
            false => (ClientProtocol::Https, "https"),
        };
        let config = ClientConfig {
            protocol,
            connect_timeout: Some(CONNECT_LIMIT),
            read_timeout: Some(SILENCE_LIMIT),
            ..ClientConfig::default()
        };
        let unusable = |error: &dyn std::error::Error| {
            archive_error(&shown, format!("no HTTP client: {}", chain(error)))
        };
        let client = Client::try_from(config).map_err(|error| unusable(&error))?;
        let http = reqwest::Client::builder().connect_timeout(CONNECT_LIMIT);
        let http = http.read_timeout(SILENCE_LIMIT).build();
        let http = http.map_err(|error| unusable(&error))?;
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_all().build();
        Ok(Self {
            reference: reference.clone(),
            auth: credentials(docker_config().as_deref(), reference.registry())
                .map_err(|problem| archive_error(&shown, problem))?,
            runtime: runtime.map_err(io_error("starting a runtime for", &shown))?,
            shown,
            client,
            http,
            scheme,
        })
    }

    /// Does `what` until it works, fails for good or was tried often enough.
    fn tried<'a, T, F>(&'a self, mut what: impl FnMut(&'a Self) -> F) -> Result<T, ImportError>
    where
        F: Future<Output = Result<T, OciDistributionError>>,
    {
        let mut waits = RETRY_AFTER.iter();
        let trying = async {
            loop {
                let error = match what(self).await {
                    Ok(done) => return Ok(done),
                    Err(error) => error,
                };
                match waits.next().filter(|_| may_pass(&error)) {
                    Some(wait) => tokio::time::sleep(*wait).await,
                    None => return Err(archive_error(&self.shown, self.said(&error))),
                }
            }
        };
        let done = without_panic(|| self.runtime.block_on(trying));
        done.unwrap_or_else(|| {
            let registry = self.reference.registry();
            let problem = format!("{registry} answers what makes no sense");
            Err(archive_error(&self.shown, problem))
        })
    }

    /// What a user is told of an error.
    fn said(&self, error: &OciDistributionError) -> String {
        let registry = self.reference.registry();
        match error {
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => format!(
                "{registry} does not let you have it: check the name; `docker login {registry}` \
                 keeps credentials in ~/.docker/config.json, which are used"
            ),
            OciDistributionError::RegistryError { envelope, .. } => {
                let codes = || envelope.errors.iter().map(|one| &one.code);
                if codes()
                    .any(|code| matches!(code, OciErrorCode::Unauthorized | OciErrorCode::Denied))
                {
                    let refused = OciDistributionError::AuthenticationFailure(String::new());
                    return self.said(&refused);
                }
                let missing = |code: &OciErrorCode| {
                    use OciErrorCode::{ManifestUnknown, NameUnknown, NotFound};
                    matches!(code, ManifestUnknown | NameUnknown | NotFound)
                };
                if codes().any(missing) {
                    return format!("{registry} has no such image or tag");
                }
                format!("{registry} says: {envelope}")
            }
            OciDistributionError::ServerError { code: 404, .. }
            | OciDistributionError::ImageManifestNotFoundError(_) => {
                format!("{registry} has no such image or tag")
            }
            other => format!("{registry} cannot be read: {}", chain(other)),
        }
    }

    fn manifest_of(&self, reference: &Reference) -> Result<Vec<u8>, ImportError> {
        let pulled = self.tried(|one| async {
            let pull = tokio::time::timeout(DOCUMENT_LIMIT, one.document(reference));
            let late = |_| Err(std::io::Error::from(ErrorKind::TimedOut).into());
            pull.await.unwrap_or_else(late)
        })?;
        if pulled.len() as u64 > MAX_DOCUMENT_BYTES {
            return Err(archive_error(
                &self.shown,
                "its manifest is too large to be read",
            ));
        }
        Ok(pulled)
    }

    /// A manifest, or what is enough of one that is too large.
    async fn document(&self, reference: &Reference) -> Result<Vec<u8>, OciDistributionError> {
        let url = format!(
            "{}://{}/v2/{}/manifests/{}",
            self.scheme,
            reference.resolve_registry(),
            reference.repository(),
            reference.digest().or(reference.tag()).unwrap_or("latest")
        );
        let pull = RegistryOperation::Pull;
        let token = self.client.auth(&self.reference, &self.auth, pull).await?;
        let asked = self.http.get(&url).header(ACCEPT, ACCEPTED.join(", "));
        let asked = match (token, &self.auth) {
            (Some(token), _) => asked.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => asked.basic_auth(user, Some(password)),
            (None, _) => asked,
        };
        let answer = asked.send().await?;
        let status = answer.status();
        let mut body = Vec::new();
        let mut parts = answer.bytes_stream();
        while body.len() as u64 <= MAX_DOCUMENT_BYTES
            && let Some(part) = parts.next().await
        {
            body.extend_from_slice(&part?);
        }
        if status.is_success() {
            return Ok(body);
        }
        Err(match (status.as_u16(), serde_json::from_slice(&body)) {
            (401, _) => OciDistributionError::UnauthorizedError { url },
            (_, Ok(envelope)) => OciDistributionError::RegistryError { envelope, url },
            (code, Err(_)) => OciDistributionError::ServerError {
                code,
                url,
                message: String::from_utf8_lossy(&body[..body.len().min(SAID_BYTES)]).into_owned(),
            },
        })
    }

    fn expected(&self, blob: &Blob) -> Result<(OciDescriptor, u64), ImportError> {
        let (Some(digest), Some(bytes)) = (blob.digest, blob.bytes) else {
            return Err(archive_error(&self.shown, "a blob without digest"));
        };
        if bytes > DEFAULT_LIMIT_BYTES {
            let problem =
                format!("a blob of {bytes} bytes; at most {DEFAULT_LIMIT_BYTES} are taken");
            return Err(archive_error(&self.shown, problem));
        }
        let descriptor = OciDescriptor {
            digest: digest.to_string(),
            size: i64::try_from(bytes).unwrap_or(i64::MAX),
            ..OciDescriptor::default()
        };
        Ok((descriptor, bytes))
    }

    /// Appends to `file`, which has `have` bytes of a blob, what is missing.
    async fn append(
        &self,
        descriptor: &OciDescriptor,
        file: &File,
        (have, total): (u64, u64),
        report: Reporter<'_>,
    ) -> Result<(), OciDistributionError> {
        let mut file = file;
        if have > 0 && have == total {
            return Ok(());
        }
        let stream = match have {
            0 => {
                self.client
                    .pull_blob_stream(&self.reference, descriptor)
                    .await?
            }
            _ => {
                let pull =
                    self.client
                        .pull_blob_stream_partial(&self.reference, descriptor, have, None);
                match pull.await? {
                    BlobResponse::Partial(stream) => stream,
                    // The registry has no ranges: from the start.
                    BlobResponse::Full(stream) => {
                        file.set_len(0)?;
                        stream
                    }
                }
            }
        };
        let mut stream = stream.stream;
        let mut done_bytes = file.metadata()?.len();
        while let Some(bytes) = stream.next().await {
            let bytes = bytes?;
            done_bytes += bytes.len() as u64;
            if done_bytes > total {
                let problem =
                    format!("a blob is longer than the {total} bytes that it should have");
                return Err(OciDistributionError::SpecViolationError(problem));
            }
            file.write_all(&bytes)?;
            report(Progress::Bytes {
                phase: BuildPhase::Download,
                done_bytes,
                total_bytes: Some(total),
            });
        }
        match done_bytes == total {
            true => Ok(()),
            false => Err(std::io::Error::from(ErrorKind::UnexpectedEof).into()),
        }
    }
}

impl Blobs for Registry {
    fn root(&mut self) -> Result<Root, ImportError> {
        Ok(Root::Document {
            title: ImageTitle::of(&self.reference),
            bytes: self.manifest_of(&self.reference)?,
            name: None,
        })
    }

    fn manifest(&mut self, blob: &Blob) -> Result<Vec<u8>, ImportError> {
        let (descriptor, bytes) = self.expected(blob)?;
        if bytes > MAX_DOCUMENT_BYTES {
            let problem = "its manifest is too large to be read";
            return Err(archive_error(&self.shown, problem));
        }
        self.manifest_of(&self.reference.clone_with_digest(descriptor.digest))
    }

    fn blob(
        &mut self,
        blob: &Blob,
        spool: &mut Spool,
        report: Reporter<'_>,
    ) -> Result<FileData, ImportError> {
        let (descriptor, bytes) = self.expected(blob)?;
        let path = spool.sparse_file(0, &self.shown)?;
        let file = File::options().append(true).open(&path);
        let file = file.map_err(io_error("opening", &path))?;
        self.tried(|one| {
            let have = file.metadata().map_or(0, |metadata| metadata.len());
            one.append(&descriptor, &file, (have, bytes), report)
        })?;
        Ok(FileData::HostFile {
            path,
            offset: 0,
            len: bytes,
        })
    }
}

/// Does `what`; `None` if it panics, of which nothing is printed.
fn without_panic<T>(what: impl FnOnce() -> T) -> Option<T> {
    thread_local! {
        static QUIET: Cell<bool> = const { Cell::new(false) };
    }
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                before(panic);
            }
        }));
    });
    QUIET.set(true);
    let done = std::panic::catch_unwind(AssertUnwindSafe(what));
    QUIET.set(false);
    done.ok()
}

/// True for a registry on this host, which speaks plain HTTP as a rule.
fn is_local(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    let address = host.parse::<Ipv4Addr>();
    host == "localhost" || host == "[::1]" || address.is_ok_and(|address| address.is_loopback())
}

/// True if the same request may work a moment later.
fn may_pass(error: &OciDistributionError) -> bool {
    match error {
        OciDistributionError::RequestError(error) => !error.is_builder(),
        OciDistributionError::IoError(error) => {
            let full = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded];
            !full.contains(&error.kind())
                && error
                    .get_ref()
                    .is_none_or(|cause| !cause.is::<oci_client::errors::DigestError>())
        }
        OciDistributionError::ServerError { code, .. } => *code == 429 || *code >= 500,
        OciDistributionError::RegistryError { envelope, .. } => {
            let busy = |code: &OciErrorCode| matches!(code, OciErrorCode::Toomanyrequests);
            envelope.errors.iter().any(|one| busy(&one.code))
        }
        _ => false,
    }
}

/// Docker's file, which need not be there.
fn docker_config() -> Option<PathBuf> {
    let own = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker"));
    own.or_else(home).map(|dir| dir.join("config.json"))
}

/// What Docker's file has for a registry; nothing counts as nobody.
fn credentials(file: Option<&Path>, registry: &str) -> Result<RegistryAuth, String> {
    let server = match registry {
        "docker.io" => DOCKER_HUB,
        other => other,
    };
    let Some(path) = file else {
        return Ok(RegistryAuth::Anonymous);
    };
    let unusable = |error: &dyn std::error::Error| format!("{}: {error}", path.display());
    let file = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(RegistryAuth::Anonymous),
        Err(error) => return Err(unusable(&error)),
    };
    match docker_credential::get_credential_from_reader(file, server) {
        Ok(DockerCredential::UsernamePassword(user, password)) => {
            Ok(RegistryAuth::Basic(user, password))
        }
        Ok(DockerCredential::IdentityToken(_)) => Err(format!(
            "the credentials for {registry} are an identity token, which is not supported: log \
             in with a password or an access token"
        )),
        Err(CredentialRetrievalError::HelperFailure {
            helper,
            stdout,
            stderr,
        }) => {
            // A helper that knows nothing fails, too, and says so in either place.
            let said = format!("{} {}", stdout.trim(), stderr.trim());
            match said.contains("not found") {
                true => Ok(RegistryAuth::Anonymous),
                false => Err(format!("{helper} failed: {}", said.trim())),
            }
        }
        Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(RegistryAuth::Anonymous),
        Err(error) => Err(unusable(&error)),
    }
}

/// An error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_no_end() {
        assert_eq!(without_panic(|| 7), Some(7));
        assert_eq!(without_panic(|| panic!("nobody sees this")), None::<u8>);
    }

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

    #[test]
    fn credentials_are_what_dockers_file_has_and_nobodys_without_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let of = |registry| credentials(Some(&path), registry);
        assert_eq!(credentials(None, "a.io"), Ok(RegistryAuth::Anonymous));
        assert_eq!(of("a.io"), Ok(RegistryAuth::Anonymous));
        // `me:secret`
        let text = r#"{"auths": {"a.io": {"auth": "bWU6c2VjcmV0"},
            "https://index.docker.io/v1/": {"auth": "bWU6c2VjcmV0"},
            "token.io": {"auth": "bWU6", "identitytoken": "x"}},
            "credHelpers": {"helped.io": "forelay-has-no-such"}}"#;
        std::fs::write(&path, text).unwrap();
        let mine = RegistryAuth::Basic("me".to_owned(), "secret".to_owned());
        assert_eq!(of("a.io"), Ok(mine.clone()));
        assert_eq!(of("docker.io"), Ok(mine));
        assert_eq!(of("b.io"), Ok(RegistryAuth::Anonymous));
        assert!(of("token.io").unwrap_err().contains("identity token"));
        assert!(of("helped.io").unwrap_err().contains("config.json"));
        std::fs::write(&path, "{").unwrap();
        assert!(of("a.io").unwrap_err().contains("config.json"));
    }
}
