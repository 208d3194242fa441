//! The credentials that Docker keeps for a registry: those of its file, or of the helper that
//! the file names. Nothing counts as nobody.

use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::{Path, PathBuf};

use docker_credential::{CredentialRetrievalError, DockerCredential};

use crate::RemoteError;

/// Docker's own registry, by all of its names...
const DOCKER_HUB: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];
/// ...and what Docker keeps its credentials under.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// A user of a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// Who.
    pub user: String,
    /// The password, or an access token.
    pub password: String,
}

/// What Docker's file has for a registry; `None` if nothing, or if there is no file.
pub fn docker_login(registry: &str) -> Result<Option<Login>, RemoteError> {
    let own = std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker"));
    match own.or_else(home) {
        Some(dir) => login_in(&dir.join("config.json"), registry),
        None => Ok(None),
    }
}

fn login_in(path: &Path, registry: &str) -> Result<Option<Login>, RemoteError> {
    let key = match DOCKER_HUB.contains(&registry) {
        true => DOCKER_HUB_KEY,
        false => registry,
    };
    let unusable = |problem: String| RemoteError::Local(format!("{}: {problem}", path.display()));
    let file = match File::open(path) {
        Ok(file) => BufReader::new(file),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unusable(error.to_string())),
    };
    match docker_credential::get_credential_from_reader(file, key) {
        Ok(DockerCredential::UsernamePassword(user, password)) => {
            Ok(Some(Login { user, password }))
        }
        Ok(DockerCredential::IdentityToken(_)) => Err(unusable(format!(
            "what it has for {registry} is an identity token, which is not supported: log in \
             with a password or an access token"
        ))),
        Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(None),
        // A helper that knows nothing fails, too, and says so in either place.
        Err(CredentialRetrievalError::HelperFailure { stdout, stderr, .. })
            if stdout.contains("not found") || stderr.contains("not found") =>
        {
            Ok(None)
        }
        Err(error) => Err(unusable(error.to_string().replace('\n', " "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_what_dockers_file_has_and_nobodys_without_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let of = |registry| {
            let login = login_in(&path, registry).map_err(|error| error.to_string())?;
            Ok::<_, String>(login.map(|login| (login.user, login.password)))
        };
        assert_eq!(of("a.io"), Ok(None), "no file");
        // `me:secret`
        let text = r#"{"auths": {"a.io": {"auth": "bWU6c2VjcmV0"},
            "https://index.docker.io/v1/": {"auth": "bWU6c2VjcmV0"},
            "token.io": {"auth": "bWU6", "identitytoken": "x"}},
            "credHelpers": {"helped.io": "forelay-has-no-such"}}"#;
        std::fs::write(&path, text).unwrap();
        let mine = Ok(Some(("me".to_owned(), "secret".to_owned())));
        for registry in ["a.io", "docker.io", "index.docker.io"] {
            assert_eq!(of(registry), mine, "{registry}");
        }
        assert_eq!(of("b.io"), Ok(None));
        assert!(of("token.io").unwrap_err().contains("identity token"));
        assert!(of("helped.io").unwrap_err().contains("config.json"));
        std::fs::write(&path, "{").unwrap();
        assert!(of("a.io").unwrap_err().contains("config.json"));
    }
}
