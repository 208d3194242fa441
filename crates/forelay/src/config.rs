//! The host's configuration: a TOML file with a default for everything.
//!
//! Looked for at `--config`, `$FORELAY_CONFIG`, `/etc/forelay/forelay.toml`, in this
//! order; a missing default file means all defaults. Unknown keys are errors.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use forelay_image::NameOf;
use forelay_import::BuildLimits;
use forelay_import::users::{DEFAULT_FIRST_USER, UserRange};
use forelay_store::RepositoryUrl;
use forelay_store::repositories::address::BadUrl;
use serde::{Deserialize, Serialize};

/// Where the configuration is when nobody says.
pub const DEFAULT_PATH: &str = "/etc/forelay/forelay.toml";

/// Host configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What must survive a reboot: disk cache, history, keys.
    pub state_dir: PathBuf,
    /// What need not: mounts, VM runtime directories, the socket.
    pub runtime_dir: PathBuf,
    /// The API's Unix socket; `runtime_dir/forelay.sock` if absent.
    pub socket: Option<PathBuf>,
    /// Group whose users may reach the socket; what they may do there, `access` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Where components come from.
    pub repository: RepositoryConfig,
    /// The disk cache in front of the repository.
    pub cache: CacheConfig,
    /// Shared memory.
    pub memory: MemoryConfig,
    /// Learning and forecasting.
    pub forecast: ForecastConfig,
    /// Snapshots that launches resume from.
    pub snapshots: SnapshotConfig,
    /// VMM defaults.
    pub vmm: VmmConfig,
    /// What builds of components run, and may take.
    pub build: BuildConfig,
    /// Which owners users act for; root acts for all, whom no entry names for none.
    pub access: Vec<AccessRule>,
    /// The API and the dashboard over TCP.
    pub api: ApiConfig,
}

/// The API and the dashboard over TCP.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiConfig {
    /// Where they are served besides the socket: 127.0.0.1 or [::1] and a port, 0 for any.
    /// Clients there need the token that is in the state directory (`api-token`, readable for
    /// root alone). It is an operator's: who has it sees and handles what is of all owners,
    /// whatever `access` says, as root does. With `api-read-token` beside it all is only seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
}

/// Which owners a user or the users of a group act for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AccessRule {
    /// A user, by name or number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Or a group, by name or number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Owners in manifests; `*` for all, and all that concerns the whole host.
    pub owners: Vec<String>,
}

impl AccessRule {
    fn check(&self) -> Result<(), String> {
        if self.user.is_some() == self.group.is_some() || self.owners.is_empty() {
            return Err(
                "an [[access]] entry has either `user` or `group`, and `owners`".to_owned(),
            );
        }
        let owners = self.owners.iter().filter(|owner| *owner != "*");
        for owner in owners {
            NameOf::Owner
                .check(owner)
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

/// Where components come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RepositoryConfig {
    /// `dir:/PATH`, `s3://BUCKET/PREFIX` or `oci://HOST/NAME`: where components are published;
    /// the directory `state_dir/repository` if neither this nor `path` is given.
    pub url: Option<String>,
    /// Asked after `url`, in this order, when it fails or lacks something.
    pub mirrors: Vec<String>,
    /// A directory; the same as `url = "dir:..."`.
    pub path: Option<PathBuf>,
    /// Longest time that the repository may take to answer, in seconds; what takes longer
    /// fails for now.
    pub timeout_s: f64,
    /// Added to every request, in milliseconds: stands in for a remote repository.
    pub latency_ms: u64,
    /// Ceiling on bytes per second, 0 for none: stands in for a remote repository.
    pub bandwidth_bytes_per_s: u64,
}

/// The disk cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CacheConfig {
    /// Directory; `state_dir/cache` if absent.
    pub path: Option<PathBuf>,
    /// Cap in bytes.
    pub cap_bytes: u64,
}

/// Shared memory.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryConfig {
    /// Most bytes that components may take; 0 for adaptive (a share of free memory).
    pub budget_bytes: u64,
    /// Available memory below this is critical, in bytes; 0 for 5% of all memory.
    pub critical_bytes: u64,
    /// Owner whose VMs offer their memory to the kernel's search for pages that are the same
    /// (KSM), nobody's if absent. One alone: the kernel knows no trust domains, and who can tell
    /// that a page was shared knows what another VM has in memory.
    pub ksm: Option<String>,
}

