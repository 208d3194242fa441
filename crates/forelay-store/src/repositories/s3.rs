//! A repository in a bucket of S3, or of a server that speaks its protocol.
//!
//! The protocol is `object_store`'s, over a client of our own (`Careful`) that bounds what a
//! server may send and keeps to the pauses that it asks for. Credentials come from the
//! environment (`AWS_*`), a profile of `~/.aws/credentials`, or the machine's role.
//!
//! Refuses to know what the objects contain. Objects are put with `If-None-Match`; where a
//! server ignores that or does not know it, the last of two writers that race wins, which the
//! trait permits: nothing rests on it.

use std::error::Error as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use forelay_image::Extent;
use forelay_remote::RemoteError;
use forelay_remote::wire::{Wire, WireOptions};
use futures_util::StreamExt as _;
use http_body_util::{BodyExt as _, Limited as Bounded};
use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, AwsCredential};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::path::Path as ObjectPath;
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, PutMode, PutOptions,
    PutPayload, RetryConfig, StaticCredentialProvider,
};

use super::remote::{MAX_OBJECT_BYTES, failed};
use crate::repository::{Body, Description, Object, Put, Repository, RepositoryError, check_key};

/// One page of a listing, which has up to 1,000 keys.
const MAX_PAGE_BYTES: usize = 4 << 20;
/// Of what a server says of a failure so much is read.
const MAX_SAID_BYTES: usize = 16 << 10;
/// Keys that a listing may have.
const MAX_KEYS: usize = 4_000_000;

/// Where a bucket is, and how it is asked.
#[derive(Clone, Debug)]
pub struct S3Place {
    /// The bucket.
    pub bucket: String,
    /// What all keys begin with, without `/` at its end; may be empty.
    pub prefix: String,
    /// The server, as `http://...` or `https://...`; Amazon's, or the environment's, if absent.
    pub endpoint: Option<String>,
    /// The region; the environment's if absent.
    pub region: Option<String>,
    /// Without credentials.
    pub anonymous: bool,
    /// A file with profiles; the environment's credentials if absent.
    pub credentials: Option<PathBuf>,
    /// Which profile of it.
    pub profile: Option<String>,
}

impl S3Place {
    /// The bucket and the prefix, for messages.
    pub fn location(&self) -> String {
        let location = format!("s3://{}/{}", self.bucket, self.prefix);
        location.trim_end_matches('/').to_owned()
    }
}

/// A repository in a bucket.
pub struct S3Repository {
    store: AmazonS3,
    prefix: String,
    location: String,
    /// The server does not know `If-None-Match`.
    is_plain: AtomicBool,
}

impl S3Repository {
    /// The repository at `place`. Nothing is asked yet.
    pub fn open(place: &S3Place, options: &WireOptions) -> Result<Self, RepositoryError> {
        let location = place.location();
        let local = |problem: String| failed("opening", &location, problem);
        let mut builder = AmazonS3Builder::from_env().with_bucket_name(&place.bucket);
        if let Some(endpoint) = &place.endpoint {
            // By the name that goes before what the environment says.
            builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
        }
        if let Some(region) = &place.region {
            builder = builder.with_region(region);
        }
        let key = AmazonS3ConfigKey::AccessKeyId;
        let mut has_keys = place.anonymous || builder.get_config_value(&key).is_some();
        if place.anonymous {
            builder = builder.with_skip_signature(true);
        } else if let Some(profile) = profile(place, has_keys).map_err(local)? {
            has_keys = true;
            let credential = AwsCredential {
                key_id: profile.id,
                secret_key: profile.secret,
                token: profile.token,
            };
            let provider = StaticCredentialProvider::new(credential);
            builder = builder.with_credentials(Arc::new(provider));
        }
        let endpoint = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint];
        let endpoint = endpoint
            .iter()
            .find_map(|key| builder.get_config_value(key));
        let host = endpoint.as_deref().and_then(|text| text.split_once("://"));
        let host = host.map_or("Amazon S3", |(_, rest)| rest.trim_end_matches('/'));
        // The role of a machine is asked for over HTTP, on the machine itself.
        let is_http = endpoint
            .as_deref()
            .is_some_and(|text| text.starts_with("http://"));
        let options = WireOptions {
            plain_http: is_http || !has_keys,
            ..options.clone()
        };
        let wire =
            Wire::new(host, &options).map_err(|error| failed("opening", &location, error))?;
        let connector = Careful {
            wire: Arc::new(wire),
            server: endpoint.as_deref().and_then(authority),
        };
        let store = builder
            .with_http_connector(connector)
            .with_allow_http(is_http)
            .with_retry(RetryConfig {
                max_retries: 0,
                ..RetryConfig::default()
            })
            .build()
            .map_err(|error| local(error.to_string()))?;
        Ok(Self {
            store,
            prefix: place.prefix.clone(),
            location,
            is_plain: AtomicBool::new(false),
        })
    }

    fn path(&self, key: &str) -> Result<ObjectPath, RepositoryError> {
        check_key(key)?;
        let path = match self.prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}/{key}"),
        };
        ObjectPath::parse(path).map_err(|_| RepositoryError::Key(key.to_owned()))
    }

    async fn size(&self, key: &str) -> Result<u64, RepositoryError> {
        Ok(self.inspect(key).await?.bytes)
    }
}

