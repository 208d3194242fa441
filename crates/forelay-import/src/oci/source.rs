//! Where a container image is, and what its component is called.
//!
//! ```text
//! nginx:1.25, quay.io/a/b@sha256:..., docker://REF   a registry's
//! docker-archive:F[:TAG]  oci-archive:F[:TAG]        an archive, as `docker save` writes it
//! oci:DIR[:TAG]                                      a directory with `oci-layout`
//! ./F, /DIR, F.tar                                   either, by its path alone
//! ```
//! Owns the notation. Invariants: the names that it gives are no package's: they start
//! with `oci-`; images of other registries or paths have other names (`a/b` is `a+b` in them, a
//! port follows `++`).

use std::path::{Path, PathBuf};

use forelay_image::{Digest, NameOf};
use oci_spec::distribution::Reference;

use crate::dir::name_from_path;
use crate::error::ImportError;

/// Where a container image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// In a registry.
    Registry(Box<Reference>),
    /// In an archive or a directory.
    Files {
        /// Its path.
        path: PathBuf,
        /// Which of several images.
        tag: Option<String>,
    },
}

impl ImageSource {
    /// Reads the notation.
    pub fn parse(text: &str) -> Result<Self, ImportError> {
        for transport in ["docker-archive:", "oci-archive:", "oci:"] {
            if let Some(rest) = text.strip_prefix(transport) {
                return Ok(files(rest));
            }
        }
        if Self::is_path(text) {
            return Ok(files(text));
        }
        let name = text.strip_prefix("docker://").unwrap_or(text);
        let reference: Reference = name.parse().map_err(|error| {
            ImportError::Request(format!(
                "{text:?} names no container image ({error}): give `nginx:1.25`, \
                 `registry:5000/app@sha256:...`, `docker-archive:FILE`, `oci-archive:FILE` or \
                 `oci:DIRECTORY`"
            ))
        })?;
        if let Some(digest) = reference.digest() {
            digest.parse::<Digest>().map_err(|error| {
                ImportError::Request(format!("{text:?} names no container image: {error}"))
            })?;
        }
        Ok(Self::Registry(Box::new(reference)))
    }

    /// True if a name without transport is a path.
    fn is_path(text: &str) -> bool {
        let starts = ["/", "./", "../"];
        let ends = [".tar", ".tar.gz", ".tgz", ".tar.zst"];
        starts.iter().any(|start| text.starts_with(start))
            || ends.iter().any(|end| text.ends_with(end))
    }

    /// What it is called in full, if it is a registry's.
    pub fn reference(&self) -> Option<String> {
        match self {
            Self::Registry(reference) => Some(reference.whole()),
            Self::Files { .. } => None,
        }
    }

    /// How errors name it.
    pub(super) fn shown(&self) -> PathBuf {
        match self {
            Self::Registry(reference) => PathBuf::from(reference.whole()),
            Self::Files { path, .. } => path.clone(),
        }
    }
}

/// `PATH[:TAG]`; a path that exists is one, colons and all.
fn files(text: &str) -> ImageSource {
    let (path, tag) = match text.split_once(':') {
        Some((path, tag)) if !Path::new(text).exists() => (path, Some(tag.to_owned())),
        _ => (text, None),
    };
    ImageSource::Files {
        path: PathBuf::from(path),
        tag,
    }
}

/// Name, version and full reference of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ImageTitle {
    pub name: String,
    pub version: String,
    pub reference: String,
}

impl ImageTitle {
    /// Of what a registry has, or an archive says that one has.
    pub fn of(reference: &Reference) -> Self {
        let path = match (reference.registry(), reference.repository()) {
            ("docker.io", path) => path.strip_prefix("library/").unwrap_or(path).to_owned(),
            (registry, path) => format!("{registry}/{path}"),
        };
        let digest = reference.digest().and_then(|text| text.split_once(':'));
        let version = reference
            .tag()
            .or(digest.map(|(_, hex)| &hex[..hex.len().min(12)]))
            .unwrap_or("latest");
        Self {
            name: component_name(&path),
            version: version.to_owned(),
            reference: reference.whole(),
        }
    }

