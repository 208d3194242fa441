//! Hot attach: grafting a component's files into the running root.
//!
//! A mounted overlay cannot get another lower layer, and an overlay over `/usr` would have to
//! stay mounted for as long as any process that was started meanwhile lives. So each part of
//! the component that the root does not have yet is bind-mounted to its own path:
//!
//! ```text
//! /run/forelay/attached/<uuid>          the component, EROFS with DAX
//!   usr/bin/tool          --bind-->     /usr/bin/tool        (empty placeholder below)
//!   usr/lib/tool/         --bind-->     /usr/lib/tool/       (one mount for a new directory)
//!   usr/lib/libx.so -> .. --copy-->     /usr/lib/libx.so     (symbolic links are made again)
//!   etc/tool.conf         --copy-->     /etc/tool.conf       (only where the host asks)
//!   srv/, var/            --copy-->     /srv/, /var/         (data: a file of the VM stays)
//! ```
//! Paths stay what they are (`/proc/self/exe`, `$ORIGIN`), any number of components can be
//! attached, open files are not disturbed, and a component is in use exactly if its own files
//! are. Mounts reach services in mount namespaces of their own by shared propagation.
//!
//! Invariants: a file that exists and differs is a conflict and nothing is attached; an
//! attach or detach that fails leaves the root as it was. Copies under /etc, /srv and /var
//! stay after a detach, as configuration and data. What is left out is told.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use forelay_guest_protocol::messages::{Attach, Attached, ErrorKind};
use forelay_guest_protocol::superblock;

use crate::{accounts, devices, root, sys};

const ATTACHED: &str = "/run/forelay/attached";
const DEFAULT_WAIT: Duration = Duration::from_secs(10);
/// How long a component may stay busy without a process that uses it.
const BUSY_GRACE: Duration = Duration::from_secs(2);
/// More would make the mount table slow for everyone.
const MAX_MOUNTS: usize = 4096;
const MAX_COPIES: usize = 16_384;
const MAX_COPY_BYTES: u64 = 64 << 20;
/// Most files that the host is told to be left out, and the longest text for one.
const MAX_LEFT_OUT: usize = 64;
const MAX_LEFT_OUT_BYTES: usize = 512;

/// Top-level directories whose content is grafted; merged-usr links are followed.
const TOPS: [&str; 8] = [
    "bin", "lib", "lib32", "lib64", "libx32", "opt", "sbin", "usr",
];

/// Top-level directories of configuration and data: copied where the VM has nothing.
const DATA_TOPS: [&str; 3] = ["etc", "srv", "var"];

type Refusal = (ErrorKind, String);

fn failed(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Refusal {
    move |error| (ErrorKind::Failed, format!("{what}: {error}"))
}

/// One change to the root.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    BindDirectory(PathBuf),
    BindFile(PathBuf),
    Link(PathBuf, PathBuf),
    CopyDirectory(PathBuf),
    CopyFile(PathBuf, u64),
}

/// One attached component.
#[derive(Debug)]
struct Graft {
    uuid: String,
    name: String,
    mountpoint: PathBuf,
    steps: Vec<Step>,
}

/// All attached components, in order.
#[derive(Debug, Default)]
pub struct Grafts {
    attached: Vec<Graft>,
}

impl Grafts {
    /// UUIDs of the attached components.
    pub fn uuids(&self) -> Vec<String> {
        self.attached
            .iter()
            .map(|graft| graft.uuid.clone())
            .collect()
    }

    /// Attaches a component whose device is there or about to appear.
    pub fn attach(&mut self, request: &Attach) -> Result<Attached, Refusal> {
        let started = Instant::now();
        let uuid = superblock::parse_uuid(&request.uuid).ok_or_else(|| {
            (
                ErrorKind::BadRequest,
                format!("{:?}: a UUID is 32 hex digits", request.uuid),
            )
        })?;
        let text = superblock::format_uuid(&uuid);
        if self.attached.iter().any(|graft| graft.uuid == text) {
            return Err((ErrorKind::Conflict, format!("{text} is already attached")));
        }
        let limit = match request.timeout_ms {
            0 => DEFAULT_WAIT,
            limit => Duration::from_millis(limit),
        };
        let mut pmem = devices::PmemDevices::default();
        let (device, _) = devices::wait_for(limit, || pmem.find(&uuid)).ok_or_else(|| {
            (
                ErrorKind::NotFound,
                format!("no pmem device with UUID {text}"),
            )
        })?;
        let device_wait_ms = started.elapsed().as_millis() as u64;
        let own_before = sys::user_time();
        let mountpoint = Path::new(ATTACHED).join(&text);
        fs::create_dir_all(&mountpoint).map_err(failed(mountpoint.display()))?;
        let dax = root::mount_erofs(&device, &mountpoint, "").map_err(failed("attach"))?;
        let graft = Graft {
            uuid: text,
            name: request.name.clone(),
            mountpoint,
            steps: Vec::new(),
        };
        let (graft, left_out) = graft.apply(Path::new("/"), request.etc)?;
        let count = |want: fn(&Step) -> bool| graft.steps.iter().filter(|step| want(step)).count();
        let mounts = count(Step::is_mount) as u32;
        let copies = count(|step| !step.is_mount()) as u32;
        self.attached.push(graft);
        let graft_ms = started.elapsed().as_millis() as u64 - device_wait_ms;
        Ok(Attached {
            dax,
            mounts,
            copies,
            device_wait_ms,
            graft_ms,
            agent_ms: (sys::user_time() - own_before).as_millis() as u64,
            left_out,
        })
    }

