//! A scratch root: an overlay of read-only layers with a fresh upper directory, in which
//! packages are installed and commands tried.
//!
//! Every run happens in mount, process, host-name and network namespaces of its own:
//! when it ends, for whatever reason, its mounts, its daemons and its names are gone.
//! Scripts find `/proc`, a minimal `/dev`, empty `/run` and `/tmp`, a host name that
//! resolves, and no network but the loopback; their standard input is empty, what they
//! print is kept. Services cannot be started (`policy-rc.d` answers 101).
//!
//! Invariant: the upper directory holds only what the run changed in the layers; what
//! belongs to the sandbox itself comes from a helper layer below it and from mounts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::error::{ImportError, io_error};
use crate::spool::{DEFAULT_LIMIT_BYTES, Spool};
use crate::tool::{Tool, require_root};

/// Mounts everything and becomes the command. Arguments: root, overlay options, command.
const ENTER: &str = r#"set -eu
root=$1 options=$2
shift 2
mount -t overlay -o "$options" overlay "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
mount -t tmpfs -o mode=755,size=64m tmpfs "$root/dev"
for node in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "$root/dev/${node%:*}" c 1 "${node#*:}"
done
mknod -m 666 "$root/dev/tty" c 5 0
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mkdir -m 1777 "$root/run/lock"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
echo debian > /proc/sys/kernel/hostname
if [ -n "${FORELAY_ARCHIVES:-}" ]; then
    mkdir -p "$root/var/cache/apt/archives"
    mount --bind "$FORELAY_ARCHIVES" "$root/var/cache/apt/archives"
fi
# The host's name resolves to an address that is there.
ip link set lo up 2>/dev/null || :
# Programs report on descriptor 3, which is what our caller reads; what scripts print goes
# to standard error, which is open, and is kept for when something fails.
status=${FORELAY_STATUS:-}
unset FORELAY_STATUS FORELAY_ARCHIVES
if [ -n "$status" ]; then
    exec 3>&1 >&2
fi
exec "$@"
"#;

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
}

impl Sandbox {
    /// A scratch root over `layers` (directories, topmost first), with its temporary
    /// files in `scratch`. Needs root.
    pub fn new(scratch: &Path, layers: &[&Path]) -> Result<Self, ImportError> {
        require_root("a scratch root for packages")?;
        let spool = Spool::new(scratch, DEFAULT_LIMIT_BYTES)?;
        let sandbox = Self {
            layers: layers.iter().map(|layer| (*layer).to_owned()).collect(),
            spool,
        };
        for name in ["upper", "work", "root", "helper"] {
            let path = sandbox.spool.path().join(name);
            fs::create_dir(&path).map_err(io_error("creating", &path))?;
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(&path, mode).map_err(io_error("creating", &path))?;
        }
        for section in 1..=9 {
            let path = sandbox.spool.path().join("helper");
            let path = path.join(format!("{HELPER_DIRECTORIES}{section}"));
            fs::create_dir_all(&path).map_err(io_error("creating", &path))?;
        }
        for (name, mode, content) in HELPERS {
            let path = sandbox.spool.path().join("helper").join(name);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(io_error("creating", parent))?;
            }
            fs::write(&path, content).map_err(io_error("writing", &path))?;
            let mode = fs::Permissions::from_mode(*mode);
            fs::set_permissions(&path, mode).map_err(io_error("writing", &path))?;
        }
        Ok(sandbox)
    }

    /// The directory that receives changes.
    pub fn upper(&self) -> PathBuf {
        self.spool.path().join("upper")
    }

    /// Where a run sees the whole root.
    pub fn root(&self) -> PathBuf {
        self.spool.path().join("root")
    }

    /// Keeps the upper directory's files alive after the sandbox.
    pub fn into_spool(self) -> Spool {
        self.spool
    }

    /// A tool that runs on the host's programs, but sees the scratch root mounted at
    /// [`Self::root`]. `package` has the program.
    pub(crate) fn host_tool(
        &self,
        program: &str,
        package: &'static str,
        doing: &str,
    ) -> Result<Tool, ImportError> {
        Ok(Tool::new("unshare", package, doing)
            .args([
                "--mount",
                "--propagation",
                "private",
                "--uts",
                "--net",
                "--ipc",
            ])
            .args(["--pid", "--fork", "--kill-child", "--"])
            .args(["sh", "-c", ENTER, "sh"])
            .arg(self.root())
            .arg(self.overlay_options()?)
            .arg(program))
    }

    /// Runs a shell script inside the scratch root and returns what it prints.
    pub fn run(&self, script: &str) -> Result<String, ImportError> {
        self.host_tool(
            "chroot",
            "util-linux",
            "running a command in the scratch root",
        )?
        .arg(self.root())
        .args(["sh", "-c", script])
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
