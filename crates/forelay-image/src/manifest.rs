//! The manifest: the TOML file in which a user says what VM they want.
//!
//! Owns the syntax, its defaults and the wording of its errors: each names line and
//! column and, where it can, the fix. Refuses to know what exists in a repository.
//!
//! Invariant: a [`Manifest`] that parsed is consistent in itself: ranges and ports are
//! well-formed, `entrypoint` and `init` exclude each other, file paths are absolute, names
//! pass [`NameOf::check`].

use std::collections::BTreeMap;

use forelay_guest_protocol::snapshot::Tier;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Digest;
use crate::component::NameRange;
use crate::tree::{PATH_LIMIT_BYTES, is_plain_path};
use crate::version;
use crate::{NameError, NameOf};

/// What a VM is to be made of and how it is to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Name of VMs made from it, unless the launch gives another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Profile under which launches are remembered; the name if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// Owner of the trust domain; the daemon's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The base component, e.g. `debian@>= 12`.
    #[serde(with = "wanted")]
    pub base: NameRange,
    /// The kernel component; the newest available if absent.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        with = "wanted_option"
    )]
    pub kernel: Option<NameRange>,
    /// Further components, e.g. `nginx@>= 1.22`.
    #[serde(default, with = "wanted_list")]
    pub components: Vec<NameRange>,
    /// Command that the agent runs, container style.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// Arguments that take the place of a container image's own; its entrypoint stays.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
    /// Who runs the command: `user`, `user:group` or their numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Directory in which the command runs, made if it is not there.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "directory"
    )]
    pub workdir: Option<String>,
    /// Path of the image's own init to hand over to (`true`, `"systemd"` or a path).
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "init"
    )]
    pub init: Option<String>,
    /// Environment of the entrypoint.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// When the VM counts as ready; when it is mounted if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<Ready>,
    /// Host name; the VM's name if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Public keys that may log in as root.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ssh_keys: Vec<String>,
    /// The virtual machine.
    #[serde(default)]
    pub vm: VmSettings,
    /// What its guests can connect to.
    #[serde(default, skip_serializing_if = "NetworkSettings::is_default")]
    pub network: NetworkSettings,
    /// From what its launches may resume instead of booting.
    #[serde(default, skip_serializing_if = "SnapshotSettings::is_default")]
    pub snapshot: SnapshotSettings,
    /// Files of this VM alone, by absolute path.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "files"
    )]
    pub files: BTreeMap<String, FileEntry>,
}

/// The `[vm]` table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmSettings {
    /// Guest memory in MiB.
    #[serde(deserialize_with = "memory")]
    pub memory_mib: u64,
    /// Virtual CPUs.
    #[serde(deserialize_with = "cpus")]
    pub cpus: u32,
    /// Port forwards, `"HOST:GUEST"` or `"HOST:GUEST/udp"`; without a host port any free one.
    #[serde(with = "forwards")]
    pub forward: Vec<Forward>,
    /// Where the guest's writes go: `"tmpfs"` or the size of a scratch disk such as `"2G"`.
    #[serde(with = "scratch")]
    pub scratch: Scratch,
}

impl Default for VmSettings {
    fn default() -> Self {
        Self {
            memory_mib: 512,
            cpus: 1,
            forward: Vec::new(),
            scratch: Scratch::Tmpfs,
        }
    }
}

/// The `[network]` table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkSettings {
    /// Whether the guest reaches the host's loopback, as its gateway: services of the host, and
    /// ports of other VMs.
    pub host_loopback: bool,
}

impl NetworkSettings {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// The `[snapshot]` table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SnapshotSettings {
    /// The latest tier that a launch resumes from; `"off"` boots always.
    #[serde(with = "snapshot_at")]
    pub at: Option<Tier>,
    /// What clones may share with the VM that a snapshot was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secrets: Option<Secrets>,
}

/// Whether a VM's environment and files may be in a snapshot that a program has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Secrets {
    /// They may.
    Shared,
}

impl Default for SnapshotSettings {
    fn default() -> Self {
        Self {
            at: Some(Tier::Composed),
            secrets: None,
        }
    }
}

