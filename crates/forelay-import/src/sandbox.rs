//! A scratch root: an overlay of read-only layers with a fresh upper directory, in which
//! packages are installed and commands tried.
//!
//! What runs there is anybody's: maintainer scripts, and the layers' own shell and dpkg. So
//! every run has a file tree ([`jail`]), mounts, processes, host name, network and users of its
//! own. Its root is one of a range of the host's users that are nobody ([`UserRange`]), has no
//! capability outside, cannot get new rights, makes no mount, and is refused system calls that
//! packages have no business with ([`filter`]). What it takes is bounded ([`limits`]). When it
//! ends, for whatever reason, its mounts, its daemons and its names are gone.
//!
//! Scripts find `/proc`, a minimal `/dev`, empty `/run` and `/tmp`, a host name that
//! resolves, and no network but the loopback; their standard input is empty, what they
//! print is kept. Services cannot be started (`policy-rc.d` answers 101).
//!
//! Layers are directories whose owners are shifted by the range ([`crate::unpack`]); so any
//! file system serves that overlayfs takes as its upper layer (ext4, xfs, btrfs, tmpfs), from
//! Linux 5.6 on.
//!
//! Invariant: the upper directory holds only what the run changed in the layers; what
//! belongs to the sandbox itself comes from a helper layer below it and from mounts.

mod filter;
pub(crate) mod jail;
pub(crate) mod limits;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use forelay_image::tree::Tree;

use crate::error::{ImportError, io_error};
use crate::sandbox::jail::{Jail, TARGET};
use crate::sandbox::limits::{BuildLimits, Watch};
use crate::spool::{DEFAULT_LIMIT_BYTES, Spool};
use crate::tool::{Tool, require_root};
use crate::users::UserRange;

/// The name of the sandbox's host, with a domain, as scripts ask for one.
const HOSTS: &str = "127.0.0.1 localhost
127.0.1.1 debian.localdomain debian
::1 localhost ip6-localhost ip6-loopback
";

/// Files that are in every sandbox and in no component: path, mode, content.
const HELPERS: &[(&str, u32, &str)] = &[
    ("usr/sbin/policy-rc.d", 0o755, "#!/bin/sh\nexit 101\n"),
    ("etc/hostname", 0o644, "debian\n"),
    ("etc/hosts", 0o644, HOSTS),
    // A database cluster made at build time would be one identity in every VM.
    (
        "etc/postgresql-common/createcluster.d/forelay.conf",
        0o644,
        "create_main_cluster = false\n",
    ),
];

/// Directories that are in every sandbox: a base without documentation may lack those in
/// which scripts make alternatives of pages.
const HELPER_DIRECTORIES: &str = "usr/share/man/man";

/// A scratch root.
#[derive(Debug)]
pub struct Sandbox {
    spool: Spool,
    layers: Vec<PathBuf>,
    users: UserRange,
    limits: BuildLimits,
}

impl Sandbox {
    /// A scratch root over `layers` (directories, topmost first, whose owners are of `users`),
    /// with its temporary files in `scratch`. Needs root.
    pub fn new(
        scratch: &Path,
        layers: &[&Path],
        users: UserRange,
        limits: &BuildLimits,
    ) -> Result<Self, ImportError> {
        require_root("a scratch root for packages")?;
        let spool = Spool::new(scratch, DEFAULT_LIMIT_BYTES)?;
        let sandbox = Self {
            layers: layers.iter().map(|layer| (*layer).to_owned()).collect(),
            spool,
            users,
            limits: limits.clone(),
        };
        for name in ["upper", "work", "jail", "helper"] {
            sandbox.make_directory(&sandbox.spool.path().join(name))?;
        }
        let helper = sandbox.spool.path().join("helper");
        for section in 1..=9 {
            sandbox.make_helper_directory(&format!("{HELPER_DIRECTORIES}{section}"))?;
        }
        for (name, mode, content) in HELPERS {
            if let Some((parent, _)) = name.rsplit_once('/') {
                sandbox.make_helper_directory(parent)?;
            }
            let path = helper.join(name);
            fs::write(&path, content).map_err(io_error("writing", &path))?;
            sandbox.give(&path, *mode)?;
        }
        Ok(sandbox)
    }

    fn make_helper_directory(&self, name: &str) -> Result<(), ImportError> {
        let mut path = self.spool.path().join("helper");
        for part in name.split('/') {
            path.push(part);
            if !path.is_dir() {
                self.make_directory(&path)?;
            }
        }
        Ok(())
    }

