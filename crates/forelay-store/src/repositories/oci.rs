//! A repository in a container registry: one artifact per object.
//!
//! ```text
//! tag      the key, with `_.` for `/` and `__` for `_`
//! manifest artifactType application/vnd.forelay.<kind>.v1, one layer: the object
//!          annotations: when it was put, and its key, so that no two keys share a manifest
//! ```
//! A small object stands in its layer's `data` as well, so that reading it is one request;
//! of a large one the manifest is remembered and its blob read in parts. The catalogue is the
//! list of tags: nothing here needs the registry's catalog or referrers API.
//!
//! Refuses to know what the objects contain. Invariant: the tag is put last, after the blob.
//! Registries have no "if absent", so of two writers that race one is `Created` too many, which
//! the trait permits.

use std::collections::HashMap;
use std::io::Read as _;
use std::time::SystemTime;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use forelay_image::digest::Hasher;
use forelay_image::{Digest, Extent};
use forelay_remote::RemoteError;
use forelay_remote::registry::{BlobBody, Registry};
use forelay_remote::wire::WireOptions;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::remote::failed;
use crate::repository::{Body, Description, Object, Put, Repository, RepositoryError, check_key};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const EMPTY_BLOB: &[u8] = b"{}";
const CREATED: &str = "org.opencontainers.image.created";
const KEY: &str = "dev.forelay.key";
/// Objects up to this size stand in their manifests.
const INLINE_BYTES: u64 = 64 << 10;
const MAX_MANIFEST_BYTES: u64 = 256 << 10;
/// Longest tag that the specification permits.
const MAX_TAG_CHARS: usize = 128;
/// So many manifests are remembered.
const MAX_REMEMBERED: usize = 4096;

/// A repository in a container registry.
pub struct OciRepository {
    registry: Registry,
    location: String,
    /// What the blobs of objects are that were read in parts.
    remembered: Mutex<HashMap<String, Stored>>,
}

/// An object as its manifest has it.
#[derive(Clone)]
struct Stored {
    blob: Digest,
    bytes: u64,
    modified: SystemTime,
    data: Option<Bytes>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u32,
    media_type: String,
    artifact_type: Option<String>,
    config: BlobDescriptor,
    layers: Vec<BlobDescriptor>,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BlobDescriptor {
    media_type: String,
    digest: Digest,
    size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    data: Option<String>,
}

impl OciRepository {
    /// The repository `name` of the registry `host`. Nothing is asked yet.
    pub fn open(host: &str, name: &str, options: &WireOptions) -> Result<Self, RepositoryError> {
        let location = format!("oci://{host}/{name}");
        let registry = Registry::new(host, name, options);
        Ok(Self {
            registry: registry.map_err(|error| failed("opening", &location, error))?,
            location,
            remembered: Mutex::default(),
        })
    }

    async fn stored(&self, key: &str) -> Result<Stored, RepositoryError> {
        let tag = tag(key)?;
        let ask = || self.registry.manifest(&tag, MANIFEST, MAX_MANIFEST_BYTES);
        let manifest = match ask().await {
            // Registries that keep files write a tag again in place: for a moment it is none.
            Err(error) if error.is_missing() => ask().await,
            other => other,
        };
        let manifest = manifest.map_err(|error| told("reading", key, error))?;
        let stored = understood(&manifest);
        stored.ok_or_else(|| RepositoryError::Permanent {
            operation: "reading",
            key: key.to_owned(),
            source: "the registry has something under its name that is none of ours".into(),
        })
    }

