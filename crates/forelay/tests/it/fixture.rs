//! A host of the test's own: daemon, configuration and runtime directory in a temporary
//! directory, driven through the real command line.
//!
//! Owns the repository that all tests share (built once, by the real command, kept in
//! `$FORELAY_TEST_CACHE`) and cleaning up: whatever a test leaves, dropping its [`Host`]
//! ends the daemon and the VMs by their ids and unmounts below its directory.
//!
//! Invariant: nobody writes to the shared repository after it is built; a test that
//! wants a broken one has a copy ([`RepositoryOf::Test`]).

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The command under test.
pub const FORELAY: &str = env!("CARGO_BIN_EXE_forelay");
/// How long anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// The shared repository, and the right to run VMs: only one test has it at a time.
pub struct Bench {
    repository: PathBuf,
    guest: PathBuf,
    _turn: File,
}

/// What privileged tests stand on, or `None` after a loud line.
pub fn bench(test: &str) -> Option<Bench> {
    match prepare() {
        Ok(bench) => Some(bench),
        Err(why) => {
            println!("SKIPPED {test}: {why}");
            None
        }
    }
}

fn prepare() -> Result<Bench, String> {
    use std::os::unix::fs::MetadataExt as _;
    let root = std::fs::metadata("/proc/self").map_err(|error| error.to_string())?;
    if root.uid() != 0 {
        return Err("needs root".to_owned());
    }
    if !Path::new("/dev/fuse").exists() {
        return Err("needs /dev/fuse".to_owned());
    }
    for program in ["qemu-system-x86_64", "mmdebstrap", "dpkg-deb"] {
        let found = Command::new(program).arg("--version").output();
        if !found.is_ok_and(|output| output.status.success()) {
            return Err(format!("needs {program}"));
        }
    }
    let guest = std::env::var_os("FORELAY_GUEST").map(PathBuf::from);
    let guest = guest.ok_or("FORELAY_GUEST does not name the guest init")?;
    if !guest.is_file() {
        return Err(format!("FORELAY_GUEST: no file {}", guest.display()));
    }
    let cache = match std::env::var_os("FORELAY_TEST_CACHE") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-cache"),
    };
    let cache = cache.join("forelay");
    std::fs::create_dir_all(&cache).map_err(|error| error.to_string())?;
    let turn = File::create(cache.join("lock")).map_err(|error| error.to_string())?;
    turn.lock().map_err(|error| error.to_string())?;
    let bench = Bench {
        repository: cache.join("repository"),
        guest,
        _turn: turn,
    };
    bench.build(&cache);
    Ok(bench)
}

/// A small Debian package: control fields after `Package`, a program and what it says.
struct Deb {
    name: &'static str,
    fields: &'static str,
    program: Option<(&'static str, &'static str)>,
}

/// Components made of packages of our own: two that can be attached, and four that cannot.
const DEBS: [Deb; 6] = [
    Deb {
        name: "forelay-tool",
        fields: "Version: 1.0",
        program: Some(("forelay-tool", "hello from the tool")),
    },
    Deb {
        name: "forelay-rival",
        fields: "Version: 2.0\nConflicts: forelay-tool",
        program: Some(("forelay-rival", "hello from the rival")),
    },
    Deb {
        name: "forelay-needy",
        fields: "Version: 3.0\nDepends: forelay-absent (>= 4)",
        program: None,
    },
    Deb {
        name: "forelay-part",
        fields: "Version: 1.0",
        program: Some(("forelay-part", "hello from the part")),
    },
    // Needs the part, and has a file that differs from the base's.
    Deb {
        name: "forelay-clash",
        fields: "Version: 1.0\nDepends: forelay-part",
        program: Some(("bash", "no shell at all")),
    },
    Deb {
        name: "forelay-foreign",
        fields: "Version: 1.0\nArchitecture: s390x",
        program: Some(("forelay-foreign", "hello from elsewhere")),
    },
];

