//! The host's apt, pointed at another root: sources, indexes and downloaded archives in
//! a cache directory of ours, never in the host's own.
//!
//! Owns the configuration (the host's hooks and preferences are left out, its proxies
//! and mirrors are used), refreshing, and the question which name was probably meant.
//!
//! Invariant: one process at a time uses a cache (a lock file is held meanwhile).

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::draft::host_architecture;
use crate::error::{ImportError, io_error};
use crate::progress::{BuildPhase, Progress, Reporter, apt_status};
use crate::sandbox::jail::{APT, APT_STATE, TARGET};
use crate::tool::Tool;
use crate::within::read_within;

/// How old package indexes may be before they are refreshed.
pub const DEFAULT_REFRESH_AFTER: Duration = Duration::from_secs(3600);

const DEFAULT_MIRROR: &str = "http://deb.debian.org/debian";
const DEFAULT_SECURITY_MIRROR: &str = "http://deb.debian.org/debian-security";

/// apt's cache for one Debian release.
#[derive(Clone, Debug)]
pub struct AptCache {
    directory: PathBuf,
    suite: String,
    refresh_after: Duration,
    mirror: Option<String>,
}

/// Held while apt works in the cache.
#[derive(Debug)]
pub struct AptLock {
    _file: File,
}

impl AptCache {
    /// The cache for release `suite` (e.g. `bookworm`) below `parent`.
    pub fn open(parent: &Path, suite: &str, refresh_after: Duration) -> Result<Self, ImportError> {
        let good = |c: char| c.is_ascii_alphanumeric() || c == '-';
        if suite.is_empty() || !suite.chars().all(good) {
            return Err(ImportError::Request(format!(
                "{suite:?} is not the name of a Debian release"
            )));
        }
        let directory = parent.join("apt").join(suite);
        for part in [
            "lists/partial",
            "archives/partial",
            "sources.d",
            "empty",
            "log",
        ] {
            let path = directory.join(part);
            fs::create_dir_all(&path).map_err(io_error("creating", &path))?;
        }
        let cache = Self {
            directory,
            suite: suite.to_owned(),
            refresh_after,
            mirror: None,
        };
        Ok(cache)
    }

    /// Uses the mirror at `uri` alone, instead of the host's sources.
    pub fn with_mirror(mut self, uri: Option<String>) -> Self {
        self.mirror = uri;
        self
    }

    /// Where downloaded package archives are.
    pub fn archives(&self) -> PathBuf {
        self.directory.join("archives")
    }

    /// Waits for other builds that use this cache.
    pub fn lock(&self) -> Result<AptLock, ImportError> {
        let path = self.directory.join("lock");
        let file = File::create(&path).map_err(io_error("creating", &path))?;
        file.lock().map_err(io_error("locking", &path))?;
        Ok(AptLock { _file: file })
    }

    /// Writes the sources (the host's for this release, else Debian's own) and returns
    /// their path, for tools that want it.
    pub fn write_sources(&self) -> Result<PathBuf, ImportError> {
        let path = self.directory.join("sources.d/forelay.list");
        let text = match &self.mirror {
            Some(uri) => format!("deb {uri} {} main\n", self.suite),
            None => sources_text(&host_sources(), &self.suite),
        };
        fs::write(&path, text).map_err(io_error("writing", &path))?;
        Ok(path)
    }

    /// Where all that is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes a configuration for resolving what the root at `root` lacks (`None`: no packages
    /// installed) and returns its path, to be given in `APT_CONFIG`. The root may be anybody's:
    /// its status is copied, and no program of it runs.
    pub fn write_config(&self, root: Option<&Path>) -> Result<PathBuf, ImportError> {
        let (name, status) = match root {
            Some(root) => {
                let status = read_within(root, "var/lib/dpkg/status");
                (
                    "root",
                    status.map_err(io_error("reading dpkg's status in", root))?,
                )
            }
            None => ("empty", Vec::new()),
        };
        let status_path = self.directory.join(format!("{name}-status"));
        fs::write(&status_path, status).map_err(io_error("writing", &status_path))?;
        let path = self.directory.join(format!("{name}.conf"));
        let places = Places {
            cache: &self.directory.display().to_string(),
            state: &self.directory.display().to_string(),
            archives: &self.archives().display().to_string(),
            status: &status_path.display().to_string(),
        };
        let mut text = places.settings();
        if let Some(root) = root {
            text.push_str(&architectures(root));
        }
        text.push_str(&host_acquire_options()?);
        fs::write(&path, text).map_err(io_error("writing", &path))?;
        Ok(path)
    }

