//! A Debian root file system, built by mmdebstrap from the host's mirrors.
//!
//! Owns what belongs in a base and the one place where it differs from what mmdebstrap
//! leaves: standard sources (a digest must not depend on the mirror), stable account ids,
//! account fragments for [`forelay_guest_protocol::accounts`], no build-time traces. `/etc/ld.so.cache` and
//! dpkg's database stay: they describe the base truly, and components that add libraries
//! rely on ld.so's default search path, not on the cache.
//!
//! Invariant: two builds of the same set of packages give the same tree.

use std::path::Path;

use forelay_image::component::Role;
use forelay_image::tree::{Attributes, Tree};

use crate::apt::{AptCache, network_error};
use crate::clean::{clamp_times, remove_noise, remove_secrets};
use crate::deb::read_small_file;
use crate::dir::{Ownership, read_directory};
use crate::draft::{Draft, Imported, plain_files};
use crate::error::{ImportError, text_of, tree_error};
use crate::progress::{BuildPhase, Progress, Reporter};
use crate::rootfs::{describe_base, put_fragments};
use crate::spool::{DEFAULT_LIMIT_BYTES, Spool};
use crate::stable_ids::{IdMap, without_change_days};
use crate::tool::{Tool, require_root};

/// Documentation and translations that a slim base leaves out; licences stay.
const SLIM: &[&str] = &[
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    // Alternatives have links there, and fail without the directories.
    "path-include=/usr/share/man/man[1-9]",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
    "path-include=/usr/share/locale/locale.alias",
    "path-exclude=/usr/share/lintian/*",
    "path-exclude=/usr/share/bug/*",
];

/// dpkg's option for the build, which the base does not keep.
const UNSAFE_IO: &str = "force-unsafe-io";
const DPKG_OPTIONS: &str = "etc/dpkg/dpkg.cfg.d/99mmdebstrap";

/// Packages that make a base boot with systemd as its init.
const SYSTEMD: &[&str] = &["systemd-sysv", "dbus", "udev", "kmod", "iproute2"];

/// The Debian release that is taken where none is named.
pub(crate) const DEFAULT_SUITE: &str = "bookworm";

/// The day on which Debian 12 came out: the time of files if no package gives one.
pub(crate) const FALLBACK_TIME_S: i64 = 1_686_355_200;

/// What base to build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseOptions {
    /// Debian release.
    pub suite: String,
    /// Packages beyond the minimum.
    pub include: Vec<String>,
    /// With systemd as init, so that a VM may hand over to it.
    pub systemd: bool,
    /// Without documentation and translations; components built on it are slim too.
    pub slim: bool,
}

impl Default for BaseOptions {
    fn default() -> Self {
        Self {
            suite: DEFAULT_SUITE.to_owned(),
            include: Vec::new(),
            systemd: false,
            slim: true,
        }
    }
}

impl BaseOptions {
    /// The name of the component, unless the request gives another.
    pub fn default_name(&self) -> String {
        let name = if self.systemd {
            "debian-systemd"
        } else {
            "debian"
        };
        name.to_owned()
    }

    fn packages(&self) -> Vec<String> {
        let systemd = if self.systemd { SYSTEMD } else { &[] };
        let mut packages: Vec<String> = systemd.iter().map(|name| (*name).to_owned()).collect();
        packages.extend(self.include.iter().cloned());
        packages
    }
}

/// Builds a base named `name`. Needs root and mmdebstrap.
pub fn build_base(
    options: &BaseOptions,
    name: &str,
    apt: &AptCache,
    scratch: &Path,
    report: Reporter<'_>,
) -> Result<Imported, ImportError> {
    require_root("building a Debian base")?;
    let spool = Spool::new(scratch, DEFAULT_LIMIT_BYTES)?;
    let root = spool.path().join("root");
    let started_s = now_s() - 1;
    bootstrap(options, apt, &root, report)?;
    report(Progress::Started(BuildPhase::Read));
    let mut tree = read_directory(&root, Ownership::Keep)?.tree;
    let notes = clean_base(&mut tree, options, name, &root, started_s)?;
    let draft = describe(&tree, options, name, &root, notes)?;
    Ok(Imported::alone(tree, draft, vec![spool]))
}