impl Bench {
    /// Builds the components that the repository lacks.
    fn build(&self, cache: &Path) {
        let host = Host::new(self, &Settings::default());
        let list = || -> Vec<String> {
            if !self.repository.exists() {
                return Vec::new();
            }
            let all = host.json(["component", "list"]);
            let all = all.as_array().unwrap().iter();
            all.map(|one| one["name"].as_str().unwrap().to_owned())
                .collect()
        };
        let build = |arguments: &[&str]| {
            eprintln!(
                "building a component for the tests: {}",
                arguments.join(" ")
            );
            host.ok(["component", "build"].iter().chain(arguments));
        };
        let present = list();
        let lacks = |name: &str| !present.iter().any(|one| one == name);
        if lacks("debian") {
            build(&["--base", "debian"]);
        }
        if lacks("debian-systemd") {
            build(&["--base", "debian", "--systemd", "--name", "debian-systemd"]);
        }
        for package in ["nginx", "kmod"].into_iter().filter(|name| lacks(name)) {
            build(&["--deb", package]);
        }
        // The kernel component holds the guest init, which may have changed.
        let stamp = cache.join("guest-init");
        let init = std::fs::read(&self.guest).unwrap();
        let lacks_kernel = lacks("linux-cloud") || lacks("linux-cloud-modules");
        if lacks_kernel || std::fs::read(&stamp).ok().as_ref() != Some(&init) {
            if !lacks("linux-cloud") {
                host.ok(["component", "remove", "linux-cloud"]);
            }
            build(&["--kernel"]);
            std::fs::write(&stamp, &init).unwrap();
        }
        for deb in DEBS {
            if lacks(deb.name) {
                let file = package(host.dir(), &deb);
                build(&["--deb-file", file.to_str().unwrap()]);
            }
        }
    }

    /// A copy of the repository.
    fn private_repository(&self, to: &Path) -> PathBuf {
        let copy = to.join("repository");
        let mut command = Command::new("cp");
        command.arg("-al").arg(&self.repository).arg(&copy);
        if !command.output().unwrap().status.success() {
            // On another file system: the directories are there by now.
            let _ = std::fs::remove_dir_all(&copy);
            command = Command::new("cp");
            command.arg("-a").arg(&self.repository).arg(&copy);
            assert!(
                command.status().unwrap().success(),
                "copy of the repository"
            );
        }
        copy
    }
}

fn package(dir: &Path, deb: &Deb) -> PathBuf {
    let root = dir.join(deb.name);
    std::fs::create_dir_all(root.join("DEBIAN")).unwrap();
    let architecture = match deb.fields.contains("Architecture:") {
        true => "",
        false => "\nArchitecture: amd64",
    };
    let control = format!(
        "Package: {}\n{}{architecture}\nMaintainer: Tests <tests@example.org>\n\
         Description: a package of the tests\n",
        deb.name, deb.fields
    );
    std::fs::write(root.join("DEBIAN/control"), control).unwrap();
    if let Some((program, words)) = deb.program {
        let data = format!("usr/share/{}", deb.name);
        std::fs::create_dir_all(root.join("usr/bin")).unwrap();
        std::fs::create_dir_all(root.join(&data)).unwrap();
        std::fs::write(root.join(&data).join("words"), format!("{words}\n")).unwrap();
        let path = root.join("usr/bin").join(program);
        std::fs::write(&path, format!("#!/bin/sh\ncat /{data}/words\n")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&path, mode).unwrap();
    }
    let file = dir.join(format!("{}.deb", deb.name));
    let mut command = Command::new("dpkg-deb");
    command.args(["--root-owner-group", "--build"]);
    command.arg(&root).arg(&file);
    assert!(command.output().unwrap().status.success(), "dpkg-deb");
    file
}

/// Whose repository a host has.
#[derive(Clone, Debug, Default)]
pub enum RepositoryOf {
    /// The one that all tests share.
    #[default]
    All,
    /// A copy that the test may break: [`Host::repository`]. Files are hard links: remove and
    /// replace them, never write into them.
    Test,
    /// What is there, if anything.
    Path(PathBuf),
    /// At this address, with mirrors.
    Url { url: String, mirrors: Vec<String> },
}

