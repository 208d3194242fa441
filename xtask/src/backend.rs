//! The repositories that the demo can run over: the directory that
//! components are built into, and servers that it is copied to.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::host::{Host, Programs, Settings};
use crate::prerequisites;
use crate::process::{run, target_dir};
use crate::servers::Server;

/// Where components are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The directory.
    Directory,
    /// A bucket of an S3 server (moto).
    S3,
    /// Debian's container registry.
    Oci,
}

impl Backend {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Directory, Self::S3, Self::Oci];

    /// As the command line and reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::S3 => "s3",
            Self::Oci => "oci",
        }
    }

    /// The one of this name.
    pub fn parse(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|one| one.name() == name);
        found.with_context(|| format!("no repository {name:?}: directory, s3 or oci"))
    }

    /// Starts its server, if it has one.
    pub fn start(self) -> Result<Option<Server>> {
        let server = match self {
            Self::Directory => return Ok(None),
            Self::S3 => {
                prerequisites::install_s3_server();
                Server::s3()
            }
            Self::Oci => Server::registry(),
        };
        match server {
            Some(server) => Ok(Some(server)),
            None => bail!("the server for {} is not installed", self.name()),
        }
    }

    /// The address of its repository on the server, asked there.
    pub fn url(self, server: &Server) -> String {
        self.url_at(server, server.address)
    }

    /// The same, asked at another address that leads there.
    pub fn url_at(self, server: &Server, address: SocketAddr) -> String {
        match self {
            Self::Oci => server.oci_url(address),
            _ => server.s3_url(address),
        }
    }
}

/// Copies all that is in a directory to a server's repository.
pub fn fill(programs: &Programs, repository: &Path, url: &str) -> Result<()> {
    let state = target_dir().join("build-state");
    let host = Host::new(programs, &Settings::local(repository.to_path_buf(), state))?;
    run(&mut host.forelay(["component", "push", "--all", "--to", url]))
}