/// The failure of an operation as the trait tells it.
fn told(operation: &'static str, key: &str, error: object_store::Error) -> RepositoryError {
    if matches!(error, object_store::Error::NotFound { .. }) {
        return RepositoryError::NotFound {
            key: key.to_owned(),
        };
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(error) = cause {
        if let Some(remote) = error.downcast_ref::<RemoteError>() {
            return failed(operation, key, remote.clone());
        }
        cause = error.source();
    }
    failed(operation, key, forelay_host::error_chain(&error))
}

#[async_trait]
impl Repository for S3Repository {
    fn describe(&self) -> Description {
        Description {
            kind: "s3",
            location: self.location.clone(),
        }
    }

    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        let path = self.path(key)?;
        let failure = |error| told("reading", key, error);
        let answer = self.store.get_opts(&path, GetOptions::default()).await;
        let answer = answer.map_err(failure)?;
        let bytes = answer.meta.size;
        if bytes > most_bytes {
            let key = key.to_owned();
            return Err(RepositoryError::TooLarge { key, most_bytes });
        }
        let body = answer.bytes().await.map_err(failure)?;
        match body.len() as u64 == bytes {
            true => Ok(body),
            false => Err(RepositoryError::Transient {
                operation: "reading",
                key: key.to_owned(),
                source: format!("{} of {bytes} bytes came", body.len()).into(),
            }),
        }
    }

    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        let path = self.path(key)?;
        if extent.len == 0 {
            return Ok(Bytes::new());
        }
        let truncated = |bytes| RepositoryError::Truncated {
            key: key.to_owned(),
            bytes,
            extent,
        };
        let options = GetOptions {
            range: Some(GetRange::Bounded(extent.offset..extent.end())),
            ..GetOptions::default()
        };
        let answer = match self.store.get_opts(&path, options).await {
            Ok(answer) => answer,
            Err(error) => {
                let error = told("reading", key, error);
                if matches!(error, RepositoryError::Permanent { .. })
                    && let Ok(bytes) = self.size(key).await
                    && extent.end() > bytes
                {
                    return Err(truncated(bytes));
                }
                return Err(error);
            }
        };
        if answer.range != (extent.offset..extent.end()) {
            return Err(truncated(answer.meta.size));
        }
        let part = answer
            .bytes()
            .await
            .map_err(|error| told("reading", key, error))?;
        match part.len() as u64 == extent.len {
            true => Ok(part),
            false => Err(RepositoryError::Transient {
                operation: "reading",
                key: key.to_owned(),
                source: format!("{} of {} bytes came", part.len(), extent.len).into(),
            }),
        }
    }

    async fn put_if_absent(&self, key: &str, body: Body) -> Result<Put, RepositoryError> {
        let path = self.path(key)?;
        match self.inspect(key).await {
            Ok(_) => return Ok(Put::Present),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let bytes = match body {
            Body::Bytes(bytes) => bytes,
            Body::File(path) => {
                let read = tokio::fs::read(&path).await;
                let failure =
                    |error| failed("writing", key, format!("{}: {error}", path.display()));
                read.map_err(failure)?.into()
            }
        };
        let payload = PutPayload::from_bytes(bytes);
        let is_plain = self.is_plain.load(Ordering::Relaxed);
        let mode = if is_plain {
            PutMode::Overwrite
        } else {
            PutMode::Create
        };
        let put = self
            .store
            .put_opts(&path, payload.clone(), mode.into())
            .await;
        let error = match put {
            Ok(_) => return Ok(Put::Created),
            Err(object_store::Error::AlreadyExists { .. }) => {
                // Or another writer is at work, who may fail yet.
                return match self.inspect(key).await {
                    Ok(_) => Ok(Put::Present),
                    Err(error) => Err(RepositoryError::Transient {
                        operation: "writing",
                        key: key.to_owned(),
                        source: error.into(),
                    }),
                };
            }
            Err(error) => told("writing", key, error),
        };
        if is_plain || !answers_not_implemented(&error) {
            return Err(error);
        }
        self.is_plain.store(true, Ordering::Relaxed);
        let put = self
            .store
            .put_opts(&path, payload, PutOptions::default())
            .await;
        put.map_err(|error| told("writing", key, error))?;
        Ok(Put::Created)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        let folder = self.path(prefix.trim_end_matches('/'))?;
        let skipped = folder.as_ref().len() + 1;
        let mut keys = Vec::new();
        let mut listing = self.store.list(Some(&folder));
        while let Some(object) = listing.next().await {
            let object = object.map_err(|error| told("listing", prefix, error))?;
            let name = object.location.as_ref().get(skipped..).unwrap_or_default();
            let key = format!("{}/{name}", prefix.trim_end_matches('/'));
            if !name.contains('/') && check_key(&key).is_ok() {
                keys.push(key);
            }
            if keys.len() > MAX_KEYS {
                return Err(failed(
                    "listing",
                    prefix,
                    "the list does not end".to_owned(),
                ));
            }
        }
        keys.sort();
        Ok(keys)
    }

    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError> {
        let found = self.store.head(&self.path(key)?).await;
        let found = found.map_err(|error| told("reading", key, error))?;
        Ok(Object {
            bytes: found.size,
            modified: found.last_modified.into(),
        })
    }

    async fn delete(&self, key: &str) -> Result<(), RepositoryError> {
        match self.store.delete(&self.path(key)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(told("deletion", key, error)),
        }
    }
}