impl SnapshotSettings {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A host port that leads to a guest port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Forward {
    /// Port on the host's loopback interface; 0 for any free one.
    pub host: u16,
    /// Port in the guest.
    pub guest: u16,
    /// UDP instead of TCP.
    pub udp: bool,
}

impl Forward {
    /// Reads `8080:80`, `5353:53/udp` or `:80`.
    pub fn parse(text: &str) -> Option<Self> {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (host, guest) = ports.split_once(':')?;
        let udp = match protocol {
            "tcp" => false,
            "udp" => true,
            _ => return None,
        };
        let host = if host.is_empty() { "0" } else { host };
        Some(Self {
            host: host.parse().ok()?,
            guest: guest.parse().ok().filter(|port| *port > 0)?,
            udp,
        })
    }
}

/// Where the guest's writes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scratch {
    /// Guest memory.
    Tmpfs,
    /// A sparse disk of so many bytes.
    Disk {
        /// Its size.
        bytes: u64,
    },
}

/// When a VM counts as ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ready {
    /// This TCP port accepts connections in the guest.
    Tcp(u16),
    /// This command exits with 0.
    Exec(Vec<String>),
    /// This path exists.
    Path(String),
}

/// A file of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its text.
    pub content: String,
    /// Permission bits, as `"0644"` or `0o644`.
    #[serde(default = "default_mode", with = "mode")]
    pub mode: u16,
    /// Owner.
    #[serde(default)]
    pub uid: u32,
    /// Group.
    #[serde(default)]
    pub gid: u32,
}

fn default_mode() -> u16 {
    0o644
}

/// Why a manifest was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}{}", help.as_ref().map(|help| format!("\n  help: {help}")).unwrap_or_default())]
pub struct ManifestError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
}

impl Manifest {
    /// Reads a manifest.
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let manifest: Self = toml::from_str(text).map_err(|error| located(text, &error))?;
        let refused = |key: &str, message: String, help: Option<String>| {
            let (line, column) = position(text, key_offset(text, key));
            ManifestError {
                line,
                column,
                message,
                help,
            }
        };
        let runs = !manifest.entrypoint.is_empty() || !manifest.command.is_empty();
        if runs && manifest.init.is_some() {
            let message = "`entrypoint` or `command` and `init` exclude each other".to_owned();
            let help =
                "keep `entrypoint` to run one command, or `init` to boot the image's own init";
            return Err(refused("init", message, Some(help.to_owned())));
        }
        let has_secrets = !(manifest.env.is_empty() && manifest.files.is_empty());
        let shared = manifest.snapshot.secrets == Some(Secrets::Shared);
        if manifest.snapshot.at == Some(Tier::Ready) && has_secrets && !shared {
            let message =
                "a snapshot at \"ready\" holds `env` and `files` as its VM's program has \
                           read them, and each clone has the same"
                    .to_owned();
            let help = "add `secrets = \"shared\"` to [snapshot] if none of them is a secret of one \
                        VM, or stay with `at = \"composed\"`";
            return Err(refused("at", message, Some(help.to_owned())));
        }
        manifest.check_names().map_err(|(key, error)| {
            let help = (key == "base")
                .then(|| "the base names the profile here: give a `name` or a `profile`".into());
            refused(key, error.to_string(), help)
        })?;
        Ok(manifest)
    }

    /// Checks the names that it gives; an error names the key.
    fn check_names(&self) -> Result<(), (&'static str, NameError)> {
        let given = [
            ("name", NameOf::Vm, &self.name),
            ("profile", NameOf::Profile, &self.profile),
            ("owner", NameOf::Owner, &self.owner),
            ("hostname", NameOf::Host, &self.hostname),
        ];
        for (key, of, name) in given {
            if let Some(name) = name {
                of.check(name).map_err(|error| (key, error))?;
            }
        }
        let profile = NameOf::Profile.check(self.profile_name());
        profile.map_err(|error| ("base", error))
    }

    /// The profile under which launches are remembered.
    pub fn profile_name(&self) -> &str {
        self.profile
            .as_deref()
            .or(self.name.as_deref())
            .unwrap_or(&self.base.name)
    }

    /// Digest of what the manifest says (comments and layout do not count).
    pub fn digest(&self) -> Digest {
        Digest::of(&serde_json::to_vec(self).expect("a manifest always serialises"))
    }

    /// Digest of what the machine shows of it: without names, ports of the host and wishes that
    /// the lock has settled.
    pub fn machine_digest(&self) -> Digest {
        let mut machine = self.clone();
        for name in [
            &mut machine.name,
            &mut machine.profile,
            &mut machine.owner,
            &mut machine.hostname,
        ] {
            *name = None;
        }
        machine.base = NameRange::default();
        machine.kernel = None;
        machine.components = Vec::new();
        machine.snapshot = SnapshotSettings::default();
        for forward in &mut machine.vm.forward {
            forward.host = 0;
        }
        machine.digest()
    }

    /// The manifest as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a manifest always serialises")
    }
}