fn bootstrap(
    options: &BaseOptions,
    apt: &AptCache,
    root: &Path,
    report: Reporter<'_>,
) -> Result<(), ImportError> {
    let lock = apt.lock()?;
    apt.refresh(&lock, report)?;
    report(Progress::Started(BuildPhase::Install));
    let archives = apt.archives();
    // A private mount namespace: whatever happens, no mount is left on the host.
    let mut tool = Tool::new("unshare", "util-linux", "building the Debian base")
        .args(["--mount", "--propagation", "private", "--"])
        .args([
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            "--format=directory",
        ])
        .arg("--skip=essential/unlink")
        // The root is thrown away if the host fails: no need to wait for its disk.
        .arg(format!("--dpkgopt={UNSAFE_IO}"))
        .arg(format!(
            "--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives && \
             mount --bind '{}' \"$1\"/var/cache/apt/archives",
            archives.display()
        ))
        .arg("--customize-hook=umount \"$1\"/var/cache/apt/archives");
    let packages = options.packages();
    if !packages.is_empty() {
        tool = tool.arg(format!("--include={}", packages.join(",")));
    }
    if options.slim {
        tool = tool.args(SLIM.iter().map(|rule| format!("--dpkgopt={rule}")));
    }
    if let Some(settings) = apt.write_acquire_settings()? {
        tool = tool.arg(format!("--aptopt={}", settings.display()));
    }
    let sources = apt.write_sources()?;
    let made = tool.arg(&options.suite).arg(root).arg(sources).run(|_| ());
    made.map_err(|error| bootstrap_error(error, &packages, apt))
}

fn bootstrap_error(error: ImportError, packages: &[String], apt: &AptCache) -> ImportError {
    match network_error(error) {
        ImportError::Tool { tail, .. } if tail.contains("mmdebstrap: No such file") => {
            ImportError::MissingTool {
                tool: "mmdebstrap".to_owned(),
                package: "mmdebstrap",
            }
        }
        ImportError::Tool { tail, .. } if tail.contains("Unable to locate package") => {
            let missing = packages
                .iter()
                .find(|name| tail.contains(&format!("Unable to locate package {name}")));
            apt.no_such_package(missing.map_or("?", String::as_str))
        }
        other => other,
    }
}

/// Makes the tree reproducible; returns notes for the component.
fn clean_base(
    tree: &mut Tree,
    options: &BaseOptions,
    name: &str,
    root: &Path,
    started_s: i64,
) -> Result<Vec<String>, ImportError> {
    remove_noise(tree);
    let secrets = remove_secrets(tree);
    for path in [
        "etc/apt/sources.list.d/0000sources.list",
        "etc/apt/sources.list.d/0000forelay.list",
        "etc/apt/sources.list",
        "etc/apt/apt.conf.d/99mmdebstrap",
    ] {
        tree.remove_path(path.as_bytes());
    }
    if let Some(text) = text_of(tree, DPKG_OPTIONS)? {
        tree.remove_path(DPKG_OPTIONS.as_bytes());
        let kept: Vec<&str> = text.lines().filter(|line| *line != UNSAFE_IO).collect();
        if !kept.is_empty() {
            let text = kept.join("\n") + "\n";
            tree.put_file("etc/dpkg/dpkg.cfg.d/slim", text.into_bytes(), made(0o644))
                .map_err(tree_error(root))?;
        }
    }
    let sources = standard_sources(&options.suite);
    let place = "etc/apt/sources.list.d/debian.sources";
    tree.put_file(place, sources, made(0o644))
        .map_err(tree_error(root))?;
    stable_accounts(tree, root)?;
    put_fragments(tree, name, root)?;
    clamp_times(tree, started_s, FALLBACK_TIME_S);
    let removed = secrets.into_iter().map(|what| format!("left out: {what}"));
    Ok(removed.collect())
}