    /// Writes a configuration for installing in a sandbox, and returns its path there.
    /// `archives` is where the archives are in the scratch root.
    pub(crate) fn write_sandbox_config(&self, archives: &str) -> Result<String, ImportError> {
        let places = Places {
            cache: APT,
            state: APT_STATE,
            archives: &format!("{TARGET}/{archives}"),
            status: &format!("{TARGET}/var/lib/dpkg/status"),
        };
        let mut text = places.settings();
        // Nobody else is there, and nothing of the cache can be written.
        text.push_str("Debug::NoLocking \"true\";\n");
        text.push_str(&format!(
            "DPkg::Chroot-Directory \"{TARGET}\";\n\
             DPkg::Options:: \"--force-unsafe-io\";\nDPkg::Options:: \"--force-confnew\";\n"
        ));
        let path = self.directory.join("sandbox.conf");
        fs::write(&path, text).map_err(io_error("writing", &path))?;
        self.open_to_sandbox()?;
        Ok(format!("{APT}/sandbox.conf"))
    }

    /// A sandbox's root is none of the host's users: what it reads must be for all, whatever
    /// the umask with which it was made.
    fn open_to_sandbox(&self) -> Result<(), ImportError> {
        for part in ["", "lists", "archives", "sources.d", "empty"] {
            let directory = self.directory.join(part);
            let failed = || io_error("opening to builds", &directory);
            let mode =
                |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
            mode(&directory, 0o755).map_err(failed())?;
            for entry in fs::read_dir(&directory).map_err(failed())? {
                let entry = entry.map_err(failed())?;
                if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                    mode(&entry.path(), 0o644).map_err(failed())?;
                }
            }
        }
        Ok(())
    }

    /// Writes the host's settings for reaching its mirrors alone, for tools that make a
    /// configuration of their own; `None` if there are none.
    pub fn write_acquire_settings(&self) -> Result<Option<PathBuf>, ImportError> {
        let settings = host_acquire_options()?;
        let path = self.directory.join("acquire.conf");
        fs::write(&path, &settings).map_err(io_error("writing", &path))?;
        Ok((!settings.is_empty()).then_some(path))
    }

    /// Refreshes the indexes if they are older than the cache allows.
    pub fn refresh(&self, _lock: &AptLock, report: Reporter<'_>) -> Result<(), ImportError> {
        let stamp = self.directory.join("refreshed");
        let sources = self.write_sources()?;
        let text = fs::read_to_string(&sources).map_err(io_error("reading", &sources))?;
        let fresh = fs::read_to_string(&stamp).is_ok_and(|stamped| stamped == text)
            && age(&stamp).is_some_and(|age| age < self.refresh_after);
        if fresh {
            return Ok(());
        }
        report(Progress::Started(BuildPhase::Refresh));
        let config = self.write_config(None)?;
        let updated = Tool::new("apt-get", "apt", "refreshing package indexes")
            .env("APT_CONFIG", config)
            .args(["-q", "update"])
            .run(|_| ());
        updated.map_err(network_error)?;
        fs::write(&stamp, text).map_err(io_error("writing", &stamp))
    }

    /// Downloads the candidate version of `package` (not its dependencies) into the
    /// archives directory and returns the file.
    pub fn download(
        &self,
        _lock: &AptLock,
        package: &str,
        report: Reporter<'_>,
    ) -> Result<PathBuf, ImportError> {
        let config = self.write_config(None)?;
        // In a directory without archives: of one that lies where it runs apt says nothing.
        let shown = Tool::new("apt-get", "apt", format!("looking up {package}"))
            .directory(&self.directory.join("empty"))
            .env("APT_CONFIG", &config)
            .args(["-q", "--print-uris", "download", package])
            .output();
        let shown = match shown {
            Err(ImportError::Tool { tail, .. }) if tail.contains("Unable to locate package") => {
                return Err(self.no_such_package(package));
            }
            other => other.map_err(network_error)?,
        };
        // 'URI' NAME_VERSION_ARCH.deb BYTES SHA256:…
        let name = shown
            .lines()
            .find(|line| line.starts_with('\''))
            .and_then(|line| line.split_whitespace().nth(1));
        let Some(name) = name else {
            return Err(self.no_such_package(package));
        };
        let path = self.archives().join(name);
        Tool::new("apt-get", "apt", format!("downloading {package}"))
            .directory(&self.archives())
            .env("APT_CONFIG", &config)
            .args(["-q", "-o", "APT::Status-Fd=1", "download", package])
            .run(|line| report_line(line, report))
            .map_err(network_error)?;
        if path.is_file() {
            return Ok(path);
        }
        Err(crate::error::archive_error(path, "apt did not download it"))
    }

    /// The error for a name that the sources do not have, with the nearest that they have.
    pub fn no_such_package(&self, name: &str) -> ImportError {
        let names = self.write_config(None).and_then(|config| {
            Tool::new("apt-cache", "apt", "listing package names")
                .env("APT_CONFIG", config)
                .arg("pkgnames")
                .output()
        });
        let names = names.unwrap_or_default();
        ImportError::NoSuchPackage {
            name: name.to_owned(),
            sources: format!("the apt sources for {}", self.suite),
            nearest: nearest_names(name, names.lines()),
        }
    }
}

