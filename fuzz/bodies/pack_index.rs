//! Pack indexes and locations of any bytes, also well sealed: no panic, and what decodes
//! encodes to the same bytes.

use forelay_store::pack::{Locations, PackIndex};
use forelay_store::sealed::seal;

/// Takes one input.
pub fn run(bytes: &[u8]) {
    for bytes in [
        bytes.to_vec(),
        seal(b"FLPACKIX", bytes),
        seal(b"FLLOCATE", bytes),
    ] {
        if let Ok(index) = PackIndex::decode(&bytes) {
            assert_eq!(PackIndex::decode(&index.encode()), Ok(index));
        }
        if let Ok(locations) = Locations::decode(&bytes) {
            assert_eq!(Locations::decode(&locations.encode()), Ok(locations));
        }
    }
}