/// Gives dynamically allocated accounts their stable ids and forgets the build's day.
fn stable_accounts(tree: &mut Tree, root: &Path) -> Result<(), ImportError> {
    let text = |tree: &Tree, path: &str| -> Result<String, ImportError> {
        let bytes = read_small_file(tree, path.as_bytes(), root)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let (passwd, group) = (text(tree, "etc/passwd")?, text(tree, "etc/group")?);
    let map = IdMap::new("", &passwd, "", &group);
    map.apply(tree);
    let shadow = without_change_days(&text(tree, "etc/shadow")?);
    tree.replace_content("etc/passwd", map.passwd(&passwd).into_bytes());
    tree.replace_content("etc/group", map.group_file(&group).into_bytes());
    tree.replace_content("etc/shadow", shadow.into_bytes());
    Ok(())
}

fn describe(
    tree: &Tree,
    options: &BaseOptions,
    name: &str,
    root: &Path,
    notes: Vec<String>,
) -> Result<Draft, ImportError> {
    let release = read_small_file(tree, b"etc/debian_version", root)?;
    let release = String::from_utf8_lossy(&release).trim().to_owned();
    let version = format!("{release}+{}", newest_package_day(tree));
    let with = if options.systemd { " with systemd" } else { "" };
    let mut draft = plain_files(name, &version, Role::Base);
    draft.description = format!("Debian {release} ({}), minimal{with}", options.suite);
    draft.notes = notes;
    describe_base(tree, &mut draft)?;
    Ok(draft)
}

/// The day of the newest file that came out of a package, as `20260915`: a base with a
/// later security update gets a later version. (`clamp_times` has made it the maximum.)
fn newest_package_day(tree: &Tree) -> String {
    let nodes = tree.reachable();
    let times = nodes.iter().map(|&id| tree.node(id).attributes.mtime_s);
    let newest_s = times.max().unwrap_or(FALLBACK_TIME_S);
    let (year, month, day) = civil_date(newest_s.div_euclid(86_400));
    format!("{year:04}{month:02}{day:02}")
}

/// Days since 1970-01-01 as a date. Counting years from March makes the leap day the
/// last of its year; an era is 400 years of 146,097 days (H. Hinnant, "chrono-compatible
/// low-level date algorithms").
fn civil_date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

fn standard_sources(suite: &str) -> Vec<u8> {
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    format!(
        "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: {suite} {suite}-updates\n\
         Components: main\nSigned-By: {keyring}\n\n\
         Types: deb\nURIs: http://deb.debian.org/debian-security\nSuites: {suite}-security\n\
         Components: main\nSigned-By: {keyring}\n"
    )
    .into_bytes()
}

/// Attributes of a file that the build makes: root-owned, of no time of the build's.
pub(crate) fn made(mode: u16) -> Attributes {
    Attributes::with_mode(mode).modified_at(FALLBACK_TIME_S)
}

/// Seconds since the epoch, now: what separates files of packages from files of the build.
pub(crate) fn now_s() -> i64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        assert_eq!(civil_date(0), (1970, 1, 1));
        assert_eq!(civil_date(FALLBACK_TIME_S / 86_400), (2023, 6, 10));
        assert_eq!(civil_date(19_782), (2024, 2, 29));
        assert_eq!(civil_date(-1), (1969, 12, 31));
    }

    #[test]
    fn a_systemd_base_has_its_own_name_and_packages() {
        let options = BaseOptions {
            systemd: true,
            include: vec!["vim-tiny".into()],
            ..BaseOptions::default()
        };
        assert_eq!(options.default_name(), "debian-systemd");
        let packages = options.packages();
        assert!(packages.contains(&"systemd-sysv".to_owned()));
        assert!(packages.contains(&"vim-tiny".to_owned()));
        assert!(BaseOptions::default().packages().is_empty());
    }
}