/// Where apt finds and keeps things.
struct Places<'a> {
    /// Lists and sources.
    cache: &'a str,
    /// What it writes besides.
    state: &'a str,
    archives: &'a str,
    /// dpkg's status.
    status: &'a str,
}

impl Places<'_> {
    fn settings(&self) -> String {
        let Self {
            cache,
            state,
            archives,
            status,
        } = self;
        format!(
            "Dir::Etc::main \"/dev/null\";\nDir::Etc::parts \"{cache}/empty\";\n\
             Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{cache}/sources.d\";\n\
             Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"{cache}/empty\";\n\
             Dir::State \"{state}\";\nDir::State::lists \"{cache}/lists\";\n\
             Dir::State::extended_states \"{state}/extended_states\";\n\
             Dir::State::status \"{status}\";\nDir::Cache \"{state}\";\n\
             Dir::Cache::archives \"{archives}\";\nDir::Log \"{state}/log\";\n\
             APT::Install-Recommends \"false\";\nAPT::Install-Suggests \"false\";\n\
             APT::Sandbox::User \"root\";\nAPT::Get::Assume-Yes \"true\";\n\
             APT::Keep-Downloaded-Packages \"true\";\nAPT::Cmd::Disable-Script-Warning \"true\";\n\
             APT::Update::Error-Mode \"any\";\nAcquire::Languages \"none\";\n\
             Acquire::Retries \"2\";\nAcquire::http::Timeout \"20\";\nDpkg::Use-Pty \"false\";\n"
        )
    }
}

/// The architectures of a root, so that apt does not ask the root's own dpkg.
fn architectures(root: &Path) -> String {
    let native = host_architecture();
    let text = read_within(root, "var/lib/dpkg/arch").unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let good = |name: &&str| {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        *name != native && !name.is_empty() && name.chars().all(plain)
    };
    let foreign = text.lines().map(str::trim).filter(good);
    let names = std::iter::once(native).chain(foreign);
    let names = names.map(|name| format!("APT::Architectures:: \"{name}\";\n"));
    format!(
        "APT::Architecture \"{native}\";\n{}",
        names.collect::<String>()
    )
}

/// Passes a line of apt's status descriptor on, if it is one.
pub(crate) fn report_line(line: &str, report: Reporter<'_>) {
    if let Some(progress) = apt_status(line) {
        report(progress);
    }
}

/// Tells failures to download from other failures of apt.
pub(crate) fn network_error(error: ImportError) -> ImportError {
    const SIGNS: &[&str] = &[
        "Failed to fetch",
        "Could not resolve",
        "Temporary failure resolving",
        "Could not connect",
        "Connection failed",
        "Unable to fetch some archives",
        "Some index files failed to download",
    ];
    match error {
        ImportError::Tool { tail, .. } if SIGNS.iter().any(|sign| tail.contains(sign)) => {
            ImportError::Network { explanation: tail }
        }
        other => other,
    }
}

fn age(path: &Path) -> Option<Duration> {
    let modified = fs::metadata(path).ok()?.modified().ok()?;
    SystemTime::now().duration_since(modified).ok()
}

/// The texts of the host's source lists: (is deb822, text).
fn host_sources() -> Vec<(bool, String)> {
    let mut paths = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        paths.extend(entries.flatten().map(|entry| entry.path()));
    }
    paths.sort();
    let read = paths.iter().filter_map(|path| {
        let extension = path.extension()?;
        let deb822 = extension == "sources";
        (deb822 || extension == "list").then_some(())?;
        Some((deb822, fs::read_to_string(path).ok()?))
    });
    read.collect()
}

/// One-line sources for `suite` with its updates and security suites, component `main`:
/// the host's, else Debian's own servers.
fn sources_text(host: &[(bool, String)], suite: &str) -> String {
    let updates = format!("{suite}-updates");
    let security = format!("{suite}-security");
    let wanted = |name: &str| name == suite || name == updates || name == security;
    let mut lines = Vec::new();
    for (deb822, text) in host {
        if *deb822 {
            lines.extend(deb822_lines(text, wanted));
        } else {
            lines.extend(text.lines().filter_map(|line| list_line(line, wanted)));
        }
    }
    if !lines
        .iter()
        .any(|line| line.contains(&format!(" {suite} ")))
    {
        lines = vec![
            format!("deb {DEFAULT_MIRROR} {suite} main"),
            format!("deb {DEFAULT_MIRROR} {updates} main"),
            format!("deb {DEFAULT_SECURITY_MIRROR} {security} main"),
        ];
    }
    lines.dedup();
    lines.join("\n") + "\n"
}

