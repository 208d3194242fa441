//! How often, and after what waits, what failed for now is tried again.
//!
//! Refuses to know what was tried. A server that says how long it wants to be left alone is
//! left alone for that long beside it ([`Wire`](crate::wire::Wire)).

use std::time::Duration;

/// What is left of the waits between attempts.
#[derive(Debug)]
pub struct Patience {
    waits: &'static [Duration],
    used: usize,
}

impl Patience {
    /// As many further attempts as there are waits before them.
    pub fn new(waits: &'static [Duration]) -> Self {
        Self { waits, used: 0 }
    }

    /// Waits before the next attempt; false, at once, if there is to be none.
    pub async fn wait(&mut self) -> bool {
        let Some(wait) = self.waits.get(self.used) else {
            return false;
        };
        self.used += 1;
        tokio::time::sleep(*wait).await;
        true
    }

    /// All of it again: something was gained by the attempts so far.
    pub fn renew(&mut self) {
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_ends_and_comes_back_with_success() {
        const WAITS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
        let start = tokio::time::Instant::now();
        let mut patience = Patience::new(&WAITS);
        assert!(patience.wait().await && patience.wait().await);
        assert!(!patience.wait().await);
        assert_eq!(start.elapsed(), Duration::from_secs(61));
        patience.renew();
        assert!(patience.wait().await);
        assert_eq!(start.elapsed(), Duration::from_secs(62));
    }
}
