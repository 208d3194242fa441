//! Why another machine did not do what was asked.

/// Why a request failed. Each text is one line that names the server.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// There is no such thing.
    #[error("{host} has no {what}")]
    Missing {
        /// The server.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// The server does not let us.
    #[error("{host} refuses ({status}): {hint}{}", said_after(said))]
    Refused {
        /// The server.
        host: String,
        /// Its status.
        status: u16,
        /// Where credentials are kept.
        hint: &'static str,
        /// Its words, shortened.
        said: String,
    },
    /// Another answer than was hoped for.
    #[error("{host} answers {status}{}", said_after(said))]
    Answer {
        /// The server.
        host: String,
        /// Its status.
        status: u16,
        /// Its words, shortened.
        said: String,
    },
    /// The server's certificate is not accepted.
    #[error(
        "the certificate of {host} is not accepted: {problem}; check this host's clock, or name \
         the authority that signed it with `ca=FILE` in the address"
    )]
    Certificate {
        /// The server.
        host: String,
        /// What is wrong.
        problem: String,
    },
    /// The connection could not be made, or broke.
    #[error("the connection to {host} failed: {problem}")]
    Connection {
        /// The server.
        host: String,
        /// What happened.
        problem: String,
    },
    /// More bytes than were expected.
    #[error("{host} sends more than the {limit} bytes expected")]
    TooLong {
        /// The server.
        host: String,
        /// The bound.
        limit: u64,
    },
    /// Something that makes no sense.
    #[error("{host} does not keep to the protocol: {problem}")]
    Protocol {
        /// The server.
        host: String,
        /// What is wrong.
        problem: String,
    },
    /// Something on this host is in the way.
    #[error("{0}")]
    Local(String),
}

impl RemoteError {
    /// True if the same request may work a moment later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connection { .. } => true,
            Self::Answer { status, .. } => *status == 408 || *status == 429 || *status >= 500,
            _ => false,
        }
    }

    /// True if what was asked for does not exist.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Missing { .. })
    }
}

fn said_after(said: &str) -> String {
    match said {
        "" => String::new(),
        said => format!(": {said}"),
    }
}