/// Where the top-level `key` is set; the start if it is not found.
fn key_offset(text: &str, key: &str) -> usize {
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        let word = line.trim_start();
        let set = word.strip_prefix(key).map(str::trim_start);
        if set.is_some_and(|rest| rest.starts_with('=')) {
            return offset + line.len() - word.len();
        }
        offset += line.len();
    }
    0
}

/// Line and column, both from 1, of a byte offset.
pub(crate) fn position(text: &str, offset: usize) -> (usize, usize) {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (
        before.matches('\n').count() + 1,
        before[line_start..].chars().count() + 1,
    )
}

fn located(text: &str, error: &toml::de::Error) -> ManifestError {
    let offset = error.span().map_or(0, |span| span.start);
    let (line, column) = position(text, offset);
    let message = error.message().trim().replace('\n', "; ");
    let help = help(&message);
    ManifestError {
        line,
        column,
        message,
        help,
    }
}

/// Derives a hint from serde's wording of unknown and missing fields.
fn help(message: &str) -> Option<String> {
    if let Some(rest) = message.strip_prefix("unknown field `") {
        let (unknown, known) = rest.split_once('`')?;
        let known = known.split('`').skip(1).step_by(2);
        let nearest = nearest(unknown, known)?;
        return Some(format!("did you mean `{nearest}`?"));
    }
    if message.starts_with("missing field `base`") {
        return Some("add a line such as `base = \"debian@>= 12\"` at the top".into());
    }
    if message.starts_with("missing field `content`") {
        return Some("give the file's text: `content = \"...\"`".into());
    }
    None
}

/// The candidate with the smallest edit distance to `word`, if it is near enough to be a typo.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::osa_distance(word, candidate), candidate))
        .filter(|(distance, candidate)| {
            let longest = word.chars().count().max(candidate.chars().count());
            *distance <= 1 + longest / 4
        })
        .min()
        .map(|(_, candidate)| candidate)
}

/// Reads `2G`, `512M`, `64K` or a plain number of bytes.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let error = || format!("{text:?} is not a size: write for example \"2G\" or \"512M\"");
    let trimmed = text.trim();
    let digits = trimmed.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match trimmed[digits.len()..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(error()),
    };
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

fn custom<E: serde::de::Error>(message: impl std::fmt::Display) -> E {
    E::custom(message)
}

fn init<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(
        untagged,
        expecting = "`init` is `true`, \"systemd\" or the absolute path of an init"
    )]
    enum Init {
        Flag(bool),
        Name(String),
    }
    match Init::deserialize(deserializer)? {
        Init::Flag(false) => Ok(None),
        Init::Flag(true) => Ok(Some("/sbin/init".into())),
        Init::Name(name) if name == "systemd" => Ok(Some("/lib/systemd/systemd".into())),
        Init::Name(path) if path.starts_with('/') => Ok(Some(path)),
        Init::Name(other) => Err(custom(format!(
            "`init` is `true`, \"systemd\" or the absolute path of an init, not {other:?}"
        ))),
    }
}

fn directory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let path = String::deserialize(deserializer)?;
    match path == "/" || is_plain_path(&path) {
        true => Ok(Some(path)),
        false => Err(custom(format!(
            "{path:?} is not a directory's absolute path without `.`, `..` and empty parts"
        ))),
    }
}

fn memory<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    match u64::deserialize(deserializer)? {
        mib @ 32..=16_777_216 => Ok(mib),
        other => Err(custom(format!(
            "memory_mib is {other}; give 32 to 16777216"
        ))),
    }
}

fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    match u32::deserialize(deserializer)? {
        count @ 1..=1024 => Ok(count),
        other => Err(custom(format!("cpus is {other}; give 1 to 1024"))),
    }
}