fn answers_not_implemented(error: &RepositoryError) -> bool {
    let remote = error.source().and_then(|cause| cause.downcast_ref());
    matches!(remote, Some(RemoteError::Answer { status: 501, .. }))
}

/// The client below `object_store`: bounded, and with failures that say what they are.
#[derive(Clone, Debug)]
struct Careful {
    wire: Arc<Wire>,
    /// Host and port of the server, if it is not Amazon's.
    server: Option<String>,
}

fn authority(endpoint: &str) -> Option<String> {
    let uri: hyper::Uri = endpoint.parse().ok()?;
    Some(uri.authority()?.to_string())
}

impl Careful {
    fn error(error: RemoteError) -> HttpError {
        // Trying again is not for `object_store` to decide.
        HttpError::new(HttpErrorKind::Unknown, error)
    }

    fn broken(wire: &Wire, error: &HttpError) -> HttpError {
        let cause = error.source().and_then(|cause| cause.downcast_ref());
        Self::error(match cause {
            Some(cause) => wire.broken(cause),
            None => RemoteError::Connection {
                host: wire.host().to_owned(),
                problem: error.to_string(),
            },
        })
    }

    /// The body, of which no more than `limit` bytes come.
    fn bounded(&self, body: HttpResponseBody, limit: usize) -> HttpResponseBody {
        let wire = Arc::clone(&self.wire);
        let body = body.map_err(move |error| Self::broken(&wire, &error));
        let wire = Arc::clone(&self.wire);
        let bounded = Bounded::new(body, limit).map_err(move |error| {
            let too_long = || {
                Self::error(RemoteError::TooLong {
                    host: wire.host().to_owned(),
                    limit: limit as u64,
                })
            };
            error
                .downcast::<HttpError>()
                .map_or_else(|_| too_long(), |error| *error)
        });
        HttpResponseBody::new(bounded)
    }
}