    fn make_directory(&self, path: &Path) -> Result<(), ImportError> {
        fs::create_dir(path).map_err(io_error("creating", path))?;
        self.give(path, 0o755)
    }

    /// Makes it the run's root's.
    fn give(&self, path: &Path, mode: u32) -> Result<(), ImportError> {
        let root = Some(self.users.first());
        chown(path, root, root).map_err(io_error("writing", path))?;
        let mode = fs::Permissions::from_mode(mode);
        fs::set_permissions(path, mode).map_err(io_error("writing", path))
    }

    /// The directory that receives changes; its owners are shifted.
    pub(crate) fn upper(&self) -> PathBuf {
        self.spool.path().join("upper")
    }

    /// What the runs changed in the layers.
    pub(crate) fn changes(&self) -> Result<Tree, ImportError> {
        self.users.read(&self.upper())
    }

    /// Keeps the upper directory's files alive after the sandbox.
    pub fn into_spool(self) -> Spool {
        self.spool
    }

    /// A program of the host that works on the scratch root, which is at [`TARGET`], and finds
    /// nothing else of the host but programs. With `reports`, what is said on descriptor 3 is
    /// its output.
    pub(crate) fn tool(&self, program: &str, doing: &str, reports: bool) -> SandboxTool<'_> {
        let [shell, arguments @ ..] = Jail::enter_words(reports);
        SandboxTool {
            sandbox: self,
            tool: Tool::new(shell, "bash", doing)
                .called(program)
                .args(arguments)
                .arg(program),
            apt: None,
        }
    }

    /// Runs a shell script inside the scratch root and returns what it prints.
    pub fn run(&self, script: &str) -> Result<String, ImportError> {
        self.tool("chroot", "running a command in the scratch root", false)
            .args([TARGET, "sh", "-c", script])
            .output()
    }

    fn overlay_options(&self) -> Result<String, ImportError> {
        let helper = self.spool.path().join("helper");
        let mut lower = Vec::new();
        for layer in self.layers.iter().chain(std::iter::once(&helper)) {
            lower.push(option_path(layer)?);
        }
        let upper = option_path(&self.upper())?;
        let work = option_path(&self.spool.path().join("work"))?;
        Ok(format!(
            "lowerdir={},upperdir={upper},workdir={work},index=off,metacopy=off,redirect_dir=off,\
             volatile",
            lower.join(":")
        ))
    }
}

/// A program about to run in a sandbox.
pub(crate) struct SandboxTool<'a> {
    sandbox: &'a Sandbox,
    tool: Tool,
    apt: Option<PathBuf>,
}

impl SandboxTool<'_> {
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.tool = self.tool.args(args);
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.tool = self.tool.env(name, value);
        self
    }

    /// Shows it apt's cache, which it cannot write.
    pub fn apt(mut self, directory: &Path) -> Self {
        self.apt = Some(directory.to_owned());
        self
    }

    /// Runs it and returns what it printed on standard output.
    pub fn output(self) -> Result<String, ImportError> {
        let mut out = String::new();
        self.run(|line| {
            out.push_str(line);
            out.push('\n');
        })?;
        Ok(out)
    }

    /// Runs it; each line of its standard output goes to `on_line`.
    pub fn run(mut self, on_line: impl FnMut(&str)) -> Result<(), ImportError> {
        let jail = Jail {
            place: self.sandbox.spool.path().join("jail"),
            overlay: self.sandbox.overlay_options()?,
            apt: self.apt.clone(),
            users: self.sandbox.users,
        };
        let watch = Watch::new(self.sandbox.limits.clone(), self.sandbox.upper());
        let mut command = self.tool.take_command();
        let follow = |child| self.tool.follow(child, Some(&watch), on_line);
        jail.run(&mut command, |child| watch.limit(child), follow)
    }
}

/// A path as overlayfs options hold it.
fn option_path(path: &Path) -> Result<String, ImportError> {
    let text = path.to_string_lossy().into_owned();
    if text.contains([',', ':', '\\', '"']) {
        return Err(ImportError::Request(format!(
            "the cache directory {text:?} must not contain a comma, colon, quote or backslash"
        )));
    }
    Ok(text)
}

#[cfg(test)]
#[path = "sandbox_tests.rs"]
mod hostile_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_overlay_options_cannot_hold_are_refused() {
        assert!(option_path(Path::new("/a/b-c_d")).is_ok());
        for path in ["/a,b", "/a:b", "/a\\b"] {
            assert!(option_path(Path::new(path)).is_err());
        }
    }
}
