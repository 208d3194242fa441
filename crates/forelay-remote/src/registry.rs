//! A repository of a container registry: manifests, tags and blobs by the distribution
//! protocol.
//!
//! Owns the protocol and the credentials it is spoken with; refuses to know what the blobs
//! are. Every document has a bound that the caller gives, blobs have the size that their
//! descriptor says, and what is fetched by digest is checked by who asked for it.

use std::path::{Path, PathBuf};
use std::pin::Pin;

use bytes::{Buf as _, Bytes, BytesMut};
use forelay_image::{Digest, Extent};
use futures_util::{Stream, StreamExt as _};
use parking_lot::Mutex;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue,
};
use reqwest::header::{LINK, LOCATION, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use url::Url;

use crate::RemoteError;
use crate::credentials::{Login, docker_login};
use crate::wire::{Wire, WireOptions};

/// A token and what comes with it.
const MAX_TOKEN_BYTES: u64 = 64 << 10;
/// One page of tags; so many pages are asked for at the most.
const MAX_TAGS_BYTES: u64 = 16 << 20;
const MAX_PAGES: usize = 1000;
/// Tags of all pages: more than any repository has components, and what a host has room for.
const MAX_TAGS: usize = 500_000;
const TAGS_A_PAGE: usize = 1000;
const DIGEST_HEADER: &str = "docker-content-digest";

/// What is pushed as a blob.
#[derive(Clone, Debug)]
pub enum BlobBody {
    /// Bytes in memory.
    Bytes(Bytes),
    /// The contents of a host file.
    File(PathBuf),
}

/// One repository of a registry.
pub struct Registry {
    wire: Wire,
    /// `https://host/v2/name/`.
    base: Url,
    name: String,
    login: Option<Login>,
    /// What requests are authorised with since the registry last asked.
    authorisation: Mutex<Option<HeaderValue>>,
}

impl Registry {
    /// Connects to nobody yet. `host` may have a port; `name` is the repository's.
    pub fn new(host: &str, name: &str, options: &WireOptions) -> Result<Self, RemoteError> {
        let scheme = if options.plain_http { "http" } else { "https" };
        let bad = || RemoteError::Local(format!("{host}/{name} is no repository of a registry"));
        if !is_repository(host, name) {
            return Err(bad());
        }
        let base = Url::parse(&format!("{scheme}://{host}/v2/{name}/")).map_err(|_| bad())?;
        Ok(Self {
            wire: Wire::new(host, options)?,
            login: docker_login(host)?,
            base,
            name: name.to_owned(),
            authorisation: Mutex::default(),
        })
    }

    fn url(&self, path: &str) -> Result<Url, RemoteError> {
        let joined = self.base.join(path);
        joined.map_err(|error| self.nonsense(format!("{path}: {error}")))
    }

    fn nonsense(&self, problem: impl Into<String>) -> RemoteError {
        RemoteError::Protocol {
            host: self.wire.host().to_owned(),
            problem: problem.into(),
        }
    }

    /// Sends what `build` makes; once more after logging in, if the registry asks for that.
    async fn call(
        &self,
        what: &str,
        build: impl Fn(&Client) -> Result<RequestBuilder, RemoteError>,
    ) -> Result<Response, RemoteError> {
        let answer = self.attempt(&build).await?;
        let answer = match answer.status() {
            StatusCode::UNAUTHORIZED => {
                let authorisation = self.log_in(answer.headers()).await?;
                *self.authorisation.lock() = Some(authorisation);
                self.attempt(&build).await?
            }
            _ => answer,
        };
        self.wire.succeeded(answer, what).await
    }

    async fn attempt(
        &self,
        build: &impl Fn(&Client) -> Result<RequestBuilder, RemoteError>,
    ) -> Result<Response, RemoteError> {
        let request = build(self.wire.client())?.build();
        let mut request = request.map_err(|error| self.wire.broken(&error))?;
        // An upload may go elsewhere; credentials do not.
        let authorisation = self.authorisation.lock().clone();
        if let Some(authorisation) = authorisation
            && request.url().origin() == self.base.origin()
        {
            request.headers_mut().insert(AUTHORIZATION, authorisation);
        }
        self.wire.send(request).await
    }

    /// What the registry wants to see, by its own challenge.
    async fn log_in(&self, headers: &HeaderMap) -> Result<HeaderValue, RemoteError> {
        let challenges = headers.get_all(WWW_AUTHENTICATE).iter();
        let mut challenges = challenges.filter_map(|one| one.to_str().ok());
        let refused = || self.wire.refusal(StatusCode::UNAUTHORIZED, "", b"");
        let challenge = challenges.next().ok_or_else(refused)?;
        let (scheme, rest) = challenge.split_once(' ').unwrap_or((challenge, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            let login = self.login.as_ref().ok_or_else(refused)?;
            let probe = self.wire.client().get(self.base.clone());
            let probe = probe.basic_auth(&login.user, Some(&login.password)).build();
            let probe = probe.map_err(|error| self.wire.broken(&error))?;
            return probe
                .headers()
                .get(AUTHORIZATION)
                .cloned()
                .ok_or_else(refused);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(self.nonsense("it wants to be logged in to in a way that is not known"));
        }
        let realm =
            parameter(rest, "realm").ok_or_else(|| self.nonsense("a challenge without realm"))?;
        let mut realm =
            Url::parse(&realm).map_err(|_| self.nonsense("a realm that is no address"))?;
        for name in ["service", "scope"] {
            if let Some(value) = parameter(rest, name) {
                realm.query_pairs_mut().append_pair(name, &value);
            }
        }
        let mut request = self.wire.client().get(realm);
        if let Some(login) = &self.login {
            request = request.basic_auth(&login.user, Some(&login.password));
        }
        let request = request.build().map_err(|error| self.wire.broken(&error))?;
        let answer = self.wire.send(request).await?;
        let answer = self.wire.succeeded(answer, "token service").await?;
        let body = self.wire.body(answer, MAX_TOKEN_BYTES).await?;
        let token: Token = serde_json::from_slice(&body)
            .map_err(|_| self.nonsense("its token service sends no token"))?;
        let token = token.token.or(token.access_token).unwrap_or_default();
        let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| self.nonsense("its token is no token"))?;
        value.set_sensitive(true);
        Ok(value)
    }

    /// A manifest of up to `limit` bytes, by tag or digest.
    pub async fn manifest(
        &self,
        reference: &str,
        accept: &'static str,
        limit: u64,
    ) -> Result<Bytes, RemoteError> {
        let url = self.url(&format!("manifests/{reference}"))?;
        let build = |client: &Client| Ok(client.get(url.clone()).header(ACCEPT, accept));
        let answer = self.call(reference, build).await?;
        self.wire.body(answer, limit).await
    }

    /// The digest of the manifest that a tag or digest names, if there is one.
    pub async fn manifest_digest(
        &self,
        reference: &str,
        accept: &'static str,
    ) -> Result<Option<Digest>, RemoteError> {
        let url = self.url(&format!("manifests/{reference}"))?;
        let build = |client: &Client| Ok(client.head(url.clone()).header(ACCEPT, accept));
        let answer = match self.call(reference, build).await {
            Err(error) if error.is_missing() => return Ok(None),
            other => other?,
        };
        let digest = answer.headers().get(DIGEST_HEADER);
        let digest = digest.and_then(|value| value.to_str().ok()?.parse().ok());
        digest
            .map(Some)
            .ok_or_else(|| self.nonsense("a manifest without its digest"))
    }

    /// Puts a manifest under a tag, in place of one that had it.
    pub async fn put_manifest(
        &self,
        tag: &str,
        media_type: &'static str,
        manifest: Bytes,
    ) -> Result<(), RemoteError> {
        let url = self.url(&format!("manifests/{tag}"))?;
        let build = |client: &Client| {
            let put = client.put(url.clone()).header(CONTENT_TYPE, media_type);
            Ok(put.body(manifest.clone()))
        };
        self.call(tag, build).await.map(drop)
    }

    /// Deletes a manifest with its tags; one that does not exist counts as deleted.
    pub async fn delete_manifest(&self, digest: Digest) -> Result<(), RemoteError> {
        let url = self.url(&format!("manifests/{digest}"))?;
        match self
            .call("manifest", |client| Ok(client.delete(url.clone())))
            .await
        {
            Err(error) if error.is_missing() => Ok(()),
            Err(RemoteError::Answer {
                host, status: 405, ..
            }) => Err(RemoteError::Answer {
                host,
                status: 405,
                said: "it deletes nothing; a registry of your own does with \
                       REGISTRY_STORAGE_DELETE_ENABLED=true"
                    .to_owned(),
            }),
            other => other.map(drop),
        }
    }

    /// All tags.
    pub async fn tags(&self) -> Result<Vec<String>, RemoteError> {
        let mut tags = Vec::new();
        let mut next = Some(self.url(&format!("tags/list?n={TAGS_A_PAGE}"))?);
        for _ in 0..MAX_PAGES {
            let Some(url) = next else {
                return Ok(tags);
            };
            let answer = self
                .call("tags", |client| Ok(client.get(url.clone())))
                .await;
            let answer = match answer {
                // A repository without anything in it is none.
                Err(error) if error.is_missing() => return Ok(Vec::new()),
                other => other?,
            };
            next = following(&url, answer.headers());
            let page = self.wire.body(answer, MAX_TAGS_BYTES).await?;
            let page: Tags = serde_json::from_slice(&page)
                .map_err(|_| self.nonsense("its list of tags is none"))?;
            tags.extend(page.tags.unwrap_or_default());
            if tags.len() > MAX_TAGS {
                let text =
                    format!("it lists more than {MAX_TAGS} tags: use a repository of its own");
                return Err(self.nonsense(&text));
            }
        }
        Err(self.nonsense("its list of tags does not end"))
    }

    async fn has_blob(&self, digest: Digest) -> Result<bool, RemoteError> {
        let url = self.url(&format!("blobs/{digest}"))?;
        match self
            .call("blob", |client| Ok(client.head(url.clone())))
            .await
        {
            Ok(_) => Ok(true),
            Err(error) if error.is_missing() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A whole blob of `bytes` bytes. Its digest is not checked.
    pub async fn blob(&self, digest: Digest, bytes: u64) -> Result<Bytes, RemoteError> {
        let url = self.url(&format!("blobs/{digest}"))?;
        let answer = self
            .call("blob", |client| Ok(client.get(url.clone())))
            .await?;
        let all = self.wire.body(answer, bytes).await?;
        self.expect(all, bytes)
    }

    /// A part of a blob.
    pub async fn blob_range(&self, digest: Digest, extent: Extent) -> Result<Bytes, RemoteError> {
        let mut part = BytesMut::new();
        if extent.len > 0 {
            let mut parts = self.parts(digest, extent, true).await?;
            while let Some(bytes) = parts.next().await? {
                part.extend_from_slice(&bytes);
            }
        }
        Ok(part.freeze())
    }

    /// What a blob of `bytes` bytes has from `offset` on, as it comes. Its digest is not checked.
    pub async fn blob_from(
        &self,
        digest: Digest,
        offset: u64,
        bytes: u64,
    ) -> Result<BlobParts<'_>, RemoteError> {
        let extent = Extent::new(offset, bytes.saturating_sub(offset));
        self.parts(digest, extent, false).await
    }

    async fn parts(
        &self,
        digest: Digest,
        extent: Extent,
        more_follows: bool,
    ) -> Result<BlobParts<'_>, RemoteError> {
        let url = self.url(&format!("blobs/{digest}"))?;
        let range = format!("bytes={}-{}", extent.offset, extent.end().saturating_sub(1));
        let all = !more_follows && extent.offset == 0;
        let build = |client: &Client| {
            let get = client.get(url.clone());
            Ok(if all { get } else { get.header(RANGE, &range) })
        };
        let answer = self.call("blob", build).await?;
        let is_part = answer.status() == StatusCode::PARTIAL_CONTENT;
        // It has no ranges: what comes before is passed over.
        let skip = if is_part { 0 } else { extent.offset };
        let parts = BlobParts {
            wire: &self.wire,
            skip,
            wanted: extent.len,
            left: extent.len,
            more_follows: more_follows && !is_part,
            stream: Box::pin(answer.bytes_stream()),
        };
        Ok(parts)
    }

    /// A body that ends early did not come whole.
    fn expect(&self, body: Bytes, bytes: u64) -> Result<Bytes, RemoteError> {
        match body.len() as u64 == bytes {
            true => Ok(body),
            false => Err(cut_short(&self.wire, body.len() as u64, bytes)),
        }
    }

    /// Stores a blob, unless it is there. The registry checks the digest.
    pub async fn put_blob(&self, digest: Digest, body: &BlobBody) -> Result<(), RemoteError> {
        if self.has_blob(digest).await? {
            return Ok(());
        }
        let url = self.url("blobs/uploads/")?;
        let begin = |client: &Client| Ok(client.post(url.clone()).header(CONTENT_LENGTH, 0));
        let begun = self.call(&self.name, begin).await?;
        let location = begun.headers().get(LOCATION);
        let location = location.and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| self.nonsense("an upload without a place"))?;
        let mut place = begun
            .url()
            .join(location)
            .map_err(|_| self.nonsense("an upload without a place"))?;
        place
            .query_pairs_mut()
            .append_pair("digest", &digest.to_string());
        let put = |client: &Client| {
            let put = client.request(Method::PUT, place.clone());
            let put = put.header(CONTENT_TYPE, "application/octet-stream");
            Ok(match body {
                BlobBody::Bytes(bytes) => {
                    put.header(CONTENT_LENGTH, bytes.len()).body(bytes.clone())
                }
                BlobBody::File(path) => {
                    let (file, bytes) = opened(path)?;
                    put.header(CONTENT_LENGTH, bytes).body(file)
                }
            })
        };
        self.call("upload", put).await.map(drop)
    }
}