    async fn put_blob(
        &self,
        key: &str,
        digest: Digest,
        body: &BlobBody,
    ) -> Result<(), RepositoryError> {
        let put = self.registry.put_blob(digest, body).await;
        put.map_err(|error| told("writing", key, error))
    }
}

/// The failure of an operation as the trait tells it. A registry that is given a blob by
/// several at once may for a moment not know it.
fn told(operation: &'static str, key: &str, error: RemoteError) -> RepositoryError {
    match &error {
        RemoteError::Answer {
            status: 400, said, ..
        } if said.contains("BLOB_UNKNOWN") || said.contains("DIGEST_INVALID") => {
            RepositoryError::Transient {
                operation,
                key: key.to_owned(),
                source: error.into(),
            }
        }
        _ => failed(operation, key, error),
    }
}

/// The tag of a key.
fn tag(key: &str) -> Result<String, RepositoryError> {
    check_key(key)?;
    let tag = key.replace('_', "__").replace('/', "_.");
    match tag.len() <= MAX_TAG_CHARS && !tag.starts_with('-') {
        true => Ok(tag),
        false => Err(RepositoryError::Key(key.to_owned())),
    }
}

/// The key of a tag, if it is one of ours.
fn key_of(tag: &str) -> Option<String> {
    let mut key = String::with_capacity(tag.len());
    let mut chars = tag.chars();
    while let Some(one) = chars.next() {
        key.push(match one {
            '_' => match chars.next()? {
                '_' => '_',
                '.' => '/',
                _ => return None,
            },
            other => other,
        });
    }
    check_key(&key).is_ok().then_some(key)
}

/// The kind of thing that a key's folder holds, as a media type.
fn media_type(key: &str) -> String {
    let kind = match key.split_once('/') {
        Some((folder, _)) => folder.trim_end_matches('s').to_ascii_lowercase(),
        None => "repository".to_owned(),
    };
    let kind: String = kind.chars().filter(char::is_ascii_alphanumeric).collect();
    format!("application/vnd.forelay.{kind}.v1")
}

fn understood(manifest: &[u8]) -> Option<Stored> {
    let manifest: Manifest = serde_json::from_slice(manifest).ok()?;
    let [layer] = &manifest.layers[..] else {
        return None;
    };
    let created = manifest.annotations.get(CREATED)?;
    let data = layer
        .data
        .as_ref()
        .and_then(|text| BASE64.decode(text).ok());
    Some(Stored {
        blob: layer.digest,
        bytes: layer.size,
        modified: humantime::parse_rfc3339(created).ok()?,
        data: data
            .filter(|data| Digest::of(data) == layer.digest && data.len() as u64 == layer.size)
            .map(Bytes::from),
    })
}

fn manifest(key: &str, blob: Digest, bytes: u64, data: Option<&[u8]>) -> Manifest {
    let now = humantime::format_rfc3339_nanos(SystemTime::now());
    Manifest {
        schema_version: 2,
        media_type: MANIFEST.to_owned(),
        artifact_type: Some(media_type(key)),
        config: BlobDescriptor {
            media_type: EMPTY.to_owned(),
            digest: Digest::of(EMPTY_BLOB),
            size: EMPTY_BLOB.len() as u64,
            data: Some(BASE64.encode(EMPTY_BLOB)),
        },
        layers: vec![BlobDescriptor {
            media_type: media_type(key),
            digest: blob,
            size: bytes,
            data: data.map(|data| BASE64.encode(data)),
        }],
        annotations: HashMap::from([
            (CREATED.to_owned(), now.to_string()),
            (KEY.to_owned(), key.to_owned()),
        ]),
    }
}

/// Digest and size of a body; the bytes of a small one.
fn looked_at(body: &Body) -> std::io::Result<(Digest, u64, Option<Bytes>)> {
    let path = match body {
        Body::Bytes(bytes) => {
            let small = bytes.len() as u64 <= INLINE_BYTES;
            let data = small.then(|| bytes.clone());
            return Ok((Digest::of(bytes), bytes.len() as u64, data));
        }
        Body::File(path) => path,
    };
    let mut file = std::fs::File::open(path)?;
    let mut hasher = Hasher::new();
    let mut bytes = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((hasher.finish(), bytes, None)),
            read => {
                hasher.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
}

#[async_trait]
impl Repository for OciRepository {
    fn describe(&self) -> Description {
        Description {
            kind: "oci",
            location: self.location.clone(),
        }
    }

    async fn get(&self, key: &str, most_bytes: u64) -> Result<Bytes, RepositoryError> {
        let stored = self.stored(key).await?;
        if stored.bytes > most_bytes {
            let key = key.to_owned();
            return Err(RepositoryError::TooLarge { key, most_bytes });
        }
        if let Some(data) = stored.data {
            return Ok(data);
        }
        let blob = self.registry.blob(stored.blob, stored.bytes).await;
        let blob = blob.map_err(|error| told("reading", key, error))?;
        let (blob, found) = tokio::task::spawn_blocking(move || {
            let found = Digest::of(&blob);
            (blob, found)
        })
        .await
        .map_err(|error| failed("reading", key, error.to_string()))?;
        match found == stored.blob {
            true => Ok(blob),
            // On the way, or in the registry: the next attempt tells.
            false => Err(RepositoryError::Transient {
                operation: "reading",
                key: key.to_owned(),
                source: "the bytes that came do not have the digest of the blob".into(),
            }),
        }
    }

    async fn get_range(&self, key: &str, extent: Extent) -> Result<Bytes, RepositoryError> {
        check_key(key)?;
        let known = self.remembered.lock().get(key).cloned();
        let stored = match known {
            Some(stored) => stored,
            None => {
                let stored = self.stored(key).await?;
                let mut remembered = self.remembered.lock();
                if remembered.len() >= MAX_REMEMBERED {
                    remembered.clear();
                }
                remembered.insert(key.to_owned(), stored.clone());
                stored
            }
        };
        if extent.end() > stored.bytes {
            return Err(RepositoryError::Truncated {
                key: key.to_owned(),
                bytes: stored.bytes,
                extent,
            });
        }
        if let Some(data) = stored.data {
            return Ok(data.slice(extent.offset as usize..extent.end() as usize));
        }
        let part = self.registry.blob_range(stored.blob, extent).await;
        if part.as_ref().is_err_and(RemoteError::is_missing) {
            self.remembered.lock().remove(key);
        }
        part.map_err(|error| told("reading", key, error))
    }

    async fn put_if_absent(&self, key: &str, body: Body) -> Result<Put, RepositoryError> {
        let tag = tag(key)?;
        let present = self.registry.manifest_digest(&tag, MANIFEST).await;
        if present
            .map_err(|error| told("writing", key, error))?
            .is_some()
        {
            return Ok(Put::Present);
        }
        let looking = {
            let body = body.clone();
            tokio::task::spawn_blocking(move || looked_at(&body)).await
        };
        let looked = looking.map_err(|error| failed("writing", key, error.to_string()))?;
        let (digest, bytes, data) =
            looked.map_err(|error| failed("writing", key, error.to_string()))?;
        let body = match body {
            Body::Bytes(bytes) => BlobBody::Bytes(bytes),
            Body::File(path) => BlobBody::File(path),
        };
        let empty = BlobBody::Bytes(Bytes::from_static(EMPTY_BLOB));
        self.put_blob(key, Digest::of(EMPTY_BLOB), &empty).await?;
        self.put_blob(key, digest, &body).await?;
        let manifest = manifest(key, digest, bytes, data.as_deref());
        let manifest = serde_json::to_vec(&manifest)
            .map_err(|error| failed("writing", key, error.to_string()))?;
        let put = self.registry.put_manifest(&tag, MANIFEST, manifest.into());
        put.await.map_err(|error| told("writing", key, error))?;
        Ok(Put::Created)
    }

    async fn list(&self, prefix: &str) -> Result<Vec<String>, RepositoryError> {
        let folder = format!("{}/", prefix.trim_end_matches('/'));
        let tags = self.registry.tags().await;
        let tags = tags.map_err(|error| told("listing", prefix, error))?;
        let keys = tags.iter().filter_map(|tag| key_of(tag));
        let mut keys: Vec<String> = keys
            .filter(|key| {
                key.strip_prefix(&folder)
                    .is_some_and(|name| !name.contains('/'))
            })
            .collect();
        keys.sort();
        keys.dedup();
        Ok(keys)
    }

    async fn inspect(&self, key: &str) -> Result<Object, RepositoryError> {
        let stored = self.stored(key).await?;
        Ok(Object {
            bytes: stored.bytes,
            modified: stored.modified,
        })
    }

    async fn delete(&self, key: &str) -> Result<(), RepositoryError> {
        let tag = tag(key)?;
        self.remembered.lock().remove(key);
        let digest = self.registry.manifest_digest(&tag, MANIFEST).await;
        let digest = digest.map_err(|error| told("deletion", key, error))?;
        let Some(digest) = digest else {
            return Ok(());
        };
        let deleted = self.registry.delete_manifest(digest).await;
        deleted.map_err(|error| told("deletion", key, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_keys_and_back() {
        for key in ["a/b", "a_b", "a__/b_.c", "packs/0f.pack", "top.json"] {
            let tag = tag(key).unwrap();
            assert!(!tag.contains('/'));
            assert_eq!(key_of(&tag).unwrap(), key);
        }
        assert_ne!(tag("a/b").unwrap(), tag("a_.b").unwrap());
        for foreign in ["latest_", "a_b", "_", "v1_-x", ".hidden"] {
            assert_eq!(key_of(foreign), None, "{foreign}");
        }
        assert!(tag(&"x".repeat(129)).is_err());
        assert!(tag("-x").is_err());
        assert!(tag("a//b").is_err());
    }

    #[test]
    fn manifests_that_lie_are_not_understood() {
        let good = manifest("a/b", Digest::of(b"abc"), 3, Some(b"abc"));
        let good = serde_json::to_string(&good).unwrap();
        let stored = understood(good.as_bytes()).unwrap();
        assert_eq!(stored.data.unwrap()[..], *b"abc");
        // Other bytes than the layer's are not taken from the manifest.
        let other = good.replace(&BASE64.encode(b"abc"), &BASE64.encode(b"abd"));
        assert!(understood(other.as_bytes()).unwrap().data.is_none());
        for bad in ["", "{}", "[]", &good.replace("created", "destroyed")] {
            assert!(understood(bad.as_bytes()).is_none(), "{bad}");
        }
    }
}