impl HttpConnector for Careful {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[async_trait]
impl HttpService for Careful {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let asked = request.uri().authority().map(ToString::to_string);
        let is_elsewhere = self.server.is_some() && asked != self.server;
        let is_listing = request
            .uri()
            .query()
            .is_some_and(|query| query.contains("list-type="));
        let limit = if is_listing {
            MAX_PAGE_BYTES
        } else {
            MAX_OBJECT_BYTES as usize
        };
        self.wire.keep_pause().await;
        let answer = HttpService::call(self.wire.client(), request).await;
        if is_elsewhere && !answer.as_ref().is_ok_and(|one| one.status().is_success()) {
            return Err(Self::error(RemoteError::Local(
                "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, keep a profile \
                 in ~/.aws/credentials, or write anonymous=1 into the address (this machine has \
                 no role)"
                    .to_owned(),
            )));
        }
        let answer = answer.map_err(|error| Self::broken(&self.wire, &error))?;
        let (parts, body) = answer.into_parts();
        self.wire.note_pause(parts.status, &parts.headers);
        // What `object_store` tells apart by itself.
        let is_known = matches!(parts.status.as_u16(), 200..=299 | 304 | 404 | 409 | 412);
        if is_known {
            let limit = if parts.status.is_success() {
                limit
            } else {
                MAX_SAID_BYTES
            };
            return Ok(HttpResponse::from_parts(parts, self.bounded(body, limit)));
        }
        let said = self
            .bounded(body, MAX_SAID_BYTES)
            .bytes()
            .await
            .unwrap_or_default();
        Err(Self::error(self.wire.refusal(
            parts.status,
            "bucket",
            &said,
        )))
    }
}

/// A user of Amazon's, or of a server that speaks the same.
#[derive(Debug, PartialEq, Eq)]
struct AwsProfile {
    id: String,
    secret: String,
    token: Option<String>,
}

/// The profile that is named, of the file that is named or that the AWS tools keep. Not asked
/// for by name, it may be absent, and the environment goes before it.
fn profile(place: &S3Place, has_keys: bool) -> Result<Option<AwsProfile>, String> {
    let is_named = place.credentials.is_some() || place.profile.is_some();
    if has_keys && !is_named {
        return Ok(None);
    }
    let own = || std::env::var_os("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".aws/credentials"));
    let Some(path) = place.credentials.clone().or_else(own).or_else(home) else {
        return Ok(None);
    };
    let unusable = |problem: String| format!("{}: {problem}", path.display());
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !is_named => {
            return Ok(None);
        }
        Err(error) => return Err(unusable(error.to_string())),
    };
    let of_environment = || {
        std::env::var("AWS_PROFILE")
            .ok()
            .filter(|name| !name.is_empty())
    };
    let name = place.profile.clone().or_else(of_environment);
    let name = name.as_deref().unwrap_or("default");
    match profile_in(&text, name) {
        None if is_named => Err(unusable(format!("it has no keys in a profile {name}"))),
        found => Ok(found),
    }
}

fn profile_in(text: &str, name: &str) -> Option<AwsProfile> {
    let mut is_in = false;
    let (mut id, mut secret, mut token) = (None, None, None);
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[') {
            is_in = section.strip_suffix(']').map(str::trim) == Some(name);
        } else if is_in && let Some((key, value)) = line.split_once('=') {
            let value = Some(value.trim().to_owned());
            match key.trim() {
                "aws_access_key_id" => id = value,
                "aws_secret_access_key" => secret = value,
                "aws_session_token" => token = value,
                _ => {}
            }
        }
    }
    Some(AwsProfile {
        id: id?,
        secret: secret?,
        token,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_found_by_its_name() {
        let text = "# mine\n[default]\naws_access_key_id = A\naws_secret_access_key=B\n\n\
                    [ other ]\naws_access_key_id=C\naws_secret_access_key = D=\n\
                    aws_session_token = E\n[half]\naws_access_key_id=F\n";
        let of = |name| profile_in(text, name);
        let profile = |id: &str, secret: &str, token: Option<&str>| AwsProfile {
            id: id.to_owned(),
            secret: secret.to_owned(),
            token: token.map(str::to_owned),
        };
        assert_eq!(of("default"), Some(profile("A", "B", None)));
        assert_eq!(of("other"), Some(profile("C", "D=", Some("E"))));
        assert_eq!(of("half"), None);
        assert_eq!(of("absent"), None);
    }
}