    /// Detaches a component that nobody uses.
    pub fn detach(&mut self, uuid: &str) -> Result<(), Refusal> {
        let index = self
            .attached
            .iter()
            .position(|graft| graft.uuid == uuid)
            .ok_or_else(|| (ErrorKind::NotFound, format!("{uuid} is not attached")))?;
        let graft = &self.attached[index];
        let deadline = Instant::now() + BUSY_GRACE;
        while let Err((kind, text)) = graft.remove(Path::new("/")) {
            // Without a process to name, the last user is just on its way out.
            let leaving = kind == ErrorKind::Busy && graft.users().is_empty();
            if !leaving || Instant::now() >= deadline {
                return Err((kind, text));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        self.attached.remove(index);
        Ok(())
    }
}

impl Step {
    fn is_mount(&self) -> bool {
        matches!(self, Self::BindDirectory(_) | Self::BindFile(_))
    }

    fn path(&self) -> &Path {
        match self {
            Self::BindDirectory(path) | Self::BindFile(path) | Self::CopyDirectory(path) => path,
            Self::Link(path, _) | Self::CopyFile(path, _) => path,
        }
    }

    /// Libraries and data come before the programs that need them.
    fn is_program(&self) -> bool {
        let parent = self.path().parent().and_then(Path::file_name);
        parent.is_some_and(|name| name == "bin" || name == "sbin")
    }

    fn apply(&self, component: &Path, root: &Path) -> io::Result<()> {
        let source = component.join(self.path());
        let target = root.join(self.path());
        match self {
            Self::BindDirectory(_) => {
                fs::create_dir(&target)?;
                bind_or(&source, &target, || fs::remove_dir(&target))
            }
            Self::BindFile(_) => {
                fs::File::options()
                    .write(true)
                    .create_new(true)
                    .open(&target)?;
                bind_or(&source, &target, || fs::remove_file(&target))
            }
            Self::Link(_, destination) => {
                std::os::unix::fs::symlink(destination, &target)?;
                copy_owner(&source, &target)
            }
            Self::CopyDirectory(_) => {
                fs::create_dir(&target)?;
                copy_owner(&source, &target)
            }
            Self::CopyFile(..) => {
                fs::copy(&source, &target)?;
                copy_owner(&source, &target)
            }
        }
    }

    /// Undoes a mount or link; copies stay unless `copies` says otherwise.
    fn undo(&self, root: &Path, copies: bool) -> io::Result<()> {
        let target = root.join(self.path());
        match self {
            Self::BindDirectory(_) => {
                sys::unmount(&target)?;
                // Someone may have written under the placeholder before: then it stays.
                let _ = fs::remove_dir(&target);
            }
            Self::BindFile(_) => {
                sys::unmount(&target)?;
                let _ = fs::remove_file(&target);
            }
            Self::Link(_, destination) => {
                if fs::read_link(&target).is_ok_and(|found| found == *destination) {
                    let _ = fs::remove_file(&target);
                }
            }
            Self::CopyDirectory(_) if copies => drop(fs::remove_dir(&target)),
            Self::CopyFile(..) if copies => drop(fs::remove_file(&target)),
            Self::CopyDirectory(_) | Self::CopyFile(..) => {}
        }
        Ok(())
    }
}

fn bind_or(source: &Path, target: &Path, undo: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let bound = sys::mount(source, target, "", sys::MS_BIND, "");
    if bound.is_err() {
        let _ = undo();
    }
    bound
}

fn copy_owner(source: &Path, target: &Path) -> io::Result<()> {
    let from = fs::symlink_metadata(source)?;
    std::os::unix::fs::lchown(target, Some(from.uid()), Some(from.gid()))?;
    if !from.is_symlink() {
        fs::set_permissions(target, fs::Permissions::from_mode(from.mode() & 0o7777))?;
    }
    Ok(())
}

impl Graft {
    /// Plans and makes all changes, and says what is left out; on failure nothing is left,
    /// the component unmounted.
    fn apply(mut self, root: &Path, etc: bool) -> Result<(Self, Vec<String>), Refusal> {
        let result = plan(&self.mountpoint, root, etc).and_then(|(steps, left_out)| {
            let accounts = accounts::changes(&self.mountpoint, root)
                .map_err(failed("accounts"))?
                .map_err(|error| (ErrorKind::Conflict, error.to_string()))?;
            accounts::write(root, &accounts).map_err(failed("accounts"))?;
            for step in steps {
                let path = step.path().display().to_string();
                step.apply(&self.mountpoint, root)
                    .map_err(failed(format!("/{path}")))?;
                self.steps.push(step);
            }
            Ok(left_out)
        });
        match result {
            Ok(left_out) => Ok((self, left_out)),
            Err(refusal) => {
                for step in self.steps.iter().rev() {
                    let _ = step.undo(root, true);
                }
                let _ = sys::unmount(&self.mountpoint);
                let _ = fs::remove_dir(&self.mountpoint);
                Err(refusal)
            }
        }
    }

    /// Takes all mounts and links away, or none.
    fn remove(&self, root: &Path) -> Result<(), Refusal> {
        let mut undone = Vec::new();
        let mut result = Ok(());
        for step in self.steps.iter().rev() {
            result = step
                .undo(root, false)
                .map_err(|error| (step.path().to_owned(), error));
            if result.is_err() {
                break;
            }
            undone.push(step);
        }
        if result.is_ok() {
            result =
                sys::unmount(&self.mountpoint).map_err(|error| (self.mountpoint.clone(), error));
        }
        let Err((path, error)) = result else {
            let _ = fs::remove_dir(&self.mountpoint);
            return Ok(());
        };
        for step in undone.into_iter().rev().filter(|step| !step.is_copy()) {
            let _ = step.apply(&self.mountpoint, root);
        }
        if error.raw_os_error() != Some(libc::EBUSY) {
            return Err((ErrorKind::Failed, format!("/{}: {error}", path.display())));
        }
        let users = self.users();
        let users = if users.is_empty() {
            "by the kernel".to_owned()
        } else {
            users.join(", ")
        };
        let text = format!("{} is in use ({}): {users}", self.name, path.display());
        Err((ErrorKind::Busy, text))
    }

    /// Processes that have a file of the component open, mapped or as their directory.
    fn users(&self) -> Vec<String> {
        let mut users = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<u32>().ok())
            else {
                continue;
            };
            if users.len() < 8 && process_paths(pid).iter().any(|path| self.owns(path)) {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                users.push(format!("{} (pid {pid})", name.trim()));
            }
        }
        users
    }

