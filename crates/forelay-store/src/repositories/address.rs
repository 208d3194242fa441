//! Addresses of repositories: `dir:PATH`, `s3://BUCKET/PREFIX?...`, `oci://HOST/NAME?...`.
//!
//! Owns their syntax and what each opens. Refuses secrets in an address: they would be in logs.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use forelay_remote::registry::is_repository;
use forelay_remote::wire::WireOptions;
use url::Url;

use super::directory::DirectoryRepository;
use super::oci::OciRepository;
use super::retrying::Retrying;
use super::s3::{S3Place, S3Repository};
use crate::repository::{Description, Repository, check_key};

/// Longest time without a byte from a server.
const SILENCE: Duration = Duration::from_secs(15);
const S3_HINT: &str = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in \
                       ~/.aws/credentials, and what its user may do with the bucket";
const OCI_HINT: &str = "`docker login` keeps credentials in ~/.docker/config.json, which are used";

/// Where a repository is.
#[derive(Clone, Debug)]
pub struct RepositoryUrl {
    text: String,
    place: UrlPlace,
}

#[derive(Clone, Debug)]
enum UrlPlace {
    Directory(PathBuf),
    S3(S3Place, WireOptions),
    Oci {
        host: String,
        name: String,
        options: WireOptions,
    },
}

/// Why an address is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no address of a repository: {problem}")]
pub struct BadUrl {
    /// The address.
    pub text: String,
    /// What is wrong.
    pub problem: String,
}

impl RepositoryUrl {
    /// A directory of this host.
    pub fn directory(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        Self {
            text: format!("dir:{}", path.display()),
            place: UrlPlace::Directory(path),
        }
    }

    /// The directory, if it is one.
    pub fn as_directory(&self) -> Option<&std::path::Path> {
        match &self.place {
            UrlPlace::Directory(path) => Some(path),
            _ => None,
        }
    }

    /// The repository there. Nothing is asked, and nothing is made.
    pub fn open(&self) -> Arc<dyn Repository> {
        let describe = |kind, location| Description { kind, location };
        match self.place.clone() {
            UrlPlace::Directory(path) => Arc::new(DirectoryRepository::open(path)),
            UrlPlace::S3(place, options) => {
                let description = describe("s3", place.location());
                Arc::new(Retrying::new(description, move || {
                    Ok(Arc::new(S3Repository::open(&place, &options)?))
                }))
            }
            UrlPlace::Oci {
                host,
                name,
                options,
            } => {
                let description = describe("oci", format!("oci://{host}/{name}"));
                Arc::new(Retrying::new(description, move || {
                    Ok(Arc::new(OciRepository::open(&host, &name, &options)?))
                }))
            }
        }
    }
}

impl std::fmt::Display for RepositoryUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for RepositoryUrl {
    type Err = BadUrl;

    fn from_str(text: &str) -> Result<Self, BadUrl> {
        let bad = |problem: &str| BadUrl {
            text: text.to_owned(),
            problem: problem.to_owned(),
        };
        let place = match text.split_once(':') {
            Some(("dir", path)) if path.starts_with('/') => UrlPlace::Directory(path.into()),
            Some(("dir", _)) => return Err(bad("give the directory's whole path")),
            Some(("s3" | "oci", _)) => parsed(text).map_err(|problem| bad(&problem))?,
            _ => {
                return Err(bad(
                    "write dir:/PATH, s3://BUCKET/PREFIX or oci://HOST/NAME",
                ));
            }
        };
        Ok(Self {
            text: text.to_owned(),
            place,
        })
    }
}

/// What stands behind the `?`.
#[derive(Default)]
struct UrlSettings {
    endpoint: Option<String>,
    region: Option<String>,
    anonymous: bool,
    credentials: Option<PathBuf>,
    profile: Option<String>,
    plain_http: bool,
    ca: Option<PathBuf>,
}