/// Bytes of a blob, no more than were asked for.
pub struct BlobParts<'a> {
    wire: &'a Wire,
    /// Bytes to come that were not asked for.
    skip: u64,
    wanted: u64,
    left: u64,
    /// Whether there may be more behind them.
    more_follows: bool,
    stream: Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>,
}

impl BlobParts<'_> {
    /// The next ones; `None` after the last. Fails if there are fewer or more than expected.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RemoteError> {
        while !(self.left == 0 && self.more_follows)
            && let Some(bytes) = self.stream.next().await
        {
            let mut bytes = bytes.map_err(|error| self.wire.broken(&error))?;
            let skipped = self.skip.min(bytes.len() as u64);
            bytes.advance(skipped as usize);
            self.skip -= skipped;
            if bytes.len() as u64 > self.left {
                if !self.more_follows {
                    let host = self.wire.host().to_owned();
                    let limit = self.wanted;
                    return Err(RemoteError::TooLong { host, limit });
                }
                bytes.truncate(self.left as usize);
            }
            if !bytes.is_empty() {
                self.left -= bytes.len() as u64;
                return Ok(Some(bytes));
            }
        }
        match self.left {
            0 => Ok(None),
            left => Err(cut_short(self.wire, self.wanted - left, self.wanted)),
        }
    }
}