/// What a host is configured with.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Its repository.
    pub repository: RepositoryOf,
    /// Another place for durable state.
    pub state: Option<PathBuf>,
    /// Stands in for a remote repository.
    pub latency_ms: u64,
    /// Memory budget; 0 for adaptive.
    pub budget_bytes: u64,
    /// Loads ahead of need.
    pub ahead: bool,
    /// Pmem devices that a VM may have at its launch; the daemon's own limit if absent.
    pub pmem_slots: Option<usize>,
    /// What the forecaster's clock shows when the host is made, in milliseconds since the epoch.
    pub clock_starts_ms: Option<i64>,
    /// A shell script that is the VMM; it finds the real one as `$QEMU` and the host's
    /// directory as `$DIR`.
    pub vmm: Option<&'static str>,
    /// Longest time for an answer of the repository, in seconds.
    pub timeout_s: Option<f64>,
    /// Makes snapshots in the background of what is launched again.
    pub makes_snapshots: bool,
    /// The API is also served over TCP, on any free port.
    pub over_tcp: bool,
    /// Every launch fails at starting its VMM, after all that comes before.
    pub no_vmm: bool,
}

/// What a command did.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A daemon, its configuration and its command line.
pub struct Host {
    dir: tempfile::TempDir,
    repository: PathBuf,
    guest: PathBuf,
    daemon: Option<Child>,
}

impl Host {
    /// Writes the configuration; starts nothing.
    pub fn new(bench: &Bench, settings: &Settings) -> Self {
        // Sockets need short paths.
        let dir = tempfile::Builder::new().prefix("fl-").tempdir_in("/tmp");
        let dir = dir.unwrap();
        let repository = match &settings.repository {
            RepositoryOf::All => bench.repository.clone(),
            RepositoryOf::Test => bench.private_repository(dir.path()),
            RepositoryOf::Path(path) => path.clone(),
            RepositoryOf::Url { .. } => PathBuf::new(),
        };
        let place = match &settings.repository {
            RepositoryOf::Url { url, mirrors } => format!("url = {url:?}\nmirrors = {mirrors:?}"),
            _ => format!("path = {repository:?}"),
        };
        let state = settings.state.clone();
        let slots = settings
            .pmem_slots
            .map(|slots| format!("pmem_slots = {slots}\n"));
        let clock = settings.clock_starts_ms.map(|starts_ms| {
            let now_ms = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis();
            format!("time_origin_ms = {now_ms}\ntime_starts_ms = {starts_ms}\n")
        });
        let vmm = match settings.vmm {
            Some(script) => {
                let path = dir.path().join("vmm");
                let text = format!(
                    "#!/bin/sh\nDIR={:?}\nQEMU=qemu-system-x86_64\n{script}\n",
                    dir.path()
                );
                std::fs::write(&path, text).unwrap();
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
                std::fs::set_permissions(&path, mode).unwrap();
                // It is to reach the host's directory.
                format!("qemu = {path:?}\nconfine = false\n")
            }
            None if settings.no_vmm => "qemu = \"/bin/false\"\n".to_owned(),
            None => String::new(),
        };
        let timeout = settings.timeout_s;
        let timeout = timeout.map(|seconds| format!("timeout_s = {seconds}\n"));
        let text = format!(
            "state_dir = {:?}\nruntime_dir = {:?}\n\n[repository]\n{}\nlatency_ms = {}\n{}\n\
             [memory]\nbudget_bytes = {}\n\n[forecast]\nahead = {}\nwindow_s = 1.0\n{}\n\
             [snapshots]\nmake = {}\ncpu_stall = 100.0\n\n{}[vmm]\n{}{vmm}",
            state.unwrap_or_else(|| dir.path().join("state")),
            dir.path().join("run"),
            place,
            settings.latency_ms,
            timeout.unwrap_or_default(),
            settings.budget_bytes,
            settings.ahead,
            clock.unwrap_or_default(),
            settings.makes_snapshots,
            match settings.over_tcp {
                true => "[api]\nlisten = \"127.0.0.1:0\"\n\n",
                false => "",
            },
            slots.unwrap_or_default(),
        );
        std::fs::write(dir.path().join("forelay.toml"), text).unwrap();
        Self {
            dir,
            repository,
            guest: bench.guest.clone(),
            daemon: None,
        }
    }

    /// A host with its daemon running.
    pub fn started(bench: &Bench, settings: &Settings) -> Self {
        let mut host = Self::new(bench, settings);
        host.start();
        host
    }