fn deb822_lines(text: &str, wanted: impl Fn(&str) -> bool) -> Vec<String> {
    let mut lines = Vec::new();
    for stanza in forelay_image::control::parse_paragraphs(text) {
        let has =
            |field: &str, word: &str| stanza.field(field).split_whitespace().any(|w| w == word);
        if !has("Types", "deb") || !has("Components", "main") || has("Enabled", "no") {
            continue;
        }
        let signed = stanza.field("Signed-By");
        let options = match signed.starts_with('/') {
            true => format!("[signed-by={signed}] "),
            false => String::new(),
        };
        for uri in stanza.field("URIs").split_whitespace() {
            let suites = stanza.field("Suites").split_whitespace();
            for suite in suites.filter(|suite| wanted(suite)) {
                lines.push(format!("deb {options}{uri} {suite} main"));
            }
        }
    }
    lines
}

fn list_line(line: &str, wanted: impl Fn(&str) -> bool) -> Option<String> {
    let rest = line.trim().strip_prefix("deb ")?.trim();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (options, rest) = rest.split_once(']')?;
            (format!("[{options}] "), rest)
        }
        None => (String::new(), rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let has_main = words.any(|component| component == "main");
    (has_main && wanted(suite)).then(|| format!("deb {options}{uri} {suite} main"))
}

/// The host's settings for reaching its mirrors: proxies, certificates, validity checks.
fn host_acquire_options() -> Result<String, ImportError> {
    let dump = Tool::new("apt-config", "apt", "reading apt's settings")
        .args(["dump", "--no-empty"])
        .output()?;
    const KEPT: &[&str] = &[
        "Acquire::http::",
        "Acquire::https::",
        "Acquire::ftp::",
        "Acquire::Check-",
        "Acquire::Max-FutureTime",
        "Acquire::ForceIPv",
    ];
    let kept = dump
        .lines()
        .filter(|line| KEPT.iter().any(|prefix| line.starts_with(prefix)));
    Ok(kept.fold(String::new(), |out, line| out + line + "\n"))
}

/// Up to three of `names` that `name` is probably a misspelling of, nearest first.
pub fn nearest_names<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let limit = (name.len() / 3).clamp(1, 3);
    let mut near: Vec<(usize, &str)> = names
        .filter_map(|candidate| {
            let distance = strsim::osa_distance(name, candidate);
            if distance <= limit {
                return Some((distance, candidate));
            }
            let longer = candidate.starts_with(name) && name.len() >= 3;
            longer.then(|| (limit + candidate.len() - name.len(), candidate))
        })
        .collect();
    near.sort_unstable();
    near.dedup();
    near.truncate(3);
    near.into_iter().map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_names_find_what_was_meant() {
        let names = ["nginx", "nginx-core", "redis", "redis-server", "zsh"];
        let nearest = |name| nearest_names(name, names.iter().copied());
        assert_eq!(nearest("ngnix"), ["nginx"]);
        assert_eq!(nearest("redis-sever"), ["redis-server"]);
        assert_eq!(nearest("reddis"), ["redis"]);
        assert!(nearest("quite-different").is_empty());
    }

    #[test]
    fn host_sources_are_used_for_the_release_alone() {
        let deb822 = "Types: deb\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates \
                      bookworm-backports\nComponents: main contrib\nSigned-By: /k.gpg\n\n\
                      Types: deb\nEnabled: no\nURIs: http://off\nSuites: bookworm\nComponents: main\n";
        let list = "# comment\ndeb [arch=amd64] http://sec/ bookworm-security main\n\
                    deb http://pg/ bookworm-pgdg main\ndeb-src http://x/ bookworm main\n\
                    deb http://docker/ bookworm stable\n";
        let host = [(true, deb822.to_owned()), (false, list.to_owned())];
        assert_eq!(
            sources_text(&host, "bookworm"),
            "deb [signed-by=/k.gpg] http://mirror/debian bookworm main\n\
             deb [signed-by=/k.gpg] http://mirror/debian bookworm-updates main\n\
             deb [arch=amd64] http://sec/ bookworm-security main\n"
        );
        let other = sources_text(&host, "trixie");
        assert!(
            other.contains("deb.debian.org/debian trixie main"),
            "{other}"
        );
    }

    #[test]
    fn download_failures_are_told_from_other_failures() {
        let failed = |tail: &str| ImportError::Tool {
            tool: "apt-get".into(),
            status: "1".into(),
            doing: "testing".into(),
            tail: tail.into(),
        };
        let network = network_error(failed("E: Failed to fetch http://x Could not resolve 'x'"));
        assert!(matches!(network, ImportError::Network { .. }));
        let other = network_error(failed("E: dpkg broke"));
        assert!(matches!(other, ImportError::Tool { .. }));
    }
}