/// A body that ended early: it may come whole another time.
fn cut_short(wire: &Wire, came: u64, bytes: u64) -> RemoteError {
    RemoteError::Connection {
        host: wire.host().to_owned(),
        problem: format!("{came} of {bytes} bytes came"),
    }
}

/// Whether these can be a registry and a repository of it.
pub fn is_repository(host: &str, name: &str) -> bool {
    let is_small = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let part_ok = |part: &str| {
        part.starts_with(is_small)
            && part.ends_with(is_small)
            && part.chars().all(|c| is_small(c) || "._-".contains(c))
    };
    let host_ok = |c: char| c.is_ascii_alphanumeric() || ".-:[]".contains(c);
    let url = Url::parse(&format!("https://{host}/v2/{name}/"));
    name.len() <= 200
        && name.split('/').all(part_ok)
        && host.chars().all(host_ok)
        && url.is_ok_and(|url| !host.is_empty() && url.path() == format!("/v2/{name}/"))
}

fn opened(path: &Path) -> Result<(reqwest::Body, u64), RemoteError> {
    let open = || {
        let file = std::fs::File::open(path)?;
        let bytes = file.metadata()?.len();
        Ok((tokio::fs::File::from_std(file).into(), bytes))
    };
    open()
        .map_err(|error: std::io::Error| RemoteError::Local(format!("{}: {error}", path.display())))
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

#[derive(Deserialize)]
struct Tags {
    tags: Option<Vec<String>>,
}

/// The value of `name="value"` in a challenge.
fn parameter(challenge: &str, name: &str) -> Option<String> {
    let mut rest = challenge;
    loop {
        let (key, after) = rest.split_once('=')?;
        let key = key.trim().trim_start_matches(',').trim();
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').unwrap_or((after, "")),
        };
        if key.eq_ignore_ascii_case(name) {
            return Some(value.trim().to_owned());
        }
        rest = after;
    }
}