/// Learning and forecasting.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ForecastConfig {
    /// The kill switch: with `false` nothing is prefetched, everything is on demand.
    pub prefetch: bool,
    /// Prefetch and set up before a launch is asked for.
    pub ahead: bool,
    /// Let launches of one owner's profiles tell what another owner's will touch.
    pub pool_across_owners: bool,
    /// Seconds after `ready` during which touches still count to the working set.
    pub window_s: f64,
    /// How far ahead needs are forecast, in seconds: several times what loading a profile takes.
    pub horizon_s: f64,
    /// How many times faster than the clock on the wall the forecaster's clock runs, from
    /// `time_origin_ms` on. For benches and replays that compress a day; 1 on a real host.
    pub time_scale: f64,
    /// From when on (milliseconds since the epoch) it runs faster.
    pub time_origin_ms: i64,
    /// What the forecaster's clock shows then; the same, if absent.
    pub time_starts_ms: Option<i64>,
}

/// Snapshots that launches resume from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SnapshotConfig {
    /// Make them in the background for what is launched again and again, while memory is
    /// plentiful; with `false`, `forelay snapshot create` alone makes them.
    pub make: bool,
    /// Not while tasks wait for a CPU for more of the time than this, in percent; 100 is never.
    pub cpu_stall: f64,
    /// Most VMMs that are started, and wait in a resumed VM's memory, before a likely launch is
    /// asked for; 0 for none.
    pub standby: usize,
    /// Most bytes on disk that the snapshots of one trust domain may take; the least useful go
    /// first.
    pub cap_bytes: u64,
    /// Longest time that the VM of which a snapshot is made may take until it can be saved, in
    /// seconds; it is ended then, and no snapshot is made.
    pub maker_limit_s: f64,
}

/// VMM defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmmConfig {
    /// The QEMU program.
    pub qemu: PathBuf,
    /// `auto` probes KVM once and falls back to TCG; `kvm` and `tcg` force one.
    pub accelerator: String,
    /// Most pmem devices per VM before small components are bundled.
    pub pmem_slots: usize,
    /// VMMs run as users without rights, one for each trust domain, and see nothing of the host
    /// but what they need. With `false` they are the host's root: for tests and comparisons.
    pub confine: bool,
    /// First of the user ids that VMMs run as; nobody else may have them.
    pub first_user: u32,
    /// How many there are: a trust domain takes one for good.
    pub users: u32,
    /// How much is kept of what a VM's console prints, and of what its VMM says: of each the
    /// newest, to the next 64 KiB.
    pub log_bytes: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/forelay".into(),
            runtime_dir: "/run/forelay".into(),
            socket: None,
            repository: RepositoryConfig::default(),
            cache: CacheConfig::default(),
            memory: MemoryConfig::default(),
            forecast: ForecastConfig::default(),
            snapshots: SnapshotConfig::default(),
            vmm: VmmConfig::default(),
            build: BuildConfig::default(),
            group: None,
            access: Vec::new(),
            api: ApiConfig::default(),
        }
    }
}

impl RepositoryConfig {
    /// Longest time that the repository may take to answer: a millisecond to a day.
    pub fn timeout(&self) -> std::time::Duration {
        limit(self.timeout_s, Self::default().timeout_s)
    }
}

/// A time limit of so many seconds, within what makes sense.
fn limit(seconds: f64, default: f64) -> std::time::Duration {
    let seconds = if seconds.is_finite() {
        seconds
    } else {
        default
    };
    std::time::Duration::from_secs_f64(seconds.clamp(0.001, 86_400.0))
}

impl Default for RepositoryConfig {
    fn default() -> Self {
        Self {
            url: None,
            mirrors: Vec::new(),
            path: None,
            timeout_s: 30.0,
            latency_ms: 0,
            bandwidth_bytes_per_s: 0,
        }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            path: None,
            cap_bytes: 20 << 30,
        }
    }
}