    fn owns(&self, path: &Path) -> bool {
        path.starts_with(&self.mountpoint)
            || self
                .steps
                .iter()
                .filter(|step| step.is_mount())
                .any(|step| {
                    path.strip_prefix("/")
                        .is_ok_and(|path| path.starts_with(step.path()))
                })
    }
}

impl Step {
    fn is_copy(&self) -> bool {
        matches!(self, Self::CopyDirectory(_) | Self::CopyFile(..))
    }
}

/// Paths that a process holds: program, directory, open and mapped files.
fn process_paths(pid: u32) -> Vec<PathBuf> {
    let base = PathBuf::from(format!("/proc/{pid}"));
    let links = ["exe", "cwd", "root"].map(|name| base.join(name));
    let open = fs::read_dir(base.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    let mut paths: Vec<PathBuf> = links
        .into_iter()
        .chain(open.map(|entry| entry.path()))
        .filter_map(|link| fs::read_link(link).ok())
        .collect();
    let maps = fs::read_to_string(base.join("maps")).unwrap_or_default();
    let mapped = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])));
    paths.extend(mapped);
    paths
}

/// What to change so that `root` has the component's files, and what is left out.
fn plan(component: &Path, root: &Path, etc: bool) -> Result<(Vec<Step>, Vec<String>), Refusal> {
    let mut plan = GraftPlan {
        component,
        root,
        steps: Vec::new(),
        conflicts: Vec::new(),
        left_out: Vec::new(),
        copy_bytes: 0,
    };
    for top in TOPS {
        plan.visit(Path::new(top), false).map_err(failed(top))?;
    }
    for top in DATA_TOPS {
        if top != "etc" || etc {
            plan.visit(Path::new(top), true).map_err(failed(top))?;
        }
    }
    plan.leave_out_other_tops(etc).map_err(failed("/"))?;
    if !plan.conflicts.is_empty() {
        let total = plan.conflicts.len();
        plan.conflicts.truncate(8);
        let list = plan.conflicts.join(", ");
        let text = format!("{total} of its files differ from files that the VM has: {list}");
        return Err((ErrorKind::Conflict, text));
    }
    let mounts = plan.steps.iter().filter(|step| step.is_mount()).count();
    if mounts > MAX_MOUNTS
        || plan.steps.len() - mounts > MAX_COPIES
        || plan.copy_bytes > MAX_COPY_BYTES
    {
        let text = format!(
            "too much to attach into a running VM: {mounts} mounts (at most {MAX_MOUNTS}), {} \
             copies of {} bytes (at most {MAX_COPIES} and {MAX_COPY_BYTES}); put the component \
             into the manifest instead",
            plan.steps.len() - mounts,
            plan.copy_bytes
        );
        return Err((ErrorKind::Failed, text));
    }
    let (mut steps, programs): (Vec<_>, Vec<_>) =
        plan.steps.into_iter().partition(|step| !step.is_program());
    steps.extend(programs);
    Ok((steps, shortened(plan.left_out)))
}