    /// Has the forecaster's clock show again what it showed when the host was made, however long
    /// it has taken since; before a start.
    pub fn restart_clock(&self) {
        let path = self.dir().join("forelay.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let now_ms = std::time::UNIX_EPOCH.elapsed().unwrap().as_millis();
        let lines = text.lines().map(|line| match line {
            origin if origin.starts_with("time_origin_ms") => {
                format!("time_origin_ms = {now_ms}\n")
            }
            line => format!("{line}\n"),
        });
        std::fs::write(path, lines.collect::<String>()).unwrap();
    }

    /// Where the test may write; the daemon's runtime directory is `run` in it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Its repository's directory.
    pub fn repository(&self) -> PathBuf {
        self.repository.clone()
    }

    /// What the API answers to a GET, if anybody does.
    pub fn get(&self, path: &str) -> Option<Value> {
        let mut socket = UnixStream::connect(self.dir().join("run/forelay.sock")).ok()?;
        socket.set_read_timeout(Some(PATIENCE)).ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: forelay\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        serde_json::from_str(body).ok()
    }

    /// Writes a file of the test, such as a manifest.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// The command with this host's configuration.
    pub fn command<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(FORELAY);
        command.arg("--config").arg(self.dir().join("forelay.toml"));
        command.args(arguments);
        command.env("FORELAY_GUEST", &self.guest);
        command.env_remove("FORELAY_SOCKET");
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub fn run<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Ran {
        let output = self.command(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran {
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    /// Runs a command that must succeed; what it printed.
    #[track_caller]
    pub fn ok<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> String {
        let ran = self.run(arguments);
        if ran.code != Some(0) {
            panic!(
                "exit code {:?}: {}\nthe daemon said:\n{}",
                ran.code,
                ran.stderr,
                self.log()
            );
        }
        ran.stdout
    }

    /// Runs a command that must be refused in words; what it said.
    #[track_caller]
    pub fn refused<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> String {
        let ran = self.run(arguments);
        assert_eq!(ran.code, Some(1), "{}{}", ran.stdout, ran.stderr);
        let told = ran.stderr.lines().any(|line| line.starts_with("error: "));
        assert!(told && !ran.stderr.contains("panicked"), "{}", ran.stderr);
        ran.stderr
    }

    /// Runs a reading command with `--json`.
    #[track_caller]
    pub fn json<I: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Value {
        let mut all: Vec<_> = arguments
            .into_iter()
            .map(|word| word.as_ref().to_owned())
            .collect();
        all.push("--json".into());
        serde_json::from_str(&self.ok(all)).unwrap()
    }

    /// Starts the daemon and waits until it answers.
    pub fn start(&mut self) {
        self.start_with_umask("022");
    }

    /// Starts the daemon under another umask.
    pub fn start_with_umask(&mut self, umask: &str) {
        let mut log = File::options();
        let log = log.create(true).append(true).open(self.dir().join("log"));
        let log = log.unwrap();
        let daemon = self.command(["daemon"]);
        let script = format!("umask {umask}; exec \"$0\" \"$@\"");
        let mut command = Command::new("sh");
        command.arg("-c").arg(script).arg(daemon.get_program());
        command
            .args(daemon.get_args())
            .env("FORELAY_GUEST", &self.guest);
        command.env_remove("FORELAY_SOCKET").stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.daemon = Some(command.spawn().unwrap());
        self.until("the daemon answers", |host| {
            host.run(["ps"]).code == Some(0)
        });
    }

    /// What the daemon logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir().join("log")).unwrap_or_default()
    }

    /// Waits until `done`, or panics with the daemon's log.
    #[track_caller]
    pub fn until(&self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(
                Instant::now() < deadline,
                "waited in vain until {what}; the daemon said:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Process id of the daemon's holder.
    pub fn holder(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// Kills the holder alone.
    pub fn kill_holder(&mut self) {
        let mut child = self.daemon.take().unwrap();
        signal("KILL", child.id());
        child.wait().unwrap();
    }

    /// Process id of the daemon's worker, if one runs.
    pub fn worker(&self) -> Option<u32> {
        let holder = self.holder();
        let children = format!("/proc/{holder}/task/{holder}/children");
        let children = std::fs::read_to_string(children).unwrap_or_default();
        let mut pids = children.split_whitespace().map(|pid| pid.parse().unwrap());
        pids.find(|pid| command_line(*pid).contains("internal-worker"))
    }

    /// SIGTERM; returns the holder's exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        let mut child = self.daemon.take().unwrap();
        signal("TERM", child.id());
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        signal("KILL", child.id());
        child.wait().unwrap();
        panic!("the daemon did not end:\n{}", self.log());
    }

    /// Launches a VM and waits until it is ready; its description.
    #[track_caller]
    pub fn launch(&self, manifest: &Path, name: &str, further: &[&str]) -> Value {
        let mut words = vec!["run", "--detach", "--name", name];
        words.extend(further);
        words.push(manifest.to_str().unwrap());
        self.json(words)
    }

    /// Runs a shell script in a VM; what it printed.
    #[track_caller]
    pub fn sh(&self, vm: &str, script: &str) -> String {
        self.ok(["exec", vm, "--", "sh", "-c", script])
    }

    /// A VM as `ps --all` lists it.
    #[track_caller]
    pub fn vm(&self, name: &str) -> Value {
        let all = self.json(["ps", "--all"]);
        let found = all
            .as_array()
            .unwrap()
            .iter()
            .rfind(|vm| vm["name"] == name);
        found
            .unwrap_or_else(|| panic!("no VM {name} in {all}"))
            .clone()
    }

    /// Mounts below the host's directory.
    pub fn mounts(&self) -> Vec<String> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        let below = points.filter(|point| Path::new(point).starts_with(self.dir()));
        below.map(str::to_owned).collect()
    }

    /// VMMs of this host.
    pub fn vmms(&self) -> Vec<u32> {
        let dir = self.dir().to_str().unwrap().to_owned();
        let pids = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| {
            let words = command_line(*pid);
            // The daemon's own processes have a `--config` below it.
            let vmm = words.contains("qemu-system") || words.contains(&format!("{dir}/vmm"));
            vmm && words.contains(&format!("{dir}/run/"))
        })
        .collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(child) = &mut self.daemon {
            signal("TERM", child.id());
            let deadline = Instant::now() + PATIENCE;
            while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
            if matches!(child.try_wait(), Ok(None)) {
                signal("KILL", child.id());
                let _ = child.wait();
            }
        }
        for pid in self.vmms() {
            signal("KILL", pid);
        }
        for mount in self.mounts().iter().rev() {
            let _ = Command::new("umount").args(["-l", mount]).status();
        }
    }
}

/// A process's command line in one line; empty if it is gone.
fn command_line(pid: u32) -> String {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&words).replace('\0', " ")
}

/// Sends a signal to one process.
pub fn signal(name: &str, pid: u32) {
    let _ = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .stderr(Stdio::null())
        .status();
}

/// True while a process exists that is no zombie.
pub fn lives(pid: u64) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| !status.contains("State:\tZ"))
}