impl ForecastConfig {
    /// How far ahead needs are forecast: from a minute to a day.
    pub fn horizon(&self) -> std::time::Duration {
        let seconds = if self.horizon_s.is_finite() {
            self.horizon_s.clamp(60.0, 86_400.0)
        } else {
            Self::default().horizon_s
        };
        std::time::Duration::from_secs_f64(seconds)
    }
}

impl Default for ForecastConfig {
    fn default() -> Self {
        Self {
            prefetch: true,
            ahead: true,
            pool_across_owners: false,
            window_s: 5.0,
            horizon_s: 600.0,
            time_scale: 1.0,
            time_origin_ms: 0,
            time_starts_ms: None,
        }
    }
}

impl Default for SnapshotConfig {
    fn default() -> Self {
        Self {
            make: true,
            cpu_stall: 50.0,
            standby: 2,
            cap_bytes: 4 << 30,
            maker_limit_s: 180.0,
        }
    }
}

impl SnapshotConfig {
    /// How long a maker's VM may take: a millisecond to a day.
    pub fn maker_limit(&self) -> std::time::Duration {
        limit(self.maker_limit_s, Self::default().maker_limit_s)
    }
}

impl Default for VmmConfig {
    fn default() -> Self {
        Self {
            qemu: "qemu-system-x86_64".into(),
            accelerator: "auto".into(),
            pmem_slots: 32,
            confine: true,
            // Neither systemd nor subordinate ids nor directories of users come near.
            first_user: 2_100_000_000,
            users: 65_536,
            log_bytes: 4 << 20,
        }
    }
}

/// What packages and bases run while they are installed: as whom, and what it may take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BuildConfig {
    /// First of the 65536 user ids of builds; nobody else may have them.
    pub first_user: u32,
    /// Seconds that installing may take.
    pub time_s: u64,
    /// Memory that it may take; 0 is half of the host's.
    pub memory_bytes: u64,
    /// Processes and threads that it may have.
    pub processes: u32,
    /// Bytes that it may write to the disk.
    pub disk_bytes: u64,
}

impl Default for BuildConfig {
    fn default() -> Self {
        let limits = BuildLimits::default();
        Self {
            first_user: DEFAULT_FIRST_USER,
            time_s: limits.time.as_secs(),
            memory_bytes: 0,
            processes: limits.processes,
            disk_bytes: limits.disk_bytes,
        }
    }
}

impl BuildConfig {
    /// What a build may take.
    pub fn limits(&self) -> BuildLimits {
        let defaults = BuildLimits::default();
        BuildLimits {
            time: std::time::Duration::from_secs(self.time_s),
            memory_bytes: match self.memory_bytes {
                0 => defaults.memory_bytes,
                bytes => bytes,
            },
            processes: self.processes,
            disk_bytes: self.disk_bytes,
            ..defaults
        }
    }

    /// Refuses users that are the host's or of VMMs.
    fn check(&self, vmm: &VmmConfig) -> Result<(), String> {
        let first = self.first_user;
        let last = first
            .checked_add(UserRange::COUNT)
            .filter(|end| *end < u32::MAX);
        let vmms = vmm.first_user..vmm.first_user.saturating_add(vmm.users);
        let apart = last.is_some_and(|last| last <= vmms.start || first >= vmms.end);
        if first < 1_000 || !apart {
            return Err(format!(
                "build.first_user {first}: {} user ids from there on must be above 1000 and none \
                 of VMMs (vmm.first_user {}, vmm.users {})",
                UserRange::COUNT,
                vmm.first_user,
                vmm.users
            ));
        }
        if self.time_s == 0 || self.processes == 0 || self.disk_bytes == 0 {
            return Err("build.time_s, processes and disk_bytes must not be 0".to_owned());
        }
        Ok(())
    }
}

/// Why the configuration could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: give another with --config or create it")]
    Read {
        /// The file.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is not valid.
    #[error("the configuration {path} is not valid: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        message: String,
    },
}

