//! Manifests and locks of any text: no panic, and what parses survives a round trip.

use forelay_image::lock::Lock;
use forelay_image::manifest::Manifest;

/// Takes one input.
pub fn run(text: &str) {
    if let Ok(manifest) = Manifest::parse(text) {
        assert_eq!(Manifest::parse(&manifest.to_toml()).as_ref(), Ok(&manifest));
    }
    if let Ok(lock) = Lock::parse(text) {
        assert_eq!(Lock::parse(&lock.to_toml()).as_ref(), Ok(&lock));
    }
}