    /// Of what is in a file or directory, by what that calls it.
    pub fn in_files(path: &Path, called: Option<&str>) -> Self {
        let full = called.filter(|name| name.contains(['/', ':']));
        if let Some(reference) = full.and_then(|name| name.parse::<Reference>().ok()) {
            // What an archive calls itself is not what a registry has of that name.
            let title = Self::of(&reference);
            return Self {
                reference: format!("archive:{}", title.reference),
                ..title
            };
        }
        let usable = |tag: &&str| NameOf::Version.check(tag).is_ok();
        let shown = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        Self {
            name: component_name(&name_from_path(path)),
            version: called.filter(usable).unwrap_or("latest").to_owned(),
            reference: shown.display().to_string(),
        }
    }
}

fn component_name(path: &str) -> String {
    let mut name = "oci-".to_owned();
    for c in path.to_lowercase().chars() {
        match c {
            'a'..='z' | '0'..='9' | '.' | '_' | '+' => name.push(c),
            // Neither is in a name of a registry or a repository.
            '/' => name.push('+'),
            ':' => name.push_str("++"),
            _ => name.push('-'),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn title(text: &str) -> (String, String) {
        let ImageSource::Registry(reference) = ImageSource::parse(text).unwrap() else {
            panic!("{text} is no reference");
        };
        let title = ImageTitle::of(&reference);
        (title.name, title.version)
    }

    #[test]
    fn references_name_components() {
        let digest = "a".repeat(64);
        for (text, name, version) in [
            ("nginx", "oci-nginx", "latest"),
            ("docker://nginx:1.25", "oci-nginx", "1.25"),
            ("bitnami/redis:7", "oci-bitnami+redis", "7"),
            ("bitnami-redis:7", "oci-bitnami-redis", "7"),
            ("quay.io/a/b:x_y", "oci-quay.io+a+b", "x_y"),
            ("localhost:5000/app:1", "oci-localhost++5000+app", "1"),
            ("localhost/5000/app:1", "oci-localhost+5000+app", "1"),
            (&format!("app@sha256:{digest}"), "oci-app", "aaaaaaaaaaaa"),
        ] {
            assert_eq!(title(text), (name.to_owned(), version.to_owned()), "{text}");
        }
        for bad in ["", "Nginx", "a b", "app@sha256:12", "app@sha512:12", "-x"] {
            assert!(ImageSource::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn archives_and_directories_are_named_with_or_without_a_tag() {
        let parsed = |text: &str| ImageSource::parse(text).unwrap();
        let expected = |path: &str, tag: Option<&str>| ImageSource::Files {
            path: path.into(),
            tag: tag.map(str::to_owned),
        };
        assert_eq!(parsed("docker-archive:/x.tar"), expected("/x.tar", None));
        assert_eq!(parsed("oci-archive:x.tar:a"), expected("x.tar", Some("a")));
        assert_eq!(parsed("oci:dir:b:1"), expected("dir", Some("b:1")));
        assert_eq!(parsed("./dir"), expected("./dir", None));
        assert_eq!(parsed("web.tar.gz"), expected("web.tar.gz", None));
        let colons = tempfile::Builder::new().suffix(":x").tempfile().unwrap();
        let text = format!("oci-archive:{}", colons.path().display());
        let expected = expected(colons.path().to_str().unwrap(), None);
        assert_eq!(parsed(&text), expected);
        let in_files = |called| ImageTitle::in_files(Path::new("/none/Web App.tar"), called);
        assert_eq!(in_files(None).name, "oci-web-app");
        assert_eq!(in_files(Some("1.2")).version, "1.2");
        let called = in_files(Some("a/b:3"));
        assert_eq!(called.name, "oci-a+b");
        assert_eq!(called.reference, "archive:docker.io/a/b:3");
    }
}
