//! FUSE sessions and pins: asked of the holder, which outlives this daemon.
//!
//! Without a holder (tests, tools) both end with this process.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use forelay_memory::holder::{self, Shutdown};
use forelay_memory::{Session, pinner};

use crate::daemon::error::HostError;

/// Where sessions and pins live.
pub struct Sessions {
    holder: Option<holder::Client>,
    pinner: Arc<pinner::PinnerClient>,
}

impl Sessions {
    /// The holder's, if this process was started by one; else this process's own.
    pub fn connect() -> Result<Self, HostError> {
        let holder = holder::Client::from_env().map_err(HostError::failed)?;
        let pinner = match &holder {
            // One that is being started again is asked for later: see `renew_pinner`.
            Some(holder) => holder.pinner().or_else(|error| {
                tracing::warn!(%error, "nothing can be pinned for now");
                pinner::PinnerClient::unconnected()
            }),
            None => pinner::PinnerClient::in_process(),
        };
        let pinner = pinner.map_err(HostError::failed)?;
        Ok(Self {
            holder,
            pinner: Arc::new(pinner),
        })
    }

    /// The session of `domain`, mounted on `mountpoint`: taken over if the holder has it.
    pub fn open(&self, domain: &str, mountpoint: &Path) -> Result<Session, HostError> {
        let Some(holder) = &self.holder else {
            return Ok(Session::New);
        };
        let held = holder.domain(domain).map_err(HostError::failed)?;
        let held = match held {
            Some(held) => held,
            None => holder
                .create_domain(domain, mountpoint)
                .map_err(HostError::failed)?,
        };
        Ok(Session::Takeover(held.fuse))
    }

    /// Names of the domains that the holder holds from an earlier daemon.
    pub fn held(&self) -> Result<Vec<String>, HostError> {
        let Some(holder) = &self.holder else {
            return Ok(Vec::new());
        };
        let held = holder.domains().map_err(HostError::failed)?;
        Ok(held.into_iter().map(|held| held.name).collect())
    }

    /// Says that this daemon serves its mounts.
    pub fn ready(&self) -> Result<(), HostError> {
        self.holder
            .as_ref()
            .map_or(Ok(()), |holder| holder.ready().map_err(HostError::failed))
    }

    /// A sign of life to the holder; an error if it has ended.
    pub fn alive(&self) -> Result<(), HostError> {
        self.holder
            .as_ref()
            .map_or(Ok(()), |holder| holder.alive().map_err(HostError::failed))
    }

    /// Waits for the holder's end for at most `limit`; true if it has ended.
    pub fn wait_for_holders_end(&self, limit: Duration) -> bool {
        match &self.holder {
            Some(holder) => holder.wait_for_end(limit),
            None => {
                std::thread::sleep(limit);
                false
            }
        }
    }

    /// Says that the holder is to start another daemon when this one ends.
    pub fn restart(&self) -> Result<(), HostError> {
        let Some(holder) = &self.holder else {
            return Ok(());
        };
        holder
            .shutdown(Shutdown::Restart)
            .map_err(HostError::failed)
    }

    /// Finds the next pinner if the last one has ended. True if there is a new one, which
    /// holds no pins yet.
    pub fn renew_pinner(&self) -> Result<bool, HostError> {
        if !self.pinner.is_gone() {
            return Ok(false);
        }
        let next = match &self.holder {
            Some(holder) => holder.pinner().map_err(HostError::failed)?,
            None => pinner::PinnerClient::in_process().map_err(HostError::failed)?,
        };
        self.pinner.renew(next);
        Ok(true)
    }

    /// The process that holds pins.
    pub fn pinner(&self) -> &Arc<pinner::PinnerClient> {
        &self.pinner
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_holder_nothing_is_held_and_nobody_is_told() {
        let sessions = Sessions::connect().unwrap();
        let session = sessions.open("me", Path::new("/nonexistent")).unwrap();
        assert!(matches!(session, Session::New), "made when it is mounted");
        assert_eq!(sessions.held().unwrap(), Vec::<String>::new());
        for told in [sessions.ready(), sessions.alive(), sessions.restart()] {
            told.unwrap();
        }
        assert!(!sessions.wait_for_holders_end(Duration::ZERO));
        assert!(!sessions.renew_pinner().unwrap(), "the first one lives");
        assert!(sessions.pinner().table().unwrap().is_empty());
    }
}
