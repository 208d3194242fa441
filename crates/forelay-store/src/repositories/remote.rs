//! What repositories on other machines have in common: failures and bounds.

use forelay_remote::RemoteError;

use crate::repository::RepositoryError;

/// Of no answer comes more; what an object may have, callers say.
pub(super) const MAX_OBJECT_BYTES: u64 = 256 << 20;

/// Why an operation failed: another machine's answer, or something on this one.
pub(super) enum FailureCause {
    Remote(RemoteError),
    Here(String),
}

impl From<RemoteError> for FailureCause {
    fn from(error: RemoteError) -> Self {
        Self::Remote(error)
    }
}

impl From<String> for FailureCause {
    fn from(problem: String) -> Self {
        Self::Here(problem)
    }
}

/// The failure of an operation as the trait tells it.
pub(super) fn failed(
    operation: &'static str,
    key: &str,
    cause: impl Into<FailureCause>,
) -> RepositoryError {
    let key = key.to_owned();
    let error = match cause.into() {
        FailureCause::Remote(error) => error,
        FailureCause::Here(problem) => {
            let source = problem.into();
            return RepositoryError::Permanent {
                operation,
                key,
                source,
            };
        }
    };
    if error.is_missing() {
        return RepositoryError::NotFound { key };
    }
    let transient = error.is_transient();
    let source = Box::new(error);
    match transient {
        true => RepositoryError::Transient {
            operation,
            key,
            source,
        },
        false => RepositoryError::Permanent {
            operation,
            key,
            source,
        },
    }
}