/// A list of bounded size that says how much is missing of it.
fn shortened(mut list: Vec<String>) -> Vec<String> {
    let more = list.len().saturating_sub(MAX_LEFT_OUT);
    list.truncate(MAX_LEFT_OUT);
    for text in &mut list {
        text.truncate(text.floor_char_boundary(MAX_LEFT_OUT_BYTES));
    }
    if more > 0 {
        list.push(format!("and {more} more"));
    }
    list
}

struct GraftPlan<'a> {
    component: &'a Path,
    root: &'a Path,
    steps: Vec<Step>,
    conflicts: Vec<String>,
    left_out: Vec<String>,
    copy_bytes: u64,
}

impl GraftPlan<'_> {
    fn leave_out(&mut self, path: &Path, why: &str) {
        self.left_out.push(format!("/{}: {why}", path.display()));
    }

    /// Names the top-level directories with files for which a running VM has no place.
    fn leave_out_other_tops(&mut self, etc: bool) -> io::Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.component)? {
            names.push(entry?.file_name());
        }
        names.sort();
        for name in names {
            let known = |top: &str| name == *top && (etc || top != "etc");
            let has_place = TOPS.iter().chain(&DATA_TOPS).any(|&top| known(top));
            if !has_place && has_files(&self.component.join(&name))? {
                self.leave_out(Path::new(&name), "not brought into a running VM");
            }
        }
        Ok(())
    }

    /// Compares one path of the component with the root. With `copy`, files are configuration
    /// or data: copied if missing, left alone if there.
    fn visit(&mut self, path: &Path, copy: bool) -> io::Result<()> {
        let source = self.component.join(path);
        let Ok(found) = fs::symlink_metadata(&source) else {
            return Ok(());
        };
        let target = self.root.join(path);
        let exists = fs::symlink_metadata(&target).is_ok();
        if found.is_dir() {
            let is_directory = fs::metadata(&target).is_ok_and(|target| target.is_dir());
            match (exists, is_directory) {
                (false, _) if copy => {
                    self.steps.push(Step::CopyDirectory(path.to_owned()));
                    self.children(path, copy)
                }
                (false, _) => {
                    self.steps.push(Step::BindDirectory(path.to_owned()));
                    Ok(())
                }
                (true, true) => self.children(path, copy),
                (true, false) => {
                    self.conflicts.push(format!("/{}", path.display()));
                    Ok(())
                }
            }
        } else {
            self.leaf(path, &found, exists, copy)
        }
    }

    fn children(&mut self, path: &Path, copy: bool) -> io::Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.component.join(path))? {
            names.push(entry?.file_name());
        }
        names.sort();
        names
            .into_iter()
            .try_for_each(|name| self.visit(&path.join(name), copy))
    }

    fn leaf(
        &mut self,
        path: &Path,
        found: &fs::Metadata,
        exists: bool,
        copy: bool,
    ) -> io::Result<()> {
        let source = self.component.join(path);
        let target = self.root.join(path);
        let kind = found.file_type();
        if kind.is_symlink() {
            let destination = fs::read_link(&source)?;
            if !exists {
                self.steps.push(Step::Link(path.to_owned(), destination));
            } else if !self.same_link(&target, &destination) {
                if copy {
                    self.leave_out(path, "the VM has another");
                } else {
                    self.conflicts.push(format!("/{}", path.display()));
                }
            }
        } else if kind.is_file() {
            match (exists, copy) {
                (false, true) => {
                    self.copy_bytes += found.len();
                    self.steps
                        .push(Step::CopyFile(path.to_owned(), found.len()));
                }
                (false, false) => self.steps.push(Step::BindFile(path.to_owned())),
                (true, true) => {
                    if !same_file(&source, &target)? {
                        self.leave_out(path, "the VM has another");
                    }
                }
                (true, false) => {
                    if !same_file(&source, &target)? {
                        self.conflicts.push(format!("/{}", path.display()));
                    }
                }
            }
        } else {
            // Whiteouts and devices mean nothing for a running root.
            self.leave_out(path, "no file, directory or link");
        }
        Ok(())
    }

    /// The same destination, or a merged-usr link where the component has a link too.
    fn same_link(&self, target: &Path, destination: &Path) -> bool {
        fs::read_link(target).is_ok_and(|found| found == destination)
    }
}

