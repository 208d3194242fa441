//! Servers that tests and the project's tasks start: an S3 server (moto), Debian's container
//! registry.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

/// A server on this host, for as long as this lives.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
    dir: tempfile::TempDir,
}

impl Server {
    /// Runs `command` until it says on its standard error, after `before`, where it listens.
    fn start(mut command: Command, dir: tempfile::TempDir, before: &str) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (address, lines) = listening(stderr, before);
        // Nobody reads on: a pipe that fills would stop the server.
        std::thread::spawn(move || lines.lines().for_each(drop));
        Self {
            child,
            address,
            dir,
        }
    }

    /// Debian's registry; `None` where it is not installed.
    pub fn registry() -> Option<Self> {
        if !Path::new("/usr/bin/docker-registry").exists() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  delete:\n    enabled: true\n  \
             filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n",
            dir.path().join("registry").display()
        );
        let path = dir.path().join("registry.yml");
        std::fs::write(&path, config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(path);
        Some(Self::start(command, dir, "listening on "))
    }

    /// An S3 server with a bucket `vms`; `None` where `cargo xtask test` has not installed it.
    pub fn s3() -> Option<Self> {
        let program = cache()?.join("moto/bin/moto_server");
        if !program.exists() {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.args(["-H", "127.0.0.1", "-p", "0"]);
        let server = Self::start(command, dir, "Running on http://");
        let keys = "[default]\naws_access_key_id = forelay\naws_secret_access_key = secret\n";
        std::fs::write(server.credentials(), keys).unwrap();
        let request =
            "PUT /vms HTTP/1.1\r\nHost: s3\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Some(server)
    }

    fn credentials(&self) -> PathBuf {
        self.dir.path().join("credentials")
    }

    /// A repository of the S3 server, asked at `address`.
    pub fn s3_url(&self, address: SocketAddr) -> String {
        let credentials = self.credentials();
        let credentials = credentials.display();
        format!("s3://vms/team/a?endpoint=http://{address}&credentials={credentials}")
    }

    /// A repository of the registry, asked at `address`.
    pub fn oci_url(&self, address: SocketAddr) -> String {
        format!("oci://{address}/team/vms?plain-http=1")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where `cargo xtask test` keeps what takes long to get.
fn cache() -> Option<PathBuf> {
    if let Some(dir) = std::env::var_os("FORELAY_TEST_CACHE") {
        return Some(dir.into());
    }
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = package
        .ancestors()
        .find(|dir| dir.join("Cargo.lock").exists())?;
    Some(root.join("target/test-cache"))
}

fn listening(stderr: ChildStderr, before: &str) -> (SocketAddr, BufReader<ChildStderr>) {
    let mut lines = BufReader::new(stderr);
    let mut said = String::new();
    loop {
        let start = said.len();
        assert_ne!(lines.read_line(&mut said).unwrap(), 0, "it ended: {said}");
        let Some((_, rest)) = said[start..].split_once(before) else {
            continue;
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && !".:".contains(c));
        let address = rest[..end.unwrap_or(rest.len())].parse();
        return (address.unwrap(), lines);
    }
}
