//! Why the daemon did not do as asked: one error for all that its clients may meet.
//!
//! Refuses to know who asks and how an answer is sent.

use forelay_host::error_chain;

/// Why the daemon did not do as asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HostError {
    /// No instance of this name.
    #[error("no VM is called {0:?}: `forelay ps --all` lists them")]
    NoSuchVm(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The thing is in use, or not in a state for this.
    #[error("{0}")]
    Busy(String),
    /// Something did not work.
    #[error("{0}")]
    Failed(String),
    /// A launch was told to end.
    #[error("it was stopped before its VMM ran")]
    Cancelled,
}

impl HostError {
    /// A failure with all its causes.
    pub fn failed(error: impl std::error::Error) -> Self {
        Self::Failed(error_chain(&error))
    }

    /// A refusal with all its causes.
    pub fn invalid(error: impl std::error::Error) -> Self {
        Self::Invalid(error_chain(&error))
    }
}