fn settings(url: &Url) -> Result<UrlSettings, String> {
    let mut settings = UrlSettings::default();
    let is_s3 = url.scheme() == "s3";
    for (name, value) in url.query_pairs() {
        let flag = || match &*value {
            "" | "1" | "true" => Ok(true),
            "0" | "false" => Ok(false),
            other => Err(format!("{name} is {other:?}: 1 or 0")),
        };
        match (&*name, is_s3) {
            ("endpoint", true) => settings.endpoint = Some(value.into_owned()),
            ("region", true) => settings.region = Some(value.into_owned()),
            ("anonymous", true) => settings.anonymous = flag()?,
            ("credentials", true) => settings.credentials = Some(PathBuf::from(&*value)),
            ("profile", true) => settings.profile = Some(value.into_owned()),
            ("plain-http", false) => settings.plain_http = flag()?,
            ("ca", _) => settings.ca = Some(PathBuf::from(&*value)),
            (other, true) => {
                return Err(format!(
                    "{other:?} is none of endpoint, region, anonymous, credentials, profile, ca"
                ));
            }
            (other, false) => return Err(format!("{other:?} is none of plain-http, ca")),
        }
    }
    Ok(settings)
}

fn parsed(text: &str) -> Result<UrlPlace, String> {
    let url = Url::parse(text).map_err(|error| error.to_string())?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("secrets do not belong into it".to_owned());
    }
    if url.fragment().is_some() {
        return Err("what stands behind # means nothing".to_owned());
    }
    let host = url.host_str().unwrap_or_default().to_owned();
    if host.is_empty() {
        return Err("it names no bucket or host".to_owned());
    }
    let settings = settings(&url)?;
    let path = url.path().trim_matches('/').to_owned();
    let options = |plain_http, hint| WireOptions {
        plain_http,
        ca: settings.ca.clone(),
        silence: SILENCE,
        hint,
    };
    if url.scheme() == "oci" {
        let host = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host,
        };
        if !is_repository(&host, &path) {
            return Err("its name is lower-case letters, digits and . _ - /".to_owned());
        }
        return Ok(UrlPlace::Oci {
            options: options(settings.plain_http, OCI_HINT),
            host,
            name: path,
        });
    }
    if !path.is_empty() && check_key(&path).is_err() {
        return Err("its prefix has other characters than letters, digits and . _ - /".to_owned());
    }
    let options = options(false, S3_HINT);
    if let Some(endpoint) = &settings.endpoint {
        let parsed = Url::parse(endpoint).ok();
        let is_plain = |url: &Url| {
            ["http", "https"].contains(&url.scheme())
                && url.username().is_empty()
                && url.password().is_none()
                && url.query().is_none()
        };
        if !parsed.as_ref().is_some_and(is_plain) {
            return Err("its endpoint is no http:// or https:// address".to_owned());
        }
    }
    let place = S3Place {
        bucket: host,
        prefix: path,
        endpoint: settings.endpoint,
        region: settings.region,
        anonymous: settings.anonymous,
        credentials: settings.credentials,
        profile: settings.profile,
    };
    Ok(UrlPlace::S3(place, options))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_open_what_they_say() {
        for (text, kind, location) in [
            ("dir:/srv/forelay", "directory", "/srv/forelay"),
            ("s3://vms", "s3", "s3://vms"),
            (
                "s3://vms/a/b/?endpoint=http://127.0.0.1:9000&region=x&anonymous=1",
                "s3",
                "s3://vms/a/b",
            ),
            ("oci://r.io/team/vms", "oci", "oci://r.io/team/vms"),
            (
                "oci://localhost:5000/vms?plain-http=1",
                "oci",
                "oci://localhost:5000/vms",
            ),
        ] {
            let url: RepositoryUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), text);
            let description = url.open().describe();
            assert_eq!((description.kind, &*description.location), (kind, location));
        }
    }

    #[test]
    fn what_is_no_address_is_refused_in_one_line() {
        for (text, because) in [
            ("", "dir:/PATH"),
            ("/srv", "dir:/PATH"),
            ("ftp://x/y", "dir:/PATH"),
            ("dir:srv", "whole path"),
            ("s3://", "no bucket"),
            ("s3://b/../x y", "characters"),
            ("s3://b?endpoint=ftp://x", "endpoint"),
            ("s3://b?endpoint=http://me:secret@x", "endpoint"),
            ("s3://b?plain-http=1", "none of"),
            ("s3://key:secret@b", "secrets"),
            ("oci://u:p@h/x", "secrets"),
            ("oci://h/x?plain-http=maybe", "1 or 0"),
            ("oci://h/x?region=y", "none of"),
            ("oci://h/x#y", "#"),
            ("oci://h/Upper", "lower-case"),
            ("oci://h/", "lower-case"),
        ] {
            let error = text.parse::<RepositoryUrl>().unwrap_err().to_string();
            assert!(error.contains(because), "{text}: {error}");
            assert!(!error.contains('\n'));
        }
    }
}