impl Config {
    /// Loads `path`, or the default places (see the module's header).
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let named = path.map(Path::to_path_buf).or_else(|| {
            std::env::var_os("FORELAY_CONFIG")
                .filter(|path| !path.is_empty())
                .map(PathBuf::from)
        });
        let path = named.clone().unwrap_or_else(|| DEFAULT_PATH.into());
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        let parsed: Result<Self, _> = toml::from_str(&text);
        let checked = parsed
            .map_err(|error| error.to_string())
            .and_then(|config| {
                config.check()?;
                Ok(config)
            });
        checked.map_err(|message| ConfigError::Parse { path, message })
    }

    /// What the types do not say.
    fn check(&self) -> Result<(), String> {
        if self.repository.url.is_some() && self.repository.path.is_some() {
            return Err("repository.url and repository.path: give one of them".to_owned());
        }
        self.repository_urls().map_err(|error| error.to_string())?;
        match self.vmm.accelerator.as_str() {
            "auto" | "kvm" | "tcg" => {}
            other => {
                return Err(format!(
                    "vmm.accelerator is {other:?}: it can be auto, kvm or tcg"
                ));
            }
        }
        for rule in &self.access {
            rule.check()?;
        }
        if let Some(owner) = &self.memory.ksm {
            NameOf::Owner
                .check(owner)
                .map_err(|error| format!("memory.ksm: {error}"))?;
        }
        // Where browsers look for names of localhost.
        let loopback = [
            IpAddr::from(Ipv4Addr::LOCALHOST),
            IpAddr::from(Ipv6Addr::LOCALHOST),
        ];
        let elsewhere = |one: &SocketAddr| !loopback.contains(&one.ip());
        if let Some(address) = self.api.listen.filter(elsewhere) {
            return Err(format!(
                "api.listen is {address}: the API is served on loopback alone, on 127.0.0.1 or \
                 [::1], for example 127.0.0.1:8900; to reach it from elsewhere use `ssh -L`"
            ));
        }
        let VmmConfig {
            first_user, users, ..
        } = self.vmm;
        if self.vmm.log_bytes < 64 << 10 {
            return Err("vmm.log_bytes must be at least 65536".to_owned());
        }
        // The last user id means none.
        let last = first_user.checked_add(users).filter(|end| *end < u32::MAX);
        if first_user < 1_000 || users == 0 || last.is_none() {
            return Err(format!(
                "vmm.first_user {first_user} and vmm.users {users} are no range of user ids \
                 above 1000"
            ));
        }
        self.build.check(&self.vmm)
    }

    /// Where the configuration is kept that a worker was last ready with.
    pub fn last_good_path(runtime_dir: &Path) -> PathBuf {
        runtime_dir.join("last-good.toml")
    }

    /// Where a worker whose holder has ended waits for another.
    pub fn handover_socket(&self) -> PathBuf {
        self.runtime_dir.join("handover.sock")
    }

    /// The API's Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.socket
            .clone()
            .unwrap_or_else(|| self.runtime_dir.join("forelay.sock"))
    }

    /// The token of clients over TCP.
    pub fn api_token_path(&self) -> PathBuf {
        self.state_dir.join("api-token")
    }

    /// The token of clients over TCP that only read.
    pub fn api_read_token_path(&self) -> PathBuf {
        self.state_dir.join("api-read-token")
    }

    /// The repository, then its mirrors.
    pub fn repository_urls(&self) -> Result<(RepositoryUrl, Vec<RepositoryUrl>), BadUrl> {
        let first = match &self.repository.url {
            Some(url) => url.parse()?,
            None => RepositoryUrl::directory(self.repository_path()),
        };
        let mirrors = self.repository.mirrors.iter().map(|url| url.parse());
        Ok((first, mirrors.collect::<Result<_, _>>()?))
    }

    /// The repository's directory, where it is in one.
    pub fn repository_path(&self) -> PathBuf {
        self.repository
            .path
            .clone()
            .unwrap_or_else(|| self.state_dir.join("repository"))
    }

    /// The disk cache's directory.
    pub fn cache_path(&self) -> PathBuf {
        self.cache
            .path
            .clone()
            .unwrap_or_else(|| self.state_dir.join("cache"))
    }

    /// Where trust domains are mounted.
    pub fn mounts_dir(&self) -> PathBuf {
        self.runtime_dir.join("memory")
    }

    /// Where snapshots are kept, those of each trust domain apart.
    pub fn snapshots_dir(&self) -> PathBuf {
        self.state_dir.join("snapshots")
    }

    /// Where the VMs that snapshots are made from keep their runtime files.
    pub fn makers_dir(&self) -> PathBuf {
        self.runtime_dir.join("makers")
    }

    /// Where VMMs that have no VM yet keep theirs.
    pub fn standby_dir(&self) -> PathBuf {
        self.runtime_dir.join("standby")
    }

    /// Where instances keep their runtime files.
    pub fn vms_dir(&self) -> PathBuf {
        self.runtime_dir.join("vms")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_refused_and_defaults_fill_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("forelay.toml");
        std::fs::write(&path, "[memory]\nbudget_bytes = 1048576\n").unwrap();
        let config = Config::load(Some(&path)).unwrap();
        assert_eq!(config.memory.budget_bytes, 1 << 20);
        assert!(config.forecast.prefetch);
        assert_eq!(config.forecast.horizon().as_secs(), 600);
        for (horizon_s, expected) in [(f64::NAN, 600), (-5.0, 60), (1e9, 86_400), (1800.0, 1800)] {
            let forecast = ForecastConfig {
                horizon_s,
                ..ForecastConfig::default()
            };
            assert_eq!(forecast.horizon().as_secs(), expected);
        }
        for (text, valid) in [
            ("[build]\nfirst_user = 2100000001\n", false),
            ("[build]\nfirst_user = 2099934464\n", true),
            ("[build]\nfirst_user = 0\n", false),
            ("[build]\nfirst_user = 4294950000\n", false),
            ("[build]\ntime_s = 0\n", false),
            ("[vmm]\nusers = 1000000\n", false),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(Config::load(Some(&path)).is_ok(), valid, "{text}");
        }
        std::fs::write(&path, "[memory]\nbuget_bytes = 1\n").unwrap();
        let error = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("buget_bytes"), "{error}");
        for (access, valid) in [
            ("user = \"ann\"\nowners = [\"a\", \"*\"]", true),
            ("user = \"ann\"\ngroup = \"ops\"\nowners = [\"a\"]", false),
            ("group = \"ops\"", false),
            ("owners = [\"a\"]", false),
            ("user = \"ann\"\nowners = [\"../a\"]", false),
        ] {
            std::fs::write(&path, format!("[[access]]\n{access}\n")).unwrap();
            let loaded = Config::load(Some(&path));
            assert_eq!(loaded.is_ok(), valid, "{access}: {loaded:?}");
            let Ok(config) = loaded else { continue };
            // As a worker keeps it for the next.
            std::fs::write(&path, toml::to_string(&config).unwrap()).unwrap();
            assert_eq!(Config::load(Some(&path)).unwrap(), config);
        }
        for (text, because) in [
            ("url = \"ftp://x\"", "no address of a repository"),
            ("url = \"s3://x\"\npath = \"/x\"", "give one of them"),
            ("mirrors = [\"oci://u:p@h/x\"]", "secrets"),
        ] {
            std::fs::write(&path, format!("[repository]\n{text}\n")).unwrap();
            let error = Config::load(Some(&path)).unwrap_err().to_string();
            assert!(error.contains(because), "{error}");
        }
        std::fs::write(&path, "[memory]\nksm = \"../a\"\n").unwrap();
        let error = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("memory.ksm"), "{error}");
        for (address, valid) in [
            ("127.0.0.1:8900", true),
            ("[::1]:0", true),
            ("127.0.0.5:8900", false),
            ("0.0.0.0:8900", false),
            ("192.0.2.7:80", false),
            ("localhost", false),
        ] {
            std::fs::write(&path, format!("[api]\nlisten = \"{address}\"\n")).unwrap();
            assert_eq!(Config::load(Some(&path)).is_ok(), valid, "{address}");
        }
        std::fs::write(&path, "[vmm]\naccelerator = \"xen\"\n").unwrap();
        let error = Config::load(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("auto, kvm or tcg"), "{error}");
        assert!(Config::load(Some(&dir.path().join("absent.toml"))).is_err());
    }
}