/// A manifest of a VM that idles: profile, further components, further TOML.
pub fn idle(profile: &str, components: &str, further: &str) -> String {
    format!(
        "name = \"{profile}\"\nowner = \"tests\"\nbase = \"debian\"\ncomponents = {components}\n\
         entrypoint = [\"sleep\", \"infinity\"]\n\n[vm]\nmemory_mib = 160\n\n{further}"
    )
}

/// A manifest of nginx on a free host port, and that port.
pub fn web() -> (String, u16) {
    let port = reserved_port();
    let manifest = format!(
        "name = \"web\"\nowner = \"tests\"\nbase = \"debian\"\ncomponents = [\"nginx\"]\n\
         entrypoint = [\"nginx\", \"-g\", \"daemon off;\"]\nready = {{ tcp = 80 }}\n\n\
         [vm]\nmemory_mib = 192\nforward = [\"{port}:80\"]\n\n\
         [files.\"/var/www/html/index.html\"]\ncontent = \"hello from a test\\n\"\n"
    );
    (manifest, port)
}

/// A port of this machine that nobody else is given while this process lives: it is bound, does
/// not listen, and lets programs that ask for the same, as servers do, bind it as well.
pub fn reserved_port() -> u16 {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket, sockopt};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_socket_reuseaddr(&socket, true).unwrap();
    bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    let address = SocketAddr::try_from(getsockname(&socket).unwrap()).unwrap();
    std::mem::forget(socket);
    address.port()
}

/// A page from a guest, with its headers.
pub fn http_get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: guest\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// MD5 (the digest that Debian packages carry) of bytes, in hex.
pub fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_whitespace().next().unwrap().to_owned()
}