/// Where the next page is, if there is one and the same server has it.
fn following(url: &Url, headers: &HeaderMap) -> Option<Url> {
    let link = headers.get(LINK)?.to_str().ok()?;
    let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
    if !parameters.contains("next") {
        return None;
    }
    let next = url.join(target).ok()?;
    (next.origin() == url.origin()).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_taken_apart() {
        let text = r#"realm="https://a.io/token",service="a.io", scope="repository:x/y:pull,push""#;
        assert_eq!(parameter(text, "realm").unwrap(), "https://a.io/token");
        assert_eq!(parameter(text, "service").unwrap(), "a.io");
        assert_eq!(
            parameter(text, "scope").unwrap(),
            "repository:x/y:pull,push"
        );
        assert_eq!(parameter(text, "error"), None);
        assert_eq!(parameter("service=plain, realm=x", "realm").unwrap(), "x");
        for bad in ["", "=", "realm", "realm=\"unterminated", ",,,=,,\"=\""] {
            assert_eq!(parameter(bad, "realm"), None, "{bad}");
        }
    }

    #[test]
    fn pages_stay_with_their_server() {
        let url = Url::parse("https://a.io/v2/x/tags/list?n=2").unwrap();
        let of = |link: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(LINK, link.parse().unwrap());
            following(&url, &headers).map(String::from)
        };
        let next = of("</v2/x/tags/list?n=2&last=b>; rel=\"next\"").unwrap();
        assert_eq!(next, "https://a.io/v2/x/tags/list?n=2&last=b");
        assert_eq!(of("<https://evil.io/>; rel=\"next\""), None);
        assert_eq!(of("</v2/x>; rel=\"prev\""), None);
        assert_eq!(of("nothing"), None);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        let options = WireOptions {
            plain_http: false,
            ca: None,
            silence: std::time::Duration::from_secs(1),
            hint: "",
        };
        assert!(Registry::new("a.io:5000", "team/vms", &options).is_ok());
        for (host, name) in [
            ("a.io", ""),
            ("a.io", "../x"),
            ("a.io", "x/../../y"),
            ("a.io", "Upper"),
            ("a.io", "x?y"),
            ("user:secret@a.io", "x"),
            ("a.io/y", "x"),
            ("a.io?y", "x"),
            ("", "x"),
        ] {
            assert!(
                Registry::new(host, name, &options).is_err(),
                "{host} {name}"
            );
        }
    }
}
