//! The credentials that Docker keeps for a registry.

use std::fs::File;
use std::io::{BufReader, ErrorKind};
use std::path::PathBuf;

use docker_credential::{CredentialRetrievalError, DockerCredential};

use crate::RemoteError;

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
    let Some(path) = own.or_else(home).map(|dir| dir.join("config.json")) else {
        return Ok(None);
    };
    let unusable = |problem: String| RemoteError::Local(format!("{}: {problem}", path.display()));
    let file = match File::open(&path) {
        Ok(file) => BufReader::new(file),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unusable(error.to_string())),
    };
    match docker_credential::get_credential_from_reader(file, registry) {
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