/// Whether there is anything but directories.
fn has_files(path: &Path) -> io::Result<bool> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return Ok(true);
    }
    for entry in fs::read_dir(path)? {
        if has_files(&entry?.path())? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn same_file(left: &Path, right: &Path) -> io::Result<bool> {
    let (a, b) = (fs::symlink_metadata(left)?, fs::symlink_metadata(right)?);
    if !b.is_file() || a.len() != b.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (fs::File::open(left)?, fs::File::open(right)?);
    let (mut one, mut two) = ([0; 16 << 10], [0; 16 << 10]);
    let mut left_bytes = a.len();
    while left_bytes > 0 {
        let count = left_bytes.min(one.len() as u64) as usize;
        io::Read::read_exact(&mut left, &mut one[..count])?;
        io::Read::read_exact(&mut right, &mut two[..count])?;
        if one[..count] != two[..count] {
            return Ok(false);
        }
        left_bytes -= count as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn new_directories_are_one_step_and_existing_files_must_agree() {
        let (component, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (component, root) = (component.path(), root.path());
        write(root, "usr/bin/sh", "sh");
        write(root, "usr/share/doc/readme", "same");
        write(root, "etc/tool.conf", "edited");
        std::os::unix::fs::symlink("usr/bin", root.join("bin")).unwrap();
        write(component, "usr/bin/tool", "tool");
        write(component, "usr/lib/tool/data/x", "x");
        write(component, "usr/share/doc/readme", "same");
        write(component, "bin/other", "other");
        write(component, "etc/tool.conf", "default");
        write(component, "etc/tool.d/a", "a");
        write(component, "root/ignored", "");
        write(component, "srv/tool/page", "page");
        write(component, "var/lib/tool/state", "state");
        fs::create_dir_all(component.join("run/tool")).unwrap();
        std::os::unix::fs::symlink("tool", component.join("usr/bin/alias")).unwrap();
        let paths = |(steps, _): (Vec<Step>, Vec<String>)| -> Vec<String> {
            steps
                .iter()
                .map(|step| step.path().display().to_string())
                .collect()
        };
        assert_eq!(
            paths(plan(component, root, false).unwrap()),
            [
                "usr/lib",
                "srv",
                "srv/tool",
                "srv/tool/page",
                "var",
                "var/lib",
                "var/lib/tool",
                "var/lib/tool/state",
                "bin/other",
                "usr/bin/alias",
                "usr/bin/tool"
            ]
        );
        let left_out = |etc| plan(component, root, etc).unwrap().1;
        let root_dir = "/root: not brought into a running VM";
        let etc_dir = "/etc: not brought into a running VM";
        assert_eq!(left_out(false), [etc_dir, root_dir]);
        assert_eq!(
            left_out(true),
            ["/etc/tool.conf: the VM has another", root_dir]
        );
        assert_eq!(
            paths(plan(component, root, true).unwrap()),
            [
                "usr/lib",
                "etc/tool.d",
                "etc/tool.d/a",
                "srv",
                "srv/tool",
                "srv/tool/page",
                "var",
                "var/lib",
                "var/lib/tool",
                "var/lib/tool/state",
                "bin/other",
                "usr/bin/alias",
                "usr/bin/tool"
            ]
        );
        write(component, "usr/bin/sh", "xx");
        let (kind, text) = plan(component, root, false).unwrap_err();
        assert_eq!(kind, ErrorKind::Conflict);
        assert!(text.contains("/usr/bin/sh"), "{text}");
    }
}
