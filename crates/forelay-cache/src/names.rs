//! The names by which decisions refer to trust domains, VMs, profiles and images.
//!
//! Names are shared strings: cloning one is a reference count, never a copy.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use forelay_image::Digest;
use serde::{Deserialize, Serialize};

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(name: &str) -> Self {
                Self(name.into())
            }
        }

        impl From<String> for $name {
            fn from(name: String) -> Self {
                Self(name.into())
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

name!(
    /// A trust domain: who may share memory with whom.
    Domain
);
name!(
    /// A VM's name, unique on the host.
    VmName
);
name!(
    /// A profile: the named workload that launches share.
    ProfileName
);

impl VmName {
    /// The row of a launch that is mapped ahead of a VM: no VM has a name like it.
    pub(crate) fn prepared(domain: &Domain, profile: &ProfileName) -> Self {
        Self::from(format!("~{domain}/{profile}"))
    }
}

/// One image in the shared memory of one trust domain: the unit that has residency.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SharedImage {
    /// Whose shared memory.
    pub domain: Domain,
    /// The component image.
    pub image: Digest,
}

impl SharedImage {
    /// `image` in the shared memory of `domain`.
    pub const fn new(domain: Domain, image: Digest) -> Self {
        Self { domain, image }
    }
}

/// A pmem device of a VM: which image it shows and how large that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DeviceImage {
    /// The component image.
    pub image: Digest,
    /// The image's size in bytes.
    pub image_bytes: u64,
}