fn files<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<String, FileEntry>, D::Error> {
    let files = BTreeMap::<String, FileEntry>::deserialize(deserializer)?;
    if let Some(path) = files.keys().find(|path| path.len() > PATH_LIMIT_BYTES) {
        let start: String = path.chars().take(60).collect();
        return Err(custom(format!(
            "the path {start:?}… has {} bytes, of at most {PATH_LIMIT_BYTES}",
            path.len()
        )));
    }
    match files.keys().find(|path| !is_plain_path(path)) {
        Some(path) => Err(custom(format!(
            "{path:?} is not a file's absolute path without `.`, `..` and empty parts"
        ))),
        None => Ok(files),
    }
}

mod wanted {
    use super::*;

    pub fn serialize<S: Serializer>(value: &NameRange, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&version::display_wanted(value))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NameRange, D::Error> {
        Wanted::deserialize(deserializer).map(|wanted| wanted.0)
    }

    /// One entry, deserialised on its own so that errors point at it.
    pub struct Wanted(pub NameRange);

    impl<'de> Deserialize<'de> for Wanted {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let text = String::deserialize(deserializer)?;
            version::parse_wanted(&text).map(Self).map_err(custom)
        }
    }
}

mod wanted_option {
    use super::*;

    pub fn serialize<S: Serializer>(
        value: &Option<NameRange>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => wanted::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<NameRange>, D::Error> {
        wanted::deserialize(deserializer).map(Some)
    }
}

mod wanted_list {
    use super::*;

    pub fn serialize<S: Serializer>(
        values: &[NameRange],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(version::display_wanted))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<NameRange>, D::Error> {
        let list = Vec::<wanted::Wanted>::deserialize(deserializer)?;
        Ok(list.into_iter().map(|wanted| wanted.0).collect())
    }
}

mod snapshot_at {
    use super::*;

    const OFF: &str = "off";

    pub fn serialize<S: Serializer>(at: &Option<Tier>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(at.map_or(OFF, Tier::name))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Tier>, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == OFF {
            return Ok(None);
        }
        Tier::named(&text).map(Some).ok_or_else(|| {
            custom(format!(
                "`at` is \"kernel\", \"composed\", \"ready\" or \"off\", not {text:?}"
            ))
        })
    }
}

mod forwards {
    use super::*;

    pub fn serialize<S: Serializer>(values: &[Forward], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|forward| {
            let protocol = if forward.udp { "/udp" } else { "" };
            format!("{}:{}{protocol}", forward.host, forward.guest)
        }))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Forward>, D::Error> {
        let list = Vec::<Entry>::deserialize(deserializer)?;
        Ok(list.into_iter().map(|entry| entry.0).collect())
    }

    struct Entry(Forward);

    impl<'de> Deserialize<'de> for Entry {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let text = String::deserialize(deserializer)?;
            Forward::parse(&text).map(Self).ok_or_else(|| {
                custom(format!(
                    "{text:?} is not a port forward: write \"8080:80\" (host:guest), or \":80\" for any \
                     free port of the host"
                ))
            })
        }
    }
}

mod scratch {
    use super::*;

    pub fn serialize<S: Serializer>(value: &Scratch, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Scratch::Tmpfs => serializer.serialize_str("tmpfs"),
            Scratch::Disk { bytes } => serializer.serialize_str(&bytes.to_string()),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Scratch, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "tmpfs" {
            return Ok(Scratch::Tmpfs);
        }
        match parse_bytes(&text) {
            Ok(bytes) if bytes >= 1 << 20 => Ok(Scratch::Disk { bytes }),
            Ok(_) => Err(custom("a scratch disk has at least 1M")),
            Err(_) => Err(custom(format!(
                "`scratch` is \"tmpfs\" or a size such as \"2G\", not {text:?}"
            ))),
        }
    }
}

mod mode {
    use super::*;

    pub fn serialize<S: Serializer>(value: &u16, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{value:04o}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "`mode` is octal: \"0644\" or 0o644")]
        enum Mode {
            Number(u16),
            Text(String),
        }
        let mode = match Mode::deserialize(deserializer)? {
            Mode::Number(mode) => Some(mode),
            Mode::Text(text) => u16::from_str_radix(text.trim_start_matches("0o"), 8).ok(),
        };
        mode.filter(|mode| *mode <= 0o7777)
            .ok_or_else(|| custom("`mode` is octal, at most 7777: \"0644\" or 0o644"))
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
